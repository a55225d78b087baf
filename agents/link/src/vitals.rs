//! What a guest says about itself, read from its kernel.

use std::fs;
use std::mem;

use ark_types::guest::{Heartbeat, Hello};
use nix::time::{ClockId, clock_gettime};

/// The hello of this guest. `guestd` is the version of the program that says it.
#[must_use]
pub fn hello(guestd: &str) -> Hello {
    let kernel =
        nix::sys::utsname::uname().map(|u| u.release().to_string_lossy().into_owned()).unwrap_or_default();
    Hello { guestd: guestd.to_owned(), kernel, uptime_ms: uptime_ms(), cpus: cpus() }
}

/// Heartbeat number `sequence`. A figure that cannot be read is 0.
#[must_use]
pub fn heartbeat(sequence: u64) -> Heartbeat {
    let read = |path| fs::read_to_string(path).unwrap_or_default();
    Heartbeat {
        sequence,
        uptime_ms: uptime_ms(),
        mem_available_kib: meminfo_kib(&read("/proc/meminfo"), "MemAvailable").unwrap_or(0),
        load1_x100: load1_x100(&read("/proc/loadavg")).unwrap_or(0),
    }
}

/// Milliseconds since the kernel started, time asleep included.
fn uptime_ms() -> u64 {
    let Ok(now) = clock_gettime(ClockId::CLOCK_BOOTTIME) else { return 0 };
    u64::try_from(now.tv_sec() * 1000 + now.tv_nsec() / 1_000_000).unwrap_or(0)
}

/// Processors this process may run on: all that are online, and told without /proc or /sys, which come later than hello.
fn cpus() -> u32 {
    // SAFETY: cpu_set_t is plain old data, for which all zeros is a valid value.
    let mut set: libc::cpu_set_t = unsafe { mem::zeroed() };
    // SAFETY: `set` is writable and as long as said.
    let done = unsafe { libc::sched_getaffinity(0, size_of_val(&set), &raw mut set) };
    // SAFETY: `set` is a valid cpu_set_t in either case.
    let count = unsafe { libc::CPU_COUNT(&set) };
    if done == 0 { u32::try_from(count).unwrap_or(1) } else { 1 }
}

/// Value of the line `key` in the text of /proc/meminfo, KiB (proc_meminfo(5)).
#[must_use]
pub fn meminfo_kib(text: &str, key: &str) -> Option<u64> {
    let line = text.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix(':'))?;
    line.trim().strip_suffix("kB")?.trim().parse().ok()
}

/// First figure of /proc/loadavg times 100 (proc_loadavg(5) prints it with two decimals).
fn load1_x100(text: &str) -> Option<u32> {
    let (whole, part) = text.split_whitespace().next()?.split_once('.')?;
    let part: u32 = (part.len() == 2).then(|| part.parse().ok())??;
    whole.parse::<u32>().ok()?.checked_mul(100)?.checked_add(part)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn figures_are_found_in_the_kernels_texts() {
        let text = "MemTotal:         121344 kB\nMemFree:           97580 kB\nMemAvailable:     104212 kB\n";
        assert_eq!(meminfo_kib(text, "MemAvailable"), Some(104_212));
        assert_eq!(meminfo_kib(text, "MemTotal"), Some(121_344));
        assert_eq!(meminfo_kib(text, "Mem"), None);
        assert_eq!(load1_x100("12.07 0.00 0.00 1/33 57\n"), Some(1207));
        assert_eq!(load1_x100("12.7 0.00"), None);
    }

    #[test]
    fn this_kernel_gives_every_figure() {
        let hello = hello("1");
        assert!(hello.uptime_ms > 0 && hello.cpus > 0 && !hello.kernel.is_empty());
        assert!(heartbeat(3).mem_available_kib > 0);
    }

    proptest! {
        #[test]
        fn no_text_makes_a_parser_panic(text in ".{0,200}") {
            let _ = (meminfo_kib(&text, "MemTotal"), load1_x100(&text));
        }
    }
}
