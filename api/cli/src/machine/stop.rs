//! Stopping the emulated host: by asking it, then QEMU, then the kernel.

use std::time::Duration;

use ark_client::ExecEvent;
use ark_types::exec::ExecRequest;
use nix::sys::signal::Signal;

use super::{Machine, MachineError, Record, qmp};
use crate::output::Ui;
use crate::progress::Spinner;

/// Program in the machine that ends its agents, writes its disk and powers it off.
const POWEROFF: &str = "/sbin/ark-poweroff";
/// Longest wait for [`POWEROFF`] to be taken.
const ASK_DEADLINE: Duration = Duration::from_secs(10);
/// Longest wait for the machine to end after that.
const POWEROFF_DEADLINE: Duration = Duration::from_secs(20);
/// Longest wait after QEMU's `quit`, and after SIGKILL.
const QUIT_DEADLINE: Duration = Duration::from_secs(5);

/// How a machine was stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stopped {
    /// It did not run.
    DidNotRun,
    /// It powered itself off.
    Gracefully,
    /// It did not follow in time: QEMU was told to quit, disks flushed.
    Quit,
    /// QEMU did not listen either.
    Killed,
}

impl Machine {
    /// Stops the machine; every agent in it ends.
    pub(crate) async fn stop(&self, ui: Ui) -> Result<Stopped, MachineError> {
        if !self.dirs.state.machine().exists() {
            // None was ever started here: no reason to make a directory for the lock.
            return Ok(Stopped::DidNotRun);
        }
        let _lock = self.lock().await?;
        let Some(record) = self.record() else { return Ok(Stopped::DidNotRun) };
        if !record.identity.is_alive() {
            self.forget();
            return Ok(Stopped::DidNotRun);
        }
        let spinner = Spinner::new(ui, "stopping the emulated host");
        let how = self.end(&record).await?;
        drop(spinner);
        self.forget();
        Ok(how)
    }

    async fn end(&self, record: &Record) -> Result<Stopped, MachineError> {
        let asked = tokio::select! {
            ended = record.identity.gone_within(POWEROFF_DEADLINE) => ended,
            () = self.ask(record) => false,
        };
        if asked {
            return Ok(Stopped::Gracefully);
        }
        let quit = tokio::time::timeout(QUIT_DEADLINE, qmp::quit(&self.monitor())).await;
        if matches!(quit, Ok(Ok(()))) && record.identity.gone_within(QUIT_DEADLINE).await {
            return Ok(Stopped::Quit);
        }
        let pid = record.identity.pid;
        record.identity.signal(Signal::SIGKILL).map_err(|_| MachineError::Unkillable(pid))?;
        if record.identity.gone_within(QUIT_DEADLINE).await {
            Ok(Stopped::Killed)
        } else {
            Err(MachineError::Unkillable(pid))
        }
    }

    /// Asks the machine to power itself off; returns only when that has failed. The stream stays open, because closing
    /// it would end the program before it has left for a session of its own.
    async fn ask(&self, record: &Record) {
        let Ok(client) = self.client(record.port) else { return };
        let request = ExecRequest { argv: vec![POWEROFF.to_owned()], ..ExecRequest::default() };
        let open = tokio::time::timeout(ASK_DEADLINE, client.host_exec_stream(&request)).await;
        let Ok(Ok(mut program)) = open else { return };
        let mut runs = false;
        loop {
            match program.output.next().await {
                Ok(ExecEvent::Started(_)) => runs = true,
                Ok(ExecEvent::Stdout(_) | ExecEvent::Stderr(_)) => {}
                Ok(ExecEvent::Exited(end)) if end.status.shell_code() != 0 => return,
                Err(_) if !runs => return,
                // arkd, which carries the stream, ends before the machine does.
                Ok(ExecEvent::Exited(_)) | Err(_) => std::future::pending().await,
            }
        }
    }
}
