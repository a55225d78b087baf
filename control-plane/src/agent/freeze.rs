//! An agent stands still while a model thinks for it, where it was made so.
//!
//! ```text
//!  calls wait ── SHORT ──► processors and devices stop ── LONG ──► memory goes to disk and back to the host
//!      ▲                       │                                      │
//!      └── runs, clock set ◄───┴── an answer is there, or the host ───┘
//!                                  has the agent do something
//! ```
//!
//! To everybody it is running all the while: who uses it wakes it ([`crate::guest::Freezer`]), and an `arkd` that finds it standing
//! still sets it going, for the calls ended with the `arkd` before.

use std::sync::Arc;
use std::time::Duration;

use ark_types::agent::AgentState;
use ark_types::vmm::{ControlReply, ControlRequest};
use tokio::time::timeout;

use super::Handle;
use super::pause::{STAND_STILL, give_memory_back, set_clock_of};
use super::record;
use crate::core::Core;
use crate::guest::{Attendant, Waiting};
use crate::supervisor::ask_for;

/// An answer that is there by then is cheaper waited for awake.
const SHORT: Duration = Duration::from_millis(200);
/// What stands still for so long is worth its way to disk: that takes some hundred milliseconds, in which no answer is taken.
const LONG: Duration = Duration::from_secs(2);

impl Handle {
    /// A call of one of the agent's programs begins; none where the agent goes on meanwhile.
    pub(crate) fn waits_for_a_model(&self, core: &Arc<Core>) -> Option<Waiting> {
        self.look(|agent| agent.freeze_on_inference).then(|| {
            let (waiting, attendant) = self.0.guest.idle.freezer.wait();
            if let Some(attendant) = attendant {
                tokio::spawn(attend(Arc::clone(core), self.clone(), attendant));
            }
            waiting
        })
    }

    /// Whether it stands still because a model thinks for it.
    pub(crate) fn is_frozen(&self) -> bool {
        self.0.guest.idle.freezer.is_frozen()
    }
}

/// Has the agent stand still whenever that is wanted, until there are no calls.
async fn attend(core: Arc<Core>, handle: Handle, mut attendant: Attendant) {
    while attendant.until(true).await {
        if timeout(SHORT, attendant.until(false)).await.is_ok() {
            continue;
        }
        if !freeze(&handle, &attendant).await {
            // It is no time for that, or its VMM does not answer.
            attendant.until(false).await;
            continue;
        }
        tokio::select! {
            () = still(&core, &handle, &mut attendant) => {}
            // It ended, or somebody paused it: whoever did has its VMM do what is needed.
            _ = handle.until(|agent| agent.state != AgentState::Running) => {}
        }
        thaw(&handle).await;
        attendant.set_frozen(false);
    }
}

/// Stops its processors and devices; whether they stand still.
async fn freeze(handle: &Handle, attendant: &Attendant) -> bool {
    let _turn = handle.0.body.turn.lock().await;
    if handle.look(|agent| agent.state != AgentState::Running) || !attendant.is_wanted() {
        return false;
    }
    // Before it does: who has it do something from now on waits.
    attendant.set_frozen(true);
    match ask_for(&handle.control_socket(), ControlRequest::Pause, STAND_STILL).await {
        Ok(ControlReply::State { .. }) => true,
        other => {
            tracing::warn!(name = %handle.name(), ?other, "an agent does not stand still while a model thinks for it");
            attendant.set_frozen(false);
            // It may have stopped all the same, just too late.
            handle.set_going_soon();
            false
        }
    }
}

/// The agent stands still until that is not wanted any more. What is begun with its memory is done to the end.
async fn still(core: &Arc<Core>, handle: &Handle, attendant: &mut Attendant) {
    if timeout(LONG, attendant.until(false)).await.is_ok() {
        return;
    }
    let (core, of) = (Arc::clone(core), handle.clone());
    let giving = tokio::spawn(async move {
        let _turn = of.0.body.turn.lock().await;
        if of.is_frozen() && of.look(|agent| agent.state == AgentState::Running) {
            let home = record::dir(&core, of.id());
            if let Err(error) = give_memory_back(&core, &of, &home).await {
                tracing::warn!(name = %of.name(), %error, "a frozen agent keeps its memory");
            }
        }
    });
    let _ = giving.await;
    attendant.until(false).await;
}

/// Has the agent go on, and its clock with the host's.
async fn thaw(handle: &Handle) {
    let _turn = handle.0.body.turn.lock().await;
    if handle.look(|agent| agent.state != AgentState::Running) {
        return;
    }
    match ask_for(&handle.control_socket(), ControlRequest::Resume, STAND_STILL).await {
        Ok(ControlReply::State { .. }) => set_clock_of(handle).await,
        other => {
            tracing::warn!(name = %handle.name(), ?other, "an agent does not go on after a model's answer; it is asked again");
            handle.set_going_soon();
        }
    }
}
