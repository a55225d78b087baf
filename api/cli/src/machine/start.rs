//! Starting the emulated host.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use ark_client::Client;
use ark_types::health::Health;
use ark_types::problem::ProblemKind;

use super::cpio::{Archive, pad};
use super::qemu::{Launch, tsc_khz};
use super::{CONSOLE_LINES, Machine, MachineError, PROGRAM, Record, disk, file_error, find_program, qmp};
use crate::args::MachineSize;
use crate::daemon::detach;
use crate::dirs::{make_private_dir, token};
use crate::identity::Identity;
use crate::output::{Ui, now_unix_ms, tail};
use crate::progress::Spinner;

/// Longest wait for arkd in a machine that starts; software emulation on a busy host is slow.
const START_DEADLINE: Duration = Duration::from_secs(120);
/// How the machine's init begins each line on the console (guest-images/machine/init).
const INIT_SAYS: &str = "ark: ";
/// A machine of which nothing was heard by then, neither from arkd nor from init on the console, is ended and started once more: QEMU
/// may get a kernel stuck (see `qemu.rs`). A start takes seconds, a quarter of this on a host with three times too much to do.
const STUCK: Duration = Duration::from_secs(45);
/// Longest wait for QEMU's monitor to say what the processors of such a machine do.
const EVIDENCE_DEADLINE: Duration = Duration::from_secs(2);
/// First and longest wait for one answer: QEMU takes connections before there is anybody to answer them.
const FIRST_ANSWER: Duration = Duration::from_millis(300);
const LONGEST_ANSWER: Duration = Duration::from_secs(4);
/// Pause between two questions.
const POLL: Duration = Duration::from_millis(40);
/// Longest that a port is waited for which a machine killed just now may still hold.
const CLOSING: Duration = Duration::from_secs(3);
/// Most memory a machine gets unasked, MiB.
const MAX_DEFAULT_MEMORY_MIB: u64 = 6 << 10;
/// Least memory a machine can boot and run an agent with, MiB.
const MIN_MEMORY_MIB: u64 = 512;
/// Most processors a machine gets unasked.
const MAX_DEFAULT_CPUS: usize = 8;
/// Longest path of a Unix socket (unix(7): `sun_path` has 108 bytes with its NUL).
const MAX_SOCKET_PATH: usize = 107;

/// A machine that answers.
pub(crate) struct Started {
    /// The way to its arkd.
    pub(crate) client: Client,
    /// What its arkd said.
    pub(crate) health: Health,
    /// Whether this command started it.
    pub(crate) fresh: bool,
    /// How long that took.
    pub(crate) took: Duration,
}

/// QEMU, ended unless the machine comes up.
struct Guard<'a> {
    machine: &'a Machine,
    child: Child,
    armed: bool,
}

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        if self.armed {
            // Either may fail only because it is gone already.
            let _ = self.child.kill();
            let _ = self.child.wait();
            self.machine.forget();
        }
    }
}

impl Machine {
    /// Starts the machine, or waits for the one that is starting, until its arkd answers.
    pub(crate) async fn start(&self, size: &MachineSize, ui: Ui) -> Result<Started, MachineError> {
        let _lock = self.lock().await?;
        let begun = Instant::now();
        if let Some(record) = self.alive()? {
            let client = self.client(record.port)?;
            let spinner = Spinner::new(ui, "waiting for the emulated host");
            let late = || begun.elapsed() > START_DEADLINE;
            let health = self.wait(&client, record.port, || record.identity.is_alive(), late).await?;
            drop(spinner);
            let health = health.map_err(|why| MachineError::Silent {
                pid: record.identity.pid,
                seconds: begun.elapsed().as_secs(),
                why,
                quote: self.quote(),
            })?;
            return Ok(Started { client, health, fresh: false, took: begun.elapsed() });
        }
        if let Some(record) = self.record() {
            let console = fs::read(self.console()).unwrap_or_default();
            ui.note(&super::how_it_ended(record.identity.pid, &String::from_utf8_lossy(&console)));
            self.forget();
        }
        let unheard = || fs::read_to_string(self.console()).is_ok_and(|said| !said.contains(INIT_SAYS));
        let stuck = || begun.elapsed() > STUCK && unheard();
        match self.boot(size, ui, begun, || stuck() || begun.elapsed() > START_DEADLINE).await {
            Err(MachineError::Stuck { seconds, evidence, .. }) if begun.elapsed() < START_DEADLINE => {
                ui.note(&format!(
                    "nothing was heard of the emulated host for {seconds} s (its processors' state: {}); it is started once more",
                    evidence.display()
                ));
                self.boot(size, ui, begun, || begun.elapsed() > START_DEADLINE).await
            }
            other => other,
        }
    }

