//! The routes of models.

use ark_types::model::{Model, ModelList};
use hyper::Method;
use tokio::io::AsyncRead;

use crate::error::Error;
use crate::rest::{Client, empty};
use crate::uri;

impl Client {
    /// `GET /v1/models`.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn models(&self) -> Result<ModelList, Error> {
        self.get("/v1/models").await
    }

    /// `GET /v1/models/{model}`.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn model(&self, model: &str) -> Result<Model, Error> {
        self.get(&uri::model(model, "")).await
    }

    /// `PUT /v1/models/{model}`: streams `source`, a GGUF file of `size` bytes, to where models are. It is there once it was checked
    /// as a whole. Without `context` it is served with the tokens that it was trained for, at most 4096.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn add_model(
        &self,
        model: &str,
        context: Option<u64>,
        size: u64,
        source: impl AsyncRead + Send + 'static,
    ) -> Result<Model, Error> {
        let context = context.map(|tokens| tokens.to_string());
        let target = uri::query(&uri::model(model, ""), &[("context", context.as_deref())]);
        let response = self.put_stream(&target, Some(size), source).await?;
        self.parse(response).await
    }

    /// `POST /v1/models/{model}/load`: returns when the service of the model is there.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn load_model(&self, model: &str) -> Result<Model, Error> {
        self.order(&uri::model(model, "/load")).await
    }

    /// `DELETE /v1/models/{model}`: removes it, its service and its template.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn delete_model(&self, model: &str) -> Result<(), Error> {
        self.send(Method::DELETE, &uri::model(model, ""), &[], empty()).await?;
        Ok(())
    }
}
