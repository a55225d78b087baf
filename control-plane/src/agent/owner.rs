//! The one task that owns an agent: it alone holds the VMM and changes the state.
//!
//! ```text
//!            hello                     Remove, or the first stream ended (auto_remove)
//!  boot() ──────────► serve() ──────────────────────────────────────────────────────► stop() ──► gone
//!     │                 │  ▲ heartbeats                                                ▲
//!     │ no hello (1)    └──┘ VMM ended: Stopped or Failed, still known until removed ──┘
//!     ▼
//!   gone (directory, sockets, process and registry entry go with the guards of `Life`)
//! ```
//!
//! (1) On an emulated processor a guest that it spoiled is booted again first: see [`boot`].

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ark_types::agent::{Agent, AgentHeartbeat, AgentState};
use ark_types::guest::{HELLO_PORT, Heartbeat};
use ark_types::layout::AgentDir;
use ark_types::vmm::{
    ControlReply, ControlRequest, DiskConfig, ExitReason, ExitRecord, VmConfig, VsockConfig,
};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{sleep, sleep_until};

use super::{BootError, boot, sentence};
use crate::cleanup;
use crate::core::Core;
use crate::guest::{Event, Greeter};
use crate::host::{millis, unix_ms};
use crate::images::Image;
use crate::supervisor::{self, Vmm, tail_text};

/// Context id of every guest: each VMM is its own vsock world, so they need not differ.
const GUEST_CID: u32 = 3;
/// Time a VMM has beyond the guest's grace to end itself before it is killed.
const STOP_SLACK: Duration = Duration::from_secs(1);

/// What others may ask of an agent's owner.
#[derive(Debug)]
pub(super) enum Request {
    /// End it and leave nothing.
    Remove {
        /// Time the guest has to end in order.
        grace: Duration,
    },
    /// A streamed exec began.
    StreamBegan,
    /// A streamed exec ended.
    StreamEnded,
}

/// The owner, before and while its agent lives.
pub(super) struct Owner {
    core: Arc<Core>,
    dir: AgentDir,
    image: Image,
    state: watch::Sender<Agent>,
    requests: mpsc::UnboundedReceiver<Request>,
}

/// What an agent has on this host. Each field undoes itself when dropped, in this order.
struct Life {
    /// None once it ended.
    vmm: Option<Vmm>,
    greeter: Greeter,
    _home: Home,
    _seat: Seat,
}

/// The agent's directory.
struct Home(AgentDir);

impl Drop for Home {
    fn drop(&mut self) {
        cleanup::remove_agent_dir(&self.0.0);
    }
}

/// The agent's entry in the registry.
struct Seat(Arc<Core>, String);

impl Drop for Seat {
    fn drop(&mut self) {
        self.0.registry.forget(&self.1);
    }
}

impl Owner {
    pub(super) fn new(
        core: Arc<Core>,
        dir: AgentDir,
        image: Image,
        state: watch::Sender<Agent>,
        requests: mpsc::UnboundedReceiver<Request>,
    ) -> Self {
        Self { core, dir, image, state, requests }
    }

    /// The agent's whole life. The first word on it goes to `up`; who no longer listens there has given it up.
    pub(super) async fn live(mut self, mut up: oneshot::Sender<Result<Agent, BootError>>) {
        let (id, name) = {
            let agent = self.state.borrow();
            (agent.id.clone(), agent.name.clone())
        };
        let seat = Seat(Arc::clone(&self.core), id.clone());
        let mut life = match self.come_up(seat, &mut up).await {
            Ok(life) => life,
            Err(error) => {
                tracing::warn!(%id, %name, %error, "the agent did not start");
                self.enter(AgentState::Failed, Some(error.to_string()), None);
                // By now every guard has run, so who is told finds nothing left.
                let _ = up.send(Err(error));
                return;
            }
        };
        let agent = self.state.borrow().clone();
        tracing::info!(%id, %name, boot_ms = agent.boot_ms, pid = agent.vmm_pid, "the agent runs");
        let grace = match up.send(Ok(agent)) {
            Ok(()) => self.serve(&mut life).await,
            Err(_) => Duration::ZERO,
        };
        if let Some(vmm) = &mut life.vmm {
            let record = self.stop(vmm, grace).await;
            self.conclude(record, true);
        }
        tracing::info!(%id, %name, "the agent is removed");
    }

