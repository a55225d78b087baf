//! The devices of a machine, their buses and the thread they run on.

use std::fs::File;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use ark_devices::GuestMemory;
use ark_devices::block::Block;
use ark_devices::bus::{Bus, BusError};
use ark_devices::event_loop::{EventLoop, LoopHandle, StillBusy};
use ark_devices::power::{PowerControl, PowerEvent, PowerSink, Pvpanic};
use ark_devices::rng::Rng;
use ark_devices::serial::{self, Serial, SerialState};
use ark_devices::virtio::VirtioDevice;
use ark_devices::virtio::mmio::{MmioTransport, TransportState};
use ark_devices::vsock::Vsock;
use ark_types::vmm::{DeviceMetrics, DiskConfig, VsockConfig};

use super::wiring::Wiring;
use super::{MachineError, SaveError};
use crate::mailbox::{Mailbox, News};
use crate::map;
use crate::vcpus::{Buses, PARK_LIMIT};

/// What the devices of a machine are made of.
pub(super) struct Parts<'a> {
    /// In the order of their windows and lines.
    pub(super) virtio: Vec<Box<dyn VirtioDevice>>,
    pub(super) memory: &'a GuestMemory,
    /// With a window for each of them.
    pub(super) wiring: Wiring,
    /// File of the serial console.
    pub(super) console: Option<&'a Path>,
    /// The serial port as it was saved.
    pub(super) serial: Option<&'a SerialState>,
}

/// All devices. Dropping it ends their thread.
pub(super) struct Devices {
    transports: Vec<Arc<MmioTransport>>,
    serial: Arc<Serial>,
    /// Until it is started.
    event_loop: Option<EventLoop>,
    handle: LoopHandle,
    thread: Option<JoinHandle<()>>,
    mailbox: Mailbox,
    buses: Arc<Buses>,
}

impl Devices {
    /// Connects the devices to their lines, doorbells and buses; none runs before [`Self::start`].
    pub(super) fn connect(parts: Parts<'_>, mailbox: &Mailbox) -> Result<Self, MachineError> {
        let Wiring { com1, windows, .. } = parts.wiring;
        let console = parts.console.map(open_console).transpose()?;
        let serial = Arc::new(match parts.serial {
            Some(state) => Serial::restore(state, com1, console)?,
            None => Serial::new(com1, console),
        });
        let ports = ports(&serial, mailbox)?;
        let mut mmio = Bus::new();
        let mut transports = Vec::with_capacity(parts.virtio.len());
        let mut event_loop = EventLoop::new().map_err(MachineError::host("make the devices' event loop"))?;
        for ((index, wires), device) in (0..).zip(windows).zip(parts.virtio) {
            let device = Arc::new(Mutex::new(device));
            let transport = MmioTransport::new(device, parts.memory.clone(), wires.line, wires.doorbells)
                .map_err(MachineError::host("make a device's notifications"))?;
            let window = map::virtio_window(index);
            event_loop.add_device(&transport).map_err(MachineError::host("wait for a device"))?;
            let transport = Arc::new(transport);
            mmio.insert(window, map::VIRTIO_LEN, Arc::<MmioTransport>::clone(&transport))?;
            transports.push(transport);
        }
        let handle = event_loop.handle();
        let (buses, mailbox) = (Arc::new(Buses { ports, mmio }), mailbox.clone());
        Ok(Self { transports, serial, event_loop: Some(event_loop), handle, thread: None, mailbox, buses })
    }

    /// Starts their thread unless it was started; the mailbox is told when that fails, now or later.
    pub(super) fn start(&mut self) {
        let Some(event_loop) = self.event_loop.take() else { return };
        let owner = self.mailbox.clone();
        let failed =
            move |error| owner.send(News::Failed(format!("the devices cannot wait for events: {error}")));
        match event_loop.spawn(failed) {
            Ok(thread) => self.thread = Some(thread),
            Err(error) => {
                self.mailbox.send(News::Failed(format!("the devices' thread cannot be started: {error}")));
            }
        }
    }

