//! The device: features, configuration, and its queue.

use std::fs::File;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_S_IOERR,
    VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use vm_memory::Bytes;

use super::disk::{Disk, DiskError, SECTOR};
use super::metrics::Metrics;
use super::request::{
    MAX_DISCARD_RANGES, MAX_ZEROES_RANGES, Operation, Request, SectorRange, scatter, total,
};
use crate::GuestMemory;
use crate::virtio::queue::DeviceQueue;
use crate::virtio::{ActivateError, VirtioDevice, only_queue, read_config_bytes};

/// Device id (section 5.2.1).
const ID: u32 = 2;
const QUEUE_SIZE: u16 = 256;
/// Most buffers of a request: the ring less header and status, as without indirect descriptors nothing more fits.
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// Most bytes of one buffer. Linux makes no larger requests than 1280 KiB by itself.
const SIZE_MAX: u32 = 1 << 20;
/// Logical block size told to the driver, bytes.
const BLOCK_SIZE: u32 = 512;
/// Logical blocks of a physical one, as a power of two: the host's page, below which it reads before it writes.
const PHYSICAL_BLOCK_EXP: u8 = 3;
/// Optimal size of a request, logical blocks: 256 KiB. Linux reads ahead twice as much (128 KiB without), so that a file read
/// from end to end takes a quarter of the requests; starting Python from a cold image caches 15 % more for it.
const OPTIMAL_IO_BLOCKS: u32 = 512;
/// Most sectors of a discarded range: 4 GiB, punched in one call.
const MAX_DISCARD_SECTORS: u32 = 1 << 23;
/// Most sectors of a range of zeroes: 16 MiB, as the host's file system may need them written.
const MAX_ZEROES_SECTORS: u32 = 1 << 15;
/// Most bytes of a request: what [`SEG_MAX`] and [`SIZE_MAX`] allow the driver.
const MAX_REQUEST_BYTES: u64 = SEG_MAX as u64 * SIZE_MAX as u64;
/// Bytes after which other devices, and whoever wants to pause the VM, have their turn: some 10 ms of a warm page cache.
const TURN_BYTES: u64 = 64 << 20;
/// Bytes of the answer to GET_ID (`VIRTIO_BLK_ID_BYTES`).
const ID_BYTES: usize = 20;
/// Bytes of `struct virtio_blk_config` up to and with write zeroes (section 5.2.4).
const CONFIG_BYTES: usize = 60;

/// A block device over a raw file or a host block device.
pub struct Block {
    name: String,
    disk: Disk,
    read_only: bool,
    config: [u8; CONFIG_BYTES],
    metrics: Metrics,
    active: Option<Active>,
}

/// What exists between activation and reset.
struct Active {
    memory: GuestMemory,
    queue: DeviceQueue,
    /// The driver knows no flush: every write goes to stable storage before it is answered (section 5.2.6.2).
    write_through: bool,
}

/// How a request ended: bytes written to the guest's buffers, or the status to answer with.
type Outcome = Result<u64, u32>;

impl Block {
    /// A device called `name` (its first 20 bytes are the guest's serial number of it) over `file`, a raw image. The capacity
    /// is the file's size now, rounded to sectors: up where it is read-only, else down; `file` must be open for writing unless `read_only`.
    ///
    /// # Errors
    /// [`DiskError`]: it is no file or block device, smaller than a sector, or another VM's that does not go with this one.
    pub fn new(name: impl Into<String>, file: File, read_only: bool) -> Result<Self, DiskError> {
        let disk = Disk::new(file, read_only)?;
        let config = config(disk.sectors());
        Ok(Self { name: name.into(), disk, read_only, config, metrics: Metrics::default(), active: None })
    }

    /// Serves what is available. A guest that keeps the ring filled gets no more than a ringful or [`TURN_BYTES`], or one
    /// request that the host's disk has to answer: the rest waits for the next turn of the event loop, after the other
    /// devices'.
    fn serve(&mut self, active: &mut Active) {
        let Active { memory, queue, write_through } = active;
        self.metrics.batches = self.metrics.batches.wrapping_add(1);
        let (mut chains, mut bytes) = (queue.size(), TURN_BYTES);
        loop {
            queue.disable_notification(memory);
            while chains > 0
                && bytes > 0
                && let Some(chain) = queue.pop(memory)
            {
                chains = chains.saturating_sub(1);
                let head = chain.head_index();
                let written = match Request::parse(memory, chain) {
                    Some(request) => {
                        bytes = bytes.saturating_sub(cost(&request, *write_through));
                        self.answer(memory, request, *write_through)
                    }
                    None => {
                        self.metrics.malformed = self.metrics.malformed.wrapping_add(1);
                        0
                    }
                };
                queue.push(memory, head, written);
            }
            queue.notify(memory);
            if chains == 0 || bytes == 0 {
                // Fails only when it is signalled already.
                let _ = queue.kick().write(1);
                return;
            }
            if !queue.enable_notification(memory) {
                return;
            }
        }
    }