    /// Starts a machine where none is.
    async fn boot(
        &self,
        size: &MachineSize,
        ui: Ui,
        begun: Instant,
        late: impl Fn() -> bool,
    ) -> Result<Started, MachineError> {
        // The kernel takes a killed QEMU's memory back first, which takes a while, and closes its sockets after that.
        let asked = Instant::now();
        while free_port(self.wanted_port()).is_err() && asked.elapsed() < CLOSING {
            tokio::time::sleep(POLL).await;
        }
        let launch = self.prepare(size)?;
        let spinner = Spinner::new(ui, "starting the emulated host");
        let mut guard = Guard { machine: self, child: self.spawn(&launch)?, armed: true };
        let pid = guard.child.id();
        let identity = Identity::of(pid).map_err(file_error("looking at QEMU's process"))?;
        let (memory_mib, cpus) = (launch.memory_mib, launch.cpus);
        let record = Record { identity, port: launch.port, memory_mib, cpus, started_unix_ms: now_unix_ms() };
        self.remember(&record)?;
        let client = self.client(launch.port)?;
        let child = &mut guard.child;
        let health =
            match self.wait(&client, launch.port, || matches!(child.try_wait(), Ok(None)), late).await? {
                Ok(health) => health,
                Err(why) => return Err(self.stuck(begun, why).await),
            };
        guard.armed = false;
        drop(spinner);
        Ok(Started { client, health, fresh: true, took: begun.elapsed() })
    }

    /// Checks everything that can be wrong and makes every file a start needs.
    fn prepare(&self, size: &MachineSize) -> Result<Launch, MachineError> {
        let program = find_program(PROGRAM).ok_or(MachineError::NoQemu)?;
        let assets = self.dirs.assets.machine();
        let asset = |name: &str| {
            let path = assets.join(name);
            if path.is_file() { Ok(path) } else { Err(MachineError::NoAsset(path)) }
        };
        let (kernel, initramfs, asset_disk) =
            (asset("vmlinuz")?, asset("initramfs.cpio")?, asset("assets.erofs")?);
        let memory_mib = memory(size.memory, host_memory_mib())?;
        let cpus = size.cpus.unwrap_or_else(default_cpus);
        let attach = size.attach.as_deref().map(attachment).transpose()?;
        let port = self.wanted_port();
        free_port(port)?;
        let monitor = self.monitor();
        if monitor.as_os_str().as_bytes().len() > MAX_SOCKET_PATH {
            return Err(MachineError::LongPath(monitor));
        }
        make_private_dir(&self.dirs.run.0)
            .map_err(file_error(format!("making {}", self.dirs.run.0.display())))?;
        // A socket that a killed machine left would be in QEMU's way.
        let _ = fs::remove_file(&monitor);
        disk::ensure(&self.data_disk(), size.disk)?;
        self.write_initramfs(&initramfs)?;
        Ok(Launch {
            program,
            kernel,
            initramfs: self.initramfs(),
            assets: asset_disk,
            data: self.data_disk(),
            attach,
            console: self.console(),
            monitor,
            port,
            memory_mib,
            cpus,
            tsc_khz: tsc_khz(),
        })
    }

    /// The build's initramfs followed by a second archive with the token, mode 0600: no secret on a command line.
    fn write_initramfs(&self, base: &Path) -> Result<(), MachineError> {
        let path = self.initramfs();
        let write = || -> io::Result<()> {
            let mut bytes = fs::read(base)?;
            pad(&mut bytes, 4);
            bytes.extend(secrets(&token(&self.dirs.state)?).map_err(io::Error::other)?);
            crate::dirs::write_private(&path, &bytes)
        };
        write().map_err(file_error(format!("writing {}", path.display())))
    }

