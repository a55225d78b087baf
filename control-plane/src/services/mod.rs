//! Services: a name, and replicas behind it that are ordinary agents, told by their labels.
//!
//! ```text
//!  set, scale, remove ─► log of events ─► table ◄── look (when something happened, and now and then) ◄── registry
//!                                           │
//!                                       reconcile ──► spawn, drain, remove
//!                                           │
//!  call ─► pick among those that are ready ─┘
//! ```
//!
//! | file | what happens there |
//! |---|---|
//! | [`change`] | what services are to be, durably |
//! | `environment` | the secret part of that |
//! | `table`, `entry` | what is known of services and replicas now; calls under way |
//! | `reconcile` | what a service needs: a pure function |
//! | `look` | the task that sees to it |
//! | `keeper` | the command of a replica, and whether that is ready |
//! | [`logs`] | what commands wrote last |
//! | `attempts` | replicas that did not come to be, and when the next one is tried |
//! | [`call`], `pick` | one call to whichever replica has the fewest |
//! | `switchboard` | agents find services, and are connected with replicas |
//! | `view` | what clients are told |
//!
//! Nothing about a replica is remembered that its agent and its guest do not say: a later `arkd` finds it by its labels, and the
//! guest knows whether it started the command. That it is drained is forgotten with the `arkd` that was asked to; who asked was not
//! told that it is gone. How often commands ended is forgotten, too: a later `arkd` tries anew.

mod attempts;
pub(crate) mod call;
pub(crate) mod change;
mod entry;
mod environment;
mod error;
mod keeper;
pub(crate) mod logs;
mod look;
mod pick;
mod reconcile;
mod switchboard;
mod table;
#[cfg(test)]
mod tests;
pub(crate) mod view;

use std::collections::BTreeMap;

use ark_types::label::{InvalidLabel, Labels};
use ark_types::problem::ProblemKind;
use ark_types::service::{COMMAND_LABEL, GENERATION_LABEL, SERVICE_LABEL, ServiceSpec};

use crate::problems::Refusal;

pub use error::ServiceError;
pub(crate) use switchboard::listen;
pub use table::Services;

/// Labels that only `arkd` gives.
const OWN_LABELS: [&str; 3] = [SERVICE_LABEL, GENERATION_LABEL, COMMAND_LABEL];

/// Refuses labels by which an agent would be taken for a replica.
///
/// # Errors
/// A [`Refusal`] that names the label.
pub(crate) fn refuse_own_labels(labels: &Labels) -> Result<(), Refusal> {
    match OWN_LABELS.iter().find(|key| labels.get(key).is_some()) {
        Some(key) => {
            let detail =
                format!("the label {key} is given by arkd to the replicas of services: leave it out");
            Err(Refusal::new(ProblemKind::InvalidValue, detail))
        }
        None => Ok(()),
    }
}

/// Refuses a change of the labels that make an agent a replica.
///
/// # Errors
/// A [`Refusal`] that names the label.
pub(crate) fn refuse_own_keys<'a>(mut keys: impl Iterator<Item = &'a String>) -> Result<(), Refusal> {
    match keys.find(|key| OWN_LABELS.contains(&key.as_str())) {
        Some(key) => {
            let detail = format!("the label {key} is arkd's own: leave it as it is");
            Err(Refusal::new(ProblemKind::InvalidValue, detail))
        }
        None => Ok(()),
    }
}

/// `labels` without those that make an agent a replica.
pub(crate) fn without_own_labels(labels: &Labels) -> Labels {
    let mut labels = BTreeMap::from(labels.clone());
    OWN_LABELS.iter().for_each(|key| drop(labels.remove(*key)));
    // Fewer labels are labels, too.
    labels.try_into().unwrap_or_default()
}

/// The labels of a replica of generation `generation` of what `spec` says.
fn replica_labels(spec: &ServiceSpec, generation: u64) -> Result<Labels, InvalidLabel> {
    let mut labels = BTreeMap::from(spec.labels.clone());
    labels.insert(SERVICE_LABEL.to_owned(), spec.name.to_string());
    if spec.command.is_some() {
        labels.insert(COMMAND_LABEL.to_owned(), "yes".to_owned());
    }
    labels.insert(GENERATION_LABEL.to_owned(), generation.to_string());
    labels.try_into()
}
