//! `ark`: the command line of NOA ARK.
//!
//! | module | does |
//! |---|---|
//! | `args`, `parse` | the command line |
//! | `host`, `probe`, `daemon`, `machine` | decide where agents run, and get there |
//! | `commands`, `session`, `signals`, `terminal` | the verbs, and programs with their streams |
//! | `output`, `progress`, `failure` | what users and scripts see |

mod args;
mod commands;
mod daemon;
mod dirs;
mod failure;
mod host;
mod identity;
mod machine;
mod output;
mod parse;
mod probe;
mod progress;
mod session;
mod signals;
mod terminal;

use std::process::ExitCode;

use ark_types::problem::{Problem, ProblemKind};
use clap::Parser;

use args::Cli;
use dirs::Dirs;
use failure::{ARK_FAILED, Failure};
use host::Context;
use output::Ui;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    let json = cli.global.json;
    match run(cli) {
        Ok(code) => ExitCode::from(code),
        Err(failure) => {
            if !failure.is_silent() {
                tell(json, &failure.problem(), &failure.to_string());
            }
            ExitCode::from(failure.exit_code())
        }
    }
}

fn run(cli: Cli) -> Result<u8, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|source| Failure::System { what: "cannot start", source })?;
    let context = Context { ui: Ui::new(cli.global.json), global: cli.global, dirs: Dirs::locate()? };
    let result = runtime.block_on(commands::perform(cli.verb, &context));
    // A thread may sit in a read of the terminal: it ends with the process.
    runtime.shutdown_background();
    result
}

/// Writes an error, for machines or for people.
fn tell(json: bool, problem: &Problem, message: &str) {
    match serde_json::to_string(problem) {
        Ok(line) if json => eprintln!("{line}"),
        _ => output::print_error(message),
    }
}

/// What clap has to say: help and versions go to standard output, errors are ark's.
fn usage(error: &clap::Error) -> ExitCode {
    if !error.use_stderr() {
        // A closed standard output is no failure of --help.
        let _ = error.print();
        return ExitCode::SUCCESS;
    }
    let json = std::env::args_os().take_while(|arg| arg != "--").any(|arg| arg == "--json");
    if json {
        let text = error.render().to_string();
        tell(true, &Problem::new(ProblemKind::BadRequest, text.trim()), "");
    } else {
        let _ = error.print();
    }
    ExitCode::from(ARK_FAILED)
}
