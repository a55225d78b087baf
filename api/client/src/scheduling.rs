//! The routes of hosts, of requests that wait for room, and of owners.

use ark_types::scheduling::{HostList, OwnerList, OwnerQuota, Quota, RequestQueue};
use hyper::Method;

use crate::error::Error;
use crate::rest::{Client, empty};
use crate::uri;

impl Client {
    /// `GET /v1/queue`: requests that wait for room, the next one first.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn queue(&self) -> Result<RequestQueue, Error> {
        self.get("/v1/queue").await
    }

    /// `GET /v1/hosts`.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn hosts(&self) -> Result<HostList, Error> {
        self.get("/v1/hosts").await
    }

    /// `GET /v1/owners`: those that have a quota, agents or requests.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn owners(&self) -> Result<OwnerList, Error> {
        self.get("/v1/owners").await
    }

    /// `GET /v1/owners/{owner}`.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn owner(&self, owner: &str) -> Result<OwnerQuota, Error> {
        self.get(&uri::owner(owner)).await
    }

    /// `PUT /v1/owners/{owner}`: what it may have from now on.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn set_quota(&self, owner: &str, quota: &Quota) -> Result<OwnerQuota, Error> {
        self.put(&uri::owner(owner), quota).await
    }

    /// `DELETE /v1/owners/{owner}`: it may have everything.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn delete_quota(&self, owner: &str) -> Result<(), Error> {
        self.send(Method::DELETE, &uri::owner(owner), &[], empty()).await?;
        Ok(())
    }
}
