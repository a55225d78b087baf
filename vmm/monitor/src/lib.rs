//! `ark-vmm`, the virtual machine monitor: one process per microVM.
//!
//! [`run`] reads the configuration, [`machine`] puts memory, devices and vCPUs together around the kernel that [`boot`]
//! loads and the tables of [`acpi`], or as a [`snapshot`] has them, and [`owner`] then keeps the VM's state until its end.
//! The states and their moves:
//!
//! ```text
//!              ┌──────────┐ pause
//!  starting ──►│ running  │◄──────► paused
//!      │       └────┬─────┘ resume    │
//!      │            ▼ stop            │ stop
//!      │        stopping ◄────────────┤
//!      │            │                 │
//!      └────────────┴──► ended ◄──────┘     (running ──► ended too: the guest ends by itself)
//! ```
//!
//! Threads: `ark-vmm` (the owner: state, control socket, signals), `devices` (all virtio devices), `vcpu0`, `vcpu1`, …;
//! and, while a stop waits for the guest, `power-off`. A snapshot is written by a child process.

pub mod acpi;
pub mod args;
pub mod boot;
pub mod control;
pub mod end;
pub mod hold;
pub mod life;
pub mod machine;
pub mod mailbox;
pub mod map;
pub mod owner;
pub mod power_off;
pub mod probe;
pub mod run;
pub mod signals;
pub mod snapshot;
pub mod vcpus;
