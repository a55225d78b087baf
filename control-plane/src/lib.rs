//! `arkd`, the control plane: decides which agents live, supervises their VMMs and lets clients reach them.
//!
//! ```text
//!  clients ── Unix socket / TCP + token ──► server ──► routes ──┬──► registry ──► agent::Handle
//!                                             │                 │                    │  requests ▲ watch
//!                                           auth                ├──► templates ──┐   ▼           │
//!                                                               ├──► pool ───────┼► agent::owner (one task per agent)
//!                                                               ├──► snapshots ──┘   │
//!                                                               ▼                    ├──► supervisor ──► ark-vmm
//!                                                             guest ── v.sock ───────┼──────────────────►   │
//!                                                               ▲                    ▼                      │
//!                                                               └───────── guest::Greeter ◄── v.sock_1024 ──┘
//! ```
//!
//! | room | what it knows |
//! |---|---|
//! | [`args`], [`config`] | flags and what they resolve to |
//! | [`daemon`] | start (lock, clean-up, listeners) and end of the whole |
//! | [`server`], [`auth`], [`problems`] | connections, who may speak, how errors are told |
//! | [`routes`] | the REST API, one file per noun |
//! | [`scheduler`] | whether there is room for an agent, and who is next |
//! | [`registry`], [`agent`] | living agents; each is owned by one task |
//! | [`pool`] | VMMs and forks made ahead of need |
//! | [`supervisor`] | an `ark-vmm` child: start, identity, control socket, end |
//! | [`guest`] | frames to and from a guest |
//! | [`images`], [`host`] | verified images; memory, processors and the probe |
//! | [`snapshots`], [`templates`] | what agents are forked from: files, who needs which, proofs |
//! | [`cleanup`] | what an earlier, killed `arkd` left |
//!
//! `arkd` never links the VMM: it starts a process and speaks to sockets.

pub mod admission;
pub mod agent;
pub mod args;
pub mod auth;
pub mod cleanup;
pub mod config;
pub mod core;
pub mod daemon;
pub mod guest;
pub mod host;
pub mod images;
pub mod names;
pub mod pool;
pub mod problems;
pub mod registry;
pub mod routes;
pub mod scheduler;
pub mod server;
pub mod snapshots;
pub mod supervisor;
pub mod templates;
pub mod validate;
