//! Every wire format, frozen: a change that others would notice fails here until its snapshot under `schema/` is renewed
//! with `ARK_BLESS=1 cargo test -p ark-types` and reviewed with it. Each value also survives the way there and back.

mod agents;
mod events;
mod forks;
mod frozen;
mod models;
mod services;
mod tasks;
