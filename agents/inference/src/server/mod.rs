//! The MCP server: tools over the engines of the models it serves, models as resources.

mod lines;
pub mod params;
mod run;
mod template;

use std::collections::BTreeMap;
use std::sync::Arc;

use rmcp::handler::server::router::tool::ToolRouter;
use rmcp::handler::server::wrapper::Parameters;
use rmcp::model::{
    ErrorData, Implementation, ListResourcesResult, PaginatedRequestParams, ReadResourceRequestParams,
    ReadResourceResponse, ReadResourceResult, Resource, ResourceContents, ServerCapabilities, ServerConfig,
};
use rmcp::service::{QuitReason, RequestContext};
use rmcp::{Json, RoleServer, ServerHandler, ServiceExt, tool, tool_handler, tool_router};
use serde_json::json;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_util::sync::CancellationToken;

use crate::engine::Engine;
pub use lines::MAX_LINE;
use params::{
    ChatParams, ChatResult, EmbedParams, EmbedResult, FinishReason, GenerateParams, GenerateResult, Message,
    Role, Timings, TokenizeParams, TokenizeResult, UsageResult,
};
use run::{Call, Saying, invalid, refused, untemplated};
pub use run::{OWNER, code};
use template::{ChatTemplate, take_tool_calls};

/// Most texts of one `embed`.
const MAX_INPUTS: usize = 64;
/// Most messages of one `chat`, and most tools.
const MAX_MESSAGES: usize = 4096;
const MAX_TOOLS: usize = 128;
/// Before the names of models, in the addresses of their resources.
const SCHEME: &str = "model://";

/// A model that is served by a name.
#[derive(Debug)]
pub struct Served {
    name: String,
    engine: Engine,
    template: Result<ChatTemplate, template::TemplateError>,
}

impl Served {
    /// Serves what `engine` has loaded as `name`.
    #[must_use]
    pub fn new(name: String, engine: Engine) -> Self {
        let (begin, end) = engine.marks();
        let template = ChatTemplate::new(engine.model().chat_template.as_deref(), begin, end);
        Self { name, engine, template }
    }

    /// Its engine.
    #[must_use]
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    fn description(&self) -> serde_json::Value {
        let (model, config, load) = (self.engine.model(), self.engine.config(), self.engine.load());
        json!({
            "name": self.name,
            "architecture": model.architecture,
            "title": model.name,
            "license": model.license,
            "parameters": model.parameters,
            "file_bytes": model.file_bytes,
            "memory_bytes": self.engine.memory().total(),
            "context": config.context,
            "context_trained": model.context,
            "sessions": config.sessions,
            "vocabulary": model.vocabulary,
            "embedding": model.embedding,
            "chat": self.template.is_ok(),
            "active": load.active,
            "queued": load.queued,
        })
    }
}

/// The models of a server; the first is taken where none is named.
#[derive(Debug)]
pub struct Models {
    first: String,
    by_name: BTreeMap<String, Served>,
}

impl Models {
    /// `None` without any model.
    #[must_use]
    pub fn new(models: Vec<Served>) -> Option<Self> {
        let first = models.first()?.name.clone();
        Some(Self { first, by_name: models.into_iter().map(|m| (m.name.clone(), m)).collect() })
    }

    /// The model of this name, or the first.
    ///
    /// # Errors
    /// No model of this name.
    pub fn get(&self, name: Option<&str>) -> Result<&Served, ErrorData> {
        let name = name.unwrap_or(&self.first);
        self.by_name.get(name).ok_or_else(|| {
            let names: Vec<_> = self.by_name.keys().map(String::as_str).collect();
            let shown: String = name.chars().take(100).collect();
            invalid(
                "unknown_model",
                &format!("there is no model \"{shown}\" here; there is {}", names.join(", ")),
            )
        })
    }
}

/// One connection's server.
#[derive(Clone, Debug)]
pub struct Server {
    models: Arc<Models>,
    gone: CancellationToken,
    tool_router: ToolRouter<Self>,
}