    /// Starts the VMM and waits for the hello; on failure nothing is left, the process neither.
    async fn come_up(
        &mut self,
        seat: Seat,
        up: &mut oneshot::Sender<Result<Agent, BootError>>,
    ) -> Result<Life, BootError> {
        let mut life = self.start(seat).await?;
        let mut attempts = boot::attempts();
        while let Err(error) = self.boot(&mut life, up).await {
            if let Some(vmm) = &mut life.vmm {
                vmm.kill();
                vmm.wait().await;
            }
            attempts -= 1;
            if attempts == 0 || !boot::is_worth_another(&error) {
                return Err(error);
            }
            tracing::warn!(%error, attempts_left = attempts, "this host's processor is emulated, so the guest is booted again");
            boot::clear(&self.dir);
            life.vmm = Some(self.start_vmm().await?);
        }
        Ok(life)
    }

    /// Makes the directory and the sockets, and starts the VMM.
    async fn start(&self, seat: Seat) -> Result<Life, BootError> {
        let directory = |source| BootError::Directory { path: self.dir.0.clone(), source };
        cleanup::make_private_dir(&self.dir.0).map_err(directory)?;
        let home = Home(self.dir.clone());
        let mut hello_socket = self.dir.vsock().into_os_string();
        hello_socket.push(format!("_{HELLO_PORT}"));
        let greeter = Greeter::listen(&PathBuf::from(hello_socket)).map_err(directory)?;
        let vmm = self.start_vmm().await?;
        Ok(Life { vmm: Some(vmm), greeter, _home: home, _seat: seat })
    }

    async fn start_vmm(&self) -> Result<Vmm, BootError> {
        let program = self.core.config.assets.program("ark-vmm");
        let vmm = Vmm::start(&program, &self.config(), &self.dir).await?;
        self.state.send_modify(|agent| agent.vmm_pid = Some(vmm.pid()));
        Ok(vmm)
    }

    fn config(&self) -> VmConfig {
        let agent = self.state.borrow();
        VmConfig {
            kernel: self.core.config.assets.kernel(),
            initrd: Some(self.core.config.assets.initrd()),
            // Read by ark-guestd.
            cmdline: format!("ark.hostname={}", agent.name),
            vcpus: agent.vcpus,
            memory_mib: agent.memory_mib,
            disks: vec![DiskConfig { path: self.image.path.clone(), read_only: true }],
            vsock: Some(VsockConfig { guest_cid: GUEST_CID, uds_path: self.dir.vsock() }),
            console: Some(self.dir.console()),
            control_socket: Some(self.dir.control_socket()),
            exit_file: Some(self.dir.exit_file()),
        }
    }