    /// Carries a request out, writes its status and returns the bytes written to the chain.
    fn answer(&mut self, memory: &GuestMemory, request: Request<'_>, write_through: bool) -> u32 {
        let outcome = match request.operation {
            Some(operation) => self.execute(operation, write_through),
            None => Err(VIRTIO_BLK_S_IOERR),
        };
        let (written, status) = match outcome {
            Ok(written) => (written, VIRTIO_BLK_S_OK),
            Err(status) => (0, status),
        };
        match status {
            VIRTIO_BLK_S_OK => {}
            VIRTIO_BLK_S_UNSUPP => self.metrics.unsupported = self.metrics.unsupported.wrapping_add(1),
            _ => self.metrics.failed = self.metrics.failed.wrapping_add(1),
        }
        let status = u8::try_from(status).unwrap_or(u8::MAX);
        match memory.write_obj(status, request.status) {
            Ok(()) => u32::try_from(written.saturating_add(1)).unwrap_or(u32::MAX),
            // Not in memory: nobody to tell.
            Err(_) => 0,
        }
    }

    fn execute(&mut self, operation: Operation<'_>, write_through: bool) -> Outcome {
        let metrics = &mut self.metrics;
        match operation {
            Operation::Read { sector, buffers } => {
                let bytes = total(&buffers);
                let range = data_range(&self.disk, sector, bytes)?;
                self.disk.read(range, &buffers).or(Err(VIRTIO_BLK_S_IOERR))?;
                metrics.reads = metrics.reads.wrapping_add(1);
                metrics.read_bytes = metrics.read_bytes.wrapping_add(bytes);
                Ok(bytes)
            }
            Operation::Write { .. } if self.read_only => Err(VIRTIO_BLK_S_IOERR),
            Operation::Write { sector, buffers } => {
                let bytes = total(&buffers);
                let range = data_range(&self.disk, sector, bytes)?;
                self.disk.write(range, &buffers).or(Err(VIRTIO_BLK_S_IOERR))?;
                if write_through {
                    self.disk.flush().or(Err(VIRTIO_BLK_S_IOERR))?;
                }
                metrics.writes = metrics.writes.wrapping_add(1);
                metrics.written_bytes = metrics.written_bytes.wrapping_add(bytes);
                Ok(0)
            }
            // Nothing was ever written through a read-only device.
            Operation::Flush if self.read_only => Ok(0),
            Operation::Flush => {
                self.disk.flush().or(Err(VIRTIO_BLK_S_IOERR))?;
                metrics.flushes = metrics.flushes.wrapping_add(1);
                Ok(0)
            }
            Operation::Discard(_) | Operation::WriteZeroes(_) if self.read_only => Err(VIRTIO_BLK_S_IOERR),
            Operation::Discard(ranges) => {
                for range in ranges {
                    self.discard(range)?;
                }
                self.metrics.discards = self.metrics.discards.wrapping_add(1);
                Ok(0)
            }
            Operation::WriteZeroes(ranges) => {
                for range in ranges {
                    self.write_zeroes(range)?;
                }
                self.metrics.write_zeroes = self.metrics.write_zeroes.wrapping_add(1);
                Ok(0)
            }
            Operation::GetId { buffers } => {
                let mut id = [0; ID_BYTES];
                for (to, from) in id.iter_mut().zip(self.name.bytes()) {
                    *to = from;
                }
                if scatter(&buffers, &id) {
                    Ok(u64::try_from(ID_BYTES).unwrap_or(0))
                } else {
                    Err(VIRTIO_BLK_S_IOERR)
                }
            }
            Operation::Unknown => Err(VIRTIO_BLK_S_UNSUPP),
        }
    }

    fn discard(&self, range: SectorRange) -> Result<(), u32> {
        // Every flag is reserved or only for write zeroes (section 5.2.6.2).
        if range.flags != 0 {
            return Err(VIRTIO_BLK_S_UNSUPP);
        }
        let bytes = self.disk.range(range.sector, range.count.into()).ok_or(VIRTIO_BLK_S_IOERR)?;
        if range.count > MAX_DISCARD_SECTORS {
            return Err(VIRTIO_BLK_S_IOERR);
        }
        match self.disk.discard(&bytes) {
            Ok(()) => Ok(()),
            Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => Err(VIRTIO_BLK_S_UNSUPP),
            Err(_) => Err(VIRTIO_BLK_S_IOERR),
        }
    }

