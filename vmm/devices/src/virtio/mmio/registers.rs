//! Register offsets, status bits and feature bits (Virtual I/O Device Version 1.2, sections 2.1, 4.2.2 and 6).

/// Bytes of a device's window: registers, then from 0x100 on its configuration.
pub const WINDOW: u64 = 0x1000;
/// Value of `MagicValue`: "virt", little-endian.
pub const MAGIC: u32 = 0x7472_6976;
/// Value of `Version`: the layout of virtio 1.x.
pub const VERSION: u32 = 2;
/// Value of `VendorID`: "NARK", little-endian. The specification leaves it open.
pub const VENDOR: u32 = 0x4b52_414e;

pub(super) const MAGIC_VALUE: u64 = 0x000;
pub(super) const VERSION_REGISTER: u64 = 0x004;
pub(super) const DEVICE_ID: u64 = 0x008;
pub(super) const VENDOR_ID: u64 = 0x00c;
pub(super) const DEVICE_FEATURES: u64 = 0x010;
pub(super) const DEVICE_FEATURES_SEL: u64 = 0x014;
pub(super) const DRIVER_FEATURES: u64 = 0x020;
pub(super) const DRIVER_FEATURES_SEL: u64 = 0x024;
pub(super) const QUEUE_SEL: u64 = 0x030;
pub(super) const QUEUE_NUM_MAX: u64 = 0x034;
pub(super) const QUEUE_NUM: u64 = 0x038;
pub(super) const QUEUE_READY: u64 = 0x044;
/// `QueueNotify`: where, from the window's start, an ioeventfd listens for the number of a queue (32 bits).
pub const QUEUE_NOTIFY: u64 = 0x050;
pub(super) const INTERRUPT_STATUS: u64 = 0x060;
pub(super) const INTERRUPT_ACK: u64 = 0x064;
pub(super) const STATUS: u64 = 0x070;
pub(super) const QUEUE_DESC_LOW: u64 = 0x080;
pub(super) const QUEUE_DESC_HIGH: u64 = 0x084;
pub(super) const QUEUE_DRIVER_LOW: u64 = 0x090;
pub(super) const QUEUE_DRIVER_HIGH: u64 = 0x094;
pub(super) const QUEUE_DEVICE_LOW: u64 = 0x0a0;
pub(super) const QUEUE_DEVICE_HIGH: u64 = 0x0a4;
/// `SHMLenLow` to `SHMBaseHigh`: all-ones, as there is no shared memory region.
pub(super) const SHM_LEN_LOW: u64 = 0x0b0;
pub(super) const SHM_BASE_HIGH: u64 = 0x0bc;
pub(super) const CONFIG_GENERATION: u64 = 0x0fc;
pub(super) const CONFIG: u64 = 0x100;

pub(super) const STATUS_ACKNOWLEDGE: u32 = 1;
pub(super) const STATUS_DRIVER: u32 = 2;
pub(super) const STATUS_DRIVER_OK: u32 = 4;
pub(super) const STATUS_FEATURES_OK: u32 = 8;
pub(super) const STATUS_NEEDS_RESET: u32 = 0x40;
pub(super) const STATUS_FAILED: u32 = 0x80;

/// VIRTIO_F_INDIRECT_DESC.
pub const FEATURE_INDIRECT_DESC: u64 = 1 << 28;
/// VIRTIO_F_EVENT_IDX.
pub const FEATURE_EVENT_IDX: u64 = 1 << 29;
/// VIRTIO_F_VERSION_1: without it the driver is refused.
pub const FEATURE_VERSION_1: u64 = 1 << 32;
/// What the transport offers for every device.
pub const TRANSPORT_FEATURES: u64 = FEATURE_VERSION_1 | FEATURE_INDIRECT_DESC | FEATURE_EVENT_IDX;