#[tool_router]
impl Server {
    fn new(models: Arc<Models>, gone: CancellationToken) -> Self {
        Self { models, gone, tool_router: Self::tool_router() }
    }

    /// Replies to a conversation. With a progress token, the text comes in progress notifications as it is said.
    #[tool(annotations(read_only_hint = true, open_world_hint = false))]
    async fn chat(
        &self,
        Parameters(params): Parameters<ChatParams>,
        context: RequestContext<RoleServer>,
    ) -> Result<Json<ChatResult>, ErrorData> {
        let served = self.models.get(params.model.as_deref())?;
        if params.messages.is_empty() || params.messages.len() > MAX_MESSAGES {
            let text = format!(
                "there are {} messages, but there must be from 1 to {MAX_MESSAGES}",
                params.messages.len()
            );
            return Err(invalid("messages", &text));
        }
        if params.tools.len() > MAX_TOOLS {
            return Err(invalid(
                "tools",
                &format!("there are {} tools, at most {MAX_TOOLS} are taken", params.tools.len()),
            ));
        }
        let template = served.template.as_ref().map_err(untemplated)?;
        let text = template.render(&params.messages, &params.tools).map_err(|e| untemplated(&e))?;
        // Many templates write the token that begins a text themselves.
        let (begin, _) = served.engine.marks();
        let add = served.engine.adds_begin() && (begin.is_empty() || !text.starts_with(&begin));
        let prompt = served.engine.tokenize(&text, add, true).map_err(refused)?;
        let call = Call {
            engine: &served.engine,
            context: &context,
            gone: &self.gone,
            timeout_ms: params.timeout_ms,
        };
        let saying = Saying { sampling: &params.sampling, max_tokens: params.max_tokens, stop: &params.stop };
        let said = call.say(prompt, saying).await?;
        let (content, tool_calls) =
            if params.tools.is_empty() { (said.text, Vec::new()) } else { take_tool_calls(&said.text) };
        let finish_reason =
            if tool_calls.is_empty() { said.done.finish.into() } else { FinishReason::ToolCalls };
        Ok(Json(ChatResult {
            model: served.name.clone(),
            message: Message { role: Role::Assistant, content, tool_calls, tool_call_id: None, name: None },
            finish_reason,
            usage: said.done.usage.into(),
            timings: said.done.usage.into(),
        }))
    }

    /// Goes on with a text. With a progress token, the text comes in progress notifications as it is said.
    #[tool(annotations(read_only_hint = true, open_world_hint = false))]
    async fn generate(
        &self,
        Parameters(params): Parameters<GenerateParams>,
        context: RequestContext<RoleServer>,
    ) -> Result<Json<GenerateResult>, ErrorData> {
        let served = self.models.get(params.model.as_deref())?;
        let prompt = served.engine.tokenize(&params.prompt, true, false).map_err(refused)?;
        let call = Call {
            engine: &served.engine,
            context: &context,
            gone: &self.gone,
            timeout_ms: params.timeout_ms,
        };
        let saying = Saying { sampling: &params.sampling, max_tokens: params.max_tokens, stop: &params.stop };
        let said = call.say(prompt, saying).await?;
        Ok(Json(GenerateResult {
            model: served.name.clone(),
            text: said.text,
            finish_reason: said.done.finish.into(),
            usage: said.done.usage.into(),
            timings: Timings::from(said.done.usage),
        }))
    }