    fn spawn(&self, launch: &Launch) -> Result<Child, MachineError> {
        let log = fresh_log(&self.qemu_log())?;
        // QEMU truncates the console's log itself, but with everybody's permissions.
        fresh_log(&self.console())?;
        let errors = log.try_clone().map_err(file_error("duplicating QEMU's log"))?;
        let mut command = Command::new(&launch.program);
        command.args(launch.arguments()).current_dir("/").stdin(Stdio::null()).stdout(log).stderr(errors);
        detach(&mut command);
        command.spawn().map_err(file_error(format!("running {}", launch.program.display())))
    }

    /// Asks for health until it is given, the machine ends, or it is too late: then the last answer comes back.
    async fn wait(
        &self,
        client: &Client,
        port: u16,
        mut alive: impl FnMut() -> bool,
        late: impl Fn() -> bool,
    ) -> Result<Result<Health, String>, MachineError> {
        let mut patience = FIRST_ANSWER;
        loop {
            let why = match tokio::time::timeout(patience, client.health()).await {
                Ok(Ok(health)) => return Ok(Ok(health)),
                Ok(Err(e)) if e.problem().is_some_and(|p| p.kind == ProblemKind::Unauthorized) => {
                    return Err(MachineError::OtherToken(port));
                }
                Ok(Err(e)) => e.to_string(),
                Err(_) => {
                    patience = (patience * 3 / 2).min(LONGEST_ANSWER);
                    "its port takes connections, but nothing answers".to_owned()
                }
            };
            if !alive() {
                return Err(self.died(port));
            }
            if late() {
                return Ok(Err(why));
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// The error of a machine that never came up. What its processors do is kept: it is the only trace of why.
    async fn stuck(&self, begun: Instant, why: String) -> MachineError {
        let evidence = self.evidence();
        let monitor = self.monitor();
        let registers = match tokio::time::timeout(EVIDENCE_DEADLINE, qmp::registers(&monitor)).await {
            Ok(Ok(registers)) => registers,
            Ok(Err(error)) => format!("QEMU's monitor: {error}\n"),
            Err(_) => "QEMU's monitor does not answer\n".to_owned(),
        };
        // The error tells what is known without it.
        let _ = crate::dirs::write_private(&evidence, registers.as_bytes());
        MachineError::Stuck { seconds: begun.elapsed().as_secs(), why, evidence, quote: self.quote() }
    }

    fn died(&self, port: u16) -> MachineError {
        let said = fs::read_to_string(self.qemu_log()).unwrap_or_default();
        if said.contains("Could not set up host forwarding rule") {
            return MachineError::PortTaken(port);
        }
        MachineError::Died { quote: self.quote() }
    }

    /// The last lines of QEMU's messages and of the console.
    fn quote(&self) -> String {
        let mut quote = String::new();
        for path in [self.qemu_log(), self.console()] {
            let lines = tail(&String::from_utf8_lossy(&fs::read(&path).unwrap_or_default()), CONSOLE_LINES);
            if !lines.is_empty() {
                quote.push_str(&format!("\n{}:{lines}", path.display()));
            }
        }
        quote
    }
}

/// What this start tells the machine, as an archive the kernel unpacks over the build's initramfs.
fn secrets(token: &str) -> Result<Vec<u8>, super::cpio::TooLarge> {
    let mut archive = Archive::new();
    archive.directory("etc", 0o755)?;
    archive.directory("etc/ark", 0o700)?;
    archive.file("etc/ark/token", 0o600, token.as_bytes())?;
    Ok(archive.finish())
}

/// An empty log with mode 0600 in place of the last start's.
fn fresh_log(path: &Path) -> Result<File, MachineError> {
    let open = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path);
    open.map_err(file_error(format!("writing {}", path.display())))
}

/// Memory of the machine: what was asked for if it can be had, else half of the host's up to a bound.
fn memory(asked: Option<u64>, host: u64) -> Result<u64, MachineError> {
    let mib =
        asked.unwrap_or((host / 2).min(MAX_DEFAULT_MEMORY_MIB)).max(asked.map_or(MIN_MEMORY_MIB, |_| 0));
    if (MIN_MEMORY_MIB..=host).contains(&mib) {
        Ok(mib)
    } else {
        Err(MachineError::Memory { asked: mib, host })
    }
}

/// Memory of this host, MiB: `MemTotal` of `/proc/meminfo` (proc(5)), in KiB there.
pub(super) fn host_memory_mib() -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let total = text.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    total.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0) / 1024
}

