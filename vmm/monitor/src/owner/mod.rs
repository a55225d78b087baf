//! The one owner of the VM's state: a single thread that takes in news, signals, time and clients' requests, hands each
//! to [`Life`] and does what it says. Nothing else changes the state.
//!
//! ```text
//!  vCPUs, devices, power-off thread ──► Mailbox ──┐
//!  SIGTERM, SIGINT, SIGHUP ──────────► signalfd ──┼─► Owner ──► Life ──► effects on the Machine
//!  clients ──────────────────► control socket ────┤
//!  timer, a snapshot's writer ────────────────────┘
//! ```

mod snapshots;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use ark_types::vmm::{ControlReply, ControlRequest, VmMetrics};

use self::snapshots::Snapshots;
use crate::control::{Server, Ticket};
use crate::life::{Effect, End, Event, Life};
use crate::machine::Machine;
use crate::mailbox::{Mailbox, News};
use crate::power_off;
use crate::signals::Signals;

/// What the owner listens to.
pub struct Inputs {
    /// What other threads have to say.
    pub mailbox: Mailbox,
    /// The signals that end the VMM; none in tests.
    pub signals: Option<Signals>,
    /// The control socket, when there is one.
    pub control: Option<Server>,
    /// The socket device's Unix socket, when there is one.
    pub vsock: Option<PathBuf>,
}

/// The owner of one VM's state.
struct Owner {
    life: Life,
    machine: Machine,
    mailbox: Mailbox,
    vsock: Option<PathBuf>,
    timer: Option<Instant>,
    end: Option<End>,
    snapshots: Snapshots,
}

/// Runs `machine` to its end.
///
/// When this returns, no vCPU or device runs any more and the control socket is gone.
#[must_use]
pub fn run(machine: Machine, mut inputs: Inputs) -> End {
    let mut owner = Owner {
        life: Life::default(),
        machine,
        mailbox: inputs.mailbox.clone(),
        vsock: inputs.vsock.take(),
        timer: None,
        end: None,
        snapshots: Snapshots::default(),
    };
    owner.on(Event::Started);
    loop {
        while let Some(news) = inputs.mailbox.take() {
            owner.on(Event::News(news));
        }
        while let Some(signal) = inputs.signals.as_ref().and_then(Signals::take) {
            owner.on(Event::Signal(signal));
        }
        if owner.timer.is_some_and(|at| at <= Instant::now()) {
            owner.timer = None;
            owner.on(Event::Timer);
        }
        if let Some(control) = &mut inputs.control {
            if let Some((ticket, reply)) = owner.snapshots.finished() {
                control.reply(ticket, &reply);
            }
            for ticket in control.hung_up() {
                owner.snapshots.forget(ticket);
            }
            control.serve(&mut |request, ticket| owner.answer(request, ticket));
        }
        if let Some(end) = owner.end.take() {
            if let (Some(ticket), Some(control)) = (owner.snapshots.give_up(), &mut inputs.control) {
                let why = "the VM ended before its snapshot was written".to_owned();
                control.reply(ticket, &ControlReply::Refused { why });
            }
            return end;
        }
        if let Err(error) = wait(&inputs, owner.timer, owner.snapshots.fd()) {
            owner.on(Event::News(News::Failed(format!("wait for events: {error}"))));
        }
    }
}

impl Owner {
    /// Feeds an event that nobody waits for an answer to.
    fn on(&mut self, event: Event) {
        if let Ok(effects) = self.life.on(event) {
            self.carry_out(effects);
        }
    }

    /// Carries out a request; without a reply, it comes later.
    fn answer(&mut self, request: ControlRequest, ticket: Ticket) -> Option<ControlReply> {
        let event = match request {
            ControlRequest::State => return Some(self.state()),
            ControlRequest::Metrics => return Some(ControlReply::Metrics(self.metrics())),
            ControlRequest::Snapshot { dir } => return self.snapshot(&dir, ticket),
            ControlRequest::Reclaim { dir } => {
                let reclaimed = self.reclaim(&dir);
                return Some(reclaimed.map_or_else(|why| ControlReply::Refused { why }, |()| self.state()));
            }
            ControlRequest::Pause => Event::Pause,
            ControlRequest::Resume => Event::Resume,
            ControlRequest::Stop { grace_ms } => Event::Stop(Duration::from_millis(grace_ms)),
        };
        Some(match self.life.on(event) {
            Ok(effects) => {
                self.carry_out(effects);
                self.state()
            }
            Err(refused) => ControlReply::Refused { why: refused.to_string() },
        })
    }

    fn carry_out(&mut self, effects: Vec<Effect>) {
        let grace =
            effects.iter().find_map(|e| if let Effect::Timer(grace) = e { Some(*grace) } else { None });
        for effect in effects {
            match effect {
                Effect::Run => {
                    self.snapshots.note_run();
                    self.machine.run();
                }
                Effect::Park => {
                    if let Err(error) = self.machine.park() {
                        self.mailbox.send(News::Failed(error.to_string()));
                    }
                }
                Effect::AskPowerOff => {
                    power_off::ask(self.vsock.clone(), grace.unwrap_or_default(), &self.mailbox);
                }
                Effect::Timer(after) => {
                    // A grace too long for the clock is no deadline.
                    let at = Instant::now().checked_add(after);
                    self.timer = [self.timer, at].into_iter().flatten().min();
                }
                Effect::End(end) => self.end = Some(end),
            }
        }
    }

    fn state(&self) -> ControlReply {
        ControlReply::State { state: self.life.state() }
    }

    fn metrics(&self) -> VmMetrics {
        VmMetrics {
            first_run_ns: self.machine.first_run_ns(),
            exits: self.machine.exits(),
            guest_resident_bytes: self.machine.resident_bytes(),
            devices: self.machine.device_metrics(),
        }
    }
}

/// Waits until an input is ready, the writer of a snapshot has something to say, the timer has run out, or the control socket wants to be looked at again.
fn wait(inputs: &Inputs, timer: Option<Instant>, writer: Option<RawFd>) -> io::Result<()> {
    let signals = inputs.signals.as_ref().map(AsRawFd::as_raw_fd);
    let fixed = [Some(inputs.mailbox.as_raw_fd()), signals, writer];
    let control = inputs.control.iter().flat_map(Server::fds);
    let mut fds: Vec<libc::pollfd> = fixed
        .into_iter()
        .flatten()
        .map(|fd| (fd, libc::POLLIN))
        .chain(control)
        .map(|(fd, events): (RawFd, libc::c_short)| libc::pollfd { fd, events, revents: 0 })
        .collect();
    let retry = inputs.control.as_ref().and_then(Server::retry_after).map(|after| Instant::now() + after);
    let timeout = [timer, retry].into_iter().flatten().min().map_or(-1, |at| {
        // Rounded up, so that the timer has run out when poll says so.
        let left = at.saturating_duration_since(Instant::now()).as_micros().div_ceil(1000);
        libc::c_int::try_from(left).unwrap_or(libc::c_int::MAX)
    });
    let count = fds.len() as libc::nfds_t;
    // SAFETY: `fds` has `count` entries and lives through the call.
    if unsafe { libc::poll(fds.as_mut_ptr(), count, timeout) } < 0 {
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
    Ok(())
}
