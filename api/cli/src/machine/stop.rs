//! Stopping the emulated host: by asking it, then QEMU, then the kernel.

use std::time::{Duration, Instant};

use ark_client::ExecEvent;
use ark_types::exec::ExecRequest;

use super::identity::Identity;
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
/// Pause between two looks at the process.
const POLL: Duration = Duration::from_millis(20);

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
        let _lock = self.lock()?;
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
            ended = gone(&record.identity, POWEROFF_DEADLINE) => ended,
            () = self.ask(record) => false,
        };
        if asked {
            return Ok(Stopped::Gracefully);
        }
        let quit = tokio::time::timeout(QUIT_DEADLINE, qmp::quit(&self.monitor())).await;
        if matches!(quit, Ok(Ok(()))) && gone(&record.identity, QUIT_DEADLINE).await {
            return Ok(Stopped::Quit);
        }
        let pid = record.identity.pid;
        record.identity.kill().map_err(|_| MachineError::Unkillable(pid))?;
        if gone(&record.identity, QUIT_DEADLINE).await {
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

/// Whether the process ends within `patience`.
async fn gone(identity: &Identity, patience: Duration) -> bool {
    let deadline = Instant::now() + patience;
    while identity.is_alive() {
        if Instant::now() >= deadline {
            return false;
        }
        tokio::time::sleep(POLL).await;
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_process_that_stays_is_not_waited_for_beyond_the_deadline() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let identity = Identity::of(child.id()).unwrap();
        assert!(!gone(&identity, Duration::from_millis(50)).await);
        identity.kill().unwrap();
        child.wait().unwrap();
        assert!(gone(&identity, Duration::from_secs(5)).await);
    }
}
