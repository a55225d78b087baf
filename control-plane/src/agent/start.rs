//! How an agent's VMM and guest come up: by a boot, or from a snapshot with every check.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ark_types::agent::{Agent, AgentState};
use ark_types::guest::{HEARTBEAT_INTERVAL_MS, HELLO_PORT, Hello};
use ark_types::layout::AgentDir;
use ark_types::receipt::Receipt;
use ark_types::vmm::{DiskConfig, ExitRecord, Generation, RestoreConfig, RunConfig, VmConfig, VsockConfig};
use tokio::sync::oneshot;
use tokio::time::sleep;
use tracing::{Instrument as _, Span};

use super::birth::Begun;
use super::body::Base;
use super::owner::Owner;
use super::renewal::{self, Wanted};
use super::request::{Parting, Removal, Request};
use super::{BootError, REASON_PATIENCE, boot};
use crate::cleanup::Home;
use crate::core::Core;
use crate::guest::{Event, Greeter, Renewal, renew};
use crate::host::millis;
use crate::media::Media;
use crate::pool::Den;
use crate::ports::Ports;
use crate::snapshots::Hold;
use crate::supervisor::{Vmm, tail_text};
use crate::telemetry::Phase;
use crate::traces::{step, step_of};

/// Context id of every guest: each VMM is its own vsock world, so they need not differ.
const GUEST_CID: u32 = 3;

/// How long after a guest was last heard its way to the host counts as proved: two heartbeats.
const FRESH: Duration = Duration::from_millis(2 * HEARTBEAT_INTERVAL_MS);

/// What an agent has on this host. Each field undoes itself when dropped, in this order.
#[derive(Debug)]
pub(super) struct Life {
    /// None once it ended, or before it began.
    pub(super) vmm: Option<Vmm>,
    pub(super) greeter: Greeter,
    /// Where its programs reach the host.
    pub(super) ports: Ports,
    /// What one is that this `arkd` restored, and what its guest said.
    pub(super) restored: Option<Restored>,
    pub(super) home: Home,
    pub(super) seat: Seat,
}

#[derive(Debug)]
pub(super) struct Restored {
    generation: Generation,
    snapshot: String,
    hello: Option<String>,
    /// When it was last heard on a connection that it made.
    heard: Instant,
}

/// An agent's entry in the registry.
#[derive(Debug)]
pub(super) struct Seat(pub(super) Arc<Core>, pub(super) String);

impl Seat {
    pub(super) const fn new(core: Arc<Core>, id: String) -> Self {
        Self(core, id)
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.0.registry.forget(&self.1);
    }
}

impl Life {
    /// The agent's directory and the socket that its guest calls, both of which may be there from an earlier `arkd`, as the VMM
    /// is, which is to be given to it then. On failure the directory stays as it is.
    pub(super) fn home(core: &Arc<Core>, dir: &AgentDir, id: String) -> Result<Self, BootError> {
        let seat = Seat::new(Arc::clone(core), id);
        let home = Home::make(dir.clone()).map_err(|source| directory(dir, source))?;
        // Anything but its absence is told by what follows.
        let _ = std::fs::remove_file(dir.host_port(HELLO_PORT));
        match listen(dir, &seat) {
            Ok((greeter, ports)) => Ok(Self { vmm: None, greeter, ports, restored: None, home, seat }),
            Err(source) => {
                home.leave();
                Err(directory(dir, source))
            }
        }
    }

    fn within(home: Home, vmm: Option<Vmm>, dir: &AgentDir, seat: Seat) -> Result<Self, BootError> {
        let (greeter, ports) = listen(dir, &seat).map_err(|source| directory(dir, source))?;
        Ok(Self { vmm, greeter, ports, restored: None, home, seat })
    }

    /// Makes room for another VMM after [`Self::kill`]: what the guest of the last one still said is heard no more.
    pub(super) fn clear(&mut self, dir: &AgentDir) -> Result<(), BootError> {
        boot::clear(dir);
        // Anything but its absence is told by what follows.
        let _ = std::fs::remove_file(dir.host_port(HELLO_PORT));
        self.listen_anew(dir).map_err(|source| directory(dir, source))
    }

