//! What the entropy device counts.

/// Counters since the VM started; a device reset keeps them.
#[derive(Debug, Default)]
pub(super) struct Metrics {
    pub(super) requests: u64,
    pub(super) bytes: u64,
    /// Requests answered with nothing: no writable buffer, or one that is not in memory.
    pub(super) failed: u64,
}

impl Metrics {
    pub(super) fn list(&self) -> Vec<(&'static str, u64)> {
        vec![("requests", self.requests), ("bytes", self.bytes), ("failed", self.failed)]
    }
}