    /// Waits for the guest's hello.
    async fn boot(
        &mut self,
        life: &mut Life,
        up: &mut oneshot::Sender<Result<Agent, BootError>>,
    ) -> Result<(), BootError> {
        let started = Instant::now();
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
                        self.enter(AgentState::Running, None, Some(millis(started.elapsed())));
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
                request = self.requests.recv() => match request {
                    Some(Request::Remove { .. }) | None => return Err(BootError::Removed),
                    Some(Request::StreamBegan | Request::StreamEnded) => {}
                },
                time = &mut standstill => {
                    return Err(BootError::Standstill { time, words: tail_text(&self.dir.console()) });
                }
                () = &mut deadline => {
                    return Err(BootError::Deadline { limit, words: tail_text(&self.dir.console()) });
                }
            }
        }
    }

    /// Looks after the agent until it is to be removed; returns the guest's grace.
    async fn serve(&mut self, life: &mut Life) -> Duration {
        let auto_remove = self.state.borrow().auto_remove;
        let first_stream = sleep(self.core.config.timing.first_stream);
        tokio::pin!(first_stream);
        let mut streamed = false;
        loop {
            tokio::select! {
                biased;
                record = ended(&mut life.vmm) => {
                    self.conclude(record, false);
                    life.vmm = None;
                }
                request = self.requests.recv() => match request {
                    Some(Request::Remove { grace }) => return grace,
                    Some(Request::StreamBegan) => streamed = true,
                    Some(Request::StreamEnded) if auto_remove => return Duration::ZERO,
                    Some(Request::StreamEnded) => {}
                    None => return Duration::ZERO,
                },
                event = life.greeter.next() => self.hear(event),
                () = &mut first_stream, if auto_remove && !streamed => {
                    tracing::info!("no streamed exec began in time");
                    return Duration::ZERO;
                }
            }
        }
    }

    fn hear(&self, event: Event) {
        match event {
            Event::Heartbeat(Heartbeat { uptime_ms, mem_available_kib, load1_x100, .. }) => {
                let heartbeat =
                    AgentHeartbeat { at_unix_ms: unix_ms(), uptime_ms, mem_available_kib, load1_x100 };
                self.state.send_modify(|agent| agent.heartbeat = Some(heartbeat));
            }
            Event::Hello(hello) => tracing::debug!(?hello, "hello again"),
            Event::Misbehaved(failure) => tracing::debug!(%failure, "the guest's heartbeat broke"),
        }
    }

    /// Ends the VMM: asks it, waits for `grace` (or less, when a later removal gives less), then kills it.
    async fn stop(&mut self, vmm: &mut Vmm, grace: Duration) -> ExitRecord {
        self.enter(AgentState::Stopping, None, None);
        if !grace.is_zero() && self.ask_to_stop(grace).await {
            let mut deadline = tokio::time::Instant::now() + grace + STOP_SLACK;
            loop {
                tokio::select! {
                    record = vmm.wait() => return record,
                    () = sleep_until(deadline) => break,
                    request = self.requests.recv() => match request {
                        Some(Request::Remove { grace }) => {
                            deadline = deadline.min(tokio::time::Instant::now() + grace);
                        }
                        Some(Request::StreamBegan | Request::StreamEnded) => {}
                        None => break,
                    },
                }
            }
        }
        vmm.kill();
        vmm.wait().await
    }

    async fn ask_to_stop(&self, grace: Duration) -> bool {
        let request = ControlRequest::Stop { grace_ms: millis(grace) };
        match supervisor::ask(&self.dir.control_socket(), request).await {
            Ok(ControlReply::State { .. }) => true,
            Ok(reply) => {
                tracing::warn!(?reply, "the VMM does not stop its guest; it is killed");
                false
            }
            Err(error) => {
                tracing::warn!(%error, "the VMM cannot be asked to stop; it is killed");
                false
            }
        }
    }

    /// Publishes the VMM's end.
    fn conclude(&self, record: ExitRecord, on_request: bool) {
        let by_itself = matches!(record.reason, ExitReason::GuestPoweroff);
        let (state, reason) = match (on_request, by_itself) {
            (true, _) => (AgentState::Stopped, "it was stopped on request".to_owned()),
            (false, true) => (AgentState::Stopped, sentence(&record)),
            (false, false) => (AgentState::Failed, sentence(&record)),
        };
        if state == AgentState::Failed {
            let agent = self.state.borrow();
            tracing::warn!(id = agent.id, name = %agent.name, reason, "the agent ended");
        }
        self.state.send_modify(|agent| agent.exit = Some(record));
        self.enter(state, Some(reason), None);
    }

    /// Moves to `next`, with its reason or, on the way to running, the time that it took.
    fn enter(&self, next: AgentState, reason: Option<String>, boot_ms: Option<u64>) {
        self.state.send_modify(|agent| {
            debug_assert!(agent.state.may_become(next), "{} may not become {next}", agent.state);
            agent.state = next;
            agent.reason = reason.or_else(|| agent.reason.take());
            agent.boot_ms = boot_ms.or(agent.boot_ms);
            if super::is_ended(next) {
                agent.vmm_pid = None;
            }
        });
    }
}

/// The end of the VMM; for ever when there is none.
async fn ended(vmm: &mut Option<Vmm>) -> ExitRecord {
    match vmm {
        Some(vmm) => vmm.wait().await,
        None => std::future::pending().await,
    }
}
