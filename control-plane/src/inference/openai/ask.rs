//! What `OpenAI` clients ask, as the tools of the inference VMs take it.

use ark_types::openai::{
    ChatMessage, ChatRequest, CompletionRequest, Content, EmbeddingRequest, ResponseFormat, Sampling,
};
use ark_types::problem::ProblemKind;
use serde_json::{Map, Value, json};

use super::super::Failure;
use super::super::call::Tool;

/// Tokens of a completion that does not say how many, as the form has it.
const COMPLETION_TOKENS: u32 = 16;

/// How a reply is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Form {
    /// As a chat, or as a completion.
    pub(super) is_chat: bool,
    /// As it is said.
    pub(super) is_stream: bool,
    /// With the usage, in a stream.
    pub(super) tells_usage: bool,
    /// With tool calls, which are only known when all is said.
    pub(super) has_tools: bool,
}

/// A call that is to say something.
#[derive(Debug)]
pub(super) struct Asking {
    pub(super) tool: Tool,
    pub(super) arguments: Map<String, Value>,
    pub(super) form: Form,
}

fn bad(detail: impl Into<String>) -> Failure {
    Failure::refused(ProblemKind::BadRequest, detail)
}

/// How vectors are told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum VectorFormat {
    Numbers,
    Base64,
}

/// # Errors
/// It is neither.
pub(super) fn vectors(format: Option<&str>) -> Result<VectorFormat, Failure> {
    match format {
        None | Some("float") => Ok(VectorFormat::Numbers),
        Some("base64") => Ok(VectorFormat::Base64),
        Some(_) => Err(bad("encoding_format is none that is known: use float or base64")),
    }
}

/// What a call that gives vectors takes.
pub(super) fn embedding(request: EmbeddingRequest) -> (Tool, Map<String, Value>) {
    let mut arguments = Map::new();
    put(&mut arguments, "model", request.model);
    arguments.insert("input".to_owned(), request.input.into_vec().into());
    (Tool::Embed, arguments)
}

impl Asking {
    /// # Errors
    /// What is wrong with the request.
    pub(super) fn chat(request: ChatRequest) -> Result<Self, Failure> {
        check_count(request.n)?;
        let tools = match request.tool_choice.as_ref().map(|choice| choice.as_str()) {
            None | Some(Some("auto")) => request.tools.unwrap_or_default(),
            Some(Some("none")) => Vec::new(),
            Some(_) => {
                return Err(bad("tool_choice can be auto or none: the models choose among tools themselves"));
            }
        };
        let messages: Vec<Value> = request.messages.into_iter().map(message).collect::<Result<_, _>>()?;
        let mut arguments = Map::new();
        put(&mut arguments, "model", request.model);
        arguments.insert("messages".to_owned(), messages.into());
        let form = Form {
            is_chat: true,
            is_stream: request.stream.unwrap_or(false),
            tells_usage: request.stream_options.is_some_and(|options| options.include_usage),
            has_tools: !tools.is_empty(),
        };
        if form.has_tools {
            arguments.insert("tools".to_owned(), tools.into());
        }
        put(&mut arguments, "max_tokens", request.max_completion_tokens.or(request.max_tokens));
        put(&mut arguments, "stop", request.stop.map(ark_types::openai::OneOrMany::into_vec));
        let mut sampling = sampling(&request.sampling);
        if let Some(schema) = schema(request.response_format)? {
            sampling.insert("json_schema".to_owned(), schema);
        }
        arguments.insert("sampling".to_owned(), sampling.into());
        Ok(Self { tool: Tool::Chat, arguments, form })
    }

    /// # Errors
    /// What is wrong with the request.
    pub(super) fn completion(request: CompletionRequest) -> Result<Self, Failure> {
        check_count(request.n)?;
        let prompts = request.prompt.into_vec();
        let [prompt] = <[String; 1]>::try_from(prompts).map_err(|prompts| {
            bad(format!("there are {} prompts: send one with each request", prompts.len()))
        })?;
        let mut arguments = Map::new();
        put(&mut arguments, "model", request.model);
        arguments.insert("prompt".to_owned(), prompt.into());
        put(&mut arguments, "max_tokens", Some(request.max_tokens.unwrap_or(COMPLETION_TOKENS)));
        put(&mut arguments, "stop", request.stop.map(ark_types::openai::OneOrMany::into_vec));
        arguments.insert("sampling".to_owned(), sampling(&request.sampling).into());
        let form = Form {
            is_chat: false,
            is_stream: request.stream.unwrap_or(false),
            tells_usage: request.stream_options.is_some_and(|options| options.include_usage),
            has_tools: false,
        };
        Ok(Self { tool: Tool::Generate, arguments, form })
    }
}

fn check_count(n: Option<u32>) -> Result<(), Failure> {
    match n {
        None | Some(1) => Ok(()),
        Some(n) => Err(bad(format!("n is {n}, but each request gets one reply: send it several times"))),
    }
}

/// Puts in what there is.
fn put(arguments: &mut Map<String, Value>, name: &str, value: Option<impl Into<Value>>) {
    if let Some(value) = value {
        arguments.insert(name.to_owned(), value.into());
    }
}

