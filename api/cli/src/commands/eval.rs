//! `ark eval`.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::time::Duration;

use ark_client::Client;
use ark_types::agent::CreateAgent;
use ark_types::eval::{EvalReply, EvalRequest, Language};
use ark_types::healing::RestartPolicy;
use ark_types::label::{Labels, Owner};
use ark_types::problem::ProblemKind;
use ark_types::scheduling::Spread;
use serde::Serialize;

use super::agents::explain;
use super::code;
use super::program::{interrupted, made_up_name};
use crate::args::EvalArgs;
use crate::failure::Failure;
use crate::host::Context;
use crate::signals::Signals;

/// Exit code when an exception ended the code, as interpreters have it.
const RAISED: u8 = 1;

/// What `ark eval --json` writes.
#[derive(Serialize)]
struct Report<'a> {
    /// Name (or id) of the agent.
    agent: &'a str,
    #[serde(flatten)]
    reply: &'a EvalReply,
}

/// Runs code in an agent that is there, or in one that is made for it and removed afterwards.
pub(crate) async fn eval(context: &Context, args: &EvalArgs) -> Result<u8, Failure> {
    let request = EvalRequest {
        code: code::from_argument(&args.code)?,
        language: Language::default(),
        timeout_ms: args.timeout.map(|t| u64::try_from(t.as_millis()).unwrap_or(u64::MAX)),
    };
    let mut signals = Signals::listen()?;
    let Some(agent) = &args.agent else {
        return in_a_temporary_agent(context, args, &request, &mut signals).await;
    };
    let evaluated = async { evaluate(context, &context.client().await?, agent, &request).await };
    tokio::select! {
        code = evaluated => code,
        signal = signals.next() => Ok(interrupted(signal)),
    }
}

async fn in_a_temporary_agent(
    context: &Context,
    args: &EvalArgs,
    request: &EvalRequest,
    signals: &mut Signals,
) -> Result<u8, Failure> {
    let client = tokio::select! {
        client = context.client_to_boot() => client?,
        signal = signals.next() => return Ok(interrupted(signal)),
    };
    // Named here, so that an agent whose creation is interrupted can be removed.
    let name = made_up_name("eval")?;
    let create = CreateAgent {
        name: Some(name.clone()),
        image: args.image.clone(),
        template: args.template.clone(),
        cold: false,
        vcpus: None,
        memory_mib: None,
        env: BTreeMap::new(),
        // That is for agents whose program is a stream: one that only evaluates would be removed within its first minute.
        auto_remove: false,
        labels: Labels::default(),
        owner: Owner::default(),
        allow: Vec::new(),
        freeze_on_inference: false,
        priority: 0,
        queue_timeout_ms: None,
        anti_affinity: None,
        spread: Spread::Soft,
        restart: RestartPolicy::Never,
        ttl_s: None,
        idle_timeout_s: None,
        checkpoint: None,
        health_check: None,
    };
    tokio::select! {
        // Of one that could not be made nothing is left.
        created = client.create(&create) => if let Err(error) = created {
            return Err(explain(&client, error).await);
        },
        signal = signals.next() => {
            drop(client.delete(name.as_ref(), Some(Duration::ZERO)).await);
            return Ok(interrupted(signal));
        }
    }
    let code = tokio::select! {
        code = evaluate(context, &client, name.as_ref(), request) => code,
        signal = signals.next() => Ok(interrupted(signal)),
    };
    if let Err(error) = client.delete(name.as_ref(), Some(Duration::ZERO)).await {
        context
            .ui
            .note(&format!("the agent {name}, which was made for this code, could not be removed: {error}"));
    }
    code
}

/// Has the code run and shows what came of it.
async fn evaluate(
    context: &Context,
    client: &Client,
    agent: &str,
    request: &EvalRequest,
) -> Result<u8, Failure> {
    let reply = match client.eval(agent, request).await {
        Ok(reply) => reply,
        Err(error) => {
            let expired = error.problem().is_some_and(|p| p.kind == ProblemKind::DeadlinePassed);
            return Err(match request.timeout_ms {
                Some(_) if expired => Failure::Expired(error),
                _ => explain(client, error).await,
            });
        }
    };
    if context.ui.json {
        context.ui.show(&Report { agent, reply: &reply }, |_| String::new())?;
    } else {
        write_reply(&reply).map_err(Failure::Output)?;
    }
    if reply.truncated {
        context.ui.note("the code wrote more than is kept: the rest of its output is lost");
    }
    Ok(if reply.exception.is_some() { RAISED } else { 0 })
}

/// Writes output as it is, then the value on a line of its own, or the traceback.
pub(super) fn write_reply(reply: &EvalReply) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(reply.stdout.as_bytes())?;
    stdout.flush()?;
    let mut stderr = io::stderr().lock();
    // Nobody reads our standard error: that is no reason to fail.
    let _ = stderr.write_all(reply.stderr.as_bytes());
    if let Some(value) = &reply.value {
        let begins_a_line = reply.stdout.is_empty() || reply.stdout.ends_with('\n');
        let line = format!("{}{value}\n", if begins_a_line { "" } else { "\n" });
        stdout.write_all(line.as_bytes())?;
        stdout.flush()?;
    }
    if let Some(exception) = &reply.exception {
        let traceback = exception.traceback.trim_end();
        let told = if traceback.is_empty() {
            format!("{}: {}", exception.kind, exception.message)
        } else {
            traceback.to_owned()
        };
        let _ = writeln!(stderr, "{told}");
    }
    Ok(())
}
