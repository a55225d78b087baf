//! `ark-vmm run`: from a configuration to the VM's end. `ark-vmm verify` and `compact`: what can be done to a snapshot.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use ark_devices::vsock::VsockError;
use ark_hal::Hypervisor;
use ark_hal::kvm::{Kvm, OpenError};
use ark_types::plain::plain;
use ark_types::vmm::{
    ConfigError, ExitReason, Generation, RestoreConfig, RunConfig, SnapshotId, VmConfig, check_size,
};

use crate::boot::{BootError, Payload};
use crate::control::{ControlError, Server};
use crate::end;
use crate::life::End;
use crate::machine::{Machine, MachineError, Makers, Prepared};
use crate::mailbox::Mailbox;
use crate::owner::{self, Inputs};
use crate::signals::Signals;
use crate::snapshot::{self, Chain, Scope, SnapshotError};

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
    /// The snapshot cannot be used.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// The machine cannot be put together.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// Signals or descriptors.
    #[error("the VMM cannot start: {0}")]
    Host(#[from] io::Error),
}

impl StartError {
    /// Whose fault it is: the configuration's, the snapshot's or the host's.
    #[must_use]
    pub fn reason(&self) -> ExitReason {
        match self {
            Self::Read { .. } | Self::Config(_) | Self::Boot(_) | Self::Control(_) => ExitReason::BadConfig,
            Self::Kvm(_) | Self::Host(_) => ExitReason::HostError,
            Self::Snapshot(error) => error.exit_reason(),
            Self::Machine(error) => match error {
                MachineError::Vsock(VsockError::Descriptors(_)) => ExitReason::HostError,
                MachineError::Boot(_)
                | MachineError::OpenDisk { .. }
                | MachineError::Disk { .. }
                | MachineError::Console { .. }
                | MachineError::DiskCount { .. }
                | MachineError::OtherDisk { .. }
                | MachineError::Socket(_)
                | MachineError::Vsock(_) => ExitReason::BadConfig,
                MachineError::Memory(_) | MachineError::Hypervisor(_) | MachineError::Host { .. } => {
                    ExitReason::HostError
                }
                MachineError::Snapshot(error) => error.exit_reason(),
                MachineError::State(_)
                | MachineError::Foreign(_)
                | MachineError::Refused(_)
                | MachineError::Device(_)
                | MachineError::Serial(_) => ExitReason::BadSnapshot,
                MachineError::Bus(_) | MachineError::Acpi(_) => ExitReason::Internal,
            },
        }
    }
}

/// Runs the VM that `source` (a file, or `-` for standard input) describes; the record of its end goes to standard output
/// and to the configuration's `exit_file`. With `prepared`, a VM of that many vCPUs is made before `source` is read; should
/// it then be empty, nobody needs the VM, and nothing is said. Gives the process's exit code.
#[must_use]
pub fn run(source: &Path, prepared: Option<u8>) -> u8 {
    // Everything this process makes is for its user alone.
    // SAFETY: umask only sets a number in the process.
    unsafe { libc::umask(0o077) };
    let mut exit_file = None;
    let end = match start(source, prepared, &mut exit_file) {
        Ok(Some(end)) => end,
        Ok(None) => return ExitReason::Signal.exit_code(),
        Err(error) => End { reason: error.reason(), detail: Some(error.to_string()) },
    };
    let record = end::record(end);
    let detail = record.detail.as_deref().map_or(String::new(), |detail| format!(": {detail}"));
    // Not `eprintln`: it panics where standard error is a full disk or a closed pipe, and the record has to be told even so.
    let _ = writeln!(io::stderr(), "ark-vmm: {}{detail}", record.reason);
    if let Err(error) = end::tell(&record, exit_file.as_deref(), &mut io::stdout().lock()) {
        let _ = writeln!(io::stderr(), "ark-vmm: {error}");
    }
    record.reason.exit_code()
}

