//! The program `ark` as users run it, against small servers on Unix sockets that answer as `arkd` would.

mod ark;
mod branches;
mod chat;
mod events;
mod golden;
mod host;
mod operate;
mod pools;
mod services;
mod tasks;
