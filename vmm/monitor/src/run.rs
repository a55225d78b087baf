//! `ark-vmm run`: from a configuration to the VM's end.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use ark_devices::vsock::VsockError;
use ark_hal::kvm::{Kvm, OpenError};
use ark_types::vmm::{ConfigError, ExitReason, VmConfig};

use crate::boot::{BootError, Payload};
use crate::control::{ControlError, Server};
use crate::end;
use crate::life::End;
use crate::machine::{Machine, MachineError};
use crate::mailbox::Mailbox;
use crate::owner::{self, Inputs};
use crate::signals::Signals;

/// Most bytes of a configuration.
const MAX_CONFIG: u64 = 1 << 20;

/// A VM that could not be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The configuration cannot be read.
    #[error("the configuration {path} cannot be read: {source}; check the path and its permissions")]
    Read {
        /// Its path.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The configuration is not one.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A file it names cannot be used.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// The control socket cannot be made.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// No KVM.
    #[error(transparent)]
    Kvm(#[from] OpenError),
    /// The machine cannot be put together.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// Signals or descriptors.
    #[error("the VMM cannot start: {0}")]
    Host(#[from] io::Error),
}

impl StartError {
    /// Whose fault it is: the configuration's or the host's.
    #[must_use]
    pub fn reason(&self) -> ExitReason {
        match self {
            Self::Read { .. } | Self::Config(_) | Self::Boot(_) | Self::Control(_) => ExitReason::BadConfig,
            Self::Kvm(_) | Self::Host(_) => ExitReason::HostError,
            Self::Machine(error) => match error {
                MachineError::Vsock(VsockError::Descriptors(_)) => ExitReason::HostError,
                MachineError::Boot(_)
                | MachineError::OpenDisk { .. }
                | MachineError::Disk { .. }
                | MachineError::Console { .. }
                | MachineError::Vsock(_) => ExitReason::BadConfig,
                MachineError::Memory(_) | MachineError::Hypervisor(_) | MachineError::Host { .. } => {
                    ExitReason::HostError
                }
                MachineError::Bus(_) | MachineError::Acpi(_) => ExitReason::Internal,
            },
        }
    }
}

/// Runs the VM that `source` (a file, or `-` for standard input) describes; the record of its end goes to standard output
/// and to the configuration's `exit_file`. Gives the process's exit code.
#[must_use]
pub fn run(source: &Path) -> u8 {
    let born = Instant::now();
    // Everything this process makes is for its user alone.
    // SAFETY: umask only sets a number in the process.
    unsafe { libc::umask(0o077) };
    let mut exit_file = None;
    let end = start(source, born, &mut exit_file).unwrap_or_else(|error| {
        let why = error.to_string();
        End { reason: error.reason(), detail: Some(why) }
    });
    let record = end::record(end);
    let detail = record.detail.as_deref().map_or(String::new(), |detail| format!(": {detail}"));
    // Not `eprintln`: it panics where standard error is a full disk or a closed pipe, and the record has to be told even so.
    let _ = writeln!(io::stderr(), "ark-vmm: {}{detail}", record.reason);
    if let Err(error) = end::tell(&record, exit_file.as_deref(), &mut io::stdout().lock()) {
        let _ = writeln!(io::stderr(), "ark-vmm: {error}");
    }
    record.reason.exit_code()
}

fn start(source: &Path, born: Instant, exit_file: &mut Option<PathBuf>) -> Result<End, StartError> {
    let text = read_config(source)?;
    // Not before: whoever gave standard input may never end it, and has to be able to end this process.
    let signals = Signals::block()?;
    // Told even when the rest of the configuration is bad.
    let config: VmConfig = serde_json::from_str(&text).map_err(|e| ConfigError::Json(e.to_string()))?;
    exit_file.clone_from(&config.exit_file);
    config.check(host_memory_mib()?)?;
    let payload = Payload::open(&config)?;
    raise_descriptor_limit();
    let kvm = Kvm::open()?;
    let control = config.control_socket.as_deref().map(Server::bind).transpose()?;
    let mailbox = Mailbox::new()?;
    let machine = Machine::build(&config, payload, &kvm, &mailbox)?;
    let vsock = config.vsock.map(|vsock| vsock.uds_path);
    let inputs = Inputs { mailbox, signals: Some(signals), control, vsock };
    Ok(owner::run(machine, inputs, born))
}

fn read_config(source: &Path) -> Result<String, StartError> {
    let read = |file: &mut dyn Read| {
        let mut text = String::new();
        file.take(MAX_CONFIG + 1).read_to_string(&mut text)?;
        if text.len() as u64 > MAX_CONFIG {
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, "it has more than 1 MiB"));
        }
        Ok(text)
    };
    let text = if source == Path::new("-") {
        read(&mut io::stdin().lock())
    } else {
        File::open(source).and_then(|mut file| read(&mut file))
    };
    text.map_err(|source_error| StartError::Read { path: source.to_owned(), source: source_error })
}

/// Descriptors the VMM may need: one for each stream of the vsock device, and some tens of its own.
const DESCRIPTORS: libc::rlim_t = 2048;

/// Raises the soft limit of open descriptors towards [`DESCRIPTORS`]. Where the hard limit is lower, the vsock device makes
/// new streams wait, so that is no reason not to start.
fn raise_descriptor_limit() {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the pointer is valid for the call, which only writes the struct.
    if unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) } == 0 && limit.rlim_cur < DESCRIPTORS {
        limit.rlim_cur = DESCRIPTORS.min(limit.rlim_max);
        // SAFETY: the pointer is valid for the call, which only reads the struct.
        unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) };
    }
}

/// All of this host's memory, MiB.
fn host_memory_mib() -> io::Result<u64> {
    // SAFETY: all-zero is a valid value of this plain C struct.
    let mut info: libc::sysinfo = unsafe { std::mem::zeroed() };
    // SAFETY: the pointer is valid for the call, which only writes the struct.
    if unsafe { libc::sysinfo(&raw mut info) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok((info.totalram * u64::from(info.mem_unit)) >> 20)
}
