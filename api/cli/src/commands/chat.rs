//! `ark chat`: a model's reply, as it is said.

use std::io::{self, IsTerminal as _, Read, Write as _};

use ark_types::plain::plain;
use serde_json::{Value, json};

use crate::args::ChatArgs;
use crate::failure::Failure;
use crate::host::Context;
use crate::output::printable;

/// Longest text of standard input, bytes: a request has no more.
const MAX_TEXT: u64 = 10 << 20;

/// Asks a model, and writes its reply as it comes, or with `--json` the whole completion.
pub(crate) async fn chat(context: &Context, args: &ChatArgs) -> Result<(), Failure> {
    let request = request(args, text(&args.text, io::stdin())?)?;
    let client = context.client_to_boot().await?;
    if context.ui.json {
        return context.ui.show(&client.chat(&request).await?, |_| String::new());
    }
    let mut stream = client.chat_stream(&request).await?;
    let (mut out, mut ends_a_line) = (Reply::new(), true);
    let result = loop {
        match stream.next().await {
            Ok(Some(text)) => {
                out.write(&text)?;
                ends_a_line = text.ends_with('\n');
            }
            Ok(None) => break Ok(()),
            Err(error) => break Err(error.into()),
        }
    };
    if !ends_a_line {
        out.write("\n")?;
    }
    result
}

/// The text of `argument`, or what `stdin` has when that is `-`.
///
/// # Errors
/// Too much, or no text.
fn text(argument: &str, stdin: impl Read) -> Result<String, Failure> {
    if argument != "-" {
        return Ok(argument.to_owned());
    }
    let mut text = String::new();
    let read = stdin.take(MAX_TEXT + 1).read_to_string(&mut text);
    read.map_err(|e| Failure::Usage(format!("cannot read standard input: {}", plain(&e))))?;
    if u64::try_from(text.len()).unwrap_or(u64::MAX) > MAX_TEXT {
        let why =
            format!("standard input has more than the {} MiB that can be asked at once", MAX_TEXT >> 20);
        return Err(Failure::Usage(why));
    }
    Ok(text)
}

/// The request that options stand for.
///
/// # Errors
/// A schema that is no JSON.
fn request(args: &ChatArgs, text: String) -> Result<Value, Failure> {
    let mut messages = Vec::new();
    if let Some(system) = &args.system {
        messages.push(json!({ "role": "system", "content": system }));
    }
    messages.push(json!({ "role": "user", "content": text }));
    let mut request = json!({ "messages": messages });
    let mut put = |key: &str, value: Option<Value>| {
        if let (Some(value), Value::Object(request)) = (value, &mut request) {
            request.insert(key.to_owned(), value);
        }
    };
    put("model", args.model.as_ref().map(|model| json!(model)));
    put("max_tokens", args.max_tokens.map(|most| json!(most)));
    put("temperature", args.temperature.map(|t| json!(t)));
    put("seed", args.seed.map(|seed| json!(seed)));
    if let Some(schema) = &args.json_schema {
        let schema: Value = serde_json::from_str(schema)
            .map_err(|e| Failure::Usage(format!("the schema of --json-schema is not JSON: {e}")))?;
        let schema = json!({ "name": "reply", "schema": schema });
        put("response_format", Some(json!({ "type": "json_schema", "json_schema": schema })));
    }
    Ok(request)
}

/// Standard output, on a terminal without what would move its cursor: nobody knows what a model says.
struct Reply {
    out: io::Stdout,
    is_terminal: bool,
}

impl Reply {
    fn new() -> Self {
        let out = io::stdout();
        Self { is_terminal: out.is_terminal(), out }
    }

    fn write(&mut self, text: &str) -> Result<(), Failure> {
        let shown = if self.is_terminal { printable(text) } else { text.to_owned() };
        self.out.write_all(shown.as_bytes()).and_then(|()| self.out.flush()).map_err(Failure::Output)
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::args::{Cli, Verb};

    fn asked(line: &[&str]) -> Result<Value, String> {
        let cli = Cli::try_parse_from([&["ark", "chat"], line].concat()).map_err(|e| e.to_string())?;
        let Verb::Chat(args) = cli.verb else { return Err("another verb".to_owned()) };
        request(&args, args.text.clone()).map_err(|e| e.to_string())
    }

    #[test]
    fn options_become_a_request_in_the_form_of_openai() {
        let user = json!({ "role": "user", "content": "hi" });
        assert_eq!(asked(&["hi"]), Ok(json!({ "messages": [user] })));
        let all =
            ["--model", "m", "--system", "s", "--seed", "7", "--max-tokens", "5", "--temperature", "0.5"];
        let schema = ["--json-schema", r#"{"type":"string"}"#, "--", "-x"];
        let request = asked(&[&all[..], &schema].concat()).unwrap();
        assert_eq!(
            request,
            json!({
                "messages": [{ "role": "system", "content": "s" }, { "role": "user", "content": "-x" }],
                "model": "m", "seed": 7, "max_tokens": 5, "temperature": 0.5,
                "response_format": {
                    "type": "json_schema", "json_schema": { "name": "reply", "schema": { "type": "string" } },
                },
            })
        );
        assert!(asked(&["--json-schema", "{", "hi"]).unwrap_err().contains("--json-schema is not JSON"));
    }

    #[test]
    fn standard_input_is_text_of_a_bounded_length() {
        assert_eq!(text("-", &b"asked"[..]).unwrap(), "asked");
        assert_eq!(text("said", &b"asked"[..]).unwrap(), "said");
        assert!(text("-", &b"\xff"[..]).unwrap_err().to_string().contains("cannot read"));
        assert!(text("-", io::repeat(b'x')).unwrap_err().to_string().contains("10 MiB"));
    }
}
