//! The client, and one method per route of health, images, agents, programs and files; the others are in `branches`.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use ark_types::agent::{Agent, AgentList, CreateAgent};
use ark_types::exec::{ExecReply, ExecRequest};
use ark_types::files::{FileList, FileStat};
use ark_types::health::Health;
use ark_types::idempotency::IDEMPOTENCY_KEY;
use ark_types::image::{ImageList, ImageManifest};
use ark_types::label::LabelPatch;
use ark_types::problem::Problem;
use ark_types::shutdown::{AgentsFate, Shutdown};
use ark_types::version::ARK_VERSION;
use bytes::Bytes;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Empty, Full, Limited};
use hyper::body::Incoming;
use hyper::header::{AUTHORIZATION, CONTENT_LENGTH, CONTENT_TYPE, HOST, HeaderName};
use hyper::{Method, Request, Response, Uri};
use hyper_util::client::legacy;
use hyper_util::rt::TokioExecutor;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::AsyncRead;
use tower::util::BoxCloneSyncService;

use crate::connect::{Endpoint, Pooled};
use crate::error::Error;
use crate::events::AgentQuery;
use crate::exec::ExecStream;
use crate::files::{ByteStream, Download, upload_body};
use crate::uri;

/// Most bytes of a JSON answer that is read: two captured outputs in base64, with room.
const MAX_ANSWER: usize = 64 << 20;
/// How long to wait before a request is sent again whose connection broke.
const AGAIN_AFTER: Duration = Duration::from_millis(500);
/// Characters of a foreign answer that an error quotes.
const EXCERPT: usize = 120;

/// Body of any request.
pub(crate) type RequestBody = UnsyncBoxBody<Bytes, std::io::Error>;
type Connector = BoxCloneSyncService<Uri, Pooled, std::io::Error>;

/// A client of one `arkd`. Clones share a pool of connections.
#[derive(Clone, Debug)]
pub struct Client {
    endpoint: Endpoint,
    http: legacy::Client<Connector, RequestBody>,
    /// What the first reply said.
    version: Arc<OnceLock<String>>,
}

impl Client {
    /// A client of the `arkd` at `endpoint`; connects with the first request.
    #[must_use]
    pub fn new(endpoint: Endpoint) -> Self {
        let target = endpoint.clone();
        let connector = BoxCloneSyncService::new(tower::service_fn(move |_: Uri| {
            let target = target.clone();
            async move { target.connect().await.map(Pooled::new) }
        }));
        let http = legacy::Client::builder(TokioExecutor::new()).build(connector);
        Self { endpoint, http, version: Arc::default() }
    }

    /// Address of the `arkd`.
    #[must_use]
    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// The version of `arkd`, once it replied to anything; older ones do not say.
    #[must_use]
    pub fn server_version(&self) -> Option<&str> {
        self.version.get().map(String::as_str)
    }

