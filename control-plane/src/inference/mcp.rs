//! MCP: the tools of the inference VMs, offered to agents on a stream and to clients of the host over HTTP.
//!
//! A call is passed on with its arguments as they are: what is wrong with them is said by the VM.

use std::sync::{Arc, LazyLock};

use ark_mcp::code;
use ark_mcp::lines::Lines;
use ark_mcp::params::{
    ChatParams, ChatResult, EmbedParams, EmbedResult, GenerateParams, GenerateResult, TokenizeParams,
    TokenizeResult,
};
use ark_types::label::Owner;
use ark_types::model::Model;
use ark_types::openai::MAX_REQUEST;
use rmcp::handler::server::common::{schema_for_output, schema_for_type};
use rmcp::model::{
    CallToolRequestParams, CallToolResponse, CallToolResult, ErrorData, Implementation, ListResourcesResult,
    ListToolsResult, PaginatedRequestParams, ProgressNotificationParam, ProgressToken,
    ReadResourceRequestParams, ReadResourceResponse, ReadResourceResult, Resource, ResourceContents,
    ServerCapabilities, ServerConfig, Tool as ToolInfo, ToolAnnotations,
};
use rmcp::service::RequestContext;
use rmcp::transport::StreamableHttpServerConfig;
use rmcp::transport::streamable_http_server::StreamableHttpService;
use rmcp::transport::streamable_http_server::session::local::LocalSessionManager;
use rmcp::{RoleServer, ServerHandler, ServiceExt as _};
use serde_json::json;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_util::sync::CancellationToken;

use super::call::{Call, Step, Telling, Tool};
use super::{Caller, Failure};
use crate::core::Core;

/// Most calls of one connection at a time.
const MAX_OPEN: usize = 64;
/// Before the names of models, in the addresses of their resources.
const SCHEME: &str = "model://";
/// Most characters of an address without a resource that are told.
const MAX_URI: usize = 256;
/// Where the pages come from that browsers may let call this. Programs that are no browsers name no origin.
const ORIGINS: [&str; 6] = [
    "http://localhost:*",
    "https://localhost:*",
    "http://127.0.0.1:*",
    "https://127.0.0.1:*",
    "http://[::1]:*",
    "https://[::1]:*",
];

/// Tools, as they are listed.
static TOOLS: LazyLock<Vec<ToolInfo>> = LazyLock::new(|| Tool::ALL.map(described).to_vec());

fn described(tool: Tool) -> ToolInfo {
    let (about, input, output) = match tool {
        Tool::Chat => (
            "Replies to a conversation. With a progress token, the text comes in progress notifications as it is said.",
            schema_for_type::<ChatParams>(),
            schema_for_output::<ChatResult>(),
        ),
        Tool::Generate => (
            "Goes on with a text. With a progress token, the text comes in progress notifications as it is said.",
            schema_for_type::<GenerateParams>(),
            schema_for_output::<GenerateResult>(),
        ),
        Tool::Embed => (
            "Gives each text a vector: the mean of the model's last hidden states, of length 1.",
            schema_for_type::<EmbedParams>(),
            schema_for_output::<EmbedResult>(),
        ),
        Tool::Tokenize => (
            "The tokens of a text, as the model reads it.",
            schema_for_type::<TokenizeParams>(),
            schema_for_output::<TokenizeResult>(),
        ),
    };
    ToolInfo::new(tool.name(), about, input)
        .with_raw_output_schema(output)
        .with_annotations(ToolAnnotations::new().read_only(true).open_world(false))
}

/// One connection's server.
#[derive(Clone, Debug)]
pub(crate) struct Server {
    core: Arc<Core>,
    caller: Caller,
    /// Cancelled when the peer has left.
    gone: CancellationToken,
}

impl Server {
    async fn models(&self) -> Result<Vec<Model>, ErrorData> {
        self.caller.models(&self.core).await.map_err(|refusal| Failure::from(refusal).rpc())
    }

    async fn call(
        &self,
        tool: Tool,
        request: CallToolRequestParams,
        token: Option<ProgressToken>,
        context: &RequestContext<RoleServer>,
    ) -> Result<CallToolResult, ErrorData> {
        let arguments = request.arguments.unwrap_or_default();
        let telling = if token.is_some() { Telling::Streamed } else { Telling::Whole };
        let mut call = Call::begin(&self.core, &self.caller, tool, arguments, telling)
            .await
            .map_err(|failure| failure.rpc())?;
        let mut said = 0;
        loop {
            match call.next().await.map_err(|failure| failure.rpc())? {
                Step::Done(result) => return Ok(CallToolResult::structured(result)),
                Step::Text(text) => {
                    said += text.len();
                    let Some(token) = token.clone() else { continue };
                    #[expect(clippy::cast_precision_loss, reason = "a reply is far below 2^52 bytes")]
                    let progress = ProgressNotificationParam::new(token, said as f64).with_message(text);
                    context.peer.notify_progress(progress).await.map_err(|_| cancelled())?;
                }
            }
        }
    }
}

