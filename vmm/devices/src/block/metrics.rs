//! What the block device counts.

/// Counters since the VM started; a device reset keeps them.
#[derive(Debug, Default)]
pub(super) struct Metrics {
    pub(super) reads: u64,
    pub(super) read_bytes: u64,
    pub(super) writes: u64,
    pub(super) written_bytes: u64,
    pub(super) flushes: u64,
    pub(super) discards: u64,
    pub(super) write_zeroes: u64,
    /// Requests answered IOERR.
    pub(super) failed: u64,
    /// Requests answered UNSUPP.
    pub(super) unsupported: u64,
    /// Chains without a place for a status: given back unanswered.
    pub(super) malformed: u64,
    /// Times the queue was looked at.
    pub(super) batches: u64,
}

impl Metrics {
    pub(super) fn list(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("reads", self.reads),
            ("read_bytes", self.read_bytes),
            ("writes", self.writes),
            ("written_bytes", self.written_bytes),
            ("flushes", self.flushes),
            ("discards", self.discards),
            ("write_zeroes", self.write_zeroes),
            ("failed", self.failed),
            ("unsupported", self.unsupported),
            ("malformed", self.malformed),
            ("batches", self.batches),
        ]
    }
}