fn default_cpus() -> u32 {
    let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    u32::try_from(cpus.min(MAX_DEFAULT_CPUS)).unwrap_or(1)
}

fn attachment(path: &Path) -> Result<PathBuf, MachineError> {
    fs::canonicalize(path).map_err(|_| MachineError::NoAttachment(path.to_owned()))
}

/// Whether nobody listens on the port. Another program may still be quicker than QEMU, which then says so.
fn free_port(port: u16) -> Result<(), MachineError> {
    match TcpListener::bind((Ipv4Addr::LOCALHOST, port)) {
        Ok(_) => Ok(()),
        Err(e) if e.kind() == io::ErrorKind::AddrInUse => Err(MachineError::PortTaken(port)),
        Err(source) => {
            Err(MachineError::File { what: format!("listening on port {port} of 127.0.0.1"), source })
        }
    }
}

#[cfg(test)]
mod tests {
    use ark_types::layout::{Assets, RunDir, StateDir};

    use super::*;
    use crate::dirs::Dirs;

    #[test]
    fn memory_is_half_the_hosts_within_bounds() {
        assert_eq!(memory(None, 4096).unwrap(), 2048);
        assert_eq!(memory(None, 65_536).unwrap(), 6144);
        assert_eq!(memory(None, 800).unwrap(), 512);
        assert_eq!(memory(Some(1024), 4096).unwrap(), 1024);
        for (asked, host) in [(Some(0), 4096), (Some(511), 4096), (Some(4097), 4096), (None, 256)] {
            let error = memory(asked, host).unwrap_err().to_string();
            assert!(error.contains("512 to"), "{error}");
        }
        assert!(host_memory_mib() > 100);
    }

    #[test]
    fn what_is_missing_or_in_the_way_is_named_and_nothing_is_left() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let dirs =
            Dirs { assets: Assets(at("assets")), state: StateDir(at("state")), run: RunDir(at("run")) };
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let machine = Machine::new(dirs.clone(), Some(port));
        let size = MachineSize::default();
        let prepare = |size: &MachineSize| machine.prepare(size).unwrap_err().to_string();
        assert!(prepare(&size).contains("vmlinuz is missing: say `make`"));
        fs::create_dir_all(at("assets/machine")).unwrap();
        for name in ["vmlinuz", "initramfs.cpio", "assets.erofs"] {
            fs::write(at("assets/machine").join(name), "x").unwrap();
        }
        assert!(prepare(&size).contains(&format!("port {port} of 127.0.0.1 is taken")));
        let attach = Some(PathBuf::from("/no/such/file"));
        assert!(
            prepare(&MachineSize { attach, ..size.clone() }).contains("/no/such/file cannot be attached")
        );
        assert!(prepare(&MachineSize { memory: Some(1), ..size.clone() }).contains("1 MiB cannot be had"));
        assert!(!at("state").exists() && !at("run").exists());
        drop(listener);
        if find_program("mkfs.ext4").is_none() {
            return;
        }
        assert!(prepare(&MachineSize { disk: Some(1), ..size.clone() }).contains("too small"));
        machine.prepare(&MachineSize { disk: Some(256), ..size }).unwrap();
        let initramfs = fs::read(machine.initramfs()).unwrap();
        assert_eq!((initramfs[0], &initramfs[1..4], &initramfs[4..10]), (b'x', &[0; 3][..], &b"070701"[..]));
        let token = token(&dirs.state).unwrap();
        assert!(initramfs.windows(64).any(|w| w == token.as_bytes()));
    }
}
