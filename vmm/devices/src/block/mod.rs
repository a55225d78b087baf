//! The block device (Virtual I/O Device Version 1.2, section 5.2): a raw file or host block device as `/dev/vdX`.
//!
//! One queue of 256 entries, served synchronously on the devices thread: a read from the host's page cache straight into
//! guest memory takes less time than handing it to another thread. A kick serves all that is available, with notifications
//! suppressed meanwhile and one interrupt for all of it.

mod device;
mod disk;
mod metrics;
mod request;
#[cfg(test)]
mod tests;

pub use self::device::Block;
pub use self::disk::DiskError;