fn cancelled() -> ErrorData {
    ErrorData::new(code::CANCELLED, "the call was cancelled", Some(json!({ "reason": "cancelled" })))
}

impl ServerHandler for Server {
    fn get_info(&self) -> ServerConfig {
        ServerConfig::new(ServerCapabilities::builder().enable_tools().enable_resources().build())
            .with_server_info(Implementation::new("arkd", env!("CARGO_PKG_VERSION")))
            .with_instructions(
                "Local language models. chat and generate say something, embed gives vectors, tokenize counts tokens. The models are \
                 the resources.",
            )
    }

    async fn list_tools(
        &self,
        _request: Option<PaginatedRequestParams>,
        _context: RequestContext<RoleServer>,
    ) -> Result<ListToolsResult, ErrorData> {
        Ok(ListToolsResult::with_all_items(TOOLS.clone()))
    }

    fn get_tool(&self, name: &str) -> Option<ToolInfo> {
        TOOLS.iter().find(|tool| tool.name == name).cloned()
    }

    async fn call_tool(
        &self,
        request: CallToolRequestParams,
        context: RequestContext<RoleServer>,
    ) -> Result<CallToolResponse, ErrorData> {
        let tool = Tool::ALL.into_iter().find(|tool| tool.name() == request.name).ok_or_else(|| {
            let shown: String = request.name.chars().take(64).collect();
            let text = format!("there is no tool {shown:?}: tools/list says which there are");
            ErrorData::invalid_params(text, Some(json!({ "reason": "unknown_tool" })))
        })?;
        let token = context.meta.get_progress_token();
        tokio::select! {
            result = self.call(tool, request, token, &context) => result.map(Into::into),
            () = context.ct.cancelled() => Err(cancelled()),
            () = self.gone.cancelled() => Err(cancelled()),
        }
    }

    async fn list_resources(
        &self,
        _request: Option<PaginatedRequestParams>,
        _context: RequestContext<RoleServer>,
    ) -> Result<ListResourcesResult, ErrorData> {
        let models = self.models().await?;
        let resources = models.into_iter().map(|model| {
            Resource::new(format!("{SCHEME}{}", model.id), model.id.to_string())
                .with_description(format!(
                    "{} model of {} million parameters, context of {} tokens",
                    model.architecture,
                    model.parameters.div_ceil(1_000_000),
                    model.context
                ))
                .with_mime_type("application/json")
        });
        Ok(ListResourcesResult::with_all_items(resources.collect()))
    }

    async fn read_resource(
        &self,
        request: ReadResourceRequestParams,
        _context: RequestContext<RoleServer>,
    ) -> Result<ReadResourceResponse, ErrorData> {
        let name = request.uri.strip_prefix(SCHEME);
        let model = self.models().await?.into_iter().find(|model| Some(model.id.as_ref()) == name);
        let model = model.ok_or_else(|| {
            let uri: String = request.uri.chars().take(MAX_URI).collect();
            let text = "there is no such model; resources/list says which there are";
            ErrorData::resource_not_found(text, Some(json!({ "uri": uri })))
        })?;
        // Of strings and numbers there is always a JSON form.
        let text = serde_json::to_string(&model).unwrap_or_default();
        let contents = ResourceContents::text(text, request.uri).with_mime_type("application/json");
        Ok(ReadResourceResult::new(vec![contents]).into())
    }
}

/// Serves `caller` on `stream`, one message a line, until either side ends it. Dropped, it ends its calls.
pub(crate) async fn serve<S>(core: Arc<Core>, caller: Caller, stream: S)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let gone = CancellationToken::new();
    let _ends = gone.clone().drop_guard();
    let (read, write) = tokio::io::split(stream);
    let lines = Lines::new(read, write, gone.clone(), MAX_OPEN, false);
    let server = Server { core, caller, gone };
    match server.serve(lines).await {
        Ok(running) => drop(running.waiting().await),
        Err(error) => tracing::debug!(%error, "a peer does not speak MCP"),
    }
}

/// The part of the host's API that is MCP: what answers at `/mcp`.
pub(crate) fn http_service(core: &Arc<Core>) -> StreamableHttpService<Server, LocalSessionManager> {
    let caller = Caller::host(Owner::default(), 0);
    let config = StreamableHttpServerConfig::default()
        // Who gets here has the token, or may open the socket, and calls this host as it likes.
        .disable_allowed_hosts()
        .with_allowed_origins(ORIGINS)
        .with_cancellation_token(core.closing.clone())
        .with_max_request_body_bytes(MAX_REQUEST);
    let weak = Arc::downgrade(core);
    let server = move || {
        let core = weak.upgrade().ok_or(std::io::ErrorKind::NotConnected)?;
        Ok(Server { gone: core.closing.clone(), core, caller: caller.clone() })
    };
    StreamableHttpService::new(server, Arc::default(), config)
}
