//! The device and its one queue. Requests are chains of writable buffers without a header, so there is no `request` file.

use std::io;

use vm_memory::{Bytes, GuestMemoryBackend};

use super::metrics::Metrics;
use crate::GuestMemory;
use crate::virtio::queue::{Chain, DeviceQueue};
use crate::virtio::{ActivateError, VirtioDevice, only_queue};

/// Device id (section 5.4.1).
const ID: u32 = 4;
const NAME: &str = "rng";
const QUEUE_SIZE: u16 = 64;
/// Most bytes given for one request: the device may use less of a buffer than there is. Linux asks for 64 bytes at a time,
/// a hostile guest for 4 GiB.
const MAX_BYTES: usize = 4096;

/// An entropy device.
#[derive(Default)]
pub struct Rng {
    metrics: Metrics,
    active: Option<Active>,
}

/// What exists between activation and reset.
struct Active {
    memory: GuestMemory,
    queue: DeviceQueue,
}

impl Rng {
    /// A device without a driver yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Serves what is available, at most a ringful per turn of the event loop.
    fn serve(&mut self, active: &mut Active) {
        let Active { memory, queue } = active;
        let mut budget = queue.size();
        loop {
            queue.disable_notification(memory);
            while budget > 0
                && let Some(chain) = queue.pop(memory)
            {
                budget = budget.saturating_sub(1);
                let head = chain.head_index();
                let written = self.fill(memory, chain);
                queue.push(memory, head, written);
            }
            queue.notify(memory);
            if budget == 0 {
                // Fails only when it is signalled already.
                let _ = queue.kick().write(1);
                return;
            }
            if !queue.enable_notification(memory) {
                return;
            }
        }
    }

    /// Fills the chain's writable buffers up to [`MAX_BYTES`] and returns the bytes written.
    fn fill(&mut self, memory: &GuestMemory, chain: Chain<'_>) -> u32 {
        let mut random = [0; MAX_BYTES];
        let mut written = 0_usize;
        for descriptor in chain.writable() {
            let Some(rest) = random.get_mut(written..).filter(|rest| !rest.is_empty()) else { break };
            let len = usize::try_from(descriptor.len()).unwrap_or(usize::MAX).min(rest.len());
            let in_memory = GuestMemoryBackend::check_range(memory, descriptor.addr(), len);
            let Some(bytes) = rest.get_mut(..len).filter(|_| in_memory) else { break };
            if get_random(bytes).is_err() || memory.write_slice(bytes, descriptor.addr()).is_err() {
                break;
            }
            written = written.saturating_add(len);
        }
        self.metrics.requests = self.metrics.requests.wrapping_add(1);
        if written == 0 {
            self.metrics.failed = self.metrics.failed.wrapping_add(1);
        }
        self.metrics.bytes = self.metrics.bytes.wrapping_add(u64::try_from(written).unwrap_or(0));
        u32::try_from(written).unwrap_or(0)
    }
}

/// Fills `bytes` from the host's generator.
fn get_random(bytes: &mut [u8]) -> io::Result<()> {
    let mut done = 0_usize;
    while let Some(rest) = bytes.get_mut(done..).filter(|rest| !rest.is_empty()) {
        // SAFETY: `rest` is writable for its length; the kernel writes no more than that.
        let got = unsafe { libc::getrandom(rest.as_mut_ptr().cast(), rest.len(), 0) };
        match usize::try_from(got) {
            Ok(got) => done = done.saturating_add(got),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
    Ok(())
}

impl VirtioDevice for Rng {
    fn id(&self) -> u32 {
        ID
    }

    fn name(&self) -> &str {
        NAME
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn activate(
        &mut self,
        memory: GuestMemory,
        queues: Vec<DeviceQueue>,
        _driver_features: u64,
    ) -> Result<(), ActivateError> {
        let queue = only_queue(NAME, queues)?;
        self.active = Some(Active { memory, queue });
        Ok(())
    }

    fn queue_notified(&mut self, _index: u16) {
        if let Some(mut active) = self.active.take() {
            self.serve(&mut active);
            self.active = Some(active);
        }
    }

    fn reset(&mut self) {
        self.active = None;
    }

    fn queues(&self) -> Vec<&DeviceQueue> {
        self.active.iter().map(|active| &active.queue).collect()
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        self.metrics.list()
    }
}
