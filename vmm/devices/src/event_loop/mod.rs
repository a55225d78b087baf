//! The one thread that serves all virtio devices: it waits for notifications from the guest and for the devices' host sides.
//!
//! ```text
//!             pause()                    the loop notices
//!  Running ────────────► PauseRequested ──────────────────► Paused
//!     ▲ ▲                      │ resume()                      │ resume()
//!     │ └──────────────────────┘                               │
//!     └────────────────────────────────────────────────────────┘
//!
//!  stop(), from everywhere ──► StopRequested ── the loop notices, or fails ──► Stopped
//! ```
//!
//! While it is paused no device runs, so none touches guest memory; what arrives meanwhile stays in its descriptor until resume.

#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::virtio::SharedDevice;
use crate::virtio::mmio::MmioTransport;

/// Bytes of the loop's stack. Less than a huge page: the default of 2 MiB would become one, all of it resident.
const STACK: usize = 256 << 10;
/// Events taken from the kernel at a time: more than most VMs have descriptors.
const BATCH: usize = 32;

/// Where the loop is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Running,
    PauseRequested,
    Paused,
    StopRequested,
    Stopped,
}

/// A device that is still at work although the loop was asked to pause or stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the devices did not come to rest within {} s; a disk of the host hangs or the host is overloaded", .0.as_secs())]
pub struct StillBusy(Duration);

struct Control {
    phase: Mutex<Phase>,
    changed: Condvar,
    wake: EventFd,
}

/// What one descriptor of the loop stands for.
enum Source {
    /// The control needs a look.
    Wake,
    /// The guest notified a queue.
    Kick { device: SharedDevice, queue: u16, event: Arc<EventFd> },
    /// A device's host side.
    Host { device: SharedDevice },
}

/// The loop while it is put together; [`Self::spawn`] runs it.
pub struct EventLoop {
    epoll: Epoll,
    /// An epoll event's data is an index here.
    sources: Vec<Source>,
    control: Arc<Control>,
}

/// Pauses, resumes and stops a running loop, from any thread but the loop's own.
#[derive(Clone)]
pub struct LoopHandle {
    control: Arc<Control>,
}

impl EventLoop {
    /// A loop without devices.
    ///
    /// # Errors
    /// When the host has no descriptor left.
    pub fn new() -> io::Result<Self> {
        let control = Arc::new(Control {
            phase: Mutex::new(Phase::Running),
            changed: Condvar::new(),
            wake: EventFd::new(EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
        });
        let mut this = Self { epoll: Epoll::new()?, sources: Vec::new(), control };
        let wake = this.control.wake.as_raw_fd();
        this.add(wake, Source::Wake)?;
        Ok(this)
    }

    /// Serves the device behind `transport`: its queues' kicks, and its host side if it has one. The host side is waited for
    /// level-triggered and from the start, before the driver is ready: `host_ready` must take what there is or stop waiting
    /// for it, else the loop spins.
    ///
    /// # Errors
    /// When the kernel refuses a descriptor.
    pub fn add_device(&mut self, transport: &MmioTransport) -> io::Result<()> {
        let device = transport.device();
        for (queue, event) in (0..).zip(transport.kicks()) {
            let source = Source::Kick { device: Arc::clone(device), queue, event: Arc::clone(event) };
            self.add(event.as_raw_fd(), source)?;
        }
        let host_fd = device.lock().unwrap_or_else(PoisonError::into_inner).host_fd();
        match host_fd {
            Some(fd) => self.add(fd, Source::Host { device: Arc::clone(device) }),
            None => Ok(()),
        }
    }

    /// A handle to control the loop with.
    #[must_use]
    pub fn handle(&self) -> LoopHandle {
        LoopHandle { control: Arc::clone(&self.control) }
    }

    /// Runs the loop on a thread of its own, named `devices`, until [`LoopHandle::stop`]. Should epoll fail before that, the
    /// thread tells `failed` and ends; devices then stand still.
    ///
    /// # Errors
    /// When the host refuses the thread.
    pub fn spawn(self, failed: impl FnOnce(io::Error) + Send + 'static) -> io::Result<JoinHandle<()>> {
        let thread = move || self.run().unwrap_or_else(failed);
        std::thread::Builder::new().name("devices".into()).stack_size(STACK).spawn(thread)
    }

    fn add(&mut self, fd: i32, source: Source) -> io::Result<()> {
        let index = u64::try_from(self.sources.len()).map_err(io::Error::other)?;
        self.epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, index))?;
        self.sources.push(source);
        Ok(())
    }

    fn run(self) -> io::Result<()> {
        // Whoever waits for a pause must not wait for a loop that has ended, however it ended.
        let _stopped = StoppedOnDrop(&self.control);
        let mut events = [EpollEvent::default(); BATCH];
        loop {
            let count = match self.epoll.wait(-1, &mut events) {
                Ok(count) => count,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => 0,
                Err(e) => return Err(e),
            };
            for event in events.iter().take(count) {
                let source = usize::try_from(event.data()).ok().and_then(|i| self.sources.get(i));
                match source {
                    Some(Source::Wake) => {
                        let _ = self.control.wake.read();
                    }
                    // Nothing to read: a reset of the device took the notification back.
                    Some(Source::Kick { device, queue, event }) if event.read().is_ok() => {
                        device.lock().unwrap_or_else(PoisonError::into_inner).queue_notified(*queue);
                    }
                    Some(Source::Host { device }) => {
                        device.lock().unwrap_or_else(PoisonError::into_inner).host_ready();
                    }
                    Some(Source::Kick { .. }) | None => {}
                }
                if !self.control.may_go_on() {
                    return Ok(());
                }
            }
        }
    }
}