    /// What vCPUs reach them by.
    pub(super) fn buses(&self) -> &Arc<Buses> {
        &self.buses
    }

    /// Returns when none runs any more.
    pub(super) fn pause(&self) -> Result<(), StillBusy> {
        if self.thread.is_some() { self.handle.pause(PARK_LIMIT) } else { Ok(()) }
    }

    /// Lets them run again.
    pub(super) fn resume(&self) {
        self.handle.resume();
    }

    /// The virtio devices' states, in order, and the serial port's. They have to be paused.
    pub(super) fn save(&self) -> Result<(Vec<TransportState>, SerialState), SaveError> {
        let transports = self.transports.iter().map(|transport| transport.save());
        Ok((transports.collect::<Result<_, _>>()?, self.serial.save()))
    }

    /// Brings the virtio devices, which have not been started, into `states`. Memory has to be restored before.
    pub(super) fn restore(&self, states: &[TransportState]) -> Result<(), MachineError> {
        if states.len() != self.transports.len() {
            let (has, made) = (states.len(), self.transports.len());
            return Err(MachineError::State(format!("it has {has} devices and its manifest names {made}")));
        }
        for (transport, state) in self.transports.iter().zip(states) {
            transport.restore(state)?;
        }
        Ok(())
    }

    /// The machine was restored and is about to run.
    pub(super) fn wake(&self) {
        self.transports.iter().for_each(|transport| transport.wake());
        self.serial.wake();
    }

    /// Sectors of 512 bytes of the first `disks` virtio devices.
    pub(super) fn sectors(&self, disks: usize) -> Vec<u64> {
        let of = |transport: &Arc<MmioTransport>| {
            // The capacity is a block device's first field (specification 1.2, section 5.2.4).
            let mut capacity = [0; 8];
            let device = transport.device().lock().unwrap_or_else(PoisonError::into_inner);
            device.read_config(0, &mut capacity);
            u64::from_le_bytes(capacity)
        };
        self.transports.iter().take(disks).map(of).collect()
    }

    /// Counters of the virtio devices, their transports and the buses.
    pub(super) fn metrics(&self) -> Vec<DeviceMetrics> {
        let metrics = |name: &str, counters: Vec<(&'static str, u64)>| DeviceMetrics {
            name: name.to_owned(),
            counters: counters.into_iter().map(|(name, value)| (name.to_owned(), value)).collect(),
        };
        let virtio = self.transports.iter().map(|transport| {
            let device = transport.device().lock().unwrap_or_else(PoisonError::into_inner);
            metrics(device.name(), device.counters().into_iter().chain(transport.counters()).collect())
        });
        let buses =
            [metrics("ports", self.buses.ports.counters()), metrics("mmio", self.buses.mmio.counters())];
        let serial = metrics("serial", self.serial.counters());
        virtio.chain([serial]).chain(buses).collect()
    }
}

impl Drop for Devices {
    fn drop(&mut self) {
        // A thread that hangs in the kernel is left to the end of the process.
        if let Some(thread) = self.thread.take()
            && self.handle.stop(PARK_LIMIT).is_ok()
        {
            let _ = thread.join();
        }
    }
}

/// How many queues each of `devices` has.
pub(super) fn queues(devices: &[Box<dyn VirtioDevice>]) -> Vec<usize> {
    devices.iter().map(|device| device.queue_sizes().len()).collect()
}

/// The virtio devices in the order of their windows and lines: disks, socket, random numbers.
pub(super) fn virtio(
    disks: &[DiskConfig],
    vsock: Option<&VsockConfig>,
) -> Result<Vec<Box<dyn VirtioDevice>>, MachineError> {
    let mut devices: Vec<Box<dyn VirtioDevice>> = Vec::new();
    for (index, disk) in disks.iter().enumerate() {
        devices.push(Box::new(open_disk(index, disk)?));
    }
    if let Some(config) = vsock {
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
