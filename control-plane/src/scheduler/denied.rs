//! Why there is no room, in words.

use std::fmt;
use std::time::Duration;

use ark_types::label::Owner;
use ark_types::scheduling::Overcommit;

use super::placement::{Lack, Misfit, Resource};

/// What is missing, with the ratios that it is counted by.
#[derive(Clone, Debug, PartialEq)]
pub struct Missing {
    /// None when it would fit, were it its turn.
    pub(super) misfit: Option<Misfit>,
    pub(super) overcommit: Overcommit,
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.misfit {
            None => f.write_str("what is free is for requests that go first"),
            Some(Misfit::Full(lack)) => self.lack(f, lack, ": end an agent, ask for less, or raise "),
            Some(Misfit::Never(lack)) => self.lack(f, lack, ", so it can never fit: ask for less, or raise "),
            Some(Misfit::Scattered) => {
                f.write_str("no single host has enough of everything free: end an agent, or ask for less")
            }
            Some(Misfit::Apart(group)) => write!(
                f,
                "every host with room has an agent of the anti-affinity group {group} already: end one of them, or spread them softly"
            ),
        }
    }
}

impl Missing {
    fn lack(&self, f: &mut fmt::Formatter<'_>, lack: &Lack, then: &str) -> fmt::Result {
        let Lack { asked, free, limit, .. } = *lack;
        let Overcommit { memory, cpu, .. } = self.overcommit;
        match lack.resource {
            Resource::Memory => write!(
                f,
                "{asked} MiB are asked for and {free} MiB of {limit} MiB are free (over-commit {memory}){then}--overcommit-memory"
            ),
            Resource::Vcpus => write!(
                f,
                "{} asked for and {free} of {limit} are free (over-commit {cpu}){then}--overcommit-cpu",
                counted(asked, "processor")
            ),
            Resource::Agents => write!(
                f,
                "{} asked for and {free} of {limit} may still be had{then}--max-agents",
                counted(asked, "agent")
            ),
        }
    }
}

fn counted(number: u64, what: &str) -> String {
    if number == 1 { format!("1 {what} is") } else { format!("{number} {what}s are") }
}

/// What an owner may have at most, and does not get.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OverQuota {
    pub(super) owner: Owner,
    /// `free` is what is left of the quota, `limit` the quota.
    pub(super) lack: Lack,
}

impl fmt::Display for OverQuota {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { owner, lack: Lack { resource, asked, free, limit } } = self;
        match resource {
            Resource::Memory => write!(
                f,
                "{asked} MiB are asked for and {free} MiB of the {limit} MiB that {owner} may have are left: "
            )?,
            Resource::Vcpus | Resource::Agents => {
                let what = if *resource == Resource::Vcpus { "processor" } else { "agent" };
                let asked = counted(*asked, what);
                write!(f, "{asked} asked for and {free} of the {limit} that {owner} may have are left: ")?;
            }
        }
        write!(f, "end an agent of {owner}, ask for less, or raise its quota with `ark quota {owner}`")
    }
}

/// Why nothing was reserved.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Denied {
    /// There is no room, and the request does not wait for it or would wait for ever.
    #[error("{0}")]
    HostFull(Missing),
    /// There is no room, and too many wait for it.
    #[error("{waiting} requests wait for room already, and no more may: {missing}")]
    QueueFull {
        /// How many.
        waiting: usize,
        /// What is missing.
        missing: Missing,
    },
    /// There was no room in time.
    #[error("there was no room within {} ms: {missing}", waited.as_millis())]
    Timeout {
        /// How long was waited.
        waited: Duration,
        /// What was missing in the end.
        missing: Missing,
    },
    /// It would be more than the owner may have, with what its other requests wait for.
    #[error("{0}")]
    Quota(OverQuota),
}
