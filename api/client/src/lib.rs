//! Typed client of `arkd`'s REST API, over its Unix socket or TCP with a bearer token.
//!
//! [`Client`] has one method per route. Programs run either in one call ([`Client::exec`]) or as a stream of frames over
//! a WebSocket ([`Client::exec_stream`]); files and logs are streamed, so their size does not matter.
//!
//! ```no_run
//! # async fn example() -> Result<(), ark_client::Error> {
//! use ark_client::{Client, Endpoint};
//! let client = Client::new(Endpoint::Unix("/run/ark/arkd.sock".into()));
//! println!("{} agents live", client.health().await?.agents);
//! # Ok(()) }
//! ```

mod branches;
mod chat;
mod connect;
mod error;
mod events;
mod exec;
mod files;
mod logs;
mod models;
mod operate;
mod pools;
mod rest;
mod scheduling;
mod services;
mod tasks;
mod uri;

pub use chat::ChatStream;
pub use connect::Endpoint;
pub use error::Error;
pub use events::{AgentQuery, EventQuery, EventStream};
pub use exec::{ExecEvent, ExecInput, ExecOutput, ExecStream};
pub use files::{ByteStream, Download};
pub use logs::{LogPiece, LogStream};
pub use rest::Client;
pub use tasks::{TaskLogQuery, TaskQuery};
