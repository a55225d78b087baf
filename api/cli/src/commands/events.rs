//! `ark events`: what happened, page by page and then as it happens.

use ark_client::{EventQuery, EventStream};
use ark_types::event::{Event, Outcome, Recorded};
use ark_types::healing::{AgentHealth, Continuity};
use ark_types::pool::PoolPolicy;
use ark_types::scheduling::Quota;
use ark_types::task::TaskWork;

use crate::args::EventsArgs;
use crate::failure::Failure;
use crate::host::Context;
use crate::output::{Ui, age, micros, printable, span};

/// Writes a line for each event; with `--json`, the event as it is.
pub(crate) async fn events(context: &Context, args: &EventsArgs) -> Result<(), Failure> {
    let client = context.client().await?;
    let mut query = EventQuery { after: args.after, stream: args.stream.clone() };
    if args.follow {
        return follow(context.ui, client.follow_events(&query).await?).await;
    }
    loop {
        let page = client.events(&query).await?;
        for event in &page.events {
            show(context.ui, event)?;
        }
        if page.next_after >= page.newest || query.after == Some(page.next_after) {
            return Ok(());
        }
        query.after = Some(page.next_after);
    }
}

async fn follow(ui: Ui, mut stream: EventStream) -> Result<(), Failure> {
    let mut last = None;
    while let Some(event) = stream.next().await? {
        show(ui, &event)?;
        last = Some(event.position);
    }
    let again = last.map_or(String::new(), |last| format!(" --after {last}"));
    ui.note(&format!("arkd has ended; what happens from then on is told by `ark events --follow{again}`"));
    Ok(())
}

fn show(ui: Ui, event: &Recorded) -> Result<(), Failure> {
    ui.show(event, line)
}

/// One event: position, age, kind, what it is about, and what there is to say.
fn line(event: &Recorded) -> String {
    let Recorded { position, at_unix_ms, stream, event, .. } = event;
    let about = printable(&about(event)).replace('\n', " ");
    let text = format!("{position:>6}  {:>6} ago  {:<19}  {stream}  {about}", age(*at_unix_ms), event.kind());
    text.trim_end().to_owned()
}