/// From here to the VM's end; none when a prepared VM is not needed.
fn start(
    source: &Path,
    prepared: Option<u8>,
    exit_file: &mut Option<PathBuf>,
) -> Result<Option<End>, StartError> {
    let ahead = match prepared {
        Some(vcpus) => {
            let kvm = Kvm::open()?;
            let prepared = Prepared::make(&kvm, vcpus)?;
            Some((kvm, prepared))
        }
        None => None,
    };
    let text = read_config(source)?;
    if ahead.is_some() && text.trim_ascii().is_empty() {
        return Ok(None);
    }
    // Not before: whoever gave standard input may never end it, and has to be able to end this process.
    let signals = Signals::block()?;
    // Told even when the rest of the configuration is bad.
    let config: RunConfig = serde_json::from_str(&text).map_err(|e| ConfigError::Json(e.to_string()))?;
    *exit_file = config.exit_file().cloned();
    raise_descriptor_limit();
    let plan = Plan::of(config)?;
    let (kvm, prepared) = match ahead {
        Some((kvm, prepared)) => (kvm, Some(prepared)),
        None => (Kvm::open()?, None),
    };
    let (control, vsock) = plan.sockets();
    let (control, vsock) = (control.map(Server::bind).transpose()?, vsock.map(Path::to_owned));
    let mailbox = Mailbox::new()?;
    let machine =
        plan.carry_out(Makers { hypervisor: &kvm as &dyn Hypervisor, prepared, mailbox: &mailbox })?;
    let inputs = Inputs { mailbox, signals: Some(signals), control, vsock };
    Ok(Some(owner::run(machine, inputs)))
}

/// A configuration whose files were looked at.
enum Plan {
    Boot(VmConfig, Payload, Generation),
    Restore(RestoreConfig, Box<Chain>),
}

impl Plan {
    /// Checks all that can be checked before anything of the VM is made.
    fn of(config: RunConfig) -> Result<Self, StartError> {
        let host_memory_mib = host_memory_mib()?;
        match config {
            RunConfig::Boot(config) => {
                config.check(host_memory_mib)?;
                let payload = Payload::open(&config)?;
                Ok(Self::Boot(config, payload, random_generation()?))
            }
            RunConfig::Restore(config) => {
                let chain = Chain::open(&config.snapshot)?;
                let manifest = chain.manifest();
                check_size(manifest.vcpus, manifest.memory_mib, host_memory_mib)?;
                Ok(Self::Restore(config, Box::new(chain)))
            }
        }
    }

    /// Paths of the control socket and of the socket device.
    fn sockets(&self) -> (Option<&Path>, Option<&Path>) {
        match self {
            Self::Boot(config, ..) => {
                let vsock = config.vsock.as_ref().map(|vsock| vsock.uds_path.as_path());
                (config.control_socket.as_deref(), vsock)
            }
            Self::Restore(config, _) => (config.control_socket.as_deref(), config.uds_path.as_deref()),
        }
    }

    fn carry_out(self, makers: Makers<'_>) -> Result<Machine, MachineError> {
        match self {
            Self::Boot(config, payload, generation) => Machine::build(&config, payload, generation, makers),
            Self::Restore(config, chain) => Machine::restore(&chain, &config, makers),
        }
    }
}

/// Checks every byte of the snapshot in `dir`, and of its bases when `chain`. Says on standard error what is wrong, and
/// nothing else. Gives the process's exit code.
#[must_use]
pub fn verify(dir: &Path, chain: bool) -> u8 {
    let scope = if chain { Scope::WholeChain } else { Scope::Top };
    snapshot::verify(dir, scope).map_or_else(|error| complain(&error), |_| 0)
}

/// Makes of the snapshot in `dir` and its bases one full snapshot in `out`; prints its id as a line of JSON. Gives the
/// process's exit code.
#[must_use]
pub fn compact(dir: &Path, out: &Path) -> u8 {
    #[derive(serde::Serialize)]
    struct Made {
        id: SnapshotId,
    }
    // Snapshots are for their user alone.
    // SAFETY: umask only sets a number in the process.
    unsafe { libc::umask(0o077) };
    let absolute = |path: &Path| {
        std::path::absolute(path).map_err(|source| SnapshotError::Host {
            what: "find the directory",
            path: path.to_owned(),
            source,
        })
    };
    let made = absolute(dir).and_then(|dir| snapshot::compact(&dir, &absolute(out)?));
    match made {
        Ok(written) => {
            let line = serde_json::to_string(&Made { id: written.id }).unwrap_or_default();
            match writeln!(io::stdout(), "{line}") {
                Ok(()) => 0,
                Err(_) => ExitReason::HostError.exit_code(),
            }
        }
        Err(error) => complain(&error),
    }
}

fn complain(error: &SnapshotError) -> u8 {
    let _ = writeln!(io::stderr(), "ark-vmm: {}", plain(error));
    error.exit_reason().exit_code()
}

/// A generation id that no VM has had.
fn random_generation() -> io::Result<Generation> {
    let mut id = [0; 16];
    // SAFETY: the pointer and length are those of `id`. So few bytes come whole (getrandom(2)).
    let got = unsafe { libc::getrandom(id.as_mut_ptr().cast(), id.len(), 0) };
    if usize::try_from(got) == Ok(id.len()) { Ok(Generation(id)) } else { Err(io::Error::last_os_error()) }
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
