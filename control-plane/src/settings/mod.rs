//! What an operator may choose: one TOML file, the environment over it, flags over both.
//!
//! ```text
//!  dist/arkd.toml (the defaults, explained)
//!  file (--config, ARK_CONFIG, or the default place) ─► environment (ARK_<SECTION>_<KEY>) ─► flags ─► Settings ─► Config
//! ```
//!
//! A section is a struct of this module and a field of [`Settings`]; its keys are found in the file, in the environment and by
//! a reload without being listed anywhere else. What a reload takes over is in [`RELOADABLE`].

mod load;
mod reload;
mod values;

use std::collections::BTreeMap;
use std::net::SocketAddr;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use ark_types::service::MAX_REPLICAS;

use crate::scheduler::SchedulerConfig;

pub use load::{SettingsError, default_path, load};
pub use reload::{Change, RELOADABLE, changes};
pub use values::{AbsolutePath, Bounded, Endpoint, Factor, LabelName, Level, Ratio};

/// The file that explains every key and says its default.
pub const DEFAULT_FILE: &str = include_str!("../../dist/arkd.toml");

/// Every section.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// Who can reach `arkd`.
    pub listen: Listen,
    /// What is made ahead of need.
    pub pool: Pool,
    /// What is written down, and for how long it is kept.
    pub log: Log,
    /// How long things may take.
    pub timing: TimeLimits,
    /// What is measured.
    pub telemetry: Telemetry,
    /// How much of the host is given away.
    pub scheduler: SchedulerConfig,
    /// Tasks, and what is kept of them.
    pub tasks: Tasks,
    /// Calls of models.
    pub inference: Inference,
}

/// `[listen]`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Listen {
    /// TCP address besides the Unix socket; its clients need the bearer token.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tcp: Option<SocketAddr>,
    /// File of the bearer token, made when missing; `token` in the state directory when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_file: Option<AbsolutePath>,
}

/// `[pool]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Pool {
    /// VMMs prepared ahead of need.
    pub prepared: u8,
    /// Forks of each template in use that are kept ready.
    pub standby: u8,
}

impl Default for Pool {
    fn default() -> Self {
        Self { prepared: 2, standby: 2 }
    }
}

/// `[log]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Log {
    /// File that messages go to; standard error when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file: Option<AbsolutePath>,
    /// How messages look; JSON in a file that is named here, text elsewhere when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub format: Option<LogFormat>,
    /// Which messages: `error`, `warn`, `info`, `debug`, `trace`, or directives such as `info,arkd::pool=debug`.
    pub level: Level,
    /// Size at which the file is put aside and another is begun, MiB.
    pub max_size_mib: Bounded<1, 1_048_576>,
    /// Files put aside that are kept: `arkd.log.1`, the newest, and so on.
    pub keep: Bounded<0, 1000>,
    /// Agents whose consoles are kept after their end, the newest ones; 0 for none.
    pub consoles_keep: Bounded<0, 100_000>,
    /// Most bytes of all kept consoles, MiB; the oldest go first.
    pub consoles_max_mib: Bounded<1, 1_048_576>,
}

impl Default for Log {
    fn default() -> Self {
        Self {
            file: None,
            format: None,
            level: Level::default(),
            max_size_mib: Bounded::new(16),
            keep: Bounded::new(4),
            consoles_keep: Bounded::new(200),
            consoles_max_mib: Bounded::new(64),
        }
    }
}

/// Format of log messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// Lines for people.
    Text,
    /// One JSON object per line.
    Json,
}

/// Seconds that something may take.
pub type Seconds = Bounded<1, 86_400>;

/// `[timing]`; what is absent depends on the kind of host.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TimeLimits {
    /// From the start of a VMM to its guest's hello, seconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub boot_s: Option<Seconds>,
    /// From a restored guest's challenge to its last answer, seconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub renewal_s: Option<Seconds>,
    /// How long a program's reply may be late after its own time limit, seconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exec_slack_s: Option<Seconds>,
    /// How long a program lives whose client's connection broke and may come back, seconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exec_grace_s: Option<Seconds>,
    /// How long an agent of `ark run` waits for its program, seconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub first_stream_s: Option<Seconds>,
}

/// `[telemetry]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Telemetry {
    /// Agents that have series of their own in `/metrics`, the oldest ones; 0 for none.
    pub agent_series: Bounded<0, 1000>,
    /// Labels that every series bears: the host's name, a zone.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<LabelName, String>,
    /// OpenTelemetry collector that traces are sent to (OTLP over HTTP, protobuf); none are made when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub otlp_endpoint: Option<Endpoint>,
    /// Part of the requests that are traced, unless their clients decided.
    pub sample_ratio: Ratio,
}

impl Default for Telemetry {
    fn default() -> Self {
        Self {
            agent_series: Bounded::new(1000),
            labels: BTreeMap::new(),
            otlp_endpoint: None,
            sample_ratio: Ratio::default(),
        }
    }
}

