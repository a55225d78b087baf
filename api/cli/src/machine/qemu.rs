//! QEMU's command line: an emulated x86-64 host with SVM and nested paging.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Address arkd has inside the emulated host's user network, and its port there.
const GUEST_API: &str = "10.0.2.15:7070";
/// Kernel command line: messages to the console, and a panic ends the machine (with `-no-reboot`). The self-tests of
/// ciphers that nobody uses are half of the instructions before `/init`. The clock is this host's (see [`tsc_khz`]): one
/// that the emulated kernel measures for itself on a busy host was seen to run a hundred times too fast.
///
/// The kernel does not check that its timer interrupts, by counting ticks in a delay loop: QEMU on a busy host may be too late
/// for that, which is a panic. Seen where four to six machines started at once on two processors, 1 to 4 times in 330 starts.
///
/// It boots on one processor. A kernel patches its own code (static branches and calls) by way of an INT3, and QEMU before
/// 8.1 may translate that INT3 while another processor takes it away again (pages were not locked before translation): the
/// processor then traps for ever. Seen in 2 of 75 starts. So init starts the other processors when everything is done that
/// makes a kernel patch itself. What it would do later is left out: broadcasting interrupts, to which it switches with its
/// last processor, and IPv6, which nothing here uses and whose first packet comes seconds after the start.
const CMDLINE: &str = "console=ttyS0 quiet loglevel=4 panic=-1 cryptomgr.notests no_timer_check tsc=reliable ipv6.disable=1 \
    maxcpus=1 no_ipi_broadcast=1";
/// The first processor never runs guests: the machine's init keeps every program off it, only its kernel uses it.
///
/// In QEMU's emulation whoever restores x87 state (XRSTOR, FXRSTOR: every task switch) on *any* processor also clears IGNNE#
/// of the *first* one, `cpu_clear_ignne()` in target/i386/tcg/sysemu/fpu_helper.c, by reading and writing back `hflags2`
/// without a lock. If the first processor is in VMRUN or #VMEXIT at that moment, `HF2_NPT` in the same word falls back to
/// what it was: the guest runs without nested paging, or its host with it, and the guest is lost to a triple fault or stands
/// still. Seen about once in 120 boots when twenty agents start at once; 7.2 and 10.0 have it.
const HOUSEKEEPING_CPUS: u32 = 1;
/// Name of the program and of Debian's package that has it.
pub(crate) const PROGRAM: &str = "qemu-system-x86_64";
/// Debian's package of [`PROGRAM`].
pub(crate) const PACKAGE: &str = "qemu-system-x86";

/// What a machine is started from.
#[derive(Debug)]
pub(crate) struct Launch {
    /// QEMU.
    pub(crate) program: PathBuf,
    /// Linux with KVM for AMD, Debian's cloud kernel.
    pub(crate) kernel: PathBuf,
    /// Its initramfs, with this start's secrets appended.
    pub(crate) initramfs: PathBuf,
    /// Read-only disk with the programs, the guest kernel and the images.
    pub(crate) assets: PathBuf,
    /// Disk that lasts.
    pub(crate) data: PathBuf,
    /// Another read-only disk.
    pub(crate) attach: Option<PathBuf>,
    /// File the console is written to.
    pub(crate) console: PathBuf,
    /// Unix socket of QEMU's monitor (QMP).
    pub(crate) monitor: PathBuf,
    /// Port on 127.0.0.1 that leads to arkd.
    pub(crate) port: u16,
    /// Memory, MiB.
    pub(crate) memory_mib: u64,
    /// Processors that run agents. QEMU gets one more: see [`HOUSEKEEPING_CPUS`].
    pub(crate) cpus: u32,
    /// Frequency of this host's time-stamp counter, which is the emulated one too; see [`tsc_khz`].
    pub(crate) tsc_khz: u64,
}

impl Launch {
    /// QEMU's arguments.
    pub(crate) fn arguments(&self) -> Vec<OsString> {
        let mut args = Vec::new();
        let mut add = |option: &str, value: OsString| {
            args.push(OsString::from(option));
            args.push(value);
        };
        add("-name", "ark-machine".into());
        // No HPET, SMM and VMware port: the kernel uses none of them and probes them slowly.
        add("-machine", "q35,hpet=off,smm=off,vmport=off".into());
        // `max` is all that software emulation has, SVM and nested paging included.
        add("-accel", "tcg,thread=multi".into());
        // Without ERMS and FSRM the kernels copy and clear memory in words; software emulation does `rep movsb` byte by
        // byte, several times slower.
        add("-cpu", "max,erms=off,fsrm=off".into());
        add("-smp", (HOUSEKEEPING_CPUS + self.cpus).to_string().into());
        add("-m", format!("{}M", self.memory_mib).into());
        add("-display", "none".into());
        add("-rtc", "base=utc".into());
        // A hostile guest that breaks out of everything else finds itself in a process that can start nothing.
        add("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny".into());
        add("-kernel", self.kernel.clone().into());
        add("-initrd", self.initramfs.clone().into());
        add(
            "-append",
            format!("{CMDLINE} tsc_early_khz={} lpj={}", self.tsc_khz, self.loops_per_jiffy()).into(),
        );
        add("-chardev", with_path("file,id=console,path=", &self.console));
        add("-serial", "chardev:console".into());
        add("-chardev", with_path("socket,id=monitor,server=on,wait=off,path=", &self.monitor));
        add("-mon", "chardev=monitor,mode=control".into());
        add("-object", "rng-random,id=rng,filename=/dev/urandom".into());
        add("-device", "virtio-rng-pci,rng=rng".into());
        // restrict=on: nothing in the machine reaches this host or the network; only the forwarded port leads in.
        let network = format!("user,id=net,restrict=on,hostfwd=tcp:127.0.0.1:{}-{GUEST_API}", self.port);
        add("-netdev", network.into());
        // Without its boot ROM, which the firmware would load for nothing.
        add("-device", "virtio-net-pci,netdev=net,romfile=".into());
        let attach = self.attach.iter().map(|path| ("test", path, true));
        for (serial, path, read_only) in
            [("assets", &self.assets, true), ("data", &self.data, false)].into_iter().chain(attach)
        {
            let access = if read_only { "readonly=on" } else { "discard=unmap" };
            add("-drive", with_path(&format!("if=none,id={serial},format=raw,{access},file="), path));
            add("-device", format!("virtio-blk-pci,drive={serial},serial={serial}").into());
        }
        args.extend(["-nodefaults", "-no-user-config", "-no-reboot"].map(OsString::from));
        args
    }

