//! Our VMM and Debian's QEMU, started with the same kernel, image, guestd and command line.

use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use ark_tests::assets;
use ark_types::guest::{Decoder, HELLO_PORT, Kind};
use ark_types::vmm::{DiskConfig, VmConfig, VsockConfig};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, VsockAddr, accept, bind, listen, socket};

use crate::guest::Address;

/// Longest wait for a guest's hello.
const BOOT_LIMIT: Duration = Duration::from_secs(60);
/// `VMADDR_CID_ANY` (linux/vm_sockets.h).
const CID_ANY: u32 = u32::MAX;

/// What every figure needs.
pub(crate) struct Bench {
    peer: PathBuf,
    quick: bool,
    scratch: tempfile::TempDir,
}

/// Which VMM runs a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Vmm {
    /// `ark-vmm`.
    Ark,
    /// `qemu-system-x86_64 -M microvm,accel=kvm`.
    Qemu,
    /// The same with every legacy device off, as QEMU's manual recommends for speed.
    QemuBare,
}

/// A guest that said hello.
pub(crate) struct Guest {
    pub(crate) child: Child,
    pub(crate) dir: PathBuf,
    /// From the start of the VMM's process to the hello.
    pub(crate) boot: Duration,
    /// Its control port.
    pub(crate) address: Address,
}

