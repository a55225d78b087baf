//! `ark run` and `ark exec`.

use std::collections::BTreeMap;
use std::time::Duration;

use ark_client::{Client, Error, ExecStream};
use ark_types::agent::{Agent, AgentName, AgentState, CreateAgent};
use ark_types::exec::{ExecReply, ExecRequest, ExitStatus};
use serde::Serialize;

use super::agents::{create_request, explain};
use crate::args::{ExecArgs, ProgramArgs, RunArgs};
use crate::dirs::random_hex;
use crate::failure::Failure;
use crate::host::Context;
use crate::session::{self, Wiring};
use crate::signals::Signals;
use crate::terminal;

/// Looks at an agent whose stream broke, and the pause between them.
const LOOKS: u32 = 10;
/// See [`LOOKS`].
const LOOK_PAUSE: Duration = Duration::from_millis(100);

/// What `ark run --json` and `ark exec --json` write.
#[derive(Serialize)]
struct Report<'a> {
    /// Name (or id) of the agent.
    agent: &'a str,
    #[serde(flatten)]
    reply: &'a ExecReply,
}

/// Creates an agent, runs the program in it, and leaves the removal to arkd, which sees the stream's end even if this
/// process is killed (and then waits for its time of grace).
pub(crate) async fn run(context: &Context, args: &RunArgs) -> Result<u8, Failure> {
    let mut request = create_request(&args.agent)?;
    let wiring = wiring(context, &args.program);
    let mut signals = Signals::listen()?;
    let client = tokio::select! {
        client = context.client_to_boot() => client?,
        signal = signals.next() => return Ok(interrupted(signal)),
    };
    request.auto_remove = !args.keep;
    if request.auto_remove && !request.restart.is_never() {
        let why = "an agent that is removed with its program cannot be restarted: add --keep, or leave --restart out";
        return Err(Failure::Usage(why.to_owned()));
    }
    // Named here, so that an agent whose creation is interrupted can be removed.
    let name = match request.name.clone() {
        Some(name) => name,
        None => made_up_name("run")?,
    };
    request.name = Some(name.clone());
    let agent = tokio::select! {
        agent = create(&client, &request) => agent?,
        signal = signals.next() => {
            drop(client.delete(name.as_ref(), Some(Duration::ZERO)).await);
            return Ok(interrupted(signal));
        }
    };
    // The agent has its environment already.
    let exec = exec_request(&args.command, &args.program, BTreeMap::new());
    let stream = match client.exec_stream(&agent.id, &exec).await {
        Ok(stream) => stream,
        Err(error) => {
            if !args.keep {
                drop(client.delete(&agent.id, Some(Duration::ZERO)).await);
            }
            return Err(explain(&client, error).await);
        }
    };
    let reply = attach(&client, name.as_ref(), stream, signals, wiring).await?;
    report(context, name.as_ref(), &reply, wiring)
}

/// Runs a program in an agent that is there.
pub(crate) async fn exec(context: &Context, args: &ExecArgs) -> Result<u8, Failure> {
    let wiring = wiring(context, &args.program);
    let mut signals = Signals::listen()?;
    let env = args.env.iter().cloned().collect();
    let request = exec_request(&args.command, &args.program, env);
    let open = async {
        let client = context.client().await?;
        match client.exec_stream(&args.agent, &request).await {
            Ok(stream) => Ok((client, stream)),
            Err(error) => Err(explain(&client, error).await),
        }
    };
    let (client, stream) = tokio::select! {
        opened = open => opened?,
        signal = signals.next() => return Ok(interrupted(signal)),
    };
    let reply = attach(&client, &args.agent, stream, signals, wiring).await?;
    report(context, &args.agent, &reply, wiring)
}

async fn create(client: &Client, request: &CreateAgent) -> Result<Agent, Failure> {
    match client.create(request).await {
        Ok(agent) => Ok(agent),
        Err(error) => Err(explain(client, error).await),
    }
}

fn report(context: &Context, agent: &str, reply: &ExecReply, wiring: Wiring) -> Result<u8, Failure> {
    if let (ExitStatus::TimedOut, Some(timeout)) = (reply.status, wiring.timeout) {
        context.ui.note(&format!("the program was killed: it ran longer than its --timeout of {timeout:?}"));
    }
    if context.ui.json {
        context.ui.show(&Report { agent, reply }, |_| String::new())?;
    }
    Ok(reply.exit_code)
}

/// Exit code of an ark that was interrupted before its program ran, as shells have it.
pub(super) fn interrupted(signal: u8) -> u8 {
    128u8.saturating_add(signal)
}

/// A name that no agent has, beginning with `verb`.
pub(super) fn made_up_name(verb: &str) -> Result<AgentName, Failure> {
    let random = random_hex(4).map_err(|source| Failure::System { what: "cannot make up a name", source })?;
    format!("{verb}-{random}")
        .parse()
        .map_err(|e: ark_types::agent::InvalidName| Failure::Usage(e.to_string()))
}

/// Which streams are connected. A pipe or file is input without being asked for, except where the program has a terminal:
/// what is typed there comes with `-i` only.
fn wiring(context: &Context, args: &ProgramArgs) -> Wiring {
    let stdin = args.interactive || (!args.tty && !terminal::stdin_is_terminal());
    Wiring { stdin, tty: args.tty, capture: context.ui.json, timeout: args.timeout }
}

/// Connects the program until it ends; when its stream breaks, says what became of the agent.
async fn attach(
    client: &Client,
    agent: &str,
    stream: ExecStream,
    signals: Signals,
    wiring: Wiring,
) -> Result<ExecReply, Failure> {
    match session::attach(stream, signals, wiring).await {
        Err(Failure::Api(error @ Error::Ended(_))) => {
            Err(Failure::Hinted { error, hint: what_became(client, agent).await })
        }
        other => other,
    }
}

/// What became of an agent whose stream broke; arkd may need a moment to notice that a VMM is gone.
async fn what_became(client: &Client, agent: &str) -> String {
    let mut last = format!("the agent was {agent}");
    for _ in 0..LOOKS {
        last = match client.agent(agent).await {
            Ok(seen) if seen.state == AgentState::Running => format!("agent {agent} is running"),
            Ok(seen) => {
                let reason = seen.reason.map(|r| format!(": {r}")).unwrap_or_default();
                return format!("agent {agent} is {}{reason}", seen.state);
            }
            Err(Error::Problem(_)) => return format!("agent {agent} is gone"),
            Err(_) => last,
        };
        tokio::time::sleep(LOOK_PAUSE).await;
    }
    last
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
        resumable: true,
        ..ExecRequest::default()
    }
}

#[cfg(test)]
mod tests {
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
        assert_ne!(made_up_name("run").unwrap(), made_up_name("run").unwrap());
        assert_eq!(interrupted(2), 130);
    }
}
