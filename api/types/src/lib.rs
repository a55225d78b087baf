//! Every word that crosses a boundary of NOA ARK.
//!
//! | module | boundary |
//! |---|---|
//! | [`agent`], [`label`], [`event`], [`exec`], [`eval`], [`files`], [`image`], [`model`], [`template`], [`snapshot`], [`receipt`], [`scheduling`], [`pool`], [`service`], [`healing`], [`health`], [`shutdown`], [`problem`] | REST clients ↔ `arkd` |
//! | [`agent`], [`label`], [`event`], [`exec`], [`eval`], [`files`], [`image`], [`model`], [`template`], [`snapshot`], [`receipt`], [`scheduling`], [`healing`], [`task`], [`health`], [`shutdown`], [`problem`] | REST clients ↔ `arkd` |
//! | [`agent`], [`checkpoint`], [`label`], [`event`], [`exec`], [`eval`], [`files`], [`image`], [`model`], [`template`], [`snapshot`], [`receipt`], [`scheduling`], [`healing`], [`health_check`], [`permission`], [`health`], [`shutdown`], [`problem`] | REST clients ↔ `arkd` |
//! | [`console`], [`stats`] | operators ↔ `arkd`: consoles of agents that are gone, what agents use |
//! | [`vmm`] | `arkd` ↔ `ark-vmm`: configuration, control socket, end record |
//! | [`guest`] | host ↔ guest: frames over vsock |
//! | [`replay`] | REST clients ↔ `arkd`: what a broken exec WebSocket may have lost |
//! | [`plain`] | programs ↔ people: error messages |
//! | [`layout`] | programs ↔ file system: where assets, state and sockets are |
//!
//! The crate holds data and pure functions only: no sockets, no runtime. The wire formats are frozen as snapshots under
//! `schema/`; a test fails when one of them changes without its snapshot.

pub mod agent;
pub mod checkpoint;
pub mod console;
pub mod eval;
pub mod event;
pub mod exec;
pub mod files;
pub mod guest;
pub mod healing;
pub mod health;
pub mod health_check;
pub mod idempotency;
pub mod image;
pub mod label;
pub mod layout;
pub mod model;
pub mod openai;
pub mod permission;
pub mod plain;
pub mod pool;
pub mod problem;
pub mod receipt;
pub mod replay;
pub mod scheduling;
pub mod service;
pub mod shutdown;
pub mod snapshot;
pub mod stats;
pub mod task;
pub mod template;
pub mod version;
pub mod vmm;