impl Guest {
    /// Process id of the VMM.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Control socket of our VMM.
    pub(crate) fn control_socket(&self) -> PathBuf {
        self.dir.join("vmm.sock")
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

impl Bench {
    pub(crate) fn new(peer: PathBuf, quick: bool) -> Self {
        if !Path::new("/dev/vhost-vsock").exists() {
            let _ = Command::new("modprobe").arg("vhost_vsock").stderr(Stdio::null()).status();
        }
        let scratch = tempfile::Builder::new().prefix("ark-bench-").tempdir().expect("a directory");
        Self { peer, quick, scratch }
    }

    /// The inference server as a program of this host.
    pub(crate) fn inference(&self) -> PathBuf {
        self.peer.join("ark-inference")
    }

    /// How many samples a figure takes, given how many a thorough run takes.
    pub(crate) fn samples(&self, thorough: usize) -> usize {
        if self.quick { thorough.div_ceil(5).max(2) } else { thorough }
    }

    /// Directory for a figure's own files.
    pub(crate) fn scratch(&self) -> &Path {
        self.scratch.path()
    }

    /// Boots `image` under `vmm` with `extra` disks, and waits for the hello.
    pub(crate) fn boot(&self, vmm: Vmm, image: &str, memory_mib: u64, extra: &[&Path]) -> Guest {
        let dir =
            tempfile::Builder::new().prefix("g").tempdir_in(self.scratch()).expect("a directory").keep();
        let image = assets().images().join(format!("{image}.erofs"));
        match vmm {
            Vmm::Ark => Self::boot_ark(dir, &image, memory_mib, extra),
            Vmm::Qemu | Vmm::QemuBare => self.boot_qemu(vmm, dir, &image, memory_mib, extra),
        }
    }

    fn boot_ark(dir: PathBuf, image: &Path, memory_mib: u64, extra: &[&Path]) -> Guest {
        let uds_path = dir.join("v.sock");
        let hello = UnixListener::bind(dir.join(format!("v.sock_{HELLO_PORT}"))).expect("a socket");
        let mut disks = vec![DiskConfig { path: image.to_owned(), read_only: true }];
        disks.extend(extra.iter().map(|p| DiskConfig { path: (*p).to_owned(), read_only: false }));
        let config = VmConfig {
            kernel: assets().kernel(),
            initrd: Some(assets().initrd()),
            cmdline: String::new(),
            vcpus: 1,
            memory_mib,
            disks,
            vsock: Some(VsockConfig { guest_cid: 3, uds_path: uds_path.clone() }),
            console: Some(dir.join("console.log")),
            control_socket: Some(dir.join("vmm.sock")),
            exit_file: None,
            labels: std::collections::BTreeMap::new(),
        };
        let file = dir.join("vm.json");
        std::fs::write(&file, serde_json::to_string(&config).expect("JSON")).expect("room for a file");
        let begin = Instant::now();
        let child = Command::new(assets().program("ark-vmm"))
            .args(["run", "--config"])
            .arg(&file)
            .stdout(Stdio::null())
            .spawn()
            .expect("ark-vmm starts");
        wait_readable(hello.as_raw_fd(), &dir);
        let (stream, _) = hello.accept().expect("a connection");
        read_hello(stream);
        Guest { child, dir, boot: begin.elapsed(), address: Address::Hybrid(uds_path) }
    }

    fn boot_qemu(&self, vmm: Vmm, dir: PathBuf, image: &Path, memory_mib: u64, extra: &[&Path]) -> Guest {
        let listener = listen_for_hello();
        let mut command = self.qemu_guest(vmm, &dir, image, memory_mib, extra);
        let begin = Instant::now();
        let child = command.stdout(Stdio::null()).spawn().expect("QEMU starts");
        wait_readable(listener.as_raw_fd(), &dir);
        let stream = accept(listener.as_raw_fd()).expect("a connection");
        // SAFETY: `accept` just made the descriptor; this is its one owner.
        read_hello(unsafe { <std::fs::File as std::os::fd::FromRawFd>::from_raw_fd(stream) });
        Guest { child, dir, boot: begin.elapsed(), address: Address::Kernel { cid: QEMU_CID } }
    }

    /// QEMU with our kernel, guestd and `image`, to be started.
    pub(crate) fn qemu_guest(
        &self,
        vmm: Vmm,
        dir: &Path,
        image: &Path,
        memory_mib: u64,
        extra: &[&Path],
    ) -> Command {
        let machine = match vmm {
            Vmm::QemuBare => "microvm,accel=kvm,x-option-roms=off,pit=off,pic=off,rtc=off",
            _ => "microvm,accel=kvm",
        };
        let mut command = self.qemu();
        command.args(["-M", machine, "-cpu", "host", "-smp", "1"]);
        command.args(["-nodefaults", "-no-user-config", "-nographic"]);
        command.args(["-no-reboot", "-m", &memory_mib.to_string()]);
        command.arg("-kernel").arg(assets().kernel()).arg("-initrd").arg(assets().initrd());
        command
            .args(["-append", CMDLINE, "-serial"])
            .arg(format!("file:{}", dir.join("console.log").display()));
        command.args(["-device", "virtio-rng-device"]);
        command.args(["-device", &format!("vhost-vsock-device,guest-cid={QEMU_CID}")]);
        let all = std::iter::once((image, true)).chain(extra.iter().map(|p| (*p, false)));
        for (index, (path, read_only)) in all.enumerate() {
            let flag = if read_only { "on" } else { "off" };
            let path = path.display();
            command.args(["-drive", &format!("id=d{index},file={path},format=raw,if=none,readonly={flag}")]);
            command.args(["-device", &format!("virtio-blk-device,drive=d{index}")]);
        }
        command
    }

    /// Debian's QEMU: the host's own, or the peer directory's with its own loader and libraries.
    fn qemu(&self) -> Command {
        let root = &self.peer;
        let own = root.join("usr/bin/qemu-system-x86_64");
        if !own.exists() {
            return Command::new("qemu-system-x86_64");
        }
        let mut command = Command::new(root.join("lib/x86_64-linux-gnu/ld-linux-x86-64.so.2"));
        let libraries =
            ["lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu/pulseaudio"];
        let path: Vec<_> = libraries.iter().map(|l| root.join(l).display().to_string()).collect();
        command.args(["--library-path", &path.join(":")]).arg(own);
        for data in ["usr/share/qemu", "usr/share/seabios"] {
            command.arg("-L").arg(root.join(data));
        }
        command
    }
}

/// Context id of QEMU's guests; one of them runs at a time.
pub(crate) const QEMU_CID: u32 = 42;

/// A listener of the host's own vsock, where QEMU's guests say hello.
pub(crate) fn listen_for_hello() -> std::os::fd::OwnedFd {
    let listener = socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)
        .expect("vsock on this host (module vhost_vsock)");
    bind(listener.as_raw_fd(), &VsockAddr::new(CID_ANY, HELLO_PORT)).expect("the hello port");
    listen(&listener, Backlog::new(4).expect("small")).expect("listen");
    listener
}

/// What `ark-vmm` gives the kernel, word for word.
const CMDLINE: &str = "console=ttyS0 quiet loglevel=4 panic=-1 8250.nr_uarts=1 tsc=reliable no_timer_check max_loop=0 random.trust_cpu=on";

pub(crate) fn wait_readable(fd: std::os::fd::RawFd, dir: &Path) {
    // SAFETY: the caller's listener stays open throughout the call.
    let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) };
    let mut fds = [PollFd::new(fd, PollFlags::POLLIN)];
    let limit = PollTimeout::try_from(BOOT_LIMIT).expect("a minute fits");
    let ready = poll(&mut fds, limit).expect("poll works");
    let console = || std::fs::read_to_string(dir.join("console.log")).unwrap_or_default();
    assert_eq!(ready, 1, "no hello within {BOOT_LIMIT:?}; the console says:\n{}", console());
}

fn read_hello(mut stream: impl Read) {
    let mut decoder = Decoder::new();
    let mut buffer = [0; 4096];
    loop {
        let n = stream.read(&mut buffer).expect("the guest speaks");
        assert!(n > 0, "the guest hung up before its hello");
        decoder.feed(&buffer[..n]);
        if let Some(frame) = decoder.next().expect("a frame") {
            assert_eq!(frame.kind, Kind::Hello);
            return;
        }
    }
}
