//! `arkd` end to end, with a VMM that is a fake: no KVM is needed.

mod agents;
mod bad_input;
mod exec;
mod faults;
mod files;
mod harness;
mod openapi;
mod streams;
