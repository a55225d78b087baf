//! Whole-VM tests: real guests on real KVM, driven through `ark` as a user would.
//!
//! They run where KVM is usable, on this host or inside the emulated host (`tests/run.sh` chooses by the probe and says
//! which). Each test has a world of its own and ends with a check that nothing is left of it. One module per subject:
//! a newcomer's test of files belongs in `files`, of a fault in `faults`.

mod boot;
mod chaos;
mod clock;
mod daemon;
mod exec;
mod faults;
mod files;
mod forks;
mod hazards;
mod healing;
mod inference;
mod models;
mod openai;
mod pause;
mod pools;
mod refusals;
mod rest;
mod resume;
mod services;
mod snapshots;
mod soak;
mod tasks;
mod templates;
mod vmm;
