//! `arkd` end to end, with a VMM that is a fake: no KVM is needed.

mod adopt;
mod agents;
mod bad_input;
mod checkpoints;
mod consoles;
mod events;
mod exec;
mod faults;
mod files;
mod forks;
mod harness;
mod healing;
mod health_checks;
mod metrics;
mod openapi;
mod pause;
mod pool;
mod scheduling;
mod settings;
mod snapshots;
mod streams;
mod templates;
mod traces;
