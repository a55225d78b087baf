//! From the kernel's first process to a guest that takes operations.
//!
//! ```text
//!   call the host ──► mount the root ──► listen ──► hello ──► mount the rest, loopback, names, limits ──► serve
//!                     └───── before hello: what a       └── after it: the host is on its way meanwhile, and its
//!                            broken image can fail           connections wait in the listener's queue
//! ```
//!
//! A step that fails says so in one sentence on the console and resets the machine: the VMM ends and names the reset as
//! its reason. PID 1 needs no protection from the OOM killer: the kernel never picks the global init
//! (`oom_unkillable_task`, mm/oom_kill.c), so nothing has to be undone for programs either.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::thread;

use ark_link::hello::{call, keep_heard};
use ark_link::socket::{ANY_CID, HOST_CID};
use ark_link::{Address, Connection, Listener};
use ark_types::guest::{CONTROL_PORT, HELLO_PORT, OPENAI_PORT, OPENAI_SOCKET};
use ark_types::plain::plain;
use nix::errno::Errno;
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use nix::sys::stat::{Mode, umask};

use crate::VERSION;
use crate::connect;
use crate::eval::Evaluators;
use crate::gateway;
use crate::renew::{identity, secrets};
use crate::server::Server;
use crate::system;

mod mounts;

/// Stack of the hello thread; it formats two small JSON objects.
const HELLO_STACK: usize = 128 << 10;
/// Open files of a process, soft and hard: enough for 256 programs at once in guestd itself, and far from what makes
/// programs slow that walk through all of them.
const OPEN_FILES: (u64, u64) = (65_536, 524_288);
/// The file of PID 1, in the initramfs.
const THIS_PROGRAM: &str = "/init";
/// Kernel parameter that names the host.
const HOSTNAME_KEY: &str = "ark.hostname=";
/// Kernel parameter that carries the machine-id, 32 hexadecimal digits.
const MACHINE_ID_KEY: &str = "ark.machine_id=";

/// A step that failed.
#[derive(Debug, thiserror::Error)]
#[error("the guest cannot start: {step}: {}", plain(source))]
struct BootError {
    /// What was tried, in words.
    step: String,
    /// What the kernel said.
    source: io::Error,
}

/// Makes an error of what the kernel said at `step`.
fn at<E: Into<io::Error>>(step: impl Into<String>) -> impl FnOnce(E) -> BootError {
    move |source| BootError { step: step.into(), source: source.into() }
}

/// Boots and serves. Does not return.
pub(crate) fn run() -> ExitCode {
    match start() {
        Ok(server) => server.children.reap(),
        Err(error) => {
            let mut console = io::stderr();
            let _ = writeln!(console, "ark-guestd: {error}");
            // The serial port works in the background; a reset must not overtake it.
            // SAFETY: tcdrain has no memory effects.
            unsafe { libc::tcdrain(console.as_raw_fd()) };
            system::reset()
        }
    }
}

fn start() -> Result<Arc<Server>, BootError> {
    umask(Mode::from_bits_truncate(0o022));
    // The kernel calls it after its file, `init`; people look for this name.
    nix::sys::prctl::set_name(c"ark-guestd").map_err(at("naming the process"))?;
    let host = Address::Vsock { cid: HOST_CID, port: HELLO_PORT };
    // The host answers while the root is mounted. One that does not listen yet hears hello from the hello thread.
    let call = call(&host).ok();
    // Its file is out of sight once the root is entered.
    let this = File::open(THIS_PROGRAM).map_err(at("opening this program's file"))?;
    let scratch = mounts::root()?;
    let here = Address::Vsock { cid: ANY_CID, port: CONTROL_PORT };
    let listener = Listener::bind(&here).map_err(at("listening for the host on vsock"))?;
    let hello = call.and_then(|call| call.say_hello(VERSION).ok());
    mounts::rest(&scratch)?;
    mounts::show_program(&this, Path::new(connect::PLACE))?;
    let openai = Address::Vsock { cid: HOST_CID, port: OPENAI_PORT };
    gateway::open(Path::new(OPENAI_SOCKET), openai).map_err(at(format!("listening at {OPENAI_SOCKET}")))?;
    loopback_up().map_err(at("bringing up the loopback interface"))?;
    name_machine()?;
    stay_quiet().map_err(at("writing to /proc/sys/vm"))?;
    secrets::make_dir(Path::new("/")).map_err(at("making /run/secrets"))?;
    identity::make_boot_id().map_err(at("making the boot id's file"))?;
    setrlimit(Resource::RLIMIT_NOFILE, OPEN_FILES.0, OPEN_FILES.1)
        .map_err(at("setting the limit of open files"))?;
    let server = Server::new(listener, Evaluators::new(None));
    server.start().map_err(at("starting threads"))?;
    stay_heard(host, hello).map_err(at("starting the hello thread"))?;
    Ok(server)
}

