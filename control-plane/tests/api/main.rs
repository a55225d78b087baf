//! `arkd` end to end, with a VMM that is a fake: no KVM is needed.

mod agents;
mod bad_input;
mod exec;
mod faults;
mod files;
mod forks;
mod harness;
mod openapi;
mod pause;
mod pool;
mod scheduling;
mod snapshots;
mod streams;
mod templates;
