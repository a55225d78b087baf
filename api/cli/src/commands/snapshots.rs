//! `ark snapshot`, `snapshots`, `restore` and `rewind`.

use ark_types::agent::AgentName;
use ark_types::snapshot::{CreateSnapshot, RestoreSnapshot, RewindAgent, SnapshotKind, SnapshotList};

use super::agents::explain;
use crate::args::{RestoreArgs, RewindArgs, SnapshotAction, SnapshotArgs, SnapshotsArgs};
use crate::failure::{Failure, summed_up};
use crate::host::Context;
use crate::output::{age, micros, printable, size, table};
use crate::progress::Spinner;

/// `ark snapshot …`.
pub(crate) async fn perform(context: &Context, args: &SnapshotArgs) -> Result<(), Failure> {
    match &args.action {
        None => take(context, args).await,
        Some(_) if args.agent.is_some() || !args.words.is_empty() => Err(Failure::Usage(
            "a snapshot can be taken, or snapshots listed, removed or compacted, but not both at once: a name that is also \
             one of these commands comes after `--`"
                .to_owned(),
        )),
        Some(SnapshotAction::Ls(args)) => ls(context, *args).await,
        Some(SnapshotAction::Rm { orphans, names }) => rm(context, names, *orphans).await,
        Some(SnapshotAction::Compact { name }) => compact(context, name).await,
    }
}

/// The agent and the name that were meant.
fn agent_and_name(args: &SnapshotArgs) -> Result<(&str, AgentName), Failure> {
    let (agent, name) = match (&args.agent, args.words.as_slice()) {
        (Some(agent), [name]) | (None, [agent, name]) => (agent, name),
        (Some(_), _) => {
            return Err(Failure::Usage("with --agent, one name is needed: that of the snapshot".to_owned()));
        }
        (None, _) => {
            let why = "two names are needed, the agent's and the snapshot's: `ark snapshot a1 before-edit`";
            return Err(Failure::Usage(why.to_owned()));
        }
    };
    let name = name.parse().map_err(|e: ark_types::agent::InvalidName| Failure::Usage(e.to_string()))?;
    Ok((agent, name))
}

/// Takes one and writes its name.
async fn take(context: &Context, args: &SnapshotArgs) -> Result<(), Failure> {
    let (agent, name) = agent_and_name(args)?;
    let client = context.client().await?;
    let spinner = Spinner::new(context.ui, &format!("taking a snapshot of {agent}"));
    let taken = client.take_snapshot(agent, &CreateSnapshot { name }).await;
    drop(spinner);
    match taken {
        Ok(snapshot) => context.ui.show(&snapshot, |snapshot| snapshot.name.to_string()),
        Err(error) => Err(explain(&client, error).await),
    }
}

/// Lists snapshots.
pub(crate) async fn ls(context: &Context, args: SnapshotsArgs) -> Result<(), Failure> {
    let list = context.client().await?.snapshots(args.all).await?;
    context.ui.show(&list, snapshot_table)
}

/// Every snapshot is tried; what fails is told for each.
async fn rm(context: &Context, names: &[String], orphans: bool) -> Result<(), Failure> {
    let client = context.client().await?;
    let mut removed = Vec::new();
    let mut failures = Vec::new();
    for name in names {
        match client.delete_snapshot(name, orphans).await {
            Ok(()) => removed.push(name),
            Err(error) => failures.push(error.into()),
        }
    }
    context.ui.show_removed(&removed)?;
    summed_up(context.ui, failures, names.len(), "snapshots were not removed")
}

async fn compact(context: &Context, name: &str) -> Result<(), Failure> {
    let client = context.client().await?;
    let spinner = Spinner::new(context.ui, &format!("compacting {name}"));
    let compacted = client.compact(name).await;
    drop(spinner);
    context.ui.show(&compacted?, |snapshot| snapshot.name.to_string())
}

/// `ark restore`: writes the new agent's name.
pub(crate) async fn restore(context: &Context, args: &RestoreArgs) -> Result<(), Failure> {
    let request = RestoreSnapshot {
        name: args.name.clone(),
        allow: args.allow.clone(),
        freeze_on_inference: args.freeze_on_inference,
        restart: args.upkeep.restart,
        checkpoint: args.upkeep.checkpoint,
        health_check: args.upkeep.health.check()?,
    };
    let client = context.client_to_boot().await?;
    let agent = client.restore(&args.snapshot, &request).await?;
    context.ui.show(&agent, |agent| agent.name.to_string())
}

/// `ark rewind`: writes the agent's name.
pub(crate) async fn rewind(context: &Context, args: &RewindArgs) -> Result<(), Failure> {
    let client = context.client().await?;
    match client.rewind(&args.agent, &RewindAgent { snapshot: args.snapshot.clone() }).await {
        Ok(agent) => context.ui.show(&agent, |agent| agent.name.to_string()),
        Err(error) => Err(explain(&client, error).await),
    }
}

fn snapshot_table(list: &SnapshotList) -> String {
    let rows: Vec<_> = list
        .snapshots
        .iter()
        .map(|snapshot| {
            let kind = match snapshot.kind {
                SnapshotKind::Full => "full".to_owned(),
                SnapshotKind::Diff => {
                    format!("diff over {}", printable(snapshot.base.as_deref().unwrap_or("?")))
                }
            };
            let kind = if snapshot.is_checkpoint { format!("checkpoint, {kind}") } else { kind };
            [
                snapshot.name.to_string(),
                snapshot.agent.to_string(),
                snapshot.image.to_string(),
                kind,
                size(snapshot.bytes),
                micros(snapshot.pause_us),
                micros(snapshot.durable_us),
                age(snapshot.created_unix_ms),
                snapshot.children.to_string(),
                snapshot.agents.to_string(),
            ]
        })
        .collect();
    let headings =
        ["NAME", "AGENT", "IMAGE", "KIND", "SIZE", "PAUSE", "DURABLE", "AGE", "CHILDREN", "AGENTS"];
    table(headings, &rows)
}