fn stay_heard(host: Address, hello: Option<Connection>) -> io::Result<()> {
    let thread = thread::Builder::new().stack_size(HELLO_STACK);
    thread.spawn(move || keep_heard(&host, VERSION, hello))?;
    Ok(())
}

/// An idle guest is not to wake its host, which may have hundreds. So memory is compacted when a huge page is wanted instead of
/// ahead of that, for which the kernel would look twice a second (`kcompactd`, mm/compaction.c), and each processor's share of
/// the statistics is added up every 30 s instead of every second; a total is off by less than a MiB meanwhile (mm/vmstat.c).
fn stay_quiet() -> io::Result<()> {
    fs::write("/proc/sys/vm/compaction_proactiveness", "0")?;
    fs::write("/proc/sys/vm/stat_interval", "30")
}

/// Sets the host name and the machine-id that the kernel's command line carries, if it does.
fn name_machine() -> Result<(), BootError> {
    let line = fs::read_to_string("/proc/cmdline").map_err(at("reading /proc/cmdline"))?;
    let root = Path::new("/");
    if let Some(name) = parameter(&line, HOSTNAME_KEY) {
        let step = || format!("setting the host name {name:?}");
        nix::unistd::sethostname(name).map_err(at(step()))?;
        identity::write_hostname(root, name).map_err(at(step()))?;
    }
    if let Some(id) = parameter(&line, MACHINE_ID_KEY) {
        let step = || format!("setting the machine-id {id:?}");
        if !identity::is_hex(id, identity::MACHINE_ID_DIGITS) {
            let wrong = io::Error::new(io::ErrorKind::InvalidInput, "it is not 32 hexadecimal digits");
            return Err(at(step())(wrong));
        }
        identity::write_machine_id(root, id).map_err(at(step()))?;
    }
    Ok(())
}

/// Value of the parameter `key` (with its `=`) of a kernel command line; the last one counts, as in the kernel.
fn parameter<'a>(line: &'a str, key: &str) -> Option<&'a str> {
    line.split_ascii_whitespace().rev().find_map(|word| word.strip_prefix(key)).filter(|v| !v.is_empty())
}

/// Brings `lo` up; the kernel gives it 127.0.0.1/8 then.
fn loopback_up() -> io::Result<()> {
    let socket = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    // SAFETY: ifreq is plain old data, for which all zeros is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = libc::c_char::from_ne_bytes([*from]);
    }
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(libc::IFF_UP | libc::IFF_RUNNING).unwrap_or(1);
    // SAFETY: SIOCSIFFLAGS reads one ifreq.
    Errno::result(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) })?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_parameter_of_a_name_counts() {
        let line = "console=ttyS0 ark.hostname=a1 quiet ark.hostname=a2\n";
        assert_eq!(parameter(line, HOSTNAME_KEY), Some("a2"));
        assert_eq!(parameter("ark.hostname= quiet", HOSTNAME_KEY), None);
        assert_eq!(parameter("dark.hostname=x", HOSTNAME_KEY), None);
    }
}
