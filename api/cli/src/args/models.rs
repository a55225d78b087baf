//! `ark model`.

use std::path::PathBuf;

use ark_types::model::{MAX_CONTEXT, ModelName};
use clap::{Args, Subcommand};

/// `ark model …`.
#[derive(Debug, Subcommand)]
pub(crate) enum ModelAction {
    /// List models
    Ls,
    /// Add a model from a GGUF file
    Add(ModelAddArgs),
    /// Show everything about a model
    Show {
        /// Name of the model
        model: ModelName,
    },
    /// Have a model loaded ahead of the first call
    Load {
        /// Name of the model
        model: ModelName,
    },
    /// Remove models, and the VMs that serve them
    Rm {
        /// Names of the models
        #[arg(required = true, value_name = "MODEL")]
        models: Vec<ModelName>,
    },
}

/// `ark model add`.
#[derive(Debug, Args)]
#[command(after_help = "\
The file is copied to where arkd keeps models, and checked: what is no GGUF file, is damaged, has an architecture that is not
supported or would take more memory than the host has is refused, and nothing of it is left.")]
pub(crate) struct ModelAddArgs {
    /// GGUF file on this machine
    pub(crate) file: PathBuf,
    /// Name that callers know it by
    #[arg(long)]
    pub(crate) name: ModelName,
    /// Longest prompt and reply together, tokens [default: what it was trained for, at most 4096]
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=MAX_CONTEXT), value_name = "TOKENS")]
    pub(crate) context: Option<u64>,
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use crate::args::{Cli, Verb};

    use super::*;

    fn verb(line: &[&str]) -> Result<Verb, String> {
        Cli::try_parse_from([&["ark"], line].concat()).map(|cli| cli.verb).map_err(|e| e.to_string())
    }

    #[test]
    fn a_model_is_listed_added_shown_loaded_or_removed() {
        let line = ["model", "add", "./qwen.gguf", "--name", "qwen", "--context", "4096"];
        let Ok(Verb::Model { action: ModelAction::Add(args) }) = verb(&line) else { panic!("it adds") };
        assert_eq!((args.name.as_ref(), args.context), ("qwen", Some(4096)));
        for line in [&["models"][..], &["model", "ls"], &["model", "show", "a"], &["model", "rm", "a", "b"]] {
            assert!(verb(line).is_ok(), "{line:?}");
        }
        assert!(verb(&["model", "load", "router"]).is_ok());
        assert!(verb(&["model", "add", "x.gguf"]).unwrap_err().contains("--name"));
        assert!(verb(&["model", "add", "x", "--name", "Qwen2.5"]).unwrap_err().contains("use 1 to 48"));
        assert!(verb(&["model", "add", "x", "--name", "a", "--context", "0"]).unwrap_err().contains("1..="));
        assert!(verb(&["model", "rm"]).is_err());
    }
}