    /// Gives each text a vector: the mean of the model's last hidden states, of length 1.
    #[tool(annotations(read_only_hint = true, open_world_hint = false))]
    async fn embed(
        &self,
        Parameters(params): Parameters<EmbedParams>,
        context: RequestContext<RoleServer>,
    ) -> Result<Json<EmbedResult>, ErrorData> {
        let served = self.models.get(params.model.as_deref())?;
        if params.input.is_empty() || params.input.len() > MAX_INPUTS {
            let text =
                format!("there are {} texts, but there must be from 1 to {MAX_INPUTS}", params.input.len());
            return Err(invalid("input", &text));
        }
        let call = Call {
            engine: &served.engine,
            context: &context,
            gone: &self.gone,
            timeout_ms: params.timeout_ms,
        };
        let mut prompts = Vec::with_capacity(params.input.len());
        for text in &params.input {
            prompts.push(served.engine.tokenize(text, true, false).map_err(refused)?);
        }
        let all = futures_util::future::try_join_all(prompts.into_iter().map(|p| call.embed(p))).await?;
        let mut usage = UsageResult::default();
        let mut embeddings = Vec::with_capacity(all.len());
        for (embedding, done) in all {
            embeddings.push(embedding);
            usage.prompt_tokens = usage.prompt_tokens.saturating_add(done.usage.prompt_tokens);
        }
        usage.total_tokens = usage.prompt_tokens;
        Ok(Json(EmbedResult { model: served.name.clone(), embeddings, usage }))
    }

    /// The tokens of a text, as the model reads it.
    #[tool(annotations(read_only_hint = true, open_world_hint = false))]
    async fn tokenize(
        &self,
        Parameters(params): Parameters<TokenizeParams>,
    ) -> Result<Json<TokenizeResult>, ErrorData> {
        let served = self.models.get(params.model.as_deref())?;
        let tokens = served
            .engine
            .tokenize(&params.text, params.add_special, params.parse_special)
            .map_err(refused)?;
        Ok(Json(TokenizeResult {
            model: served.name.clone(),
            count: tokens.len(),
            pieces: tokens.iter().map(|t| served.engine.piece(*t)).collect(),
            tokens: tokens.iter().map(|t| t.0).collect(),
        }))
    }
}

#[tool_handler(router = self.tool_router)]
impl ServerHandler for Server {
    fn get_info(&self) -> ServerConfig {
        ServerConfig::new(ServerCapabilities::builder().enable_tools().enable_resources().build())
            .with_server_info(Implementation::new("ark-inference", env!("CARGO_PKG_VERSION")))
            .with_instructions(
                "Local language models. chat and generate say something, embed gives vectors, tokenize counts tokens. \
                 The models are the resources.",
            )
    }

    async fn list_resources(
        &self,
        _request: Option<PaginatedRequestParams>,
        _context: RequestContext<RoleServer>,
    ) -> Result<ListResourcesResult, ErrorData> {
        let resources = self.models.by_name.values().map(|served| {
            let model = served.engine.model();
            Resource::new(format!("{SCHEME}{}", served.name), served.name.clone())
                .with_description(format!(
                    "{} model of {} million parameters, context of {} tokens",
                    model.architecture,
                    model.parameters.div_ceil(1_000_000),
                    served.engine.config().context
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
        let served = name.and_then(|name| self.models.get(Some(name)).ok()).ok_or_else(|| {
            ErrorData::resource_not_found("there is no such model; resources/list says which there are", None)
        })?;
        let contents = ResourceContents::text(served.description().to_string(), request.uri.clone())
            .with_mime_type("application/json");
        Ok(ReadResourceResult::new(vec![contents]).into())
    }
}

/// Serves one connection until it ends. A peer that closes its side while calls run has left: they are cancelled. With
/// `half_open`, it only has nothing more to ask, and gets its answers.
///
/// # Errors
/// A peer that does not speak MCP.
pub async fn serve(
    models: Arc<Models>,
    read: impl AsyncRead + Send + Unpin + 'static,
    write: impl AsyncWrite + Send + Unpin + 'static,
    half_open: bool,
) -> Result<QuitReason, Box<dyn std::error::Error + Send + Sync>> {
    let gone = CancellationToken::new();
    let handlers = if half_open { CancellationToken::new() } else { gone.clone() };
    let running =
        Server::new(models, handlers).serve(lines::Lines::new(read, write, gone, half_open)).await?;
    Ok(running.waiting().await?)
}
