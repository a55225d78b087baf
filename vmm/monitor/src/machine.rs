//! The machine: memory, devices and vCPUs put together from a configuration.
//!
//! Dropping a [`Machine`] ends the vCPUs, then the devices.

use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;

use ark_devices::bus::{Bus, BusDevice, BusError};
use ark_devices::event_loop::{EventLoop, LoopHandle};
use ark_devices::virtio::VirtioDevice;
use ark_devices::virtio::mmio::{MmioTransport, QUEUE_NOTIFY};
use ark_devices::{GuestMemory, Interrupt, IrqLine};
use ark_hal::memory::{HugePages, MemoryError};
use ark_hal::{HalError, Hypervisor, IoEventAddress, Vm};
use ark_types::vmm::{DeviceMetrics, VmConfig};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::boot::{BootError, Payload};
use crate::mailbox::Mailbox;
use crate::power::{self, PanicPort, PowerRegisters};
use crate::vcpus::{Buses, StillRunning, Vcpus};
use crate::{acpi, map};

/// A machine that could not be put together.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// Kernel, initrd or command line.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// A disk's file cannot be used.
    #[error("the disk {path} cannot be opened: {source}; check the path and its permissions")]
    Disk {
        /// Its path.
        path: PathBuf,
        /// Why.
        source: io::Error,
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
    #[error("the vsock socket {path} cannot be made: {source}")]
    Vsock {
        /// Its path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
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

/// A VM with its devices and parked vCPUs.
pub struct Machine {
    memory: GuestMemory,
    vcpus: Option<Vcpus>,
    devices: Devices,
}

struct Devices {
    transports: Vec<Arc<MmioTransport>>,
    handle: LoopHandle,
    thread: Option<JoinHandle<io::Result<()>>>,
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
    let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(MachineError::host("make an interrupt line"))?;
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
    /// [`StillRunning`]: a vCPU does not come back.
    pub fn park(&self) -> Result<(), StillRunning> {
        self.vcpus.iter().try_for_each(Vcpus::park)?;
        self.devices.handle.pause();
        Ok(())
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
            let device = transport.device().lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            metrics(device.name(), device.counters().into_iter().chain(transport.counters()).collect())
        });
        let buses = &self.devices.buses;
        let buses = [metrics("ports", buses.ports.counters()), metrics("mmio", buses.mmio.counters())];
        virtio.chain(buses).collect()
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
    let _ = config;
    Ok(devices)
}

impl Devices {
    fn start(
        config: &VmConfig,
        virtio: Vec<Box<dyn VirtioDevice>>,
        memory: &GuestMemory,
        vm: &dyn Vm,
        mailbox: &Mailbox,
    ) -> Result<Self, MachineError> {
        let ports = ports(config, vm, mailbox)?;
        let mut mmio = Bus::new();
        let mut transports = Vec::with_capacity(virtio.len());
        let mut event_loop = EventLoop::new().map_err(MachineError::host("make the devices' event loop"))?;
        for ((index, gsi), device) in (0..).zip(map::VIRTIO_GSIS).zip(virtio) {
            let transport =
                MmioTransport::new(Arc::new(std::sync::Mutex::new(device)), memory.clone(), line(vm, gsi)?)
                    .map_err(MachineError::host("make a device's notifications"))?;
            let window = map::virtio_window(index);
            for (queue, kick) in (0..).zip(transport.kicks()) {
                vm.register_ioeventfd(kick, IoEventAddress::Mmio(window + QUEUE_NOTIFY), Some(queue))?;
            }
            event_loop.add_device(&transport).map_err(MachineError::host("wait for a device"))?;
            let transport = Arc::new(transport);
            mmio.insert(window, map::VIRTIO_LEN, Arc::<MmioTransport>::clone(&transport))?;
            transports.push(transport);
        }
        let handle = event_loop.handle();
        let thread = event_loop.spawn().map_err(MachineError::host("start the devices' thread"))?;
        Ok(Self { transports, handle, thread: Some(thread), buses: Arc::new(Buses { ports, mmio }) })
    }
}

impl Drop for Devices {
    fn drop(&mut self) {
        self.handle.stop();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The port bus: COM1, power registers, panic port.
fn ports(config: &VmConfig, vm: &dyn Vm, mailbox: &Mailbox) -> Result<Bus, MachineError> {
    let console = match &config.console {
        Some(path) => {
            let open = File::options().create(true).append(true).open(path);
            Some(open.map_err(|source| MachineError::Console { path: path.clone(), source })?)
        }
        None => None,
    };
    let mut bus = Bus::new();
    let _ = line(vm, map::COM1_GSI)?;
    struct Temp(Option<File>);
    impl BusDevice for Temp {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(if offset == 5 { 0x60 } else { 0 });
        }
        fn write(&self, offset: u64, data: &[u8]) {
            use std::io::Write;
            if offset == 0 {
                let _ = self.0.as_ref().map(|mut f| f.write_all(data));
            }
        }
    }
    let serial: Arc<dyn BusDevice> = Arc::new(Temp(console));
    bus.insert(map::COM1.into(), map::COM1_LEN.into(), serial)?;
    bus.insert(map::SLEEP_CONTROL.into(), power::REGISTERS, Arc::new(PowerRegisters::new(mailbox.clone())))?;
    bus.insert(map::PVPANIC.into(), 1, Arc::new(PanicPort::new(mailbox.clone())))?;
    Ok(bus)
}
