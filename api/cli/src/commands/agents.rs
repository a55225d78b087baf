//! `ark create`, `ps`, `inspect` and `rm`.

use std::time::Duration;

use ark_client::{Client, Error};
use ark_types::agent::{Agent, AgentList, AgentState, CreateAgent};
use ark_types::problem::ProblemKind;
use serde_json::json;

use crate::args::{AgentArgs, RmArgs};
use crate::failure::Failure;
use crate::host::Context;
use crate::output::{Colour, Ui, age, print_error, printable, size, span, table};

/// Names an error lists at most.
const MAX_LISTED: usize = 10;
/// Characters of a reason that `ark ps -a` shows.
const REASON_WIDTH: usize = 60;

/// The request that options stand for.
pub(crate) fn create_request(args: &AgentArgs) -> CreateAgent {
    CreateAgent {
        name: args.name.clone(),
        image: args.image.clone(),
        vcpus: args.vcpus,
        memory_mib: args.memory,
        env: args.env.iter().cloned().collect(),
        auto_remove: false,
    }
}

/// `ark create`: writes the new agent's name.
pub(crate) async fn create(context: &Context, args: &AgentArgs) -> Result<(), Failure> {
    let client = context.client_to_boot().await?;
    match client.create(&create_request(args)).await {
        Ok(agent) => context.ui.show(&agent, |agent| agent.name.to_string()),
        Err(error) => Err(explain(&client, error).await),
    }
}

/// `ark ps`.
pub(crate) async fn ps(context: &Context, all: bool) -> Result<(), Failure> {
    let mut list = context.client().await?.agents().await?;
    list.agents.retain(|agent| all || is_living(agent.state));
    context.ui.show(&list, |list| agent_table(context.ui, list, all))
}

/// `ark inspect`.
pub(crate) async fn inspect(context: &Context, name: &str) -> Result<(), Failure> {
    let client = context.client().await?;
    match client.agent(name).await {
        Ok(agent) => context.ui.show(&agent, |agent| details(context.ui, agent)),
        Err(error) => Err(explain(&client, error).await),
    }
}

/// `ark rm`: every agent is tried; what fails is told for each.
pub(crate) async fn rm(context: &Context, args: &RmArgs) -> Result<(), Failure> {
    let client = context.client().await?;
    let mut removed = Vec::new();
    let mut failures = Vec::new();
    for name in &args.agents {
        match client.delete(name, args.force.then_some(Duration::ZERO)).await {
            Ok(()) => removed.push(name),
            Err(Error::Problem(p)) if args.force && p.kind == ProblemKind::AgentNotFound => {}
            Err(error) => failures.push(explain(&client, error).await),
        }
    }
    context
        .ui
        .show(&json!({ "removed": removed }), |_| removed.iter().map(|name| format!("{name}\n")).collect())?;
    let last = failures.pop();
    match last {
        None => Ok(()),
        Some(only) if failures.is_empty() => Err(only),
        Some(last) => {
            let all: Vec<String> = failures.iter().chain([&last]).map(ToString::to_string).collect();
            if !context.ui.json {
                all.iter().for_each(|message| print_error(message));
            }
            let details = if context.ui.json { format!(": {}", all.join("; ")) } else { String::new() };
            Err(Failure::Partly(format!(
                "{} of {} agents were not removed{details}",
                all.len(),
                args.agents.len()
            )))
        }
    }
}

/// Adds to an error what arkd itself does not say: a name that is no agent's is mostly a slip, and the right one is among
/// those there are.
pub(crate) async fn explain(client: &Client, error: Error) -> Failure {
    if error.problem().is_none_or(|p| p.kind != ProblemKind::AgentNotFound) {
        return error.into();
    }
    let known = client.agents().await.map(|list| list.agents).unwrap_or_default();
    let names: Vec<String> = known.iter().map(|agent| agent.name.to_string()).collect();
    Failure::Hinted { error, hint: listed(&names) }
}

fn listed(names: &[String]) -> String {
    let Some(shown) = names.get(..names.len().min(MAX_LISTED)).filter(|n| !n.is_empty()) else {
        return "none is there yet: `ark create` makes one".to_owned();
    };
    let more = if names.len() > MAX_LISTED { ", …" } else { "" };
    format!("there are: {}{more}", shown.join(", "))
}

/// Whether an agent is not over.
const fn is_living(state: AgentState) -> bool {
    match state {
        AgentState::Creating | AgentState::Running | AgentState::Stopping => true,
        AgentState::Stopped | AgentState::Failed => false,
    }
}

