//! `ark run` and `ark exec`.

use std::collections::BTreeMap;

use ark_client::Client;
use ark_types::agent::{Agent, AgentName, CreateAgent};
use ark_types::exec::{ExecReply, ExecRequest};
use serde::Serialize;

use super::agents::{create_request, explain};
use crate::args::{ExecArgs, ProgramArgs, RunArgs};
use crate::dirs::random_hex;
use crate::failure::Failure;
use crate::host::Context;
use crate::session::{self, Wiring};
use crate::signals::Signals;
use crate::terminal;

/// What `ark run --json` and `ark exec --json` write.
#[derive(Serialize)]
struct Report<'a> {
    /// Name (or id) of the agent.
    agent: &'a str,
    #[serde(flatten)]
    reply: &'a ExecReply,
}

/// Creates an agent, runs the program in it, and leaves the removal to arkd, which sees the stream's end even if this
/// process is killed.
pub(crate) async fn run(context: &Context, args: &RunArgs) -> Result<u8, Failure> {
    let wiring = wiring(context, &args.program)?;
    let mut signals = Signals::listen()?;
    let client = tokio::select! {
        client = context.client_to_boot() => client?,
        signal = signals.next() => return Ok(interrupted(signal)),
    };
    let mut request = create_request(&args.agent);
    request.auto_remove = !args.keep;
    // Named here, so that an agent whose creation is interrupted can be removed.
    let name = match request.name.clone() {
        Some(name) => name,
        None => made_up_name()?,
    };
    request.name = Some(name.clone());
    let agent = tokio::select! {
        agent = create(&client, &request) => agent?,
        signal = signals.next() => {
            drop(client.delete(name.as_ref(), Some(std::time::Duration::ZERO)).await);
            return Ok(interrupted(signal));
        }
    };
    // The agent has its environment already.
    let exec = exec_request(&args.command, &args.program, BTreeMap::new());
    let stream = match client.exec_stream(&agent.id, &exec).await {
        Ok(stream) => stream,
        Err(error) => {
            if !args.keep {
                drop(client.delete(&agent.id, Some(std::time::Duration::ZERO)).await);
            }
            return Err(explain(&client, error).await);
        }
    };
    report(context, name.as_ref(), &session::attach(stream, signals, wiring).await?)
}

/// Runs a program in an agent that is there.
pub(crate) async fn exec(context: &Context, args: &ExecArgs) -> Result<u8, Failure> {
    let wiring = wiring(context, &args.program)?;
    let mut signals = Signals::listen()?;
    let env = args.env.iter().cloned().collect();
    let request = exec_request(&args.command, &args.program, env);
    let open = async {
        let client = context.client().await?;
        match client.exec_stream(&args.agent, &request).await {
            Ok(stream) => Ok(stream),
            Err(error) => Err(explain(&client, error).await),
        }
    };
    let stream = tokio::select! {
        stream = open => stream?,
        signal = signals.next() => return Ok(interrupted(signal)),
    };
    report(context, &args.agent, &session::attach(stream, signals, wiring).await?)
}

async fn create(client: &Client, request: &CreateAgent) -> Result<Agent, Failure> {
    match client.create(request).await {
        Ok(agent) => Ok(agent),
        Err(error) => Err(explain(client, error).await),
    }
}

fn report(context: &Context, agent: &str, reply: &ExecReply) -> Result<u8, Failure> {
    if context.ui.json {
        context.ui.show(&Report { agent, reply }, |_| String::new())?;
    }
    Ok(reply.exit_code)
}

/// Exit code of an ark that was interrupted before its program ran, as shells have it.
fn interrupted(signal: u8) -> u8 {
    128u8.saturating_add(signal)
}

fn made_up_name() -> Result<AgentName, Failure> {
    let random = random_hex(4).map_err(|source| Failure::System { what: "cannot make up a name", source })?;
    format!("run-{random}").parse().map_err(|e: ark_types::agent::InvalidName| Failure::Usage(e.to_string()))
}

/// Which streams are connected; what this terminal cannot do is refused before anything starts.
fn wiring(context: &Context, args: &ProgramArgs) -> Result<Wiring, Failure> {
    let terminal = terminal::stdin_is_terminal();
    if args.tty && args.interactive && !terminal {
        return Err(Failure::Usage(
            "-t needs a terminal, and standard input is none: leave out -t to send a pipe or file".to_owned(),
        ));
    }
    let stdin = if args.tty { args.interactive } else { args.interactive || !terminal };
    Ok(Wiring { stdin, tty: args.tty, capture: context.ui.json, timeout: args.timeout })
}

fn exec_request(command: &[String], args: &ProgramArgs, mut env: BTreeMap<String, String>) -> ExecRequest {
    if args.tty
        && let Ok(term) = std::env::var("TERM")
    {
        env.entry("TERM".to_owned()).or_insert(term);
    }
    ExecRequest {
        argv: command.to_vec(),
        env,
        cwd: args.workdir.clone(),
        user: args.user.clone(),
        timeout_ms: args.timeout.map(|t| u64::try_from(t.as_millis()).unwrap_or(u64::MAX)),
        tty: args.tty.then(terminal::size),
        ..ExecRequest::default()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn args() -> ProgramArgs {
        ProgramArgs {
            interactive: false,
            tty: false,
            workdir: Some("/tmp".to_owned()),
            user: None,
            timeout: Some(Duration::from_millis(1500)),
        }
    }

    #[test]
    fn options_become_a_request() {
        let request = exec_request(&["wc".to_owned(), "-c".to_owned()], &args(), BTreeMap::new());
        assert_eq!(request.argv, ["wc", "-c"]);
        assert_eq!(
            (request.cwd.as_deref(), request.timeout_ms, request.tty),
            (Some("/tmp"), Some(1500), None)
        );
        assert!(request.env.is_empty(), "TERM is for terminals");
        let tty = exec_request(&[], &ProgramArgs { tty: true, ..args() }, BTreeMap::new());
        assert!(tty.tty.is_some_and(|size| size.rows > 0 && size.cols > 0));
    }

    #[test]
    fn made_up_names_are_names_and_differ() {
        assert_ne!(made_up_name().unwrap(), made_up_name().unwrap());
        assert_eq!(interrupted(2), 130);
    }
}
