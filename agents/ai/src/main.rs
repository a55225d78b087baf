//! `ark-ai`: has models say something from within an agent, over the host's vsock port for MCP.

mod args;

use std::io::{self, Write as _};
use std::process::ExitCode;

use ark_ai::mcp::{AiError, Session, Socket};
use ark_link::Address;
use ark_link::socket::HOST_CID;
use ark_types::guest::MCP_PORT;
use clap::Parser as _;
use serde_json::{Value, json};

use args::{Cli, Verb, named, text};

/// Exit code when the host or the model refused or failed.
const FAILED: u8 = 1;
/// Exit code for wrong usage, clap's.
const USAGE: u8 = 2;

/// Why nothing came of it.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("{0}")]
    Usage(String),
    #[error(transparent)]
    Ai(#[from] AiError),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("ark-ai: {failure}");
            ExitCode::from(match failure {
                Failure::Usage(_) => USAGE,
                Failure::Ai(_) => FAILED,
            })
        }
    }
}

fn run(cli: Cli) -> Result<(), Failure> {
    let address = match cli.socket {
        Some(path) => Address::Unix(path),
        None => Address::Vsock { cid: HOST_CID, port: MCP_PORT },
    };
    let begin = || Session::connect(&address);
    match cli.verb {
        Verb::Chat { system, saying, text: ask } => {
            let ask = text(ask).map_err(Failure::Usage)?;
            let system = system.map(|text| json!({ "role": "system", "content": text }));
            let user = json!({ "role": "user", "content": ask });
            let messages: Vec<Value> = system.into_iter().chain([user]).collect();
            let parameters = saying.parameters(json!({ "messages": messages })).map_err(Failure::Usage)?;
            say(&mut begin()?, "chat", &parameters, "/message/content", cli.json)?;
        }
        Verb::Generate { saying, prompt } => {
            let prompt = text(prompt).map_err(Failure::Usage)?;
            let parameters = saying.parameters(json!({ "prompt": prompt })).map_err(Failure::Usage)?;
            say(&mut begin()?, "generate", &parameters, "/text", cli.json)?;
        }
        Verb::Embed { model, texts } => {
            let result = ask(&mut begin()?, "embed", &named(model.as_ref(), json!({ "input": texts })))?;
            lines(&result, "embeddings", cli.json)?;
        }
        Verb::Tokenize { model, text: words } => {
            let words = text(words).map_err(Failure::Usage)?;
            let result = ask(&mut begin()?, "tokenize", &named(model.as_ref(), json!({ "text": words })))?;
            lines(&result, "pieces", cli.json)?;
        }
        Verb::Models => models(&mut begin()?, cli.json)?,
    }
    Ok(())
}

fn ask(session: &mut Session<Socket>, tool: &str, parameters: &Value) -> Result<Value, AiError> {
    session.call(tool, parameters, &mut |_| Ok(()))
}

/// Has a model say something, and writes that as it comes, or the whole result as JSON.
fn say(
    session: &mut Session<Socket>,
    tool: &str,
    parameters: &Value,
    place: &str,
    as_json: bool,
) -> Result<(), AiError> {
    if as_json {
        let result = ask(session, tool, parameters)?;
        return write(&format!("{result}\n"));
    }
    let (mut stdout, mut said) = (io::stdout().lock(), String::new());
    let result = session.call(tool, parameters, &mut |more| {
        said.push_str(more);
        stdout.write_all(more.as_bytes())?;
        stdout.flush()
    });
    let rest = match &result {
        Ok(result) => {
            let whole = result.pointer(place).and_then(Value::as_str).unwrap_or_default();
            // Where a model called tools, its text is another than what it said.
            let calls = result.pointer("/message/tool_calls").map(|calls| format!("{calls}\n"));
            format!("{}\n{}", whole.strip_prefix(&said).unwrap_or_default(), calls.unwrap_or_default())
        }
        Err(_) if said.is_empty() => String::new(),
        Err(_) => "\n".to_owned(),
    };
    stdout.write_all(rest.as_bytes()).and_then(|()| stdout.flush()).map_err(AiError::Output)?;
    result.map(drop)
}

/// Writes each value of the list `key` as a line of JSON, or the whole result as one.
fn lines(result: &Value, key: &str, as_json: bool) -> Result<(), AiError> {
    let text = match result.get(key).and_then(Value::as_array) {
        Some(values) if !as_json => values.iter().map(|value| format!("{value}\n")).collect(),
        _ => format!("{result}\n"),
    };
    write(&text)
}

fn models(session: &mut Session<Socket>, as_json: bool) -> Result<(), AiError> {
    let resources = session.resources()?;
    let text = if as_json {
        format!("{}\n", json!({ "models": resources }))
    } else {
        let word = |resource: &Value, key: &str| {
            let text = resource.get(key).and_then(Value::as_str).unwrap_or_default();
            text.replace(char::is_control, " ")
        };
        resources.iter().map(|r| format!("{:<20} {}\n", word(r, "name"), word(r, "description"))).collect()
    };
    write(&text)
}

fn write(text: &str) -> Result<(), AiError> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).map_err(AiError::Output)
}
