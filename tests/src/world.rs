//! One `arkd` of a test's own.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use ark_chaos::host::{Proc, processes_mentioning};
use ark_types::layout::{Assets, RunDir};
use nix::sys::signal::Signal;
use nix::unistd::Pid;

use crate::run::{Output, Running, eventually};

/// Time a command has when a test names none. Emulated hosts are slow; a hang is slower.
const LIMIT: Duration = Duration::from_secs(300);

/// The assets under test: `ARK_ASSETS`, which `run.sh` sets.
///
/// # Panics
/// When it is not set.
#[must_use]
pub fn assets() -> Assets {
    let dir = std::env::var_os("ARK_ASSETS").expect("ARK_ASSETS names the build; run `make test`");
    Assets(PathBuf::from(dir))
}

/// Makes sure that VMs can run here.
///
/// # Panics
/// With the probe's reason when they cannot: a test that could not start a VM has failed, not passed.
pub fn require_kvm() {
    static ANSWER: std::sync::OnceLock<Output> = std::sync::OnceLock::new();
    let said = ANSWER.get_or_init(|| {
        let mut probe = Command::new(assets().program("ark-vmm"));
        // An emulated host that runs other tests is slow, not broken.
        probe.args(["probe", "--json", "--limit-ms", "30000"]);
        Running::start(probe, LIMIT).wait()
    });
    assert_eq!(said.code, 0, "no VM can run here, so no VM test can pass: {}{}", said.stdout, said.stderr);
}

/// Whether this host's processor is QEMU's emulation, where `arkd` boots a guest again that stands still.
#[must_use]
pub fn processor_is_emulated() -> bool {
    std::fs::read_to_string("/proc/cpuinfo").is_ok_and(|text| text.contains("QEMU TCG"))
}

/// Directories and environment of one `arkd`; the daemon starts with the first `ark` command.
pub struct World {
    dir: tempfile::TempDir,
    assets: Assets,
    /// VMMs that are prepared ahead of need, and forks of recently used templates: none unless a test is about them, so that
    /// every VMM is an agent's.
    pool: (u32, u32),
}

impl Default for World {
    fn default() -> Self {
        Self::new()
    }
}

impl World {
    /// A fresh world on this host's KVM.
    ///
    /// # Panics
    /// When KVM is not usable or directories cannot be made.
    #[must_use]
    pub fn new() -> Self {
        require_kvm();
        Self::with_assets(assets())
    }

    /// A fresh world over other assets (a damaged copy, say).
    ///
    /// # Panics
    /// When directories cannot be made.
    #[must_use]
    pub fn with_assets(assets: Assets) -> Self {
        let dir = tempfile::Builder::new().prefix("ark-").tempdir().expect("a temporary directory");
        Self { dir, assets, pool: (0, 0) }
    }

    /// The same with `prepared` VMMs and `standbys` of each template kept ahead of need.
    #[must_use]
    pub fn with_pool(mut self, prepared: u32, standbys: u32) -> Self {
        self.pool = (prepared, standbys);
        self
    }

    /// Its directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Its run directory.
    #[must_use]
    pub fn run_dir(&self) -> RunDir {
        RunDir(self.path().join("run"))
    }

