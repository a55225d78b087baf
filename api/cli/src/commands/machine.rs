//! `ark machine …`.

use std::io::{Read, Seek, SeekFrom};
use std::time::Duration;

use ark_types::exec::ExecRequest;
use serde_json::json;

use super::logs::Writer;
use crate::args::{MachineAction, MachineSize};
use crate::failure::Failure;
use crate::host::Context;
use crate::machine::{MachineState, Started, Status, Stopped};
use crate::output::{Colour, Ui, age, now_unix_ms, size, span};
use crate::session::{self, Wiring};
use crate::signals::Signals;
use crate::terminal;

/// The machine's shell.
const SHELL: [&str; 2] = ["/bin/sh", "-l"];
/// Pause between two looks at a console that is followed.
const FOLLOW_POLL: Duration = Duration::from_millis(100);
/// Bytes of the console that are read at once.
const CHUNK: usize = 64 << 10;

/// Does what the user asked of the machine.
pub(crate) async fn perform(context: &Context, action: MachineAction) -> Result<u8, Failure> {
    match action {
        MachineAction::Start(size) => start(context, &size).await,
        MachineAction::Stop => stop(context).await.map(|()| 0),
        MachineAction::Status => status(context).await.map(|()| 0),
        MachineAction::Logs { follow } => logs(context, follow).await.map(|()| 0),
        MachineAction::Shell { command } => shell(context, command).await,
    }
}

async fn start(context: &Context, size: &MachineSize) -> Result<u8, Failure> {
    let mut signals = Signals::listen()?;
    let machine = context.machine();
    let started = tokio::select! {
        started = machine.start(size, context.ui) => started?,
        // What has been started so far is ended.
        signal = signals.next() => return Ok(128u8.saturating_add(signal)),
    };
    let Started { client, health, fresh, took } = started;
    let millis = u64::try_from(took.as_millis()).unwrap_or(u64::MAX);
    let report = json!({
        "state": MachineState::Running, "fresh": fresh, "took_ms": millis, "endpoint": client.endpoint().to_string(),
        "health": health,
    });
    context.ui.show(&report, |_| {
        let memory = crate::output::size(health.memory_mib << 20);
        let what = format!("{}, {memory}, {}", processors(health.cpus), client.endpoint());
        if fresh {
            format!("the emulated host runs after {}: {what}", span(millis))
        } else {
            format!("the emulated host runs already: {what}")
        }
    })?;
    Ok(0)
}

async fn stop(context: &Context) -> Result<(), Failure> {
    let how = context.machine().stop(context.ui).await?;
    let (word, sentence) = match how {
        Stopped::DidNotRun => ("did_not_run", "the emulated host did not run"),
        Stopped::Gracefully => ("gracefully", "the emulated host is stopped"),
        Stopped::Quit => ("quit", "the emulated host did not power off in time; QEMU was told to quit"),
        Stopped::Killed => ("killed", "the emulated host did not stop; QEMU was killed"),
    };
    context.ui.show(&json!({ "state": MachineState::Stopped, "how": word }), |_| sentence.to_owned())
}

async fn status(context: &Context) -> Result<(), Failure> {
    let status = context.machine().status().await?;
    context.ui.show(&status, |status| describe(context.ui, status))
}

fn describe(ui: Ui, status: &Status) -> String {
    let state = match status.state {
        MachineState::Running => ui.paint(Colour::Green, "running"),
        MachineState::Stopped => ui.paint(Colour::Yellow, "stopped"),
        MachineState::Crashed => ui.paint(Colour::Red, "crashed"),
    };
    let mut rows = vec![("state", state)];
    if let Some(note) = &status.note {
        rows.push(("note", note.clone()));
    }
    if let (Some(pid), Some(port)) = (status.pid, status.port) {
        rows.push(("process", format!("{pid} (QEMU)")));
        rows.push(("address", format!("127.0.0.1:{port}")));
    }
    if let (Some(memory), Some(cpus)) = (status.memory_mib, status.cpus) {
        rows.push(("size", format!("{}, {}", processors(cpus), size(memory << 20))));
    }
    if let Some(started) = status.started_unix_ms {
        rows.push(("started", format!("{} ago", age(started.min(now_unix_ms())))));
    }
    if let Some(health) = &status.health {
        let kvm = if health.kvm.usable { "usable" } else { "not usable" };
        rows.push(("arkd", format!("{}, {} agents, KVM {kvm} in it", health.version, health.agents)));
    }
    if let Some(disk) = &status.disk {
        rows.push(("disk", disk.display().to_string()));
    }
    if let Some(console) = &status.console {
        rows.push(("console", console.display().to_string()));
    }
    rows.iter().map(|(key, value)| format!("{key:<8} {value}\n")).collect()
}

/// Copies the console's log; with `follow`, until the machine does not run any more.
async fn logs(context: &Context, follow: bool) -> Result<(), Failure> {
    let machine = context.machine();
    let path = machine.console();
    let missing =
        || Failure::Usage("there is no console log yet: `ark machine start` starts the machine".to_owned());
    let mut file = std::fs::File::open(&path).map_err(|_| missing())?;
    let mut out = Writer { lines: context.ui.json.then(Vec::new), stdout: tokio::io::stdout() };
    let system = |source| Failure::System { what: "cannot read the console's log", source };
    let mut buffer = vec![0; CHUNK];
    loop {
        // Looked at before reading, so that what a machine says last is not missed.
        let goes_on = follow && machine.is_alive();
        loop {
            let count = file.read(&mut buffer).map_err(system)?;
            if count == 0 {
                break;
            }
            out.write(buffer.get(..count).unwrap_or_default()).await.map_err(Failure::Output)?;
        }
        if !goes_on {
            return out.finish().await.map_err(Failure::Output);
        }
        // A new start begins the log anew.
        if file.metadata().map_err(system)?.len() < file.stream_position().map_err(system)? {
            file.seek(SeekFrom::Start(0)).map_err(system)?;
        }
        tokio::time::sleep(FOLLOW_POLL).await;
    }
}

async fn shell(context: &Context, command: Vec<String>) -> Result<u8, Failure> {
    let terminal = terminal::stdin_is_terminal();
    let interactive = command.is_empty();
    if interactive && context.ui.json {
        return Err(Failure::Usage("--json needs a command: `ark machine shell --json -- CMD`".to_owned()));
    }
    let argv = if interactive { SHELL.map(str::to_owned).to_vec() } else { command };
    // Like ssh: a terminal for a shell at a terminal, plain streams otherwise.
    let tty = interactive && terminal;
    let mut signals = Signals::listen()?;
    let mut request = ExecRequest { argv, tty: tty.then(terminal::size), ..ExecRequest::default() };
    if tty && let Ok(term) = std::env::var("TERM") {
        request.env.insert("TERM".to_owned(), term);
    }
    let open = async {
        let client = context.machine().must_run().await?;
        Ok::<_, Failure>(client.host_exec_stream(&request).await?)
    };
    let stream = tokio::select! {
        stream = open => stream?,
        signal = signals.next() => return Ok(128u8.saturating_add(signal)),
    };
    let wiring = Wiring { stdin: tty || !terminal, tty, capture: context.ui.json, timeout: None };
    let reply = session::attach(stream, signals, wiring).await?;
    if context.ui.json {
        context.ui.show(&reply, |_| String::new())?;
    }
    Ok(reply.exit_code)
}

fn processors(count: u32) -> String {
    if count == 1 { "1 processor".to_owned() } else { format!("{count} processors") }
}
