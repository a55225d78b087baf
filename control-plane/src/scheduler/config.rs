//! How much of a host is given away: what the operator decides.

use std::num::NonZeroU16;

use ark_types::scheduling::{Overcommit, Resources};
use serde::{Deserialize, Serialize};

/// Flags of `arkd`, and the values that they have when they are not given.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, clap::Args)]
#[serde(default, deny_unknown_fields)]
pub struct SchedulerConfig {
    /// How many times over the host's memory is given to agents, 0.01 to 10000. What is really left is asked for besides.
    #[arg(long, value_name = "RATIO", env = "ARK_OVERCOMMIT_MEMORY", default_value_t = Self::DEFAULT.overcommit_memory, value_parser = ratio)]
    pub overcommit_memory: f64,

    /// How many times over the host's processors are given to agents, 0.01 to 10000.
    #[arg(long, value_name = "RATIO", env = "ARK_OVERCOMMIT_CPU", default_value_t = Self::DEFAULT.overcommit_cpu, value_parser = ratio)]
    pub overcommit_cpu: f64,

    /// A fork shares most pages with what it was forked from, so its memory is reserved divided by this, 1 to 10000.
    #[arg(long, value_name = "RATIO", env = "ARK_OVERCOMMIT_FORKS", default_value_t = Self::DEFAULT.overcommit_forks, value_parser = fork_ratio)]
    pub overcommit_forks: f64,

    /// Most agents at a time; those that are paused to disk are not counted.
    #[arg(long, value_name = "COUNT", env = "ARK_MAX_AGENTS", default_value_t = Self::DEFAULT.max_agents)]
    pub max_agents: u32,

    /// Most requests that wait for room at a time, at least 1.
    #[arg(long, value_name = "COUNT", env = "ARK_QUEUE", default_value_t = Self::DEFAULT.queue)]
    pub queue: NonZeroU16,
}

impl SchedulerConfig {
    const DEFAULT: Self = Self {
        overcommit_memory: 2.0,
        // Agents wait most of their time.
        overcommit_cpu: 512.0,
        overcommit_forks: 8.0,
        max_agents: 1000,
        queue: NonZeroU16::new(256).unwrap(),
    };

    /// What may be reserved on a host that has `memory_mib` MiB and `vcpus` processors.
    #[must_use]
    pub fn limit(&self, memory_mib: u64, vcpus: u32) -> Resources {
        Resources {
            agents: self.max_agents.into(),
            memory_mib: times(memory_mib, self.overcommit_memory),
            vcpus: times(vcpus.into(), self.overcommit_cpu),
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
        let own = times(memory_mib, 1.0 / self.overcommit_forks).max(1);
        Resources { agents: 1, memory_mib: own, vcpus: vcpus.into() }
    }

    /// The ratios, as they are told.
    #[must_use]
    pub const fn overcommit(&self) -> Overcommit {
        Overcommit { memory: self.overcommit_memory, cpu: self.overcommit_cpu, forks: self.overcommit_forks }
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

fn ratio(text: &str) -> Result<f64, String> {
    within(text, 0.01)
}

fn fork_ratio(text: &str) -> Result<f64, String> {
    within(text, 1.0)
}

fn within(text: &str, least: f64) -> Result<f64, String> {
    text.parse()
        .ok()
        .filter(|ratio| (least..=10_000.0).contains(ratio))
        .ok_or_else(|| format!("{text:?} is no number from {least} to 10000"))
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

    #[test]
    fn ratios_are_numbers_within_their_bounds() {
        assert_eq!((ratio("0.5"), fork_ratio("8")), (Ok(0.5), Ok(8.0)));
        for wrong in ["0", "-1", "NaN", "inf", "10001", "x", ""] {
            assert!(ratio(wrong).unwrap_err().contains("no number from 0.01 to 10000"), "{wrong}");
        }
        assert!(fork_ratio("0.5").is_err());
    }

    #[test]
    fn a_file_may_say_some_of_it() {
        let config: SchedulerConfig = serde_json::from_str(r#"{"max_agents": 7}"#).unwrap();
        assert_eq!(config, SchedulerConfig { max_agents: 7, ..SchedulerConfig::default() });
        assert!(serde_json::from_str::<SchedulerConfig>(r#"{"max_agent": 7}"#).is_err());
    }
}
