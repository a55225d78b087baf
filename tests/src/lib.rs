//! What the whole-VM tests and benchmarks stand on.
//!
//! A [`World`] is one `arkd` with directories of its own, driven through the `ark` command as a user would. It ends with
//! nothing left behind, and says so when something is: processes, sockets, directories.

mod rest;
mod run;
mod usage;
mod world;

pub use ark_chaos::host::{Proc, processes_mentioning};
pub use rest::Rest;
pub use run::{Output, Running, eventually};
pub use usage::{private_mib, processor_s, pss_mib};
pub use world::{World, assets, processor_is_emulated, require_kvm};
