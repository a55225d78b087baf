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
//! | [`args`], [`settings`], [`config`] | flags, file and environment, and what they resolve to |
//! | [`logs`], [`consoles`] | messages with rotation; what guests said, kept when they are gone |
//! | [`notify`] | what systemd is told |
//! | [`daemon`] | start (lock, clean-up, listeners) and end of the whole |
//! | [`server`], [`auth`], [`problems`] | connections, who may speak, how errors are told |
//! | [`routes`] | the REST API, one file per noun |
//! | [`idempotency`] | requests that may be sent again |
//! | [`etag`], [`version`] | conditions on what is changed; who answers |
//! | [`scheduler`] | whether there is room for an agent, and who is next |
//! | `spawn` | an agent that is asked for, whoever asks: admitted, forked or booted |
//! | [`services`] | names with replicas behind them: healing, updates, and who takes a call |
//! | `ports` | where an agent's programs reach the host: services, and inference if it is allowed |
//! | [`inference`] | calls of models, on their way to the VMs that models run in |
//! | [`execs`] | programs with a WebSocket, and how a broken one is taken up again |
//! | [`upkeep`], [`validate`] | bounds of what clients send |
//! | [`registry`], [`agent`] | living agents; each is owned by one task |
//! | [`reconcile`] | what an agent needs to be as it is wanted: restarts, limits, hung guests |
//! | [`pool`] | VMMs and forks made ahead of need |
//! | [`tasks`] | work that is done in agents made for it, whatever dies meanwhile |
//! | [`supervisor`] | an `ark-vmm`, a child or adopted: start, identity, control socket, end |
//! | [`guest`] | frames to and from a guest |
//! | [`images`], [`host`] | verified images; memory, processors and the probe |
//! | [`models`], [`media`] | language models and the VMs that serve them; what a VM's disks are |
//! | [`snapshots`], [`templates`] | what agents are forked from: files, who needs which, proofs |
//! | [`store`], [`ledger`], [`projection`] | the log of events, what is recorded in it, and what that amounts to |
//! | [`stats`], [`telemetry`], [`traces`] | what agents use; what happened, how often, how long it took, and why |
//! | [`survivors`], [`cleanup`] | what an earlier `arkd` left: agents that go on, and what nobody was told of |
//!
//! `arkd` never links the VMM: it starts a process and speaks to sockets. That process outlives it; see [`survivors`].

pub mod admission;
pub mod agent;
pub mod args;
pub mod auth;
pub mod cleanup;
pub mod config;
pub mod consoles;
pub mod core;
pub mod daemon;
pub mod etag;
pub mod execs;
pub mod guest;
pub mod host;
pub mod idempotency;
pub mod images;
pub mod inference;
pub mod ledger;
pub mod logs;
pub mod media;
pub mod models;
pub mod names;
pub mod notify;
pub mod pool;
mod ports;
pub mod problems;
pub mod projection;
pub mod reconcile;
pub mod registry;
pub mod routes;
pub mod scheduler;
pub mod server;
pub mod services;
pub mod settings;
pub mod snapshots;
mod spawn;
pub mod stats;
pub mod store;
pub mod supervisor;
pub mod survivors;
pub mod tasks;
pub mod telemetry;
pub mod templates;
pub mod traces;
pub mod upkeep;
pub mod validate;
pub mod version;
