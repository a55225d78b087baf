//! What a process takes of the host.

use nix::unistd::{SysconfVar, sysconf};

/// Processor time of a process so far, seconds.
///
/// # Panics
/// When there is no such process.
#[must_use]
pub fn processor_s(pid: i32) -> f64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("its statistics");
    // Behind the name, which may hold anything: utime and stime are the fields 14 and 15 of proc_pid_stat(5).
    let fields: Vec<&str> = text.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let ticks: u32 = [11, 12].map(|at| fields[at].parse::<u32>().expect("ticks")).iter().sum();
    let per_second = sysconf(SysconfVar::CLK_TCK).ok().flatten().and_then(|hz| u32::try_from(hz).ok());
    f64::from(ticks) / f64::from(per_second.expect("a clock"))
}

/// What `/proc/PID/smaps_rollup` gives under `field`, MiB.
fn rollup_mib(pid: i32, field: &str) -> f64 {
    let text =
        std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).expect("smaps_rollup is readable");
    let line = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':')).expect("a size");
    line.trim().trim_end_matches(" kB").trim().parse::<f64>().expect("KiB") / 1024.0
}

/// Memory that a process alone has and that cannot be read again from a file, MiB.
///
/// # Panics
/// When there is no such process.
#[must_use]
pub fn private_mib(pid: i32) -> f64 {
    rollup_mib(pid, "Private_Dirty")
}

/// Proportional set size of a process, MiB.
///
/// # Panics
/// When there is no such process.
#[must_use]
pub fn pss_mib(pid: i32) -> f64 {
    rollup_mib(pid, "Pss")
}