/// `[tasks]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Tasks {
    /// Attempts under way at a time; 0 for twice as many as there are processors.
    pub at_once: Bounded<0, 1000>,
    /// Tasks that have not ended, at most.
    pub open: Bounded<1, 1_000_000>,
    /// Tasks that are kept after their end, the last ones.
    pub keep: Bounded<0, 1_000_000>,
    /// Most bytes of their output, MiB; those that ended first go first.
    pub keep_mib: Bounded<1, 1_048_576>,
}

impl Default for Tasks {
    fn default() -> Self {
        Self {
            at_once: Bounded::new(0),
            open: Bounded::new(10_000),
            keep: Bounded::new(10_000),
            keep_mib: Bounded::new(256),
        }
    }
}

/// What somebody may have per minute; without a bound where 0.
pub type PerMinute = Bounded<0, 1_000_000_000_000>;

/// `[inference]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Inference {
    /// Calls that wait for one model, at most.
    pub queue: Bounded<1, 100_000>,
    /// Calls that are under way in one VM at a time; more wait.
    pub sessions: Bounded<1, 1000>,
    /// How long a call may take that does not say, seconds.
    pub deadline_s: Bounded<1, 3600>,
    /// How long a call waits for a VM that is ready, seconds.
    pub wait_s: Bounded<1, 600>,
    /// VMs of a model, at least, once it was used; 0 to have none while nobody uses it.
    pub replicas_min: Bounded<0, { MAX_REPLICAS as u64 }>,
    /// VMs of a model, at most.
    pub replicas_max: Bounded<1, { MAX_REPLICAS as u64 }>,
    /// How long one VM fewer has to be enough until a model has one fewer, seconds.
    pub scale_down_s: Seconds,
    /// Calls of one agent per minute.
    pub agent_calls_per_minute: PerMinute,
    /// Tokens of one agent per minute, of prompts and replies.
    pub agent_tokens_per_minute: PerMinute,
    /// Calls of all that one owner has per minute.
    pub owner_calls_per_minute: PerMinute,
    /// Tokens of all that one owner has per minute.
    pub owner_tokens_per_minute: PerMinute,
    /// Whether events of calls tell what was asked and said, besides hashes of it.
    pub texts: bool,
}

impl Default for Inference {
    fn default() -> Self {
        Self {
            queue: Bounded::new(1000),
            sessions: Bounded::new(8),
            deadline_s: Bounded::new(600),
            wait_s: Bounded::new(60),
            replicas_min: Bounded::new(1),
            replicas_max: Bounded::new(2),
            scale_down_s: Bounded::new(60),
            agent_calls_per_minute: Bounded::new(0),
            agent_tokens_per_minute: Bounded::new(0),
            owner_calls_per_minute: Bounded::new(0),
            owner_tokens_per_minute: Bounded::new(0),
            texts: false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The default file with every `#key = value` made a setting.
    fn with_every_key() -> String {
        let is_key = |line: &str| line.strip_prefix('#').is_some_and(|l| l.starts_with(char::is_lowercase));
        DEFAULT_FILE
            .lines()
            .map(|line| if is_key(line) { &line[1..] } else { line })
            .fold(String::new(), |all, line| all + line + "\n")
    }

    #[test]
    fn the_explained_file_is_the_defaults() {
        assert_eq!(toml::from_str::<Settings>(DEFAULT_FILE).unwrap(), Settings::default());
        let set: toml::Table = toml::from_str(DEFAULT_FILE).unwrap();
        assert_eq!(toml::Table::try_from(Settings::default()).unwrap(), set, "a default is not in the file");
    }

    /// Keys of a section, as its refusal of an unknown one lists them.
    fn keys(section: &str) -> Vec<String> {
        let error = toml::from_str::<Settings>(&format!("[{section}]\nno-such-key = 1\n")).unwrap_err();
        error.message().split('`').skip(3).step_by(2).map(str::to_owned).collect()
    }

    #[test]
    fn every_key_is_explained_and_valid_when_it_is_uncommented() {
        let every = with_every_key();
        toml::from_str::<Settings>(&every).unwrap();
        let table: toml::Table = toml::from_str(&every).unwrap();
        let mut count = 0;
        for (section, values) in &table {
            for key in keys(section) {
                count += 1;
                assert!(values.as_table().unwrap().contains_key(&key), "{section}.{key} is not explained");
            }
        }
        assert!(count >= 24, "{count}");
    }

    #[test]
    fn what_can_be_reloaded_exists() {
        let every: toml::Table = toml::from_str(&with_every_key()).unwrap();
        for name in RELOADABLE {
            let (section, key) = name.split_once('.').unwrap();
            assert!(every[section].as_table().unwrap().contains_key(key), "{name}");
        }
    }
}
