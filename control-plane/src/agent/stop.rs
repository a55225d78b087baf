//! An agent's end on request.

use std::time::Duration;

use ark_types::agent::AgentState;
use ark_types::event::{Event, Outcome};
use ark_types::vmm::{ControlReply, ControlRequest, ExitRecord};
use tokio::time::sleep_until;

use super::body::Base;
use super::history::ON_REQUEST;
use super::owner::Owner;
use super::request::Request;
use crate::host::millis;
use crate::supervisor::{self, Vmm};

/// Time a VMM has beyond the guest's grace to end itself before it is killed.
const STOP_SLACK: Duration = Duration::from_secs(1);

impl Owner {
    /// Ends the VMM: asks it, waits for `grace` (or less, when a later removal gives less), then kills it.
    pub(super) async fn stop(&mut self, vmm: &mut Vmm, grace: Duration) -> ExitRecord {
        let is_paused = self.state.borrow().state == AgentState::Paused;
        let is_frozen = self.guest.idle.freezer.is_frozen();
        self.enter(AgentState::Stopping, None, None);
        if is_frozen && !grace.is_zero() {
            // What it waits for does not come any more.
            let _ = supervisor::ask(&self.dir.control_socket(), ControlRequest::Resume).await;
        }
        // A paused guest cannot follow.
        if !grace.is_zero() && !is_paused && self.ask_to_stop(grace).await {
            let mut deadline = tokio::time::Instant::now() + grace + STOP_SLACK;
            loop {
                tokio::select! {
                    record = vmm.wait() => return record,
                    () = sleep_until(deadline) => break,
                    request = self.requests.recv() => match request {
                        Some(Request::Remove { grace, .. }) => {
                            deadline = deadline.min(tokio::time::Instant::now() + grace);
                        }
                        // arkd ends, and whoever asked for the removal with it.
                        Some(Request::Leave) | None => break,
                        Some(_) => {}
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

    /// Publishes the VMM's end, which was asked for, and tells what to record of it.
    pub(super) fn conclude(&self, record: ExitRecord) -> Event {
        self.core.telemetry.vmm_ended(record.reason);
        let (outcome, reason, exit) = (Outcome::Stopped, ON_REQUEST.to_owned(), Some(record));
        self.state.send_modify(|agent| agent.exit.clone_from(&exit));
        // Its memory is no more, and with it the need for what that was read from.
        self.body.set_base(Base::None);
        self.enter(outcome.into(), Some(reason.clone()), None);
        // After that: who gives it one looks whether it has ended.
        self.body.set_grant(None);
        Event::AgentEnded { outcome, reason, exit }
    }
}