    /// Has another guest find the host, in a directory where none was or that was made ready for it.
    pub(super) fn listen_anew(&mut self, dir: &AgentDir) -> std::io::Result<()> {
        (self.greeter, self.ports) = listen(dir, &self.seat)?;
        Ok(())
    }

    /// Lets VMM and directory be, for a later `arkd`.
    pub(super) fn leave(self) {
        let Self { vmm, home, .. } = self;
        home.leave();
        if let Some(vmm) = vmm {
            vmm.leave();
        }
    }

    /// Takes note of what the guest said.
    pub(super) fn note(&mut self, event: &Event) {
        let Some(restored) = &mut self.restored else { return };
        match event {
            Event::Hello(hello) => {
                let Hello { guestd, kernel, cpus, .. } = hello;
                restored.hello = Some(format!("ark-guestd {guestd} on Linux {kernel}, {cpus} processors"));
                restored.heard = Instant::now();
            }
            Event::Heartbeat(_) => restored.heard = Instant::now(),
            Event::Misbehaved(_) => {}
        }
    }

    /// What the guest said when it called, if it was heard from since or a moment ago.
    fn hello(&self) -> Option<&str> {
        let restored = self.restored.as_ref().filter(|restored| restored.heard.elapsed() < FRESH)?;
        restored.hello.as_deref()
    }

    /// Ends the VMM at once, if there is one, and waits until it is gone.
    pub(super) async fn kill(&mut self) {
        if let Some(mut vmm) = self.vmm.take() {
            vmm.kill();
            vmm.wait().await;
        }
    }
}

/// The end of the VMM; for ever when there is none.
pub(super) async fn ended(vmm: &mut Option<Vmm>) -> ExitRecord {
    match vmm {
        Some(vmm) => vmm.wait().await,
        None => std::future::pending().await,
    }
}

/// Listens on the sockets that the guest calls.
fn listen(dir: &AgentDir, seat: &Seat) -> std::io::Result<(Greeter, Ports)> {
    let greeter = Greeter::listen(&dir.host_port(HELLO_PORT))?;
    Ok((greeter, Ports::listen(&seat.0, dir, &seat.1)?))
}

/// The agent's directory as its VMM knows it: the one that it works in, whatever its name is by now.
fn here() -> AgentDir {
    AgentDir(PathBuf::new())
}

fn directory(dir: &AgentDir, source: std::io::Error) -> BootError {
    BootError::Directory { path: dir.0.clone(), source }
}

impl Owner {
    /// Starts the VMM and waits until its guest is up; on failure nothing is left, the process neither. Given up when nobody
    /// waits for `up` any more.
    pub(super) async fn come_up<T>(&mut self, up: &mut oneshot::Sender<T>) -> Result<Life, BootError> {
        // A request lasts no longer than until its agent is up, or is given up.
        let cause = std::mem::replace(&mut self.cause, Span::none());
        let seat = self.seat();
        match self.begun.take() {
            Some(Begun::Restore(base, den)) => {
                let Some(hold) = base.hold() else { return Err(BootError::Removed) };
                self.body.set_base(base);
                let mut life = match den {
                    Some(den) => {
                        let Den { vmm, home, .. } = *den;
                        Life::within(home, Some(vmm), &self.dir, seat)?
                    }
                    None => self.new_life(seat)?,
                };
                let restored = tokio::select! {
                    restored = self.restore(&mut life, &hold).instrument(step_of(&cause, "restore")) => restored,
                    () = up.closed() => Err(BootError::Removed),
                };
                self.or_nothing(life, restored).await
            }
            Some(Begun::Boot | Begun::Earlier) | None => {
                let mut life = self.new_life(seat)?;
                let booted = self.boot_well(&mut life, up).instrument(step_of(&cause, "boot")).await;
                self.or_nothing(life, booted).await
            }
        }
    }

