//! The host's clock is set: guests that run follow it. Their own times do not, see [`crate::reconcile::Clock`].
//!
//! The kernel tells of it by a timer on that clock which it cancels (timerfd_create(2), `TFD_TIMER_CANCEL_ON_SET`); also when the host
//! wakes from sleep. A clock that is only slewed is followed as any fork or resume finds it.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use ark_types::agent::AgentState;
use futures_util::StreamExt as _;
use futures_util::stream;
use nix::errno::Errno;
use nix::sys::time::{TimeSpec, TimeValLike as _};
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::pause::set_clock_of;
use crate::core::Core;

/// Guests whose clock is set at a time.
const AT_ONCE: usize = 8;
/// When the timer would expire, seconds since the Unix epoch: in the year 2242.
const NEVER: i64 = 1 << 33;

/// A timer on the host's clock.
struct Timer(TimerFd);

impl AsRawFd for Timer {
    fn as_raw_fd(&self) -> RawFd {
        std::os::fd::AsFd::as_fd(&self.0).as_raw_fd()
    }
}

impl Timer {
    fn new() -> io::Result<Self> {
        let timer =
            TimerFd::new(ClockId::CLOCK_REALTIME, TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC)?;
        let never = Expiration::OneShot(TimeSpec::seconds(NEVER));
        let until_set = TimerSetTimeFlags::TFD_TIMER_ABSTIME | TimerSetTimeFlags::TFD_TIMER_CANCEL_ON_SET;
        timer.set(never, until_set)?;
        Ok(Self(timer))
    }

    /// Whether the clock was set since it was asked last. The timer goes on.
    fn was_cancelled(&self) -> io::Result<bool> {
        match nix::unistd::read(&self.0, &mut [0; 8]) {
            Err(Errno::ECANCELED) => Ok(true),
            Ok(_) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }
}

/// Has guests that run follow the host's clock when it is set, until `arkd` ends.
pub(crate) fn follow_steps(core: &Arc<Core>) {
    let core = Arc::clone(core);
    tokio::spawn(async move {
        let closing = core.closing.clone();
        if let Some(Err(error)) = closing.run_until_cancelled(follow(&core)).await {
            tracing::warn!(%error, "it is not noticed when the host's clock is set: guests follow it when they are paused and resumed");
        }
    });
}

async fn follow(core: &Core) -> io::Result<()> {
    // SAFETY: the descriptor is owned by the timer alone, which keeps it and gives the same one every time.
    let timer = unsafe { AsyncFd::register_with_interest(Timer::new()?, Interest::READABLE) }?;
    loop {
        let was_set = timer.async_io(Interest::READABLE, Timer::was_cancelled).await?;
        if !was_set {
            continue;
        }
        let running: Vec<_> = core
            .registry
            .all()
            .into_iter()
            .filter(|handle| handle.agent().state == AgentState::Running)
            .collect();
        tracing::info!(agents = running.len(), "the host's clock was set; guests follow it");
        stream::iter(running).for_each_concurrent(AT_ONCE, async |handle| set_clock_of(&handle).await).await;
    }
}
