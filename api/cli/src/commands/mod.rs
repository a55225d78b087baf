//! The verbs.

mod agents;
mod branches;
mod chat;
mod code;
pub(crate) mod cp;
mod doctor;
mod eval;
mod events;
mod images;
mod label;
mod logs;
mod machine;
mod models;
mod pools;
mod program;
mod scheduling;
mod services;
mod snapshots;
mod stop;
mod task_logs;
mod tasks;
mod templates;
mod top;

use clap::CommandFactory;
use serde_json::json;

use crate::args::{Cli, Verb};
use crate::failure::Failure;
use crate::host::Context;

/// Does what the user asked; the number is ark's exit code.
pub(crate) async fn perform(verb: Verb, context: &Context) -> Result<u8, Failure> {
    match verb {
        Verb::Run(args) => program::run(context, &args).await,
        Verb::Exec(args) => program::exec(context, &args).await,
        Verb::Create(args) => done(agents::create(context, &args.agent).await),
        Verb::Eval(args) => eval::eval(context, &args).await,
        Verb::Chat(args) => done(chat::chat(context, &args).await),
        Verb::Fork(args) => done(branches::fork(context, &args).await),
        Verb::Pause { agents } => done(branches::pause(context, &agents).await),
        Verb::Resume { agents } => done(branches::resume(context, &agents).await),
        Verb::Snapshot(args) => done(snapshots::perform(context, &args).await),
        Verb::Snapshots(args) => done(snapshots::ls(context, args).await),
        Verb::Restore(args) => done(snapshots::restore(context, &args).await),
        Verb::Rewind(args) => done(snapshots::rewind(context, &args).await),
        Verb::Receipt { agent } => done(branches::receipt(context, &agent).await),
        Verb::Cp(args) => done(cp::cp(context, args.source, args.target).await),
        Verb::Logs(args) => done(logs::logs(context, &args).await),
        Verb::Ps(args) => done(agents::ps(context, &args).await),
        Verb::Top(args) => done(top::top(context, &args).await),
        Verb::Events(args) => done(events::events(context, &args).await),
        Verb::Inspect { agent } => done(agents::inspect(context, &agent).await),
        Verb::Rm(args) => done(agents::rm(context, &args).await),
        Verb::Label(args) => done(label::label(context, &args).await),
        Verb::Images => done(images::images(context).await),
        Verb::Model { action } => done(models::perform(context, action).await),
        Verb::Models => done(models::ls(context).await),
        Verb::Template { action } => done(templates::perform(context, action).await),
        Verb::Templates => done(templates::ls(context).await),
        Verb::Pool { action } => done(pools::perform(context, action).await),
        Verb::Service { action } => services::perform(context, action).await,
        Verb::Task { action } => tasks::perform(context, action).await,
        Verb::Queue => done(scheduling::queue(context).await),
        Verb::Hosts => done(scheduling::hosts(context).await),
        Verb::Quota(args) => done(scheduling::quota(context, &args).await),
        Verb::Doctor => doctor::doctor(context).await,
        Verb::Stop => done(stop::stop(context).await),
        Verb::Machine { action } => machine::perform(context, action).await,
        Verb::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "ark", &mut script);
            let script = String::from_utf8_lossy(&script).into_owned();
            done(context.ui.show(&json!({ "script": script }), |_| script.clone()))
        }
        Verb::Version => {
            let version = env!("CARGO_PKG_VERSION");
            done(context.ui.show(&json!({ "version": version }), |_| format!("ark {version}")))
        }
    }
}

fn done(result: Result<(), Failure>) -> Result<u8, Failure> {
    result.map(|()| 0)
}
