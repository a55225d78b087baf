//! A seeded mixed load on an `arkd` that is killed again and again, and what has to be true afterwards.
//!
//! | module | what it knows |
//! |---|---|
//! | [`http`] | REST calls over one connection, bounded in time |
//! | [`model`] | what `arkd` acknowledged, and what it may or may not have done |
//! | [`client`] | who asks, and takes agents to work with |
//! | [`operations`], `points`, `tasks`, `services`, `habits` | the table of what clients do; a new operation is one function and one line there |
//! | [`look`] | agents, snapshots, quotas, tasks, services, replies to keys and room, as `arkd` tells of them, against the model |
//! | [`history`] | the log of events: no gap, and it amounts to what is told |
//! | [`host`] | processes, directories, sockets and descriptors |
//! | [`storm`] | rounds: load, kill, start again, look |
//!
//! The same rounds run against a stand-in for the VMM (`control-plane/tests/api/chaos.rs`) and on real VMs
//! (`tests/vm/chaos.rs`). A [`Stage`] is what differs. Every panic of a round names its seed; what the dice say follows from
//! that, how the threads interleave does not.

pub mod client;
mod habits;
pub mod history;
pub mod host;
pub mod http;
pub mod look;
pub mod model;
pub mod operations;
mod points;
mod procs;
mod services;
pub mod storm;
mod tasks;

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use ark_types::layout::{RunDir, StateDir};

pub use storm::{Storm, storm};

/// How clients leave something in an agent that they find again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Memory {
    /// A name in its interpreter.
    Evaluator,
    /// A file.
    File,
}

/// Where a storm takes place: one `arkd` with directories of its own.
pub struct Stage<'a> {
    /// Its program with the environment that it needs.
    pub arkd: Box<dyn Fn() -> Command + Sync + 'a>,
    /// Its run directory.
    pub run: RunDir,
    /// Its state directory.
    pub state: StateDir,
    /// Parent of both, which every process of it has in its arguments or environment.
    pub dir: PathBuf,
    /// How clients leave something in an agent.
    pub memory: Memory,
    /// Memory of agents that are booted, MiB; another size than the default, which comes from a template.
    pub booted_mib: u64,
    /// More agents than so many are not asked for.
    pub most_agents: usize,
    /// Whether VMMs are made ahead of need.
    pub has_pool: bool,
    /// Longest time until an `arkd` is killed.
    pub load: Duration,
    /// Longest time that any request, start or end may take.
    pub patience: Duration,
}
