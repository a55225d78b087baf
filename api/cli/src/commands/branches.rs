//! `ark fork`, `pause`, `resume` and `receipt`.

use ark_types::agent::AgentList;
use ark_types::receipt::{CheckKind, Evidence, Receipt};
use ark_types::snapshot::ForkAgent;

use super::agents::explain;
use crate::args::ForkArgs;
use crate::failure::{Failure, summed_up};
use crate::host::Context;
use crate::output::{Colour, Ui, age, printable, span, table};
use crate::progress::Spinner;

/// Branches an agent: writes the names of the forks, and says of each that failed why.
pub(crate) async fn fork(context: &Context, args: &ForkArgs) -> Result<(), Failure> {
    let request = ForkAgent {
        count: args.count,
        allow: args.allow.clone(),
        freeze_on_inference: args.freeze_on_inference,
        restart: args.upkeep.restart,
        checkpoint: args.upkeep.checkpoint,
        health_check: args.upkeep.health.check()?,
    };
    let client = context.client().await?;
    let spinner = Spinner::new(context.ui, &format!("forking {}", args.agent));
    let forked = client.fork(&args.agent, &request).await;
    drop(spinner);
    let forked = match forked {
        Ok(forked) => forked,
        Err(error) => return Err(explain(&client, error).await),
    };
    context
        .ui
        .show(&forked, |forked| forked.agents.iter().map(|agent| format!("{}\n", agent.name)).collect())?;
    let failed = |fork: &ark_types::snapshot::FailedFork| {
        Failure::Partly(format!("the fork {} did not come to be: {}", fork.name, fork.why))
    };
    let total = forked.agents.len().saturating_add(forked.failed.len());
    let failures = forked.failed.iter().map(failed).collect();
    summed_up(context.ui, failures, total, "forks did not come to be")
}

/// Lets agents stand still: every one is tried, and the names of those that do are written.
pub(crate) async fn pause(context: &Context, names: &[String]) -> Result<(), Failure> {
    order(context, names, Order::Pause).await
}

/// Lets paused agents go on, likewise.
pub(crate) async fn resume(context: &Context, names: &[String]) -> Result<(), Failure> {
    order(context, names, Order::Resume).await
}

#[derive(Clone, Copy)]
enum Order {
    Pause,
    Resume,
}

async fn order(context: &Context, names: &[String], order: Order) -> Result<(), Failure> {
    let client = context.client().await?;
    let mut list = AgentList { agents: Vec::new(), next_cursor: None };
    let mut failures = Vec::new();
    for name in names {
        let result = match order {
            Order::Pause => client.pause(name).await,
            Order::Resume => client.resume(name).await,
        };
        match result {
            Ok(agent) => list.agents.push(agent),
            Err(error) => failures.push(explain(&client, error).await),
        }
    }
    context.ui.show(&list, |list| list.agents.iter().map(|agent| format!("{}\n", agent.name)).collect())?;
    let what = match order {
        Order::Pause => "agents were not paused",
        Order::Resume => "agents were not resumed",
    };
    summed_up(context.ui, failures, names.len(), what)
}

/// Shows an agent's receipt.
pub(crate) async fn receipt(context: &Context, name: &str) -> Result<(), Failure> {
    let client = context.client().await?;
    match client.receipt(name).await {
        Ok(receipt) => context.ui.show(&receipt, |receipt| receipt_text(context.ui, receipt)),
        Err(error) => Err(explain(&client, error).await),
    }
}

/// A check in words.
const fn check_words(check: CheckKind) -> &'static str {
    match check {
        CheckKind::Random => "random numbers are its own",
        CheckKind::EvaluatorRandom => "evaluator's random numbers are its own",
        CheckKind::Clock => "clock is right",
        CheckKind::MachineId => "machine-id is its own",
        CheckKind::Hostname => "host name is its own",
        CheckKind::VsockToGuest => "host reaches guest",
        CheckKind::VsockToHost => "guest reaches host",
        CheckKind::Renewals => "renewed once more",
        CheckKind::Secrets => "parent's secrets are gone",
    }
}

const fn evidence_words(evidence: Evidence) -> &'static str {
    match evidence {
        Evidence::HostObserved => "host saw it",
        Evidence::GuestReported => "guest says so",
    }
}

fn receipt_text(ui: Ui, receipt: &Receipt) -> String {
    let facts = [
        ("agent", format!("{} ({})", receipt.name, printable(&receipt.agent_id))),
        ("snapshot", printable(&receipt.snapshot)),
        ("generation", receipt.generation.to_string()),
        ("nonce", printable(&receipt.nonce)),
        ("checked", format!("{} ago, in {}", age(receipt.at_unix_ms), span(receipt.took_ms))),
        ("SHA-256", printable(&receipt.sha256)),
    ];
    let rows: Vec<_> = receipt
        .checks
        .iter()
        .map(|check| {
            let (colour, result) =
                if check.passed { (Colour::Green, "passed") } else { (Colour::Red, "failed") };
            [
                check_words(check.check).to_owned(),
                ui.paint(colour, result),
                evidence_words(check.evidence).to_owned(),
                // The guest's words: on one line, whatever they are.
                printable(&check.answer).replace('\n', " "),
            ]
        })
        .collect();
    let facts: String = facts.iter().map(|(key, value)| format!("{key:<10} {value}\n")).collect();
    format!("{facts}\n{}", table(["CHECK", "RESULT", "EVIDENCE", "ANSWER"], &rows))
}