    /// A command of this world: `program` of the assets with this world's environment.
    #[must_use]
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new(self.assets.program(program));
        command
            .env("ARK_ASSETS", &self.assets.0)
            .env("ARK_RUN", self.run_dir().0)
            .env("ARK_STATE", self.path().join("state"))
            .env("ARK_HOST", "native")
            .env("ARK_POOL", self.pool.0.to_string())
            .env("ARK_STANDBY", self.pool.1.to_string())
            .env("HOME", self.path())
            .current_dir(self.path());
        command
    }

    /// Starts `ark` with `args`.
    #[must_use]
    pub fn start<'a>(&self, args: impl IntoIterator<Item = &'a str>) -> Running {
        let mut command = self.command("ark");
        command.args(args);
        Running::start(command, LIMIT)
    }

    /// Runs `ark` with `args` to its end, with no input.
    #[must_use]
    pub fn ark<'a>(&self, args: impl IntoIterator<Item = &'a str>) -> Output {
        self.start(args).wait()
    }

    /// Runs `ark` with `args` and `input`.
    #[must_use]
    pub fn ark_with_input<'a>(&self, args: impl IntoIterator<Item = &'a str>, input: &[u8]) -> Output {
        let mut running = self.start(args);
        running.write(input);
        running.wait()
    }

    /// Runs `line` in a shell of the agent `name`.
    #[must_use]
    pub fn sh(&self, name: &str, line: &str) -> Output {
        self.ark(["exec", name, "--", "sh", "-c", line])
    }

    /// Creates the agent `name` from image `base`.
    ///
    /// # Panics
    /// When it does not come up.
    pub fn create(&self, name: &str) {
        let _ = self.ark(["create", "--image", "base", "--name", name, "--memory", "128"]).ok();
    }

    /// Creates the agent `name` as a fork of the image's default template.
    ///
    /// # Panics
    /// When it does not come up.
    pub fn create_fork(&self, image: &str, name: &str) {
        let _ = self.ark(["create", "--image", image, "--name", name]).ok();
    }

    /// Forks the agent `name` and gives the forks' names.
    ///
    /// # Panics
    /// When one of them does not come up.
    #[must_use]
    pub fn fork(&self, name: &str, count: usize) -> Vec<String> {
        let said = self.ark(["fork", name, "-n", &count.to_string()]).ok();
        let names: Vec<String> = said.stdout.lines().map(str::to_owned).collect();
        assert_eq!(names.len(), count, "{said:?}");
        names
    }

    /// The receipt of an agent.
    ///
    /// # Panics
    /// When it has none.
    #[must_use]
    pub fn receipt(&self, name: &str) -> serde_json::Value {
        self.ark(["receipt", name, "--json"]).ok().json()
    }

    /// Directories below `state/<kind>` (templates, snapshots, paused), by name.
    #[must_use]
    pub fn stored(&self, kind: &str) -> Vec<PathBuf> {
        let entries = std::fs::read_dir(self.path().join("state").join(kind));
        let mut dirs: Vec<_> = entries.into_iter().flatten().flatten().map(|e| e.path()).collect();
        dirs.sort();
        dirs
    }

    /// What `ark inspect` says of an agent.
    ///
    /// # Panics
    /// When there is no such agent.
    #[must_use]
    pub fn inspect(&self, name: &str) -> serde_json::Value {
        self.ark(["inspect", name, "--json"]).ok().json()
    }

    /// State of an agent, in a word.
    ///
    /// # Panics
    /// When there is no such agent.
    #[must_use]
    pub fn state(&self, name: &str) -> String {
        self.inspect(name)["state"].as_str().expect("a state").to_owned()
    }

    /// Waits until the agent is in `state`.
    ///
    /// # Panics
    /// When it does not get there.
    pub fn wait_for_state(&self, name: &str, state: &str) {
        eventually(&format!("{name} is {state}"), LIMIT, || self.state(name) == state);
    }

    /// Processes of this world: its path is in their environment.
    ///
    /// # Panics
    /// When the path of temporary directories is not text.
    #[must_use]
    pub fn processes(&self) -> Vec<Proc> {
        let path = self.path().to_str().expect("the path is text");
        processes_mentioning(path)
    }

    /// VMMs of this world.
    #[must_use]
    pub fn vmms(&self) -> Vec<Proc> {
        self.processes().into_iter().filter(|p| p.command.contains("ark-vmm run")).collect()
    }

    /// Process id of the running `arkd`, by its lock file.
    #[must_use]
    pub fn daemon_pid(&self) -> Option<Pid> {
        let pid: i32 = std::fs::read_to_string(self.run_dir().lock()).ok()?.trim().parse().ok()?;
        let comm = std::fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
        (comm.trim() == "arkd").then(|| Pid::from_raw(pid))
    }

    /// Sends `arkd` a signal and waits until it is gone.
    ///
    /// # Panics
    /// When none runs, or it stays.
    pub fn end_daemon(&self, signal: Signal) {
        let pid = self.daemon_pid().expect("arkd runs");
        nix::sys::signal::kill(pid, signal).expect("arkd can be signalled");
        eventually("arkd is gone", LIMIT, || self.daemon_pid().is_none());
    }

    /// Ends `arkd` and every agent as a user would.
    ///
    /// # Panics
    /// When that does not work.
    pub fn stop(&self) {
        let _ = self.ark(["stop"]).ok();
    }

    /// Ends the world as a user would, and checks that nothing is left of it.
    ///
    /// # Panics
    /// With what is left.
    pub fn end(self) {
        self.stop();
        eventually("no process is left", Duration::from_secs(10), || self.processes().is_empty());
        let sockets: Vec<_> = ["run", "run/agents"]
            .iter()
            .flat_map(|dir| std::fs::read_dir(self.path().join(dir)).into_iter().flatten().flatten())
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .filter(|name| !["agents", "arkd.lock", "probe.json"].contains(&name.as_str()))
            .collect();
        assert!(sockets.is_empty(), "left behind in the run directory: {sockets:?}");
    }
}

impl Drop for World {
    /// A test that failed half-way leaves nothing running either.
    fn drop(&mut self) {
        for process in self.processes() {
            let _ = nix::sys::signal::kill(Pid::from_raw(process.pid), Signal::SIGKILL);
        }
    }
}
