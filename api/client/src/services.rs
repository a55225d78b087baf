//! The routes of services.

use std::time::Duration;

use ark_types::service::{
    DrainReplica, ScaleService, Service, ServiceCall, ServiceList, ServiceReply, ServiceSpec,
};
use hyper::Method;

use crate::error::Error;
use crate::files::ByteStream;
use crate::rest::{Client, empty};
use crate::uri;

/// `?<name>=<milliseconds>`, where there are any.
fn in_ms(name: &str, time: Option<Duration>) -> String {
    time.map(|time| format!("?{name}={}", time.as_millis())).unwrap_or_default()
}

impl Client {
    /// `POST /v1/services`: a service of a name that none has.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn create_service(&self, spec: &ServiceSpec) -> Result<Service, Error> {
        self.post("/v1/services", spec).await
    }

    /// `PUT /v1/services/{service}`: it is to be so from now on, whatever it was to be before.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn set_service(&self, spec: &ServiceSpec) -> Result<Service, Error> {
        self.put(&uri::service(spec.name.as_ref(), ""), spec).await
    }

    /// `GET /v1/services`.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn services(&self) -> Result<ServiceList, Error> {
        self.get("/v1/services").await
    }

    /// `GET /v1/services/{service}`.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn service(&self, service: &str) -> Result<Service, Error> {
        self.get(&uri::service(service, "")).await
    }

    /// `PATCH /v1/services/{service}`: it is to have so many replicas.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn scale_service(&self, service: &str, replicas: u32) -> Result<Service, Error> {
        self.patch(&uri::service(service, ""), &ScaleService { replicas }).await
    }

    /// `DELETE /v1/services/{service}`: returns when its last replica is gone; calls under way have `grace` (`arkd`'s default
    /// when absent).
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn delete_service(&self, service: &str, grace: Option<Duration>) -> Result<(), Error> {
        let target = uri::service(service, &in_ms("grace_ms", grace));
        self.send(Method::DELETE, &target, &[], empty()).await?;
        Ok(())
    }

    /// `POST /v1/services/{service}/drain`: returns when the replica is gone; calls under way have `grace` (`arkd`'s default when
    /// absent).
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn drain_replica(
        &self,
        service: &str,
        agent: &str,
        grace: Option<Duration>,
    ) -> Result<Service, Error> {
        let target = uri::service(service, &format!("/drain{}", in_ms("grace_ms", grace)));
        self.post(&target, &DrainReplica { agent: agent.to_owned() }).await
    }

    /// `GET /v1/services/{service}/logs`: what the command of the replica `agent` wrote last.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn service_log(&self, service: &str, agent: &str) -> Result<ByteStream, Error> {
        let target = uri::query(&uri::service(service, "/logs"), &[("replica", Some(agent))]);
        let response = self.send(Method::GET, &target, &[], empty()).await?;
        Ok(ByteStream::new(self.endpoint(), response.into_body()))
    }

    /// `POST /v1/services/{service}/call`: one of its replicas does it. Waits for one that is ready for as long as `wait`
    /// (`arkd`'s default when absent).
    ///
    /// # Errors
    /// See [`Error`]; a program that fails, or code that raises, is none.
    pub async fn call_service(
        &self,
        service: &str,
        call: &ServiceCall,
        wait: Option<Duration>,
    ) -> Result<ServiceReply, Error> {
        self.post(&uri::service(service, &format!("/call{}", in_ms("wait_ms", wait))), call).await
    }
}
