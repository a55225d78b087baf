//! The entropy device (Virtual I/O Device Version 1.2, section 5.4): the host's random bytes for the guest's.

mod device;
mod metrics;
#[cfg(test)]
mod tests;

pub use self::device::Rng;