    fn new_life(&self, seat: Seat) -> Result<Life, BootError> {
        let home = Home::make(self.dir.clone()).map_err(|source| directory(&self.dir, source))?;
        Life::within(home, None, &self.dir, seat)
    }

    async fn or_nothing(&self, mut life: Life, up: Result<(), BootError>) -> Result<Life, BootError> {
        if let Err(error) = up {
            if let BootError::Ended { record, .. } = &error {
                self.core.telemetry.vmm_ended(record.reason);
            }
            life.kill().await;
            if !matches!(error, BootError::Removed) {
                self.keep_console(&error.to_string());
            }
            self.body.set_base(Base::None);
            return Err(error);
        }
        Ok(life)
    }

    /// Boots the guest, again where the processor is emulated and was at fault.
    async fn boot_well<T>(&mut self, life: &mut Life, up: &mut oneshot::Sender<T>) -> Result<(), BootError> {
        let config = RunConfig::Boot(self.config());
        let mut attempts = boot::attempts();
        loop {
            let started = Instant::now();
            self.start_vmm(life, &config).await?;
            let Err(error) = self.boot(life, up).await else {
                self.core.telemetry.phase(Phase::Boot, started.elapsed());
                return Ok(());
            };
            life.kill().await;
            attempts -= 1;
            if attempts == 0 || !boot::is_worth_another(&error) {
                return Err(error);
            }
            tracing::warn!(%error, attempts_left = attempts, "this host's processor is emulated, so the guest is booted again");
            boot::clear(&self.dir);
        }
    }

    /// Gives `config` to the VMM that waits for one, or starts one.
    async fn start_vmm(&self, life: &mut Life, config: &RunConfig) -> Result<(), BootError> {
        let pid = match &mut life.vmm {
            Some(vmm) => {
                vmm.configure(config).await?;
                vmm.pid()
            }
            none => {
                let program = self.core.config.assets.program("ark-vmm");
                none.insert(Vmm::start(&program, config, &self.dir).await?).pid()
            }
        };
        self.state.send_modify(|agent| agent.vmm_pid = Some(pid));
        Ok(())
    }

