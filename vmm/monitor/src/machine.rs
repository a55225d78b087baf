//! The machine: memory, devices and vCPUs put together from a configuration.
//!
//! Dropping a [`Machine`] ends the vCPUs, then the devices.

use std::fs::File;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use ark_devices::block::{Block, DiskError};
use ark_devices::bus::{Bus, BusError};
use ark_devices::event_loop::{EventLoop, LoopHandle, StillBusy};
use ark_devices::power::{PowerControl, PowerEvent, PowerSink, Pvpanic};
use ark_devices::rng::Rng;
use ark_devices::serial::{self, Serial};
use ark_devices::virtio::VirtioDevice;
use ark_devices::virtio::mmio::{MmioTransport, QUEUE_NOTIFY};
use ark_devices::vsock::{Vsock, VsockError};
use ark_devices::{GuestMemory, Interrupt, IrqLine};
use ark_hal::memory::{HugePages, MemoryError};
use ark_hal::{HalError, Hypervisor, Vm};
use ark_types::vmm::{DeviceMetrics, DiskConfig, VmConfig};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::boot::{BootError, Payload};
use crate::mailbox::{Mailbox, News};
use crate::vcpus::{Buses, PARK_LIMIT, StillRunning, Vcpus};
use crate::{acpi, map};

/// A machine that could not be put together.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// Kernel, initrd or command line.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// A disk's file cannot be opened.
    #[error("the disk {path} cannot be opened: {source}; check the path and its permissions")]
    OpenDisk {
        /// Its path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A disk's file is not one.
    #[error("the disk {path} cannot be used: {source}")]
    Disk {
        /// Its path.
        path: PathBuf,
        /// Why.
        source: DiskError,
    },
    /// The console's file cannot be used.
    #[error("the console log {path} cannot be opened: {source}; its directory must exist and be writable")]
    Console {
        /// Its path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The socket device cannot listen.
    #[error(transparent)]
    Vsock(#[from] VsockError),
    /// No guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The hypervisor refused.
    #[error(transparent)]
    Hypervisor(#[from] HalError),
    /// Descriptors or threads ran out.
    #[error("{what}: {source}; raise the limits on open files and processes")]
    Host {
        /// What was tried.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// Two devices at one address.
    #[error("the devices do not fit together: {0}; this is a defect")]
    Bus(#[from] BusError),
    /// Too many tables.
    #[error(transparent)]
    Acpi(#[from] acpi::TooLarge),
}

impl MachineError {
    fn host(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Host { what, source }
    }
}

/// A machine that does not stand still.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParkError {
    /// A vCPU does not come back.
    #[error(transparent)]
    Vcpus(#[from] StillRunning),
    /// A device does not come back.
    #[error(transparent)]
    Devices(#[from] StillBusy),
}

/// A VM with its devices and parked vCPUs.
pub struct Machine {
    memory: GuestMemory,
    vcpus: Option<Vcpus>,
    devices: Devices,
}

struct Devices {
    transports: Vec<Arc<MmioTransport>>,
    serial: Arc<Serial>,
    handle: LoopHandle,
    thread: Option<JoinHandle<()>>,
    buses: Arc<Buses>,
}

/// An interrupt line whose eventfd KVM turns into an interrupt.
struct Irqfd(EventFd);

impl Interrupt for Irqfd {
    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

fn line(vm: &dyn Vm, gsi: u32) -> Result<IrqLine, MachineError> {
    let event =
        EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(MachineError::host("make an interrupt line"))?;
    vm.register_irqfd(&event, gsi)?;
    Ok(Arc::new(Irqfd(event)))
}

impl Machine {
    /// Puts together what `config` describes, with `payload` in memory and every vCPU parked before its first
    /// instruction. What happens later is told to `mailbox`.
    ///
    /// # Errors
    /// [`MachineError`] names the part and the reason; nothing stays behind.
    pub fn build(
        config: &VmConfig,
        payload: Payload,
        hypervisor: &dyn Hypervisor,
        mailbox: &Mailbox,
    ) -> Result<Self, MachineError> {
        let bytes = config.memory_mib << 20;
        let virtio = virtio_devices(config)?;
        let memory = ark_hal::memory::create(bytes, HugePages::WhenPossible)?;
        let vm = hypervisor.create_vm(memory.clone())?;
        let count = u8::try_from(config.vcpus).unwrap_or(u8::MAX);
        let windows = u32::try_from(virtio.len()).unwrap_or(u32::MAX);
        let tables = acpi::tables(count, windows)?;
        memory.write_slice(&tables, GuestAddress(map::ACPI)).map_err(BootError::from)?;
        let entry = payload.load(&memory, bytes, map::ACPI)?;

        let devices = Devices::start(config, virtio, &memory, &*vm, mailbox)?;
        let vcpus = (0..count).map(|index| vm.create_vcpu(index, count, entry)).collect::<Result<_, _>>()?;
        let vcpus = Vcpus::spawn(vcpus, Arc::clone(&devices.buses), mailbox.clone())
            .map_err(MachineError::host("start the vCPUs' threads"))?;
        Ok(Self { memory, vcpus: Some(vcpus), devices })
    }

    /// Lets devices and vCPUs run.
    pub fn run(&self) {
        self.devices.handle.resume();
        self.vcpus.iter().for_each(Vcpus::run);
    }

    /// Returns when no vCPU and no device runs any more.
    ///
    /// # Errors
    /// [`ParkError`]: one of them does not come back.
    pub fn park(&self) -> Result<(), ParkError> {
        self.vcpus.iter().try_for_each(Vcpus::park)?;
        Ok(self.devices.handle.pause(PARK_LIMIT)?)
    }

    /// Exits handled in user space so far.
    #[must_use]
    pub fn exits(&self) -> u64 {
        self.vcpus.as_ref().map_or(0, Vcpus::exits)
    }

    /// Bytes of guest memory that the host has given.
    #[must_use]
    pub fn resident_bytes(&self) -> u64 {
        ark_hal::memory::resident_bytes(&self.memory).unwrap_or(0)
    }

    /// Counters of the virtio devices, their transports and the buses.
    #[must_use]
    pub fn device_metrics(&self) -> Vec<DeviceMetrics> {
        let metrics = |name: &str, counters: Vec<(&'static str, u64)>| DeviceMetrics {
            name: name.to_owned(),
            counters: counters.into_iter().map(|(name, value)| (name.to_owned(), value)).collect(),
        };
        let virtio = self.devices.transports.iter().map(|transport| {
            let device = transport.device().lock().unwrap_or_else(PoisonError::into_inner);
            metrics(device.name(), device.counters().into_iter().chain(transport.counters()).collect())
        });
        let buses = &self.devices.buses;
        let buses = [metrics("ports", buses.ports.counters()), metrics("mmio", buses.mmio.counters())];
        let serial = metrics("serial", self.devices.serial.counters());
        virtio.chain([serial]).chain(buses).collect()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // The guest first: nobody notifies devices that are going.
        self.vcpus = None;
    }
}

/// The virtio devices in the order of their windows and lines: disks, socket, random numbers.
fn virtio_devices(config: &VmConfig) -> Result<Vec<Box<dyn VirtioDevice>>, MachineError> {
    let mut devices: Vec<Box<dyn VirtioDevice>> = Vec::new();
    for (index, disk) in config.disks.iter().enumerate() {
        devices.push(Box::new(open_disk(index, disk)?));
    }
    if let Some(config) = &config.vsock {
        let vsock = Vsock::new(config.guest_cid, &config.uds_path)?;
        devices.push(Box::new(vsock));
    }
    devices.push(Box::new(Rng::new()));
    Ok(devices)
}

fn open_disk(index: usize, disk: &DiskConfig) -> Result<Block, MachineError> {
    let name = format!("block{index}");
    let open = File::options()
        .read(true)
        .write(!disk.read_only)
        // A FIFO would have us wait for its other end.
        .custom_flags(libc::O_NONBLOCK)
        .open(&disk.path);
    let file = open.map_err(|source| MachineError::OpenDisk { path: disk.path.clone(), source })?;
    Block::new(name, file, disk.read_only)
        .map_err(|source| MachineError::Disk { path: disk.path.clone(), source })
}

impl Devices {
    fn start(
        config: &VmConfig,
        virtio: Vec<Box<dyn VirtioDevice>>,
        memory: &GuestMemory,
        vm: &dyn Vm,
        mailbox: &Mailbox,
    ) -> Result<Self, MachineError> {
        let console = config.console.as_deref().map(open_console).transpose()?;
        let serial = Arc::new(Serial::new(line(vm, map::COM1_GSI)?, console));
        let ports = ports(&serial, mailbox)?;
        let mut mmio = Bus::new();
        let mut transports = Vec::with_capacity(virtio.len());
        let mut event_loop = EventLoop::new().map_err(MachineError::host("make the devices' event loop"))?;
        for ((index, gsi), device) in (0..).zip(map::VIRTIO_GSIS).zip(virtio) {
            let transport = MmioTransport::new(Arc::new(Mutex::new(device)), memory.clone(), line(vm, gsi)?)
                .map_err(MachineError::host("make a device's notifications"))?;
            let window = map::virtio_window(index);
            for (queue, kick) in (0..).zip(transport.kicks()) {
                vm.register_ioeventfd(kick, window + QUEUE_NOTIFY, queue)?;
            }
            event_loop.add_device(&transport).map_err(MachineError::host("wait for a device"))?;
            let transport = Arc::new(transport);
            mmio.insert(window, map::VIRTIO_LEN, Arc::<MmioTransport>::clone(&transport))?;
            transports.push(transport);
        }
        let handle = event_loop.handle();
        let owner = mailbox.clone();
        let failed =
            move |error| owner.send(News::Failed(format!("the devices cannot wait for events: {error}")));
        let thread = event_loop.spawn(failed).map_err(MachineError::host("start the devices' thread"))?;
        Ok(Self { transports, serial, handle, thread: Some(thread), buses: Arc::new(Buses { ports, mmio }) })
    }
}

impl Drop for Devices {
    fn drop(&mut self) {
        // A thread that hangs in the kernel is left to the end of the process.
        if self.handle.stop(PARK_LIMIT).is_ok()
            && let Some(thread) = self.thread.take()
        {
            let _ = thread.join();
        }
    }
}

/// The port bus: COM1, power registers, panic port.
fn ports(serial: &Arc<Serial>, mailbox: &Mailbox) -> Result<Bus, BusError> {
    let mut bus = Bus::new();
    let sink = power_sink(mailbox.clone());
    bus.insert(map::COM1.into(), serial::WINDOW, Arc::<Serial>::clone(serial))?;
    bus.insert(map::POWER.into(), PowerControl::WINDOW, Arc::new(PowerControl::new(Arc::clone(&sink))))?;
    bus.insert(map::PVPANIC.into(), Pvpanic::WINDOW, Arc::new(Pvpanic::new(sink)))?;
    Ok(bus)
}

/// Tells `mailbox` how the guest ends.
fn power_sink(mailbox: Mailbox) -> PowerSink {
    Arc::new(move |event| {
        mailbox.send(match event {
            PowerEvent::PowerOff => News::GuestPowerOff,
            PowerEvent::Reboot => News::GuestReset,
            PowerEvent::Panicked => News::GuestPanic,
            // Its crash kernel will say how it ends.
            PowerEvent::CrashLoaded => return,
        });
    })
}

fn open_console(path: &Path) -> Result<File, MachineError> {
    let open = File::options().create(true).read(true).append(true).open(path);
    open.map_err(|source| MachineError::Console { path: path.to_owned(), source })
}
