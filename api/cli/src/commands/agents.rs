//! `ark create`, `ps`, `inspect` and `rm`.

use std::time::Duration;

use ark_client::{AgentQuery, Client, Error};
use ark_types::agent::{Agent, AgentList, AgentState, CreateAgent, Origin};
use ark_types::checkpoint::CheckpointPolicy;
use ark_types::healing::{AgentHealth, Continuity};
use ark_types::health_check::{HealthCheck, Probe};
use ark_types::problem::ProblemKind;
use ark_types::scheduling::Spread;

use crate::args::{AgentArgs, PsArgs, RmArgs};
use crate::failure::{Failure, summed_up};
use crate::host::Context;
use crate::output::{Colour, Ui, age, printable, size, span, table};

/// Names an error lists at most.
const MAX_LISTED: usize = 10;
/// Characters of a reason that `ark ps -a` shows.
pub(super) const REASON_WIDTH: usize = 60;

/// The request that options stand for.
///
/// # Errors
/// Options that say two things about the same: a template has its size, and is never booted again.
pub(crate) fn create_request(args: &AgentArgs) -> Result<CreateAgent, Failure> {
    if args.template.is_some() && (args.vcpus.is_some() || args.memory.is_some()) {
        let why = "an agent has the processors and the memory of its template: leave --vcpus and --memory out, or name an \
                   --image instead of the --template";
        return Err(Failure::Usage(why.to_owned()));
    }
    if args.template.is_some() && args.cold {
        let why =
            "--cold boots an image, and a template is no image: name an --image instead of the --template";
        return Err(Failure::Usage(why.to_owned()));
    }
    Ok(CreateAgent {
        name: args.name.clone(),
        image: args.template.is_none().then(|| args.image.clone()),
        template: args.template.clone(),
        cold: args.cold,
        vcpus: args.vcpus,
        memory_mib: args.memory,
        env: args.env.iter().cloned().collect(),
        auto_remove: false,
        labels: args.labels()?,
        owner: args.room.owner.clone().unwrap_or_default(),
        allow: args.allow.clone(),
        freeze_on_inference: args.freeze_on_inference,
        priority: args.room.priority,
        queue_timeout_ms: args.room.queue_timeout.map(|t| u64::try_from(t.as_millis()).unwrap_or(u64::MAX)),
        anti_affinity: None,
        spread: Spread::Soft,
        restart: args.upkeep.restart,
        ttl_s: args.ttl,
        idle_timeout_s: args.idle_timeout,
        checkpoint: args.upkeep.checkpoint,
        health_check: args.upkeep.health.check()?,
    })
}

/// `ark create`: writes the new agent's name.
pub(crate) async fn create(context: &Context, args: &AgentArgs) -> Result<(), Failure> {
    let request = create_request(args)?;
    let client = context.client_to_boot().await?;
    match client.create(&request).await {
        Ok(agent) => context.ui.show(&agent, |agent| agent.name.to_string()),
        Err(error) => Err(explain(&client, error).await),
    }
}

