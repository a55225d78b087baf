//! What others may ask of an agent's owner, and how its work can end.

use std::collections::BTreeMap;
use std::time::Duration;

use ark_types::agent::{Agent, AgentState, Origin};
use ark_types::event::AgentSpec;
use tokio::sync::oneshot;
use tracing::Span;

use super::BootError;
use super::body::Base;
use super::heal::Kept;
use super::ready::StoodBy;
use crate::media::Media;
use crate::scheduler::Grant;
use crate::snapshots::Hold;

/// Who waits for an agent; who no longer does has given it up.
pub(super) type Up = oneshot::Sender<Result<Agent, BootError>>;

/// What others may ask of an agent's owner.
#[derive(Debug)]
pub(super) enum Request {
    /// End it and leave nothing.
    Remove {
        /// Time the guest has to end in order.
        grace: Duration,
        /// Whether what a paused agent has on disk goes too.
        for_good: bool,
    },
    /// `arkd` ends, and who can go on without it does.
    Leave,
    /// The first streamed exec began.
    StreamBegan,
    /// The first streamed exec ended.
    StreamEnded,
    /// Say what of its healing outlasts `arkd`.
    Healing {
        /// Told.
        told: oneshot::Sender<Kept>,
    },
    /// Publish a state that the VMM is in by now: running or paused.
    Enter {
        /// The state.
        state: AgentState,
        /// Told when it is; dropped when it cannot be.
        done: oneshot::Sender<()>,
    },
    /// Its memory is read from elsewhere from here on.
    Move {
        /// From there.
        base: Base,
        /// Told when that is on disk.
        done: oneshot::Sender<()>,
    },
    /// Go on from a snapshot, with a new VMM.
    Restart {
        /// The snapshot.
        hold: Hold,
        /// Its disks.
        media: Media,
        /// What is told of the agent from then on; unchanged when absent.
        origin: Option<Origin>,
        /// Told when it runs, or why it does not.
        up: Up,
    },
    /// Give up what it has, to an agent that begins anew: only of a standby.
    GiveUp {
        /// Where that goes; dropped, it ends.
        to: oneshot::Sender<StoodBy>,
    },
    /// Be somebody: only of a standby.
    Claim {
        /// Who.
        spec: Box<AgentSpec>,
        /// Variables its programs start with.
        env: BTreeMap<String, String>,
        /// The snapshot, lived in.
        base: Base,
        /// What is reserved for it.
        grant: Grant,
        /// What asks.
        cause: Span,
        /// Told when it runs, or why it does not.
        up: Up,
    },
}

/// How an agent is to end.
#[derive(Clone, Copy, Debug)]
pub(super) struct Removal {
    pub(super) grace: Duration,
    pub(super) for_good: bool,
}

impl Removal {
    /// At once.
    pub(super) const NOW: Self = Self { grace: Duration::ZERO, for_good: true };
}

/// How an owner's work ends.
#[derive(Clone, Copy, Debug)]
pub(super) enum Parting {
    /// With the agent.
    Removal(Removal),
    /// Without it: a later `arkd` goes on.
    Leave,
}

impl Request {
    /// How one of the requests that come while the guest comes up ends that; anything else has to wait for the next
    /// try, which dropping it tells who asked.
    pub(super) const fn parting(request: Option<&Self>) -> Option<Parting> {
        match request {
            None => Some(Parting::Removal(Removal::NOW)),
            Some(Self::Remove { grace, for_good }) => {
                Some(Parting::Removal(Removal { grace: *grace, for_good: *for_good }))
            }
            Some(Self::Leave) => Some(Parting::Leave),
            Some(_) => None,
        }
    }
}
