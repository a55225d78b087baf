//! `arkd` end to end, with a VMM that is a fake: no KVM is needed.
#![allow(dead_code)]
mod events;
mod harness;
mod openapi;
mod streams;
mod task_attempts;
mod tasks;
mod templates;
mod traces;
