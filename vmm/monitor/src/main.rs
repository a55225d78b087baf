//! See [`ark_vmm`].

use std::process::ExitCode;

use ark_vmm::args::{self, Command};

fn main() -> ExitCode {
    match args::parse(std::env::args_os().skip(1)) {
        Ok(Command::Run { config, prepared }) => ark_vmm::run::run(&config, prepared).into(),
        Ok(Command::Verify { dir, chain }) => ark_vmm::run::verify(&dir, chain).into(),
        Ok(Command::Compact { dir, out }) => ark_vmm::run::compact(&dir, &out).into(),
        Ok(Command::Probe { json, limit }) => {
            match ark_vmm::probe::run(json, limit, &mut std::io::stdout().lock()) {
                Ok(code) => code.into(),
                Err(error) => {
                    eprintln!("ark-vmm: the answer cannot be printed: {error}");
                    ExitCode::FAILURE
                }
            }
        }
        Ok(Command::Hold) => {
            let error = ark_vmm::hold::run();
            eprintln!("ark-vmm: cannot hold a VM: {}", ark_types::plain::plain(&error));
            ExitCode::FAILURE
        }
        Ok(Command::Help) => {
            print!("{}", args::USAGE);
            ExitCode::SUCCESS
        }
        Ok(Command::Version) => {
            println!("ark-vmm {}", env!("CARGO_PKG_VERSION"));
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("ark-vmm: {error}");
            // EX_USAGE of sysexits.h.
            ExitCode::from(64)
        }
    }
}
