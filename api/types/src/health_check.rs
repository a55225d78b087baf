//! Checks of an agent's own: whether what it is there for works, beyond its guest being heard.

use std::ops::RangeInclusive;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Bounds of `interval_s`, seconds.
pub const CHECK_INTERVAL_S: RangeInclusive<u32> = 1..=3600;
/// Bounds of `timeout_s`, seconds.
pub const CHECK_TIMEOUT_S: RangeInclusive<u32> = 1..=600;
/// Bounds of `failures`.
pub const CHECK_FAILURES: RangeInclusive<u32> = 1..=100;
/// Bounds of `start_period_s`, seconds.
pub const CHECK_START_S: RangeInclusive<u32> = 0..=3600;
/// Seconds from one check to the next when a request does not say.
pub const DEFAULT_CHECK_INTERVAL_S: u32 = 30;
/// Seconds that a check has when a request does not say.
pub const DEFAULT_CHECK_TIMEOUT_S: u32 = 10;
/// Failures in a row that count when a request does not say how many.
pub const DEFAULT_CHECK_FAILURES: u32 = 3;

/// What a check does in the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Probe {
    /// Runs a program: exit code 0 is healthy.
    Exec {
        /// The program and its arguments.
        command: Vec<String>,
    },
    /// Connects to 127.0.0.1 in the guest: a connection that is taken is healthy.
    Tcp {
        /// The port, 1 or more.
        port: u16,
    },
}

/// How an agent is checked while it runs, besides its guest's heartbeats, which are always listened for.
///
/// One check runs at a time. An agent whose checks failed often enough in a row is unhealthy until one passes; with a restart
/// policy it is ended and begins anew, without one that is only told. A check does not count as use.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct HealthCheck {
    /// What is done.
    pub probe: Probe,
    /// Seconds from the end of one check to the next, 1 to 3600; 30 when absent.
    #[serde(default = "interval")]
    pub interval_s: u32,
    /// Seconds that a check has, 1 to 600; 10 when absent. One that takes longer has failed.
    #[serde(default = "timeout")]
    pub timeout_s: u32,
    /// Failures in a row that make the agent unhealthy, 1 to 100; 3 when absent.
    #[serde(default = "failures")]
    pub failures: u32,
    /// Seconds after it came up in which failures do not count, unless a check has passed, at most 3600; 0 when absent.
    #[serde(default)]
    pub start_period_s: u32,
}

const fn interval() -> u32 {
    DEFAULT_CHECK_INTERVAL_S
}

const fn timeout() -> u32 {
    DEFAULT_CHECK_TIMEOUT_S
}

const fn failures() -> u32 {
    DEFAULT_CHECK_FAILURES
}