    fn disks(&self) -> impl Iterator<Item = PathBuf> + '_ {
        self.media.iter().flat_map(Media::disks)
    }

    /// What the guest's kernel is told besides what the VMM tells every one.
    fn cmdline(&self, agent: &Agent) -> String {
        // Read by ark-guestd.
        let mut line = format!("ark.hostname={} ark.machine_id={}", agent.name, self.body.machine_id());
        // A model is computed on all processors but the first. A timer tick there does nothing for it, and each is several exits.
        if agent.vcpus > 1 && self.media.as_ref().is_some_and(|media| media.model.is_some()) {
            line += &format!(" nohz_full=1-{}", agent.vcpus - 1);
        }
        line
    }

    fn config(&self) -> VmConfig {
        let (agent, here) = (self.state.borrow(), here());
        VmConfig {
            kernel: self.core.config.assets.kernel(),
            initrd: Some(self.core.config.assets.initrd()),
            cmdline: self.cmdline(&agent),
            vcpus: agent.vcpus,
            memory_mib: agent.memory_mib,
            disks: self.disks().map(|path| DiskConfig { path, read_only: true }).collect(),
            vsock: Some(VsockConfig { guest_cid: GUEST_CID, uds_path: here.vsock() }),
            console: Some(here.console()),
            control_socket: Some(here.control_socket()),
            exit_file: Some(here.exit_file()),
            labels: self.media.iter().flat_map(Media::labels).collect(),
        }
    }

    /// Waits for the guest's hello.
    async fn boot<T>(&mut self, life: &mut Life, up: &mut oneshot::Sender<T>) -> Result<(), BootError> {
        let limit = self.core.config.timing.boot;
        let deadline = sleep(limit);
        let control = self.dir.control_socket();
        let standstill = boot::standstill(&control);
        tokio::pin!(deadline, standstill);
        loop {
            tokio::select! {
                biased;
                () = up.closed() => return Err(BootError::Removed),
                event = life.greeter.next() => match event {
                    Event::Hello(hello) => {
                        tracing::debug!(?hello, "hello");
                        return Ok(());
                    }
                    Event::Misbehaved(failure) if !failure.is_disconnect() => {
                        return Err(BootError::Hello(failure));
                    }
                    Event::Heartbeat(_) | Event::Misbehaved(_) => {}
                },
                record = ended(&mut life.vmm) => {
                    return Err(BootError::Ended { record, words: tail_text(&self.dir.console()) });
                }
                request = self.requests.recv() => self.unless_removed(request.as_ref())?,
                time = &mut standstill => {
                    return Err(BootError::Standstill { time, words: tail_text(&self.dir.console()) });
                }
                () = &mut deadline => {
                    return Err(BootError::Deadline { limit, words: tail_text(&self.dir.console()) });
                }
            }
        }
    }

    pub(super) fn unless_removed(&mut self, request: Option<&Request>) -> Result<(), BootError> {
        // A restart cuts off what runs in the guest.
        let is_over = matches!(request, Some(Request::StreamEnded)) && self.state.borrow().auto_remove;
        match Request::parting(request) {
            None if !is_over => return Ok(()),
            None => self.parting = Some(Parting::Removal(Removal::NOW)),
            Some(Parting::Leave) => {
                self.parting = Some(Parting::Leave);
                return Err(BootError::Ending);
            }
            removal => self.parting = removal,
        }
        Err(BootError::Removed)
    }

    /// Boots a guest in the agent's directory, where an earlier VMM was.
    pub(super) async fn boot_again<T>(
        &mut self,
        life: &mut Life,
        up: &mut oneshot::Sender<T>,
    ) -> Result<(), BootError> {
        life.clear(&self.dir)?;
        life.restored = None;
        self.boot_well(life, up).await
    }

    /// Restores the guest of `hold` and has it prove what it has to, again where the processor is emulated and was at fault.
    pub(super) async fn restore(&mut self, life: &mut Life, hold: &Hold) -> Result<(), BootError> {
        let core = Arc::clone(&self.core);
        let waits = Instant::now();
        let turn = core.restores.acquire();
        tokio::pin!(turn);
        let _turn = loop {
            tokio::select! {
                // Closed never: an error cannot be.
                turn = &mut turn => break turn,
                request = self.requests.recv() => self.unless_removed(request.as_ref())?,
            }
        };
        core.telemetry.phase(Phase::Turn, waits.elapsed());
        let mut attempts = boot::attempts();
        loop {
            let started = Instant::now();
            let (generation, here) = (Generation(rand::random()), here());
            let config = RunConfig::Restore(RestoreConfig {
                snapshot: hold.dir().to_owned(),
                generation,
                disks: self.disks().collect(),
                uds_path: Some(here.vsock()),
                console: Some(here.console()),
                control_socket: Some(here.control_socket()),
                exit_file: Some(here.exit_file()),
            });
            self.start_vmm(life, &config).await?;
            let (snapshot, heard) = (hold.id().to_string(), Instant::now());
            life.restored = Some(Restored { generation, snapshot, hello: None, heard });
            let due = renewal::renewals_of(hold.dir()).map(|count| count.saturating_add(1));
            let proof = self.prove(life, due, started, std::future::pending());
            let Err(error) = proof.instrument(step("renewal")).await else {
                core.telemetry.phase(Phase::Restore, started.elapsed());
                return Ok(());
            };
            attempts -= 1;
            if attempts == 0 || !boot::is_worth_another(&error) {
                return Err(error);
            }
            tracing::warn!(%error, attempts_left = attempts, "this host's processor is emulated, so the guest is restored again");
            life.kill().await;
            life.clear(&self.dir)?;
        }
    }

    /// Renews a guest that was restored and renewed before: a standby that becomes somebody.
    pub(super) async fn renew(
        &mut self,
        life: &mut Life,
        since: Instant,
        gone: impl Future<Output = ()>,
    ) -> Result<(), BootError> {
        let due = self.body.renewals().saturating_add(1);
        self.prove(life, Some(due), since, gone).await
    }

    /// Gives the restored guest the agent's identity, runs every check, and writes the receipt.
    async fn prove(
        &mut self,
        life: &mut Life,
        due: Option<u64>,
        since: Instant,
        gone: impl Future<Output = ()>,
    ) -> Result<(), BootError> {
        let (id, name) = {
            let agent = self.state.borrow();
            (agent.id.clone(), agent.name.clone())
        };
        let Some(restored) = &life.restored else { return Err(BootError::Removed) };
        let (generation, snapshot) = (restored.generation, restored.snapshot.clone());
        let (machine_id, began) = (self.body.machine_id(), Instant::now());
        let order = renewal::order(generation, &name, &machine_id);
        let (renewal, hello) = self.challenge(life, order.clone(), gone).await?;
        let others = self.core.registry.all();
        let mut others = others.iter().filter(|other| other.id() != id && !other.has_ended());
        let wanted = Wanted {
            order: &order,
            renewals: due,
            hello: &hello,
            machine_id_taken: others.clone().any(|other| other.machine_id() == machine_id),
            hostname_taken: others.any(|other| *other.name() == name),
        };
        let checks = renewal::check(&renewal, &wanted, &self.core.seen)?;
        self.core.telemetry.phase(Phase::Renew, began.elapsed());
        self.body.set_renewals(renewal.answer.renewals);
        let receipt = renewal::seal(Receipt {
            agent_id: id,
            name,
            snapshot,
            generation,
            nonce: order.nonce,
            at_unix_ms: 0,
            took_ms: millis(since.elapsed()),
            checks,
            sha256: String::new(),
        });
        renewal::write(&self.dir, &receipt).map_err(|source| directory(&self.dir, source))?;
        self.body.set_receipt(Some(receipt));
        Ok(())
    }

    /// Sends `order` to the guest and waits for its answer and for its call; what it said there comes back.
    async fn challenge(
        &mut self,
        life: &mut Life,
        order: ark_types::guest::Renew,
        gone: impl Future<Output = ()>,
    ) -> Result<(Renewal, String), BootError> {
        debug_assert_eq!(self.state.borrow().state, AgentState::Creating);
        let limit = self.core.config.timing.renewal;
        let guest = self.guest.clone();
        let work = renew(&guest, order, limit);
        // The answer has its own limit; the call may come after it.
        let deadline = sleep(limit + REASON_PATIENCE);
        tokio::pin!(work, deadline, gone);
        let mut renewal = None;
        loop {
            if let Some(hello) = life.hello()
                && let Some(renewal) = renewal.take()
            {
                return Ok((renewal, hello.to_owned()));
            }
            tokio::select! {
                biased;
                () = &mut gone => return Err(BootError::Removed),
                answer = &mut work, if renewal.is_none() => match answer {
                    Ok(answer) => renewal = Some(answer),
                    Err(failure) => return Err(self.reason(life, failure).await),
                },
                event = life.greeter.next() => match event {
                    Event::Misbehaved(failure) if !failure.is_disconnect() => {
                        return Err(BootError::Hello(failure));
                    }
                    event => {
                        life.note(&event);
                        self.hear(event);
                    }
                },
                record = ended(&mut life.vmm) => {
                    return Err(BootError::Ended { record, words: String::new() });
                }
                request = self.requests.recv() => self.unless_removed(request.as_ref())?,
                () = &mut deadline => {
                    return Err(BootError::NoCall { limit, words: tail_text(&self.dir.console()) });
                }
            }
        }
    }

    /// Why a renewal failed: a VMM that ended says more than the connection it broke.
    async fn reason(&self, life: &mut Life, failure: crate::guest::GuestFailure) -> BootError {
        if failure.is_disconnect() {
            let end = tokio::time::timeout(REASON_PATIENCE, ended(&mut life.vmm)).await;
            if let Ok(record) = end {
                return BootError::Ended { record, words: String::new() };
            }
        }
        BootError::Renewal(failure)
    }
}
