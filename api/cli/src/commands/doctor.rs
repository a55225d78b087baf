//! `ark doctor`: what this machine needs to run agents, and the next step for what is missing.

use ark_types::health::{Health, LogHealth};
use ark_types::plain::plain;
use std::net::{Ipv4Addr, TcpListener};
use std::path::PathBuf;
use std::process::Stdio;

use serde::Serialize;

use crate::args::HostChoice;
use crate::daemon;
use crate::failure::Failure;
use crate::host::Context;
use crate::machine::{MachineState, PACKAGE, PROGRAM, find_program, free_near};
use crate::output::{Colour, Ui, size, wrapped};
use crate::{probe, terminal};

/// Free space below which agents and the machine's disk soon have none, bytes.
const LITTLE_SPACE: u64 = 2 << 30;
/// Exit code when something that is needed is missing.
const SOMETHING_MISSING: u8 = 1;
/// Most characters of a line: longer ones are hard to read, however wide the terminal is.
const WIDEST_LINE: usize = 100;
/// Column in which details begin, behind the mark and the name.
const DETAIL_COLUMN: usize = 11;

/// What a check found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Verdict {
    /// As it should be.
    Ok,
    /// Not as it should be, but agents can run.
    Note,
    /// Agents cannot run.
    Missing,
}

/// One check's outcome.
#[derive(Debug, Serialize)]
struct Check {
    name: &'static str,
    verdict: Verdict,
    detail: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    next: Option<String>,
}

/// All of it, as `--json` writes it.
#[derive(Debug, Serialize)]
struct Report {
    /// Whether agents can run.
    ok: bool,
    /// `native` or `machine`.
    host: &'static str,
    checks: Vec<Check>,
}

impl Check {
    fn ok(name: &'static str, detail: impl Into<String>) -> Self {
        Self { name, verdict: Verdict::Ok, detail: detail.into(), next: None }
    }

    /// Something is not there; `needed` says whether agents cannot run without it.
    fn lacking(name: &'static str, needed: bool, detail: impl Into<String>, next: impl Into<String>) -> Self {
        let verdict = if needed { Verdict::Missing } else { Verdict::Note };
        Self { name, verdict, detail: detail.into(), next: Some(next.into()) }
    }
}

/// Runs every check, anew, and changes nothing.
pub(crate) async fn doctor(context: &Context) -> Result<u8, Failure> {
    let probed = probe::fresh(&context.dirs).await;
    let native = match context.global.host {
        HostChoice::Native => true,
        HostChoice::Machine => false,
        HostChoice::Auto => probed.as_ref().is_ok_and(|report| report.usable),
    };
    let mut checks = vec![match probed {
        Ok(report) if report.usable => Check::ok("KVM", report.reason),
        Ok(report) => {
            let next =
                if native { "leave out --host native" } else { "nothing: agents run in the emulated host" };
            Check::lacking("KVM", native, report.reason, next)
        }
        Err(error) => Check::lacking("KVM", true, error.to_string(), "make"),
    }];
    checks.push(assets(context, native));
    checks.push(images(context));
    checks.push(qemu(!native).await);
    if native {
        checks.push(arkd(context).await);
    } else {
        checks.extend(machine(context).await?);
    }
    checks.push(space(context));
    let ok = checks.iter().all(|check| check.verdict != Verdict::Missing);
    let report = Report { ok, host: if native { "native" } else { "machine" }, checks };
    let columns = usize::from(terminal::size().cols).min(WIDEST_LINE);
    context.ui.show(&report, |report| show(context.ui, report, columns))?;
    Ok(if ok { 0 } else { SOMETHING_MISSING })
}

fn assets(context: &Context, native: bool) -> Check {
    let assets = &context.dirs.assets;
    let mut wanted: Vec<PathBuf> = Vec::new();
    if native {
        wanted.extend(["arkd", "ark-vmm"].map(|name| assets.program(name)));
        wanted.extend([assets.kernel(), assets.initrd()]);
    } else {
        wanted.extend(["vmlinuz", "initramfs.cpio", "assets.erofs"].map(|name| assets.machine().join(name)));
    }
    let missing: Vec<String> =
        wanted.iter().filter(|path| !path.is_file()).map(|path| path.display().to_string()).collect();
    if missing.is_empty() {
        Check::ok("assets", assets.0.display().to_string())
    } else {
        let detail = format!("missing: {}", missing.join(", "));
        Check::lacking("assets", true, detail, "say `make`, or set ARK_ASSETS to where it was built")
    }
}

fn images(context: &Context) -> Check {
    let entries = std::fs::read_dir(context.dirs.assets.images());
    let mut names: Vec<String> = entries
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok()?.strip_suffix(".erofs").map(str::to_owned))
        .collect();
    names.sort();
    if names.is_empty() {
        Check::lacking("images", true, "none", "say `make`: it builds base and python")
    } else {
        Check::ok("images", names.join(", "))
    }
}