    /// What the kernel would otherwise measure anew, waiting for timer ticks, on each processor that init starts: its delay
    /// loop counts time stamps, Debian's kernels have 250 jiffies a second.
    fn loops_per_jiffy(&self) -> u64 {
        self.tsc_khz * 1000 / 250
    }
}

/// Frequency of this host's time-stamp counter in kHz, measured against the monotonic clock for 50 ms.
pub(crate) fn tsc_khz() -> u64 {
    /// Counter and clock at the same moment, as nearly as can be told: the closest of a few readings.
    fn now() -> (u64, Instant) {
        let read = || {
            let begin = Instant::now();
            // SAFETY: RDTSC is part of x86-64 and has no memory effects.
            let counter = unsafe { std::arch::x86_64::_rdtsc() };
            (begin.elapsed(), counter, begin)
        };
        let (_, counter, at) = (0..8).map(|_| read()).min_by_key(|(width, ..)| *width).unwrap_or_else(read);
        (counter, at)
    }
    let (first, begin) = now();
    std::thread::sleep(Duration::from_millis(50));
    let (second, end) = now();
    let micros = u64::try_from((end - begin).as_micros()).unwrap_or(u64::MAX).max(1);
    second.wrapping_sub(first).saturating_mul(1000) / micros
}

/// A path at the end of an option: QEMU wants commas doubled.
fn with_path(option: &str, path: &Path) -> OsString {
    use std::os::unix::ffi::{OsStrExt, OsStringExt};
    let mut bytes = option.as_bytes().to_vec();
    for &byte in path.as_os_str().as_bytes() {
        bytes.push(byte);
        if byte == b',' {
            bytes.push(byte);
        }
    }
    OsString::from_vec(bytes)
}

/// Finds a program in `PATH`, and in the directories for administrators, which the `PATH` of ordinary users lacks.
pub(crate) fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let system = ["/usr/sbin", "/sbin"].map(PathBuf::from);
    std::env::split_paths(&path).chain(system).map(|dir| dir.join(name)).find(|file| file.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn launch() -> Launch {
        Launch {
            program: "/usr/bin/qemu-system-x86_64".into(),
            kernel: "/a/machine/vmlinuz".into(),
            initramfs: "/s/machine/initramfs.cpio".into(),
            assets: "/a/machine/assets.erofs".into(),
            data: "/s/ma,chine/data.ext4".into(),
            attach: None,
            console: "/s/machine/console.log".into(),
            monitor: "/r/machine.qmp".into(),
            port: 7071,
            memory_mib: 2048,
            cpus: 2,
            tsc_khz: 2_000_000,
        }
    }

    fn text(launch: &Launch) -> String {
        let args: Vec<_> = launch.arguments().into_iter().map(|a| a.into_string().unwrap()).collect();
        format!(" {} ", args.join(" "))
    }

    #[test]
    fn the_machine_is_what_the_contract_says() {
        let line = text(&launch());
        for part in [
            " -accel tcg,thread=multi ",
            " -cpu max,erms=off,fsrm=off ",
            " -smp 3 ",
            " -m 2048M ",
            " -no-reboot ",
            " -nodefaults ",
            " -rtc base=utc ",
            " -append console=ttyS0 quiet loglevel=4 panic=-1 cryptomgr.notests no_timer_check tsc=reliable ipv6.disable=1 maxcpus=1 no_ipi_broadcast=1 tsc_early_khz=2000000 lpj=8000000 ",
            " user,id=net,restrict=on,hostfwd=tcp:127.0.0.1:7071-10.0.2.15:7070 ",
            " if=none,id=assets,format=raw,readonly=on,file=/a/machine/assets.erofs ",
            " virtio-blk-pci,drive=assets,serial=assets ",
            " virtio-blk-pci,drive=data,serial=data ",
        ] {
            assert!(line.contains(part), "{part} in {line}");
        }
        assert!(!line.contains("serial=test"));
    }

    #[test]
    fn a_comma_in_a_path_does_not_end_it() {
        assert!(
            text(&launch())
                .contains(" if=none,id=data,format=raw,discard=unmap,file=/s/ma,,chine/data.ext4 ")
        );
    }

    #[test]
    fn another_disk_comes_last_and_read_only() {
        let line = text(&Launch { attach: Some("/t/test.img".into()), ..launch() });
        let at = |part: &str| line.find(part).unwrap();
        assert!(at("serial=data ") < at("if=none,id=test,format=raw,readonly=on,file=/t/test.img"));
        assert!(line.contains(" virtio-blk-pci,drive=test,serial=test "));
    }

    #[test]
    fn programs_are_found_where_users_do_not_look() {
        assert!(find_program("sh").is_some());
        assert!(find_program("nologin").is_some(), "in /usr/sbin");
        assert_eq!(find_program("surely-no-such-program"), None);
    }
}