    fn write_zeroes(&self, range: SectorRange) -> Result<(), u32> {
        let may_discard = range.flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0;
        if range.flags & !VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0 {
            return Err(VIRTIO_BLK_S_UNSUPP);
        }
        let bytes = self.disk.range(range.sector, range.count.into()).ok_or(VIRTIO_BLK_S_IOERR)?;
        if range.count > MAX_ZEROES_SECTORS {
            return Err(VIRTIO_BLK_S_IOERR);
        }
        self.disk.write_zeroes(&bytes, may_discard).or(Err(VIRTIO_BLK_S_IOERR))
    }
}

impl VirtioDevice for Block {
    fn id(&self) -> u32 {
        ID
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn features(&self) -> u64 {
        let mut features = bit(VIRTIO_BLK_F_SIZE_MAX)
            | bit(VIRTIO_BLK_F_SEG_MAX)
            | bit(VIRTIO_BLK_F_BLK_SIZE)
            | bit(VIRTIO_BLK_F_TOPOLOGY)
            | bit(VIRTIO_BLK_F_FLUSH);
        if self.read_only {
            features |= bit(VIRTIO_BLK_F_RO);
        } else {
            features |= bit(VIRTIO_BLK_F_DISCARD) | bit(VIRTIO_BLK_F_WRITE_ZEROES);
        }
        features
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.config, offset, data);
    }

    fn activate(
        &mut self,
        memory: GuestMemory,
        queues: Vec<DeviceQueue>,
        driver_features: u64,
    ) -> Result<(), ActivateError> {
        let queue = only_queue(&self.name, queues)?;
        let write_through = driver_features & bit(VIRTIO_BLK_F_FLUSH) == 0;
        self.active = Some(Active { memory, queue, write_through });
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

const fn bit(feature: u32) -> u64 {
    1 << feature
}

/// What of a turn's [`TURN_BYTES`] a request takes: all that is left where the host's disk, not its cache, has to answer.
fn cost(request: &Request<'_>, write_through: bool) -> u64 {
    match &request.operation {
        Some(Operation::Read { buffers, .. }) => total(buffers),
        Some(Operation::Write { buffers, .. }) if !write_through => total(buffers),
        Some(
            Operation::Write { .. } | Operation::Flush | Operation::Discard(_) | Operation::WriteZeroes(_),
        ) => TURN_BYTES,
        Some(Operation::GetId { .. } | Operation::Unknown) | None => 0,
    }
}

/// Where `bytes` of data at `sector` begin on the disk, in bytes: whole sectors, all of them on it.
fn data_range(disk: &Disk, sector: u64, bytes: u64) -> Result<u64, u32> {
    if !bytes.is_multiple_of(SECTOR) || bytes > MAX_REQUEST_BYTES {
        return Err(VIRTIO_BLK_S_IOERR);
    }
    let count = bytes.checked_div(SECTOR).ok_or(VIRTIO_BLK_S_IOERR)?;
    disk.range(sector, count).map(|range| range.start).ok_or(VIRTIO_BLK_S_IOERR)
}

/// `struct virtio_blk_config` of a disk of `capacity` sectors; fields of features that are not offered are zero.
fn config(capacity: u64) -> [u8; CONFIG_BYTES] {
    let mut config = [0; CONFIG_BYTES];
    let mut put = |offset: usize, bytes: &[u8]| {
        for (to, from) in config.iter_mut().skip(offset).zip(bytes) {
            *to = *from;
        }
    };
    put(0, &capacity.to_le_bytes());
    put(8, &SIZE_MAX.to_le_bytes());
    put(12, &SEG_MAX.to_le_bytes());
    put(20, &BLOCK_SIZE.to_le_bytes());
    put(24, &[PHYSICAL_BLOCK_EXP]);
    put(26, &(1_u16 << PHYSICAL_BLOCK_EXP).to_le_bytes());
    put(28, &OPTIMAL_IO_BLOCKS.to_le_bytes());
    put(36, &MAX_DISCARD_SECTORS.to_le_bytes());
    put(40, &u32::from(MAX_DISCARD_RANGES).to_le_bytes());
    // Alignment of discards, in sectors: what the host's file system can free is in pages.
    put(44, &(1_u32 << PHYSICAL_BLOCK_EXP).to_le_bytes());
    put(48, &MAX_ZEROES_SECTORS.to_le_bytes());
    put(52, &u32::from(MAX_ZEROES_RANGES).to_le_bytes());
    // Write zeroes may give the space back.
    put(56, &[1]);
    config
}