async fn qemu(needed: bool) -> Check {
    let Some(path) = find_program(PROGRAM) else {
        let detail = format!("{PROGRAM} is not installed");
        return Check::lacking("QEMU", needed, detail, format!("apt install {PACKAGE}"));
    };
    let asked = tokio::process::Command::new(&path).arg("--version").stdin(Stdio::null()).output().await;
    match asked {
        Ok(output) if output.status.success() => {
            let text = String::from_utf8_lossy(&output.stdout);
            Check::ok("QEMU", text.lines().next().unwrap_or_default().to_owned())
        }
        Ok(output) => {
            Check::lacking("QEMU", needed, output.status.to_string(), format!("apt reinstall {PACKAGE}"))
        }
        Err(e) => Check::lacking("QEMU", needed, plain(&e), format!("apt reinstall {PACKAGE}")),
    }
}

async fn arkd(context: &Context) -> Check {
    let (client, health) = daemon::look(&context.dirs).await;
    match health {
        Some(Health { log: LogHealth { why: Some(why), .. }, pid, .. }) => {
            let detail = format!("runs (pid {pid}), but its log of events cannot be written: {why}");
            Check::lacking("arkd", true, detail, "make room on the disk of ARK_STATE; arkd goes on by itself")
        }
        Some(health) => Check::ok(
            "arkd",
            format!("runs (pid {}), {} agents, {}", health.pid, health.agents, client.endpoint()),
        ),
        None => Check::ok("arkd", "not running: the next command starts it"),
    }
}

async fn machine(context: &Context) -> Result<Vec<Check>, Failure> {
    let machine = context.machine();
    let status = machine.status().await?;
    let note = status.note.clone().unwrap_or_default();
    let mut checks = vec![match (status.state, &status.health) {
        (MachineState::Running, Some(health)) => {
            Check::ok("machine", format!("runs (pid {}), {} agents", status.pid.unwrap_or(0), health.agents))
        }
        (MachineState::Running, None) => {
            Check::lacking("machine", true, note, "wait, or `ark machine stop`; `ark machine logs` says more")
        }
        (MachineState::Stopped, _) => Check::ok("machine", "not running: the next command starts it"),
        (MachineState::Crashed, _) => Check::lacking(
            "machine",
            false,
            note,
            "the next command starts it anew; `ark machine logs` may tell why",
        ),
    }];
    let port = machine.wanted_port();
    if status.state == MachineState::Running {
        checks.push(Check::ok("port", format!("{} leads to the machine", status.port.unwrap_or(port))));
    } else if TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok() {
        checks.push(Check::ok("port", format!("{port} of 127.0.0.1 is free")));
    } else {
        let detail = format!("{port} of 127.0.0.1 is taken by another program");
        checks.push(Check::lacking("port", true, detail, "stop it, or choose another with ARK_PORT"));
    }
    Ok(checks)
}

fn space(context: &Context) -> Check {
    let state = &context.dirs.state.0;
    match free_near(state) {
        Ok(free) if free >= LITTLE_SPACE => {
            Check::ok("space", format!("{} free for {}", size(free), state.display()))
        }
        Ok(free) => {
            let detail = format!("only {} free for {}", size(free), state.display());
            Check::lacking("space", false, detail, "free some, or set ARK_STATE to a directory elsewhere")
        }
        Err(e) => {
            Check::lacking("space", false, format!("{}: {}", state.display(), plain(&e)), "set ARK_STATE")
        }
    }
}

/// For people: a mark, a name and what was found, at most `columns` wide, and below it the next step.
fn show(ui: Ui, report: &Report, columns: usize) -> String {
    let mut text = String::new();
    for check in &report.checks {
        let mark = match check.verdict {
            Verdict::Ok => ui.paint(Colour::Green, "✓"),
            Verdict::Note => ui.paint(Colour::Yellow, "!"),
            Verdict::Missing => ui.paint(Colour::Red, "✗"),
        };
        text.push_str(&format!(
            "{mark} {:<8} {}\n",
            check.name,
            wrapped(&check.detail, columns, DETAIL_COLUMN)
        ));
        if let Some(next) = &check.next {
            let next = wrapped(next, columns, DETAIL_COLUMN + 2);
            text.push_str(&format!("{:DETAIL_COLUMN$}→ {next}\n", ""));
        }
    }
    let place = if report.host == "native" {
        "on this machine's KVM"
    } else {
        "in the emulated host (QEMU, software)"
    };
    let end =
        if report.ok { format!("agents run {place}") } else { "agents cannot run yet: see ✗".to_owned() };
    format!("{text}\n{end}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_marked_what_is_long_is_wrapped_and_the_next_step_follows() {
        let checks = vec![
            Check::ok("KVM", "a guest ran in 64-bit mode and came back"),
            Check::lacking("QEMU", false, "not installed", "apt install qemu-system-x86"),
            Check::lacking("images", true, "none", "say `make`"),
        ];
        let golden = "\
✓ KVM      a guest ran in 64-bit mode
           and came back
! QEMU     not installed
           → apt install qemu-system-x86
✗ images   none
           → say `make`

agents cannot run yet: see ✗
";
        assert_eq!(show(Ui::new(true), &Report { ok: false, host: "native", checks }, 40), golden);
    }
}
