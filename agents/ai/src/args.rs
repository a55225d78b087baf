//! What `ark-ai` is told.

use std::fs;
use std::io::{self, Read as _};
use std::path::PathBuf;

use ark_types::model::ModelName;
use ark_types::plain::plain;
use clap::{Args, Parser, Subcommand};
use serde_json::{Map, Value, json};

/// Largest text that is read from standard input or a file, bytes: the host takes no more in a call.
const MAX_TEXT: u64 = 10 << 20;

/// `ark-ai`.
#[derive(Debug, Parser)]
#[command(
    name = "ark-ai",
    version,
    about = "Has models say something, from within an agent that is allowed to",
    after_help = "The agent needs the permission: `ark run --allow inference …` gives it.\n\
                  Exit codes: 0; 1 the host or the model refused or failed; 2 wrong usage."
)]
pub(crate) struct Cli {
    /// Write results as JSON
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// Unix socket to speak to, instead of the host
    #[arg(long, global = true, hide = true)]
    pub(crate) socket: Option<PathBuf>,
    #[command(subcommand)]
    pub(crate) verb: Verb,
}

/// What is to be done.
#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// Ask a model something, and write its reply as it comes
    Chat {
        /// What holds for the whole conversation
        #[arg(long, value_name = "TEXT")]
        system: Option<String>,
        #[command(flatten)]
        saying: Saying,
        /// What to ask, or `-` to read it from standard input
        text: String,
    },
    /// Have a model go on with a text
    Generate {
        #[command(flatten)]
        saying: Saying,
        /// The text, or `-` to read it from standard input
        prompt: String,
    },
    /// Give each text a vector, one JSON array a line
    Embed {
        /// Model [default: the host's choice]
        #[arg(long)]
        model: Option<ModelName>,
        /// Texts, at most 64
        #[arg(required = true)]
        texts: Vec<String>,
    },
    /// Write the tokens of a text, as a model reads it
    Tokenize {
        /// Model [default: the host's choice]
        #[arg(long)]
        model: Option<ModelName>,
        /// The text, or `-` to read it from standard input
        text: String,
    },
    /// List the models that this agent may use
    Models,
}

/// How a model says something.
#[derive(Debug, Args)]
pub(crate) struct Saying {
    /// Model [default: the host's choice]
    #[arg(long)]
    pub(crate) model: Option<ModelName>,
    /// JSON schema that the reply matches: the schema itself, or @FILE
    #[arg(long, value_name = "SCHEMA")]
    pub(crate) json_schema: Option<String>,
    /// Most tokens of the reply
    #[arg(long, value_name = "N")]
    pub(crate) max_tokens: Option<u32>,
    /// 0 takes the likeliest token; larger values spread the choice
    #[arg(long, value_name = "T")]
    pub(crate) temperature: Option<f32>,
    /// The same seed and prompt give the same text
    #[arg(long, value_name = "N")]
    pub(crate) seed: Option<u32>,
    /// Text that ends the reply; may be given more than once
    #[arg(long, value_name = "TEXT")]
    pub(crate) stop: Vec<String>,
}

impl Saying {
    /// As parameters of the tools, with `more`.
    ///
    /// # Errors
    /// A sentence about the schema.
    pub(crate) fn parameters(&self, more: Value) -> Result<Value, String> {
        let mut sampling = Map::new();
        let mut put = |key: &str, value: Option<Value>| {
            if let Some(value) = value {
                sampling.insert(key.to_owned(), value);
            }
        };
        put("temperature", self.temperature.map(|t| json!(t)));
        put("seed", self.seed.map(|seed| json!(seed)));
        put("json_schema", self.json_schema.as_deref().map(schema).transpose()?);
        let mut parameters = named(self.model.as_ref(), more);
        if let Value::Object(parameters) = &mut parameters {
            parameters.insert("sampling".to_owned(), Value::Object(sampling));
            parameters.insert("stop".to_owned(), json!(self.stop));
            if let Some(most) = self.max_tokens {
                parameters.insert("max_tokens".to_owned(), json!(most));
            }
        }
        Ok(parameters)
    }
}

/// `parameters` with the name of a model.
pub(crate) fn named(model: Option<&ModelName>, mut parameters: Value) -> Value {
    if let (Some(model), Value::Object(parameters)) = (model, &mut parameters) {
        parameters.insert("model".to_owned(), json!(model));
    }
    parameters
}

fn schema(text: &str) -> Result<Value, String> {
    let read = match text.strip_prefix('@') {
        Some(path) => fs::read_to_string(path)
            .map_err(|e| format!("the schema in {path} cannot be read: {}", plain(&e)))?,
        None => text.to_owned(),
    };
    serde_json::from_str(&read).map_err(|e| format!("the schema is not JSON: {e}"))
}

/// The text of an argument: itself, or what standard input has.
///
/// # Errors
/// A sentence about standard input.
pub(crate) fn text(argument: String) -> Result<String, String> {
    if argument != "-" {
        return Ok(argument);
    }
    let mut text = String::new();
    let read = io::stdin().lock().take(MAX_TEXT + 1).read_to_string(&mut text);
    read.map_err(|e| format!("standard input cannot be read: {}", plain(&e)))?;
    if u64::try_from(text.len()).unwrap_or(u64::MAX) > MAX_TEXT {
        return Err(format!("standard input has more than {} MiB, which no model reads", MAX_TEXT >> 20));
    }
    Ok(text)
}