fn about(event: &Event) -> String {
    match event {
        Event::AgentCreated { agent } => {
            let labels: Vec<String> =
                agent.labels.iter().map(|(key, value)| format!(" {key}={value}")).collect();
            format!("{} of {} for {}{}", agent.name, agent.image, agent.owner, labels.concat())
        }
        Event::AgentLabelled { labels } => {
            labels.iter().map(|(key, value)| format!("{key}={value}")).collect::<Vec<_>>().join(" ")
        }
        Event::AgentReady { boot_ms } => format!("after {}", span(*boot_ms)),
        Event::AgentPaused { snapshot } => format!("to {snapshot}"),
        Event::AgentRewound { origin: ark_types::agent::Origin::Snapshot { name } } => format!("to {name}"),
        Event::AgentEnded { outcome: Outcome::Stopped, reason, .. } => reason.clone(),
        Event::AgentEnded { outcome: Outcome::Failed, reason, .. } => format!("failed: {reason}"),
        Event::OwnerQuotaSet { quota: Quota { agents, memory_mib, vcpus } } => {
            let bounds = [("agents", *agents), ("MiB", *memory_mib), ("processors", *vcpus)];
            let bounds = bounds.into_iter().filter_map(|(what, most)| Some(format!("{} {what}", most?)));
            let bounds = bounds.collect::<Vec<_>>().join(", ");
            if bounds.is_empty() { "may have everything".to_owned() } else { format!("may have {bounds}") }
        }
        Event::InferenceCalled { call } => {
            let who = call.agent.as_ref().map_or_else(String::new, |agent| format!(" for {agent}"));
            let (tool, model, outcome) = (&call.tool, &call.model, &call.outcome);
            let tokens = call.prompt_tokens.saturating_add(call.completion_tokens);
            format!("{tool} with {model}{who}: {outcome}, {tokens} tokens, {}", span(call.total_ms))
        }
        Event::AgentRestarting { cause, attempt, after_ms } => {
            format!("attempt {attempt} in {}: {cause}", span(*after_ms))
        }
        Event::AgentRestarted { continuity, boot_ms } => {
            let Continuity { restarts, lost_ms, .. } = continuity;
            format!("restart {restarts}, after {}; {} are lost", span(*boot_ms), span(*lost_ms))
        }
        Event::PoolSet { policy: PoolPolicy { min, max, target_wait_ms } } => {
            format!("{min} to {max} standbys, target wait {}", span(*target_wait_ms))
        }
        Event::ServiceSet { service, generation, .. } => {
            format!("{} replicas of generation {generation} for {}", service.replicas, service.owner)
        }
        Event::AgentExpired { reason }
        | Event::AgentCheckpointFailed { reason }
        | Event::TaskFailed { reason }
        | Event::TaskTimedOut { reason } => reason.clone(),
        Event::TaskCreated { task } => match &task.work {
            TaskWork::Command { program } => format!("{program} for {}", task.owner),
            TaskWork::Eval { .. } => format!("code for {}", task.owner),
        },
        Event::TaskStarted { attempt, agent } => {
            format!("attempt {attempt} in agent {}", agent.as_deref().unwrap_or("(none)"))
        }
        Event::TaskAttemptFailed { attempt, end, .. } | Event::TaskSucceeded { attempt, end } => {
            let why = end.reason.as_deref().map(|why| format!(": {why}")).unwrap_or_default();
            format!("attempt {attempt}{why}")
        }
        Event::RequestMade { made, .. } => made.to_string(),
        Event::RequestAnswered { reply, .. } => {
            let place = reply.headers.get("location").map_or(String::new(), |place| format!(" {place}"));
            format!("with {}{place}", reply.status)
        }
        Event::AgentCheckpointed { checkpoint } => {
            let (pause, durable) = (micros(checkpoint.pause_us), micros(checkpoint.durable_us));
            format!("{}: stood still {pause}, durable after {durable}", checkpoint.snapshot)
        }
        Event::AgentHealthChanged { health } => match health {
            AgentHealth::Healthy => "well again".to_owned(),
            AgentHealth::Unresponsive { since_unix_ms } => format!("not heard for {}", age(*since_unix_ms)),
            AgentHealth::Unhealthy { why, .. } => format!("unhealthy: {why}"),
        },
        Event::AgentCheckpointUnusable { snapshot, reason } => format!("{snapshot}: {reason}"),
        Event::AgentResumed {}
        | Event::AgentRewound { .. }
        | Event::AgentStopping {}
        | Event::AgentRemoved {}
        | Event::PoolRemoved {}
        | Event::ServiceRemoved {}
        | Event::TaskCancelled {}
        | Event::TaskRemoved {}
        | Event::RequestDropped {} => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use ark_types::event::Stream;

    use super::*;

    #[test]
    fn a_line_tells_what_happened_and_moves_no_cursor() {
        let event =
            |event| Recorded { position: 7, at_unix_ms: 0, stream: Stream::agent("0a"), version: 1, event };
        let ended = Event::AgentEnded {
            outcome: Outcome::Failed,
            reason: "the guest\u{1b}[2J\npanicked".to_owned(),
            exit: None,
        };
        let told = line(&event(ended));
        assert!(
            told.starts_with("     7  ") && told.contains("agent.ended          agent/0a  failed: the guest"),
            "{told}"
        );
        assert!(told.ends_with("the guest\\u{1b}[2J panicked"), "{told}");
        let quota = Quota { agents: Some(3), vcpus: Some(0), ..Quota::default() };
        assert!(line(&event(Event::OwnerQuotaSet { quota })).ends_with("may have 3 agents, 0 processors"));
        let quota = Quota::default();
        assert!(line(&event(Event::OwnerQuotaSet { quota })).ends_with("may have everything"));
        let policy = PoolPolicy { min: 2, max: 20, target_wait_ms: 50 };
        let told = line(&event(Event::PoolSet { policy }));
        assert!(told.ends_with("2 to 20 standbys, target wait 50 ms"), "{told}");
        assert!(line(&event(Event::AgentRemoved {})).ends_with("agent.removed        agent/0a"));
    }
}
