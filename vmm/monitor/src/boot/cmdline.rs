//! The kernel's command line.

use ark_types::vmm::{ConfigError, MAX_CMDLINE};

/// What every guest is told, and why.
const BASE: &[&str] = &[
    // Messages reach the serial port, but only errors: each byte there is an exit.
    "console=ttyS0",
    "quiet",
    "loglevel=4",
    // After a panic reset at once; pvpanic has told the VMM by then.
    "panic=-1",
    // Only COM1 exists; probing three more costs exits.
    "8250.nr_uarts=1",
    // The TSC is KVM's: no watchdog against another clock, no check that the timer interrupt arrives.
    "tsc=reliable",
    "no_timer_check",
    // Eight loop devices at boot cost a tenth of it; they are still made on demand.
    "max_loop=0",
    // Seeds the CRNG before the virtio rng driver is up.
    "random.trust_cpu=on",
];

/// The command line with `extra` appended.
///
/// # Errors
/// [`ConfigError::Cmdline`] when the whole is longer than the kernel takes.
pub fn build(extra: &str) -> Result<String, ConfigError> {
    let mut line = BASE.join(" ");
    let extra = extra.trim();
    if !extra.is_empty() {
        line.push(' ');
        line.push_str(extra);
    }
    if line.len() > MAX_CMDLINE {
        return Err(ConfigError::Cmdline);
    }
    Ok(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extra_words_come_last_so_that_they_win() {
        assert!(build(" loglevel=7 ").unwrap().ends_with("random.trust_cpu=on loglevel=7"));
        assert!(build("").unwrap().ends_with("random.trust_cpu=on"));
    }

    #[test]
    fn a_line_the_kernel_would_cut_is_refused() {
        let room = MAX_CMDLINE - build("").unwrap().len() - 1;
        assert_eq!(build(&"x".repeat(room)).unwrap().len(), MAX_CMDLINE);
        assert_eq!(build(&"x".repeat(room + 1)), Err(ConfigError::Cmdline));
    }
}
