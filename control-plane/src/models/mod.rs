//! Language models: their files, and the VMs that serve them.
//!
//! ```text
//!  PUT ─► upload ─► StateDir/models/<name>/ ─┐                       ┌─► template model-<name>: image `inference`, the model as
//!                   Assets/models/*.gguf ────┴─► Models ─► served ───┤   /dev/vdb, loaded by `ark-inference`, then frozen
//!                                                                    └─► service model-<name>, whose replicas are forks of it
//! ```
//!
//! | file | what happens there |
//! |---|---|
//! | `store` | which there are, and what is known of each |
//! | `upload` | a file on its way in: bounded, checked, and there as a whole or not at all |
//! | `size` | how it is served, and what memory that takes |
//! | `served` | its template and its service, made when somebody first needs them |
//! | `loading` | the server in the template's guest, until it answers |
//! | `error` | why not |
//!
//! Files are the truth here, as they are of images: nothing of a model is in the log of events but its service.

mod error;
mod loading;
mod served;
mod size;
mod store;
mod upload;

pub use error::{ModelError, ServeError};
pub(crate) use loading::load;
pub(crate) use served::{describe, ensure_served, is_own, list, own_template, remove};
pub use store::{ModelFile, Models};
pub(crate) use upload::{Announced, Upload, begin};