fn sampling(sampling: &Sampling) -> Map<String, Value> {
    let mut chosen = Map::new();
    put(&mut chosen, "temperature", sampling.temperature);
    put(&mut chosen, "top_p", sampling.top_p);
    put(&mut chosen, "top_k", sampling.top_k);
    put(&mut chosen, "min_p", sampling.min_p);
    // Seeds of clients are wider; the lower half tells them apart as well.
    put(&mut chosen, "seed", sampling.seed.map(|seed| seed & i64::from(u32::MAX)));
    chosen
}

/// The schema that a reply is to match.
fn schema(format: Option<ResponseFormat>) -> Result<Option<Value>, Failure> {
    let Some(format) = format else { return Ok(None) };
    match (format.kind.as_str(), format.json_schema) {
        ("text", _) => Ok(None),
        ("json_object", _) => Ok(Some(json!({ "type": "object" }))),
        ("json_schema", Some(named)) => Ok(Some(named.schema)),
        ("json_schema", None) => Err(bad("response_format is json_schema, but has no json_schema")),
        _ => Err(bad("response_format is none that is known: use text, json_object or json_schema")),
    }
}

/// A message as the tool takes it.
fn message(message: ChatMessage) -> Result<Value, Failure> {
    let role = match message.role.as_str() {
        role @ ("system" | "user" | "assistant" | "tool") => role,
        "developer" => "system",
        _ => {
            return Err(bad("a message has a role that is not known: use system, user, assistant or tool"));
        }
    };
    let content = match message.content {
        None => String::new(),
        Some(Content::Text(text)) => text,
        Some(Content::Parts(parts)) => {
            if parts.iter().any(|part| part.kind != "text") {
                return Err(bad("a message has a part that is no text, and the models read nothing else"));
            }
            parts.into_iter().map(|part| part.text).collect()
        }
    };
    let mut told = Map::new();
    told.insert("role".to_owned(), role.into());
    told.insert("content".to_owned(), content.into());
    put(&mut told, "tool_call_id", message.tool_call_id);
    put(&mut told, "name", message.name);
    let mut calls = Vec::new();
    for call in message.tool_calls.unwrap_or_default() {
        let arguments: Value = serde_json::from_str(&call.function.arguments)
            .map_err(|error| bad(format!("the arguments of a tool call are not JSON: {error}")))?;
        calls.push(json!({
            "id": call.id, "type": "function", "function": { "name": call.function.name, "arguments": arguments },
        }));
    }
    if !calls.is_empty() {
        told.insert("tool_calls".to_owned(), calls.into());
    }
    Ok(told.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chat(request: Value) -> Result<Asking, String> {
        let request = serde_json::from_value(request).unwrap();
        Asking::chat(request).map_err(|failure| failure.problem().detail)
    }

    #[test]
    fn a_chat_is_told_as_the_tool_takes_it() {
        let asking = chat(json!({
            "model": "m", "stream": true, "stream_options": { "include_usage": true }, "temperature": 0.5, "seed": -1,
            "stop": "x", "max_tokens": 5, "max_completion_tokens": 7, "logit_bias": {}, "user": "u",
            "response_format": { "type": "json_schema", "json_schema": { "name": "n", "schema": { "type": "string" } } },
            "messages": [
                { "role": "developer", "content": "be brief" },
                { "role": "user", "content": [{ "type": "text", "text": "a" }, { "type": "text", "text": "b" }] },
                { "role": "assistant", "content": null, "tool_calls": [
                    { "id": "c", "type": "function", "function": { "name": "f", "arguments": "{\"x\":1}" } }] },
                { "role": "tool", "tool_call_id": "c", "content": "1" },
            ],
        }))
        .unwrap();
        assert!(asking.form.is_stream && asking.form.tells_usage && !asking.form.has_tools);
        let told: Value = asking.arguments.into();
        let wanted = json!({
            "model": "m", "stop": ["x"], "max_tokens": 7,
            "sampling": { "temperature": 0.5, "seed": u32::MAX, "json_schema": { "type": "string" } },
            "messages": [
                { "role": "system", "content": "be brief" },
                { "role": "user", "content": "ab" },
                { "role": "assistant", "content": "", "tool_calls": [
                    { "id": "c", "type": "function", "function": { "name": "f", "arguments": { "x": 1 } } }] },
                { "role": "tool", "content": "1", "tool_call_id": "c" },
            ],
        });
        assert_eq!(told, wanted);
    }

    #[test]
    fn what_cannot_be_done_is_said() {
        let user = json!([{ "role": "user", "content": "a" }]);
        for (more, word) in [
            (json!({ "n": 2 }), "n is 2"),
            (json!({ "tool_choice": "required" }), "tool_choice"),
            (json!({ "tool_choice": { "type": "function" } }), "tool_choice"),
            (json!({ "response_format": { "type": "xml" } }), "response_format"),
            (json!({ "response_format": { "type": "json_schema" } }), "json_schema"),
            (json!({ "messages": [{ "role": "robot", "content": "a" }] }), "role"),
            (json!({ "messages": [{ "role": "user", "content": [{ "type": "image_url" }] }] }), "no text"),
        ] {
            let mut request = json!({ "model": "m", "messages": user });
            request.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            let why = chat(request).unwrap_err();
            assert!(why.contains(word), "{word}: {why}");
        }
    }
}
