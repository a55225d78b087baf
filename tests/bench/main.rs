//! The figures of the README, measured where VMs can run (`make bench`).
//!
//! Every figure is a ratio against a peer or another path, both taken in turn in the same run, with p50 and p99. The table
//! goes to standard error, the same as JSON to standard output. One module per figure; [`peers`] starts our VMM and QEMU
//! with the same kernel, image, guestd and command line; [`guest`] speaks to either guest.

mod block;
mod boot;
mod branch;
mod control;
mod cost;
mod crowd;
mod eval;
mod exec;
mod flush;
mod guest;
mod heal;
mod history;
mod idle;
mod inference;
mod ledger;
mod machine;
mod many;
mod mcp;
mod memory;
mod peers;
mod placement;
mod report;
mod restart;
mod restore;
mod restores;
mod spawn;
mod think;
mod vsock;

use std::path::PathBuf;

use clap::{Parser, Subcommand};

use crate::peers::Bench;
use crate::report::Report;

#[derive(Parser)]
#[command(about = "Benchmarks of NOA ARK; `make bench` runs them")]
struct Args {
    #[command(subcommand)]
    suite: Suite,
}

#[derive(Subcommand)]
enum Suite {
    /// Figures of VMs: needs usable KVM.
    Vm {
        /// Root file system with Debian's QEMU, and the inference server as a program.
        #[arg(long)]
        peer: PathBuf,
        /// Takes fewer samples.
        #[arg(long)]
        quick: bool,
        /// Measures these figures only: boot, memory, exec, vsock, block, many, spawn,
        /// restore, eval, branch, crowd, restart, cost, heal, idle, think.
        #[arg(long, value_delimiter = ',')]
        only: Vec<String>,
    },
    /// Figures of the emulated host: needs QEMU, not KVM.
    Machine,
    /// Figures of the control plane alone: needs no VM.
    ControlPlane,
    /// Figures of the inference server as a process of this host: needs no VM.
    Inference {
        /// The bundled model's GGUF file.
        #[arg(long)]
        model: PathBuf,
    },
}

type Measure = fn(&Bench, &mut Report);

fn main() {
    let args = Args::parse();
    let mut report = Report::default();
    match args.suite {
        Suite::Machine => machine::measure(&mut report),
        Suite::ControlPlane => {
            placement::measure(&mut report);
            ledger::measure(&mut report);
        }
        Suite::Inference { model } => inference::measure(&model, &mut report),
        Suite::Vm { peer, quick, only } => {
            ark_tests::require_kvm();
            let bench = Bench::new(peer, quick);
            let figures: [(&str, Measure); 16] = [
                ("boot", boot::measure),
                ("memory", memory::measure),
                ("exec", exec::measure),
                ("vsock", vsock::measure),
                ("block", block::measure),
                ("many", many::measure),
                ("spawn", spawn::measure),
                ("restore", restore::measure),
                ("eval", eval::measure),
                ("branch", branch::measure),
                ("crowd", crowd::measure),
                ("restart", restart::measure),
                ("cost", cost::measure),
                ("heal", heal::measure),
                ("idle", idle::measure),
                ("think", think::measure),
            ];
            for (name, measure) in figures {
                if only.is_empty() || only.iter().any(|o| o == name) {
                    eprintln!("measuring {name} …");
                    measure(&bench, &mut report);
                }
            }
        }
    }
    eprint!("{}", report.table());
    println!("{}", serde_json::to_string(&report).expect("a report is JSON"));
}
