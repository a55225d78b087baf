//! `ark chat`.

use ark_types::model::ModelName;
use clap::Args;

/// `ark chat`.
#[derive(Debug, Args)]
#[command(after_help = "\
The reply is written as it comes; with --json, whole and as OpenAI's API has it.
Try: ark chat 'Which agent should sort invoices into folders by year?'")]
pub(crate) struct ChatArgs {
    /// Model [default: arkd's choice]
    #[arg(long, value_name = "MODEL")]
    pub(crate) model: Option<ModelName>,
    /// What holds for the whole conversation
    #[arg(long, value_name = "TEXT")]
    pub(crate) system: Option<String>,
    /// JSON schema that the reply matches
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
    /// What to ask, or `-` to read it from standard input; after `--` it may begin with a dash
    pub(crate) text: String,
}