const fn colour(state: AgentState) -> Colour {
    match state {
        AgentState::Running => Colour::Green,
        AgentState::Creating | AgentState::Stopping | AgentState::Stopped => Colour::Yellow,
        AgentState::Failed => Colour::Red,
    }
}

fn agent_table(ui: Ui, list: &AgentList, all: bool) -> String {
    let row = |agent: &Agent| {
        [
            agent.name.to_string(),
            agent.id.clone(),
            agent.image.to_string(),
            ui.paint(colour(agent.state), &agent.state.to_string()),
            agent.vcpus.to_string(),
            size(agent.memory_mib << 20),
            age(agent.created_unix_ms),
            agent.boot_ms.map(span).unwrap_or_default(),
        ]
    };
    let headings = ["NAME", "ID", "IMAGE", "STATE", "VCPUS", "MEMORY", "AGE", "BOOT"];
    let rows: Vec<_> = list.agents.iter().map(row).collect();
    if !all {
        return table(headings, &rows);
    }
    let reason = |agent: &Agent| {
        let text = printable(agent.reason.as_deref().unwrap_or_default()).replace('\n', " ");
        text.chars().take(REASON_WIDTH).collect::<String>()
    };
    let [a, b, c, d, e, f, g, h] = headings;
    let rows: Vec<_> = rows
        .into_iter()
        .zip(&list.agents)
        .map(|([a, b, c, d, e, f, g, h], agent)| [a, b, c, d, e, f, g, h, reason(agent)])
        .collect();
    table([a, b, c, d, e, f, g, h, "REASON"], &rows)
}

fn details(ui: Ui, agent: &Agent) -> String {
    let mut rows = vec![
        ("name", agent.name.to_string()),
        ("id", agent.id.clone()),
        ("state", ui.paint(colour(agent.state), &agent.state.to_string())),
        ("image", format!("{} ({})", agent.image, agent.image_digest)),
        ("vcpus", agent.vcpus.to_string()),
        ("memory", size(agent.memory_mib << 20)),
        ("created", format!("{} ago", age(agent.created_unix_ms))),
    ];
    if let Some(millis) = agent.boot_ms {
        rows.push(("boot", span(millis)));
    }
    if let Some(pid) = agent.vmm_pid {
        rows.push(("VMM's pid", pid.to_string()));
    }
    if let Some(beat) = &agent.heartbeat {
        let load = f64::from(beat.load1_x100) / 100.0;
        let free = size(beat.mem_available_kib << 10);
        let (seen, up) = (age(beat.at_unix_ms), span(beat.uptime_ms));
        rows.push(("heartbeat", format!("{seen} ago: up {up}, load {load:.2}, {free} available")));
    }
    if let Some(reason) = &agent.reason {
        rows.push(("reason", printable(reason)));
    }
    if let Some(exit) = &agent.exit {
        let detail = exit.detail.as_deref().map(|d| format!(": {}", printable(d))).unwrap_or_default();
        rows.push(("VMM's end", format!("{}{detail}", exit.reason)));
    }
    if agent.auto_remove {
        rows.push(("removal", "with the end of its first program".to_owned()));
    }
    rows.iter().map(|(key, value)| format!("{key:<10} {value}\n")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn agent() -> Agent {
        let json = json!({
            "id": "00112233aabbccdd", "name": "a1", "image": "base", "image_digest": "sha256:00", "vcpus": 2,
            "memory_mib": 256, "state": "failed", "reason": "the guest\u{1b}[2J panicked", "created_unix_ms": 0,
            "boot_ms": 870, "auto_remove": false,
        });
        serde_json::from_value(json).unwrap()
    }

    #[test]
    fn the_table_shows_reasons_only_when_all_are_asked_for() {
        let ui = Ui::new(true);
        let list = AgentList { agents: vec![agent()] };
        let years = age(0);
        let short = agent_table(ui, &list, false);
        assert!(short.starts_with("NAME  ID                IMAGE  STATE   VCPUS  MEMORY   AGE"), "{short}");
        let line = format!("a1    00112233aabbccdd  base   failed  2      256 MiB  {years}  870 ms\n");
        assert!(short.ends_with(&line), "{short}");
        let long = agent_table(ui, &list, true);
        assert!(long.contains("REASON") && long.contains("the guest\\u{1b}[2J panicked"), "{long}");
    }

    #[test]
    fn lists_in_errors_are_bounded() {
        let names: Vec<String> = (0..12).map(|n| format!("a{n}")).collect();
        assert!(listed(&names).ends_with("a9, …"));
        assert_eq!(listed(&names[..2]), "there are: a0, a1");
        assert!(listed(&[]).contains("ark create"));
    }
}
