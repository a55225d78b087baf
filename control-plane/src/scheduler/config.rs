//! How much of a host is given away: what the operator decides.

use std::num::NonZeroU16;

use ark_types::scheduling::{Overcommit, Resources};
use serde::{Deserialize, Serialize};

use crate::settings::Factor;

/// `[scheduler]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SchedulerConfig {
    /// How many times over the host's memory is given to agents. What is really left is asked for besides.
    pub overcommit_memory: Factor<1>,
    /// How many times over the host's processors are given to agents.
    pub overcommit_cpu: Factor<1>,
    /// A fork shares most pages with what it was forked from, so its memory is reserved divided by this.
    pub overcommit_forks: Factor<100>,
    /// Most agents at a time; those that are paused to disk are not counted.
    pub max_agents: u32,
    /// Most requests that wait for room at a time.
    pub queue: NonZeroU16,
}

impl SchedulerConfig {
    const DEFAULT: Self = Self {
        overcommit_memory: Factor::new(2.0),
        // Agents wait most of their time.
        overcommit_cpu: Factor::new(512.0),
        overcommit_forks: Factor::new(8.0),
        max_agents: 1000,
        queue: NonZeroU16::new(256).unwrap(),
    };

    /// What may be reserved on a host that has `memory_mib` MiB and `vcpus` processors.
    #[must_use]
    pub fn limit(&self, memory_mib: u64, vcpus: u32) -> Resources {
        Resources {
            agents: self.max_agents.into(),
            memory_mib: times(memory_mib, self.overcommit_memory.get()),
            vcpus: times(vcpus.into(), self.overcommit_cpu.get()),
        }
    }

    /// What is reserved for an agent that boots: all of its size.
    #[must_use]
    pub fn booted(&self, (vcpus, memory_mib): (u32, u64)) -> Resources {
        Resources { agents: 1, memory_mib, vcpus: vcpus.into() }
    }

    /// What is reserved for an agent that goes on from a snapshot: its processors, and the part of its memory that it is
    /// expected to share with nobody.
    #[must_use]
    pub fn forked(&self, (vcpus, memory_mib): (u32, u64)) -> Resources {
        let own = times(memory_mib, 1.0 / self.overcommit_forks.get()).max(1);
        Resources { agents: 1, memory_mib: own, vcpus: vcpus.into() }
    }

    /// The ratios, as they are told.
    #[must_use]
    pub const fn overcommit(&self) -> Overcommit {
        Overcommit {
            memory: self.overcommit_memory.get(),
            cpu: self.overcommit_cpu.get(),
            forks: self.overcommit_forks.get(),
        }
    }
}

impl Default for SchedulerConfig {
    fn default() -> Self {
        Self::DEFAULT
    }
}

/// `amount` times `ratio`, whole.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_precision_loss,
    reason = "amounts are far below 2^53, ratios are positive, and what is too much is as much as there can be"
)]
fn times(amount: u64, ratio: f64) -> u64 {
    (amount as f64 * ratio).round() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hundreds_of_forks_of_the_usual_size_fit_into_a_small_host() {
        let config = SchedulerConfig::default();
        let (limit, fork) = (config.limit(8192, 2), config.forked((1, 256)));
        assert!(fork.times(257).is_within(&limit), "{fork:?} into {limit:?}");
        assert!(config.booted((1, 256)).times(60).is_within(&limit));
        assert!(!config.booted((1, 256)).times(65).is_within(&limit));
    }
}