/// `ark ps`.
pub(crate) async fn ps(context: &Context, args: &PsArgs) -> Result<(), Failure> {
    let PsArgs { all, state, ref selector } = *args;
    let labels = selector.as_ref().map(ToString::to_string);
    let query = AgentQuery { all, state, labels };
    let mut list = context.client().await?.agents_where(&query).await?;
    // Who asks for a state that is over wants to see those.
    let all = all || state.is_some();
    list.agents.retain(|agent| all || is_living(agent));
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
    context.ui.show_removed(&removed)?;
    summed_up(context.ui, failures, args.agents.len(), "agents were not removed")
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
const fn is_living(agent: &Agent) -> bool {
    match agent.state {
        AgentState::Creating | AgentState::Running | AgentState::Paused | AgentState::Stopping => true,
        AgentState::Stopped | AgentState::Failed => agent.backoff_until_unix_ms.is_some(),
    }
}

/// An agent's state, and what else there is to say of it in a word.
fn state(agent: &Agent) -> String {
    match (&agent.health, agent.backoff_until_unix_ms) {
        (AgentHealth::Unresponsive { .. }, _) => format!("{} (unresponsive)", agent.state),
        (AgentHealth::Unhealthy { .. }, _) => format!("{} (unhealthy)", agent.state),
        (AgentHealth::Healthy, Some(_)) => format!("{} (restarting)", agent.state),
        (AgentHealth::Healthy, None) => agent.state.to_string(),
    }
}

/// How often an agent began anew.
fn restarts(agent: &Agent) -> u32 {
    agent.continuity.as_ref().map_or(0, |continuity| continuity.restarts)
}

const fn colour(agent: &Agent) -> Colour {
    match agent.state {
        AgentState::Running if !agent.health.is_healthy() => Colour::Red,
        AgentState::Running => Colour::Green,
        AgentState::Creating | AgentState::Paused | AgentState::Stopping | AgentState::Stopped => {
            Colour::Yellow
        }
        AgentState::Failed => Colour::Red,
    }
}

/// Where an agent comes from, in two words.
fn origin(agent: &Agent) -> String {
    match &agent.origin {
        Origin::Boot => "boot".to_owned(),
        Origin::Template { name } => format!("template {name}"),
        Origin::Snapshot { name } => format!("snapshot {name}"),
        Origin::Fork { name, .. } => format!("fork of {name}"),
        Origin::Checkpoint { taken_unix_ms, .. } => format!("checkpoint {} ago", age(*taken_unix_ms)),
    }
}

fn agent_table(ui: Ui, list: &AgentList, all: bool) -> String {
    let row = |agent: &Agent| {
        [
            agent.name.to_string(),
            agent.id.clone(),
            agent.image.to_string(),
            origin(agent),
            ui.paint(colour(agent), &state(agent)),
            restarts(agent).to_string(),
            agent.vcpus.to_string(),
            size(agent.memory_mib << 20),
            age(agent.created_unix_ms),
            agent.boot_ms.map(span).unwrap_or_default(),
        ]
    };
    let headings = ["NAME", "ID", "IMAGE", "ORIGIN", "STATE", "RESTARTS", "VCPUS", "MEMORY", "AGE", "START"];
    let rows: Vec<_> = list.agents.iter().map(row).collect();
    if !all {
        return table(headings, &rows);
    }
    let reason = |agent: &Agent| {
        let text = printable(agent.reason.as_deref().unwrap_or_default()).replace('\n', " ");
        let text: String = text.chars().take(REASON_WIDTH).collect();
        if agent.removed_unix_ms.is_some() { format!("removed: {text}") } else { text }
    };
    let [a, b, c, d, e, f, g, h, i, j] = headings;
    let rows: Vec<_> = rows
        .into_iter()
        .zip(&list.agents)
        .map(|([a, b, c, d, e, f, g, h, i, j], agent)| [a, b, c, d, e, f, g, h, i, j, reason(agent)])
        .collect();
    table([a, b, c, d, e, f, g, h, i, j, "REASON"], &rows)
}

/// How an agent is checked.
fn checked(how: &HealthCheck) -> String {
    let HealthCheck { probe, interval_s, failures, .. } = how;
    let what = match probe {
        Probe::Exec { command } => format!("by `{}`", printable(&command.join(" "))),
        Probe::Tcp { port } => format!("by a connection to port {port}"),
    };
    format!("{what} every {}, unhealthy after {failures} failures", span(u64::from(*interval_s) * 1000))
}

/// How often checkpoints are taken, and what came of it.
fn checkpoints(agent: &Agent, policy: CheckpointPolicy) -> String {
    let CheckpointPolicy { every_s, keep } = policy;
    let newest = match agent.checkpoints.last() {
        Some(newest) => {
            format!("{} kept, the newest {} ago", agent.checkpoints.len(), age(newest.taken_unix_ms))
        }
        None => "none yet".to_owned(),
    };
    let every = span(u64::from(every_s) * 1000);
    let failure =
        agent.checkpoint_failure.as_deref().map(|why| format!("; the last failed: {}", printable(why)));
    format!("every {every}, {keep} at most: {newest}{}", failure.unwrap_or_default())
}

fn details(ui: Ui, agent: &Agent) -> String {
    let from = match &agent.origin {
        Origin::Fork { id, .. } => format!("{} ({id})", origin(agent)),
        _ => origin(agent),
    };
    let mut rows = vec![
        ("name", agent.name.to_string()),
        ("id", agent.id.clone()),
        ("state", ui.paint(colour(agent), &state(agent))),
        ("origin", from),
        ("image", format!("{} ({})", agent.image, agent.image_digest)),
        ("vcpus", agent.vcpus.to_string()),
        ("memory", size(agent.memory_mib << 20)),
        ("created", format!("{} ago", age(agent.created_unix_ms))),
        ("owner", agent.owner.to_string()),
    ];
    if !agent.labels.is_empty() {
        let labels: Vec<String> = agent.labels.iter().map(|(key, value)| format!("{key}={value}")).collect();
        rows.push(("labels", labels.join(",")));
    }
    if let Some(millis) = agent.boot_ms {
        rows.push(("start", format!("took {}", span(millis))));
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
    if let Some(at) = agent.removed_unix_ms {
        rows.push(("removed", format!("{} ago", age(at))));
    }
    if agent.auto_remove {
        rows.push(("removal", "with the end of its first program".to_owned()));
    }
    rows.extend(upkeep(agent));
    rows.iter().map(|(key, value)| format!("{key:<10} {value}\n")).collect()
}

/// What becomes of an agent by itself, and what its restarts cost it.
fn upkeep(agent: &Agent) -> Vec<(&'static str, String)> {
    let mut rows = Vec::new();
    if !agent.allow.is_empty() {
        let allow: Vec<_> = agent.allow.iter().map(ToString::to_string).collect();
        let how = if agent.freeze_on_inference { " (standing still while it waits)" } else { "" };
        rows.push(("allowed", format!("{}{how}", allow.join(", "))));
    }
    if !agent.restart.is_never() {
        rows.push(("restart", agent.restart.to_string()));
    }
    if let Some(seconds) = agent.ttl_s {
        rows.push(("ttl", format!("{} after its creation", span(seconds.saturating_mul(1000)))));
    }
    if let Some(seconds) = agent.idle_timeout_s {
        rows.push(("idle", format!("removed when unused for {}", span(seconds.saturating_mul(1000)))));
    }
    if let Some(policy) = &agent.checkpoint {
        rows.push(("checkpoints", checkpoints(agent, *policy)));
    }
    if let Some(how) = &agent.health_check {
        rows.push(("checked", checked(how)));
    }
    match &agent.health {
        AgentHealth::Healthy => {}
        AgentHealth::Unresponsive { since_unix_ms } => {
            rows.push(("health", format!("its guest was not heard for {}", age(*since_unix_ms))));
        }
        AgentHealth::Unhealthy { since_unix_ms, why } => {
            rows.push(("health", format!("unhealthy for {}: {}", age(*since_unix_ms), printable(why))));
        }
    }
    if let Some(Continuity { restarts, cause, restored_from, lost_ms, at_unix_ms }) = &agent.continuity {
        let begun = match restored_from {
            Origin::Boot => "booted anew".to_owned(),
            Origin::Template { name } => format!("forked anew from the template {name}"),
            Origin::Snapshot { name } | Origin::Fork { name, .. } => format!("restored from {name}"),
            Origin::Checkpoint { snapshot, .. } => format!("restored from its checkpoint {snapshot}"),
        };
        let (when, lost, cause) = (age(*at_unix_ms), span(*lost_ms), printable(cause));
        rows.push(("restarts", format!("{restarts}, the last {when} ago: {cause}")));
        rows.push(("continuity", format!("{begun}; what it did in the {lost} before that is lost")));
    }
    rows
}

#[cfg(test)]
mod tests {
    use ark_types::healing::RestartPolicy;
    use serde_json::json;

    use super::*;

    fn agent() -> Agent {
        let json = json!({
            "id": "00112233aabbccdd", "name": "a1", "origin": { "from": "fork", "name": "a0", "id": "ff" },
            "image": "base", "image_digest": "sha256:00", "vcpus": 2, "memory_mib": 256, "state": "failed", "reason": "the guest\u{1b}[2J panicked", "created_unix_ms": 0,
            "boot_ms": 870, "auto_remove": false,
        });
        serde_json::from_value(json).unwrap()
    }

    #[test]
    fn the_table_shows_reasons_only_when_all_are_asked_for() {
        let ui = Ui::new(true);
        let list = AgentList { agents: vec![agent()], next_cursor: None };
        let years = age(0);
        let short = agent_table(ui, &list, false);
        assert!(
            short.starts_with(
                "NAME  ID                IMAGE  ORIGIN      STATE   RESTARTS  VCPUS  MEMORY   AGE"
            ),
            "{short}"
        );
        let line = format!(
            "a1    00112233aabbccdd  base   fork of a0  failed  0         2      256 MiB  {years}  870 ms\n"
        );
        assert!(short.ends_with(&line), "{short}");
        let long = agent_table(ui, &list, true);
        assert!(long.contains("REASON") && long.contains("the guest\\u{1b}[2J panicked"), "{long}");
    }

    #[test]
    fn restarts_and_what_they_cost_are_told() {
        let mut agent = agent();
        agent.restart = RestartPolicy::OnFailure { max_restarts: Some(3) };
        agent.continuity = Some(Continuity {
            restarts: 2,
            cause: "it was\u{1b} killed".to_owned(),
            restored_from: Origin::Template { name: "py".parse().unwrap() },
            lost_ms: 1500,
            at_unix_ms: 0,
        });
        assert!(!is_living(&agent));
        agent.backoff_until_unix_ms = Some(1);
        assert!(is_living(&agent));
        let text = details(Ui::new(true), &agent);
        for part in [
            "failed (restarting)",
            "on-failure:3",
            "restarts   2",
            "it was\\u{1b} killed",
            "template py; what it did in the",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
        (agent.state, agent.health) = (AgentState::Running, AgentHealth::Unresponsive { since_unix_ms: 0 });
        let list = AgentList { agents: vec![agent], next_cursor: None };
        let table = agent_table(Ui::new(true), &list, false);
        assert!(table.contains("running (unresponsive)  2 "), "{table}");
    }

    #[test]
    fn checkpoints_and_health_checks_are_told() {
        let mut agent = agent();
        agent.checkpoint = Some(CheckpointPolicy { every_s: 60, keep: 3 });
        let told = |agent: &Agent| details(Ui::new(true), agent);
        assert!(told(&agent).contains("every 60 s, 3 at most: none yet"), "{}", told(&agent));
        let checkpoint = json!({
            "snapshot": "b2".repeat(16), "taken_unix_ms": 0, "pause_us": 900, "durable_us": 7, "bytes": 1,
        });
        agent.checkpoints = vec![serde_json::from_value(checkpoint).unwrap()];
        agent.checkpoint_failure = Some("the disk\u{1b} is full".to_owned());
        let command = vec!["/bin/sh".to_owned(), "-c".to_owned(), "test -e /ok".to_owned()];
        let probe = Probe::Exec { command };
        agent.health_check =
            Some(HealthCheck { probe, interval_s: 5, timeout_s: 1, failures: 3, start_period_s: 0 });
        agent.state = AgentState::Running;
        agent.health = AgentHealth::Unhealthy { since_unix_ms: 0, why: "it ended with 1".to_owned() };
        for part in [
            "1 kept, the newest ",
            "the last failed: the disk\\u{1b} is full",
            "by `/bin/sh -c test -e /ok` every ",
            "unhealthy after 3 failures",
            "running (unhealthy)",
            ": it ended with 1",
        ] {
            assert!(told(&agent).contains(part), "{part}: {}", told(&agent));
        }
    }

    #[test]
    fn lists_in_errors_are_bounded() {
        let names: Vec<String> = (0..12).map(|n| format!("a{n}")).collect();
        assert!(listed(&names).ends_with("a9, …"));
        assert_eq!(listed(&names[..2]), "there are: a0, a1");
        assert!(listed(&[]).contains("ark create"));
    }
}
