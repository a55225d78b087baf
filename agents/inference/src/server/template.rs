//! Chat templates: Jinja out of the model file, run within bounds, and the tool calls that come back.

use ark_mcp::params::{FunctionCall, Message, ToolCall};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{Environment, Error, ErrorKind, context};
use serde_json::Value;

/// Steps a template may take: a conversation of a thousand messages takes some ten thousand.
const FUEL: u64 = 2_000_000;
const NAME: &str = "chat";

/// A model's chat template, read once.
#[derive(Debug)]
pub(super) struct ChatTemplate {
    environment: Environment<'static>,
    has_tools: bool,
    begin: String,
    end: String,
}

/// Why there is no prompt.
#[derive(Debug, thiserror::Error)]
pub(super) enum TemplateError {
    /// The model was made for something else.
    #[error("the model has no chat template; use generate")]
    None,
    /// The template is not one.
    #[error("the model's chat template cannot be used: {0}")]
    Template(String),
    /// The template refuses these messages.
    #[error("the model's chat template does not take these messages: {0}")]
    Messages(String),
    /// Tools for a model that does not know them.
    #[error("the model's chat template has no tools; leave tools out")]
    Tools,
}

impl ChatTemplate {
    /// Reads a template; `begin` and `end` are the texts of the model's tokens for that.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(super) fn new(template: Option<&str>, begin: String, end: String) -> Result<Self, TemplateError> {
        let source = template.ok_or(TemplateError::None)?;
        let mut environment = Environment::new();
        environment.set_fuel(Some(FUEL));
        // As the library sets them that templates are written for.
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|e| TemplateError::Template(e.to_string()))?);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |text: String| -> Result<String, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, text))
        });
        environment
            .add_template_owned(NAME, source.to_owned())
            .map_err(|e| TemplateError::Template(e.to_string()))?;
        Ok(Self { environment, has_tools: source.contains("tools"), begin, end })
    }

    /// The text that the model is to go on with.
    ///
    /// # Errors
    /// Messages or tools that the template does not take.
    pub(super) fn render(&self, messages: &[Message], tools: &[Value]) -> Result<String, TemplateError> {
        if !tools.is_empty() && !self.has_tools {
            return Err(TemplateError::Tools);
        }
        let tools = (!tools.is_empty()).then_some(tools);
        self.environment
            .get_template(NAME)
            .and_then(|template| {
                template.render(context! {
                    messages => Serde(messages),
                    tools => Serde(tools),
                    add_generation_prompt => true,
                    bos_token => self.begin.as_str(),
                    eos_token => self.end.as_str(),
                })
            })
            .map_err(|e| TemplateError::Messages(e.to_string()))
    }
}

/// Takes the tool calls out of a reply, in the form that most templates teach: `<tool_call>{"name": …, "arguments": …}</tool_call>`.
/// What cannot be read as such stays in the text.
pub(super) fn take_tool_calls(text: &str) -> (String, Vec<ToolCall>) {
    const OPEN: &str = "<tool_call>";
    const CLOSE: &str = "</tool_call>";
    let mut rest = text;
    let mut content = String::new();
    let mut calls = Vec::new();
    while let Some((before, after)) = rest.split_once(OPEN) {
        // A model that stops after the last brace has made its call as well.
        let (inside, following) = after.split_once(CLOSE).unwrap_or((after, ""));
        content.push_str(before);
        match serde_json::from_str::<FunctionCall>(inside.trim()) {
            Ok(function) => {
                calls.push(ToolCall {
                    id: format!("call_{}", calls.len()),
                    kind: "function".to_owned(),
                    function,
                });
            }
            Err(_) => {
                let whole = rest.len() - before.len() - following.len();
                content.push_str(rest.get(before.len()..before.len() + whole).unwrap_or_default());
            }
        }
        rest = following;
    }
    content.push_str(rest);
    if !calls.is_empty() {
        content = content.trim().to_owned();
    }
    (content, calls)
}

#[cfg(test)]
mod tests {
    use super::*;
    use ark_mcp::params::Role;

    fn message(role: Role, content: &str) -> Message {
        Message { role, content: content.to_owned(), tool_calls: Vec::new(), tool_call_id: None, name: None }
    }

    fn template(source: &str) -> Result<ChatTemplate, TemplateError> {
        ChatTemplate::new(Some(source), "<s>".to_owned(), "</s>".to_owned())
    }

    /// As many models have it, with Python's methods and loop controls.
    const CHATML: &str = "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' and not loop.first %}\
        {{ raise_exception('system comes first') }}{% endif %}<|im_start|>{{ message['role'] }}\n{{ message['content'].strip() }}\
        <|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

    #[test]
    fn a_usual_template_is_rendered() {
        let text =
            template(CHATML).and_then(|t| t.render(&[message(Role::User, " hi ")], &[])).expect("rendered");
        assert_eq!(text, "<s><|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n");
    }

    #[test]
    fn what_a_template_refuses_is_said_in_its_words() {
        let messages = [message(Role::User, "hi"), message(Role::System, "late")];
        let error = template(CHATML).and_then(|t| t.render(&messages, &[])).expect_err("refused").to_string();
        assert!(error.contains("system comes first"), "{error}");
    }

    #[test]
    fn a_template_that_never_ends_is_stopped() {
        let error = template("{% for a in range(9999) %}{% for b in range(9999) %}x{% endfor %}{% endfor %}")
            .and_then(|t| t.render(&[], &[]))
            .expect_err("stopped");
        assert!(matches!(error, TemplateError::Messages(_)));
    }

    #[test]
    fn broken_missing_or_without_tools() {
        assert!(matches!(template("{% for %}"), Err(TemplateError::Template(_))));
        assert!(matches!(ChatTemplate::new(None, String::new(), String::new()), Err(TemplateError::None)));
        let tools = [serde_json::json!({"type": "function"})];
        assert!(matches!(template(CHATML).and_then(|t| t.render(&[], &tools)), Err(TemplateError::Tools)));
        let with = template("{{ tools | tojson }}").and_then(|t| t.render(&[], &tools)).expect("rendered");
        assert!(with.contains("function"), "{with}");
    }

    #[test]
    fn tool_calls_are_taken_out_of_the_text() {
        let (text, calls) = take_tool_calls(
            "Let me see. <tool_call>\n{\"name\": \"f\", \"arguments\": {\"x\": 1}}\n</tool_call>",
        );
        assert_eq!(text, "Let me see.");
        assert_eq!(calls.len(), 1);
        assert_eq!(calls[0].function.name, "f");
        assert_eq!(calls[0].function.arguments["x"], 1);
    }

    #[test]
    fn what_is_no_tool_call_stays() {
        for text in
            ["plain", "<tool_call>oops</tool_call> and more", "<tool_call>", " a <tool_call>{}</tool_call>"]
        {
            assert_eq!(take_tool_calls(text), (text.to_owned(), Vec::new()));
        }
    }
}