impl LoopHandle {
    /// Returns once no device runs, and none will until [`Self::resume`]. At once when the loop is paused or stopped.
    ///
    /// # Errors
    /// [`StillBusy`] after `limit`; also when the loop was not spawned yet.
    pub fn pause(&self, limit: Duration) -> Result<(), StillBusy> {
        self.control.ask(|phase| phase == Phase::Running, Phase::PauseRequested, limit)
    }

    /// Lets devices run again.
    pub fn resume(&self) {
        let mut phase = self.control.phase();
        if matches!(*phase, Phase::PauseRequested | Phase::Paused) {
            *phase = Phase::Running;
            self.control.changed.notify_all();
        }
    }

    /// Ends the loop: when this returns no device runs and the thread is about to end.
    ///
    /// # Errors
    /// [`StillBusy`] after `limit`; the loop ends as soon as the device comes back.
    pub fn stop(&self, limit: Duration) -> Result<(), StillBusy> {
        self.control.ask(|phase| phase != Phase::Stopped, Phase::StopRequested, limit)
    }
}

impl Control {
    fn phase(&self) -> MutexGuard<'_, Phase> {
        self.phase.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) {
        // Fails only when the counter is full: the loop is awake then.
        let _ = self.wake.write(1);
    }

    /// Moves to `request` when the phase is one of `from`, then waits until no request is open.
    fn ask(
        &self,
        from: impl FnOnce(Phase) -> bool,
        request: Phase,
        limit: Duration,
    ) -> Result<(), StillBusy> {
        let deadline = Instant::now().checked_add(limit);
        let mut phase = self.phase();
        if from(*phase) {
            *phase = request;
            self.changed.notify_all();
            self.wake();
        }
        while matches!(*phase, Phase::PauseRequested | Phase::StopRequested) {
            let left = deadline.map_or(limit, |at| at.saturating_duration_since(Instant::now()));
            if left.is_zero() {
                return Err(StillBusy(limit));
            }
            phase = self.changed.wait_timeout(phase, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(())
    }

    /// The loop's look at the control between two events: stands still while paused; false when it is to end.
    fn may_go_on(&self) -> bool {
        let mut phase = self.phase();
        loop {
            match *phase {
                Phase::Running => return true,
                Phase::StopRequested | Phase::Stopped => return false,
                Phase::PauseRequested => {
                    *phase = Phase::Paused;
                    self.changed.notify_all();
                }
                Phase::Paused => phase = self.changed.wait(phase).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }
}

struct StoppedOnDrop<'a>(&'a Control);

impl Drop for StoppedOnDrop<'_> {
    fn drop(&mut self) {
        *self.0.phase() = Phase::Stopped;
        self.0.changed.notify_all();
    }
}
