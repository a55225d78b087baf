//! The routes of pools.

use ark_types::pool::{Pool, PoolList, PoolPolicy};
use hyper::Method;

use crate::error::Error;
use crate::rest::{Client, empty};
use crate::uri;

impl Client {
    /// `GET /v1/pools`: those that have a policy or whose template is in use.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn pools(&self) -> Result<PoolList, Error> {
        self.get("/v1/pools").await
    }

    /// `GET /v1/pools/{template}`.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn pool(&self, template: &str) -> Result<Pool, Error> {
        self.get(&uri::pool(template)).await
    }

    /// `PUT /v1/pools/{template}`: how many standbys there are to be from now on.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn set_pool(&self, template: &str, policy: &PoolPolicy) -> Result<Pool, Error> {
        self.put(&uri::pool(template), policy).await
    }

    /// `DELETE /v1/pools/{template}`: as many as of every template in use.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn delete_pool(&self, template: &str) -> Result<(), Error> {
        self.send(Method::DELETE, &uri::pool(template), &[], empty()).await?;
        Ok(())
    }
}