    /// `GET /v1/health`.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn health(&self) -> Result<Health, Error> {
        self.get("/v1/health").await
    }

    /// `POST /v1/shutdown`: begins the end of `arkd`, and says what becomes of its agents.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn shut_down(&self, agents: AgentsFate) -> Result<(), Error> {
        self.send_json(Method::POST, "/v1/shutdown", &Shutdown { agents }, &[]).await.map(drop)
    }

    /// `GET /v1/openapi.json`.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn openapi(&self) -> Result<serde_json::Value, Error> {
        self.get("/v1/openapi.json").await
    }

    /// `GET /v1/images`.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn images(&self) -> Result<ImageList, Error> {
        self.get("/v1/images").await
    }

    /// `GET /v1/images/{image}`.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn image(&self, image: &str) -> Result<ImageManifest, Error> {
        self.get(&uri::image(image)).await
    }

    /// `POST /v1/agents`: returns when the agent takes commands, or with the reason why it will not.
    ///
    /// One that goes with its first program is of use to this client alone: whoever waits no longer takes the request back.
    /// Any other is made once, even if the connection breaks.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn create(&self, agent: &CreateAgent) -> Result<Agent, Error> {
        if agent.auto_remove {
            return self.post("/v1/agents", agent).await;
        }
        self.make("/v1/agents", agent).await
    }

    /// `PATCH /v1/agents/{agent}`: sets and removes labels.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn label(&self, agent: &str, patch: &LabelPatch) -> Result<Agent, Error> {
        let response = self.send_json(Method::PATCH, &uri::agent(agent, ""), patch, &[]).await?;
        self.parse(response).await
    }

    /// `GET /v1/agents`: the living, and ended ones that are still known.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn agents(&self) -> Result<AgentList, Error> {
        self.agents_where(&AgentQuery::default()).await
    }

    /// `GET /v1/agents/{agent}` by name or id.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn agent(&self, agent: &str) -> Result<Agent, Error> {
        self.get(&uri::agent(agent, "")).await
    }

    /// `DELETE /v1/agents/{agent}`: stops it, with `grace` for its shutdown (`arkd`'s default when absent), and removes
    /// everything it had.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn delete(&self, agent: &str, grace: Option<Duration>) -> Result<(), Error> {
        let query = grace.map(|g| format!("?grace_ms={}", g.as_millis())).unwrap_or_default();
        self.send(Method::DELETE, &uri::agent(agent, &query), &[], empty()).await?;
        Ok(())
    }

    /// `POST /v1/agents/{agent}/exec`: runs a program to its end; output is captured up to
    /// [`ark_types::exec::MAX_CAPTURE`].
    ///
    /// # Errors
    /// See [`Error`]; a program that fails is not an error.
    pub async fn exec(&self, agent: &str, request: &ExecRequest) -> Result<ExecReply, Error> {
        self.post(&uri::agent(agent, "/exec"), request).await
    }

    /// `GET /v1/agents/{agent}/exec/stream`: runs a program with its streams connected.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn exec_stream(&self, agent: &str, request: &ExecRequest) -> Result<ExecStream, Error> {
        ExecStream::open(&self.endpoint, &uri::agent(agent, "/exec/stream"), request).await
    }

    /// `GET /v1/host/exec/stream`: runs a program on the emulated host itself.
    ///
    /// # Errors
    /// See [`Error`]; an `arkd` outside the emulated host has no such route.
    pub async fn host_exec_stream(&self, request: &ExecRequest) -> Result<ExecStream, Error> {
        ExecStream::open(&self.endpoint, "/v1/host/exec/stream", request).await
    }

    /// `GET /v1/agents/{agent}/files`: streams a file out of the agent.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn read_file(&self, agent: &str, path: &str) -> Result<Download, Error> {
        let response = self.send(Method::GET, &uri::files(agent, "", path), &[], empty()).await?;
        Download::new(&self.endpoint, response)
    }

    /// `PUT /v1/agents/{agent}/files`: streams `source` into a file of the agent with permission bits `mode`. The file
    /// appears under its name only when all of it has arrived. `size`, when known, lets a source that ends early be
    /// noticed.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn write_file(
        &self,
        agent: &str,
        path: &str,
        mode: u32,
        size: Option<u64>,
        source: impl AsyncRead + Send + 'static,
    ) -> Result<(), Error> {
        let target = format!("{}&mode={mode:o}", uri::files(agent, "", path));
        self.put_stream(&target, size, source).await.map(|_| ())
    }

    /// Puts what `source` gives, `size` bytes where that is known.
    pub(crate) async fn put_stream(
        &self,
        target: &str,
        size: Option<u64>,
        source: impl AsyncRead + Send + 'static,
    ) -> Result<Response<Incoming>, Error> {
        let length = size.map(|n| n.to_string());
        let headers: Vec<_> = length.iter().map(|n| (CONTENT_LENGTH, n.as_str())).collect();
        let (body, read_error) = upload_body(source);
        let sent = self.send(Method::PUT, target, &headers, body).await;
        if let Some(error) = read_error.take() {
            return Err(Error::Source(error));
        }
        sent
    }

    /// `GET /v1/agents/{agent}/files/stat`.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn stat(&self, agent: &str, path: &str) -> Result<FileStat, Error> {
        self.get(&uri::files(agent, "/stat", path)).await
    }

    /// `GET /v1/agents/{agent}/files/list`.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn list(&self, agent: &str, path: &str) -> Result<FileList, Error> {
        self.get(&uri::files(agent, "/list", path)).await
    }

    /// `GET /v1/agents/{agent}/logs`: what there is of the serial console, its last `tail` lines or all of it. It is followed by
    /// [`Client::follow_logs`].
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn logs(&self, agent: &str, tail: Option<u64>) -> Result<ByteStream, Error> {
        let tail = tail.map(|n| format!("?tail={n}")).unwrap_or_default();
        let target = uri::agent(agent, &format!("/logs{tail}"));
        let response = self.send(Method::GET, &target, &[], empty()).await?;
        Ok(ByteStream::new(&self.endpoint, response.into_body()))
    }

    /// Asks for a value.
    pub(crate) async fn get<T: DeserializeOwned>(&self, target: &str) -> Result<T, Error> {
        let response = self.send(Method::GET, target, &[], empty()).await?;
        self.parse(response).await
    }

    /// Sends a value that something is made of, once: with a key, so that it can be sent again when the connection breaks.
    pub(crate) async fn make<T: DeserializeOwned>(
        &self,
        target: &str,
        body: &impl Serialize,
    ) -> Result<T, Error> {
        let key = format!("{:032x}", rand::random::<u128>());
        let headers = [(HeaderName::from_static(IDEMPOTENCY_KEY), key.as_str())];
        let send = async || self.parse(self.send_json(Method::POST, target, body, &headers).await?).await;
        match send().await {
            Err(Error::Broken { .. }) => {
                tokio::time::sleep(AGAIN_AFTER).await;
                send().await
            }
            other => other,
        }
    }

    /// Sends a value, for another.
    pub(crate) async fn post<T: DeserializeOwned>(
        &self,
        target: &str,
        body: &impl Serialize,
    ) -> Result<T, Error> {
        let response = self.send_json(Method::POST, target, body, &[]).await?;
        self.parse(response).await
    }

    /// Puts a value in the place of another.
    pub(crate) async fn put<T: DeserializeOwned>(
        &self,
        target: &str,
        body: &impl Serialize,
    ) -> Result<T, Error> {
        let response = self.send_json(Method::PUT, target, body, &[]).await?;
        self.parse(response).await
    }

    /// Changes a part of what is there.
    pub(crate) async fn patch<T: DeserializeOwned>(
        &self,
        target: &str,
        body: &impl Serialize,
    ) -> Result<T, Error> {
        let response = self.send_json(Method::PATCH, target, body, &[]).await?;
        self.parse(response).await
    }

    async fn send_json(
        &self,
        method: Method,
        target: &str,
        body: &impl Serialize,
        headers: &[(HeaderName, &str)],
    ) -> Result<Response<Incoming>, Error> {
        let json = serde_json::to_vec(body).map_err(|e| Error::Request(e.to_string()))?;
        let headers = [&[(CONTENT_TYPE, "application/json")], headers].concat();
        let body = Full::new(Bytes::from(json)).map_err(|never| match never {}).boxed_unsync();
        self.send(method, target, &headers, body).await
    }

    /// `POST` without a body: the path says all there is.
    pub(crate) async fn order<T: DeserializeOwned>(&self, target: &str) -> Result<T, Error> {
        let response = self.send(Method::POST, target, &[], empty()).await?;
        self.parse(response).await
    }

    /// Sends one request and sorts its answer into success and error.
    pub(crate) async fn send(
        &self,
        method: Method,
        target: &str,
        headers: &[(HeaderName, &str)],
        body: RequestBody,
    ) -> Result<Response<Incoming>, Error> {
        let authority = self.endpoint.authority();
        let mut request = Request::builder()
            .method(method)
            .uri(format!("http://{authority}{target}"))
            .header(HOST, authority);
        if let Some(authorization) = self.endpoint.authorization() {
            request = request.header(AUTHORIZATION, authorization);
        }
        for (name, value) in headers {
            request = request.header(name, *value);
        }
        let request = request.body(body).map_err(|e| Error::Request(e.to_string()))?;
        let response = self.http.request(request).await.map_err(|e| self.transport(&e))?;
        if let Some(version) = response.headers().get(ARK_VERSION).and_then(|version| version.to_str().ok()) {
            self.version.get_or_init(|| version.to_owned());
        }
        if response.status().is_success() {
            return Ok(response);
        }
        let status = response.status().as_u16();
        let body = self.collect(response.into_body(), status).await?;
        Err(refusal(&self.endpoint, status, &body))
    }

    pub(crate) async fn parse<T: DeserializeOwned>(&self, response: Response<Incoming>) -> Result<T, Error> {
        let status = response.status().as_u16();
        let body = self.collect(response.into_body(), status).await?;
        serde_json::from_slice(&body).map_err(|e| Error::Answer {
            endpoint: self.endpoint.to_string(),
            status,
            excerpt: e.to_string(),
        })
    }

    async fn collect(&self, body: Incoming, status: u16) -> Result<Bytes, Error> {
        match Limited::new(body, MAX_ANSWER).collect().await {
            Ok(whole) => Ok(whole.to_bytes()),
            Err(e) if e.is::<http_body_util::LengthLimitError>() => Err(Error::Answer {
                endpoint: self.endpoint.to_string(),
                status,
                excerpt: format!("longer than {MAX_ANSWER} bytes"),
            }),
            Err(e) => Err(Error::broken(&self.endpoint, e.as_ref())),
        }
    }

    /// Tells a refused connection from one that broke later.
    fn transport(&self, error: &legacy::Error) -> Error {
        let source = std::error::Error::source(error);
        if error.is_connect()
            && let Some(io) = source.and_then(|s| s.downcast_ref::<std::io::Error>())
        {
            let copy = io.raw_os_error().map_or_else(|| io.kind().into(), std::io::Error::from_raw_os_error);
            return Error::connect(&self.endpoint, copy);
        }
        Error::broken(&self.endpoint, error)
    }
}

/// The error that an unsuccessful answer stands for.
pub(crate) fn refusal(endpoint: &Endpoint, status: u16, body: &[u8]) -> Error {
    match serde_json::from_slice::<Problem>(body) {
        Ok(problem) => Error::Problem(problem),
        Err(_) => Error::Answer {
            endpoint: endpoint.to_string(),
            status,
            excerpt: String::from_utf8_lossy(body).chars().take(EXCERPT).collect(),
        },
    }
}

/// No body.
pub(crate) fn empty() -> RequestBody {
    Empty::new().map_err(|never| match never {}).boxed_unsync()
}
