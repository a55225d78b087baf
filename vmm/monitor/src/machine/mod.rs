//! The machine: memory, devices and vCPUs put together, from a configuration or from a snapshot.
//!
//! Dropping a [`Machine`] ends the vCPUs, then the devices.

mod devices;
mod error;
mod prepared;
mod state;
#[cfg(test)]
mod tests;
mod wiring;

use std::path::Path;
use std::sync::Arc;

use ark_devices::{GuestMemory, IrqLine};
use ark_hal::memory::HugePages;
use ark_hal::{Hypervisor, Processor, Vcpu, Vm};
use ark_types::vmm::{
    DeviceMetrics, DiskConfig, Generation, ProcessorModel, RestoreConfig, SnapshotBase, SnapshotManifest,
    VmConfig, VsockConfig,
};
use vm_memory::{Bytes, GuestAddress};

pub use self::error::{MachineError, ParkError, SaveError};
pub use self::prepared::Prepared;
use self::prepared::Shape;
pub use self::state::MachineState;

use self::devices::{Devices, Parts};
use crate::boot::{BootError, Payload};
use crate::mailbox::Mailbox;
use crate::snapshot::{About, Chain, SnapshotError};
use crate::vcpus::{Crew, Vcpus};
use crate::{acpi, map};

/// A VM with its devices and parked vCPUs.
pub struct Machine {
    memory: GuestMemory,
    vcpus: Option<Vcpus>,
    devices: Devices,
    vm: Arc<dyn Vm>,
    /// Says that the generation id has changed.
    renewed: IrqLine,
    /// It was restored and has not run since.
    asleep: bool,
    about: About,
    base: Option<SnapshotBase>,
}

/// What a machine is made with.
pub struct Makers<'a> {
    /// Makes the VM.
    pub hypervisor: &'a dyn Hypervisor,
    /// What was made ahead, if anything was.
    pub prepared: Option<Prepared>,
    /// Is told what happens later.
    pub mailbox: &'a Mailbox,
}

impl Machine {
    /// Puts together what `config` describes, with `payload` in memory and every vCPU parked before its first instruction.
    /// The VM's `generation` id is where ACPI says.
    ///
    /// # Errors
    /// [`MachineError`] names the part and the reason; nothing stays behind.
    pub fn build(
        config: &VmConfig,
        payload: Payload,
        generation: Generation,
        makers: Makers<'_>,
    ) -> Result<Self, MachineError> {
        let Makers { hypervisor, prepared, mailbox } = makers;
        let bytes = config.memory_mib << 20;
        let virtio = devices::virtio(&config.disks, config.vsock.as_ref())?;
        let count = count(config.vcpus);
        let shape = Shape { vcpus: count, memory: bytes, queues: &devices::queues(&virtio) };
        let Prepared { vm, memory, mut vcpus, crew, wiring } =
            Prepared::complete(prepared, hypervisor, shape)?;
        let renewed = IrqLine::clone(&wiring.renewed);
        let windows = u32::try_from(virtio.len()).unwrap_or(u32::MAX);
        let tables = acpi::tables(count, windows)?;
        memory.write_slice(&tables, GuestAddress(map::ACPI)).map_err(BootError::from)?;
        memory.write_slice(&generation.0, GuestAddress(map::GENERATION)).map_err(BootError::from)?;
        let entry = payload.load(&memory, bytes, map::ACPI)?;

        let console = config.console.as_deref();
        let parts = Parts { virtio, memory: &memory, wiring, console, serial: None };
        let devices = Devices::connect(parts, mailbox)?;
        for vcpu in &mut vcpus {
            vcpu.boot(count, entry)?;
        }
        let about = About {
            vcpus: config.vcpus,
            processor: model(hypervisor.processor()),
            disks: config.disks.clone(),
            guest_cid: config.vsock.as_ref().map(|vsock| vsock.guest_cid),
            labels: config.labels.clone(),
        };
        Self::assemble(memory, (vm, renewed), (vcpus, crew), devices, mailbox, about)
    }

    /// Puts together the machine that `chain` is a snapshot of, with the paths of `config` and every vCPU parked where it
    /// was. The guest learns at its first instruction that its generation id is another.
    ///
    /// # Errors
    /// [`MachineError`] names the part and the reason; nothing stays behind.
    pub fn restore(chain: &Chain, config: &RestoreConfig, makers: Makers<'_>) -> Result<Self, MachineError> {
        let Makers { hypervisor, prepared, mailbox } = makers;
        let manifest = chain.manifest();
        let state = MachineState::decode(chain.state())?;
        let count = count(manifest.vcpus);
        if state.vcpus.len() != usize::from(count) {
            let has = state.vcpus.len();
            return Err(MachineError::State(format!(
                "it has {has} processors and its manifest says {count}"
            )));
        }
        state.vcpus.iter().try_for_each(|vcpu| hypervisor.check_processor(vcpu))?;
        let disks = disks(manifest, config)?;
        let vsock = vsock(manifest.guest_cid, config.uds_path.as_deref())?;
        let virtio = devices::virtio(&disks, vsock.as_ref())?;
        let shape =
            Shape { vcpus: count, memory: manifest.memory_mib << 20, queues: &devices::queues(&virtio) };
        let Prepared { vm, memory, mut vcpus, crew, wiring } =
            Prepared::complete(prepared, hypervisor, shape)?;
        let renewed = IrqLine::clone(&wiring.renewed);
        chain.show(&memory, HugePages::WhenPossible)?;

        let console = config.console.as_deref();
        let parts = Parts { virtio, memory: &memory, wiring, console, serial: Some(&state.serial) };
        let devices = Devices::connect(parts, mailbox)?;
        check_sectors(&disks, &state.sectors, &devices.sectors(disks.len()))?;
        devices.restore(&state.transports)?;
        for (vcpu, state) in vcpus.iter_mut().zip(&state.vcpus) {
            vcpu.restore(state).map_err(MachineError::Refused)?;
        }
        vm.restore(&state.vm).map_err(MachineError::Refused)?;
        memory.write_slice(&config.generation.0, GuestAddress(map::GENERATION)).map_err(BootError::from)?;
        let about = About {
            vcpus: manifest.vcpus,
            processor: model(hypervisor.processor()),
            disks,
            guest_cid: manifest.guest_cid,
            labels: manifest.labels.clone(),
        };
        let mut machine = Self::assemble(memory, (vm, renewed), (vcpus, crew), devices, mailbox, about)?;
        machine.asleep = true;
        machine.base = Some(base(manifest, &config.snapshot)?);
        Ok(machine)
    }

    fn assemble(
        memory: GuestMemory,
        (vm, renewed): (Arc<dyn Vm>, IrqLine),
        (vcpus, crew): (Vec<Box<dyn Vcpu>>, Crew),
        devices: Devices,
        mailbox: &Mailbox,
        about: About,
    ) -> Result<Self, MachineError> {
        let vcpus = Vcpus::spawn(vcpus, crew, Arc::clone(devices.buses()), mailbox.clone())
            .map_err(MachineError::host("start the vCPUs' threads"))?;
        Ok(Self { memory, vcpus: Some(vcpus), devices, vm, renewed, asleep: false, about, base: None })
    }

    /// Lets devices and vCPUs run.
    pub fn run(&mut self) {
        if std::mem::take(&mut self.asleep) {
            self.devices.wake();
            // An eventfd write fails only when its counter is full, that is: when the line is already pending.
            let _ = self.renewed.trigger();
        }
        self.devices.resume();
        self.vcpus.iter().for_each(Vcpus::run);
        // A new thread takes longer to come up than the guest takes to its first instruction. Not earlier in any case: an
        // interrupt that a device raises while the controllers are restored would be lost.
        self.devices.start();
    }

    /// Returns when no vCPU and no device runs any more.
    ///
    /// # Errors
    /// [`ParkError`]: one of them does not come back.
    pub fn park(&self) -> Result<(), ParkError> {
        self.vcpus.iter().try_for_each(Vcpus::park)?;
        Ok(self.devices.pause()?)
    }

    /// The state of a parked machine, which stays as it is.
    ///
    /// # Errors
    /// [`SaveError`] names the part.
    pub fn save(&self) -> Result<MachineState, SaveError> {
        let vcpus = self.vcpus.as_ref().map_or(Ok(vec![]), Vcpus::save)?;
        let vm = self.vm.save()?;
        let (transports, serial) = self.devices.save()?;
        let sectors = self.devices.sectors(self.about.disks.len());
        Ok(MachineState { vcpus, vm, transports, serial, sectors })
    }

    /// What a snapshot's manifest says of the machine.
    #[must_use]
    pub fn about(&self) -> &About {
        &self.about
    }

    /// The snapshot that what was not written since is read from; none when the machine was booted and its memory never
    /// given back.
    #[must_use]
    pub fn base(&self) -> Option<&SnapshotBase> {
        self.base.as_ref()
    }

    /// Guest memory.
    #[must_use]
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Gives the memory of a parked machine back to the host: from here on it is read from the snapshot `chain` at `dir`,
    /// which has to hold exactly what is there.
    ///
    /// # Errors
    /// [`SnapshotError`]; memory is not to be relied on then, and the machine cannot go on.
    pub fn reclaim(&mut self, chain: &Chain, dir: &Path) -> Result<(), SnapshotError> {
        let base = base(chain.manifest(), dir)?;
        chain.show(&self.memory, HugePages::WhenPossible)?;
        self.base = Some(base);
        Ok(())
    }

    /// Exits handled in user space so far.
    #[must_use]
    pub fn exits(&self) -> u64 {
        self.vcpus.as_ref().map_or(0, Vcpus::exits)
    }

    /// When a vCPU first entered the guest, nanoseconds of `CLOCK_MONOTONIC`; 0 before.
    #[must_use]
    pub fn first_run_ns(&self) -> u64 {
        self.vcpus.as_ref().map_or(0, Vcpus::first_run_ns)
    }

    /// Bytes of guest memory that the host holds for this VM alone.
    #[must_use]
    pub fn resident_bytes(&self) -> u64 {
        ark_hal::memory::resident_bytes(&self.memory).unwrap_or(0)
    }

    /// Counters of the virtio devices, their transports and the buses.
    #[must_use]
    pub fn device_metrics(&self) -> Vec<DeviceMetrics> {
        self.devices.metrics()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // The guest first: nobody notifies devices that are going.
        self.vcpus = None;
    }
}

/// vCPUs as the hypervisor counts them; the bounds were checked before.
fn count(vcpus: u32) -> u8 {
    u8::try_from(vcpus).unwrap_or(u8::MAX)
}

fn model(processor: Processor) -> ProcessorModel {
    let Processor { vendor, family, model, stepping, brand } = processor;
    ProcessorModel { vendor, family, model, stepping, brand }
}

/// How a later diff names the snapshot in `dir`.
fn base(manifest: &SnapshotManifest, dir: &Path) -> Result<SnapshotBase, SnapshotError> {
    let path = std::path::absolute(dir).map_err(|source| SnapshotError::Host {
        what: "find the directory",
        path: dir.to_owned(),
        source,
    })?;
    Ok(SnapshotBase { id: manifest.id, path })
}

/// The snapshot's disks at the paths given.
fn disks(manifest: &SnapshotManifest, config: &RestoreConfig) -> Result<Vec<DiskConfig>, MachineError> {
    let (has, given) = (manifest.disks.len(), config.disks.len());
    if has != given {
        return Err(MachineError::DiskCount { has, given });
    }
    let disk = |(disk, path): (&DiskConfig, &std::path::PathBuf)| DiskConfig {
        path: path.clone(),
        read_only: disk.read_only,
    };
    Ok(manifest.disks.iter().zip(&config.disks).map(disk).collect())
}

/// The snapshot's socket device at the path given.
fn vsock(guest_cid: Option<u32>, uds_path: Option<&Path>) -> Result<Option<VsockConfig>, MachineError> {
    match (guest_cid, uds_path) {
        (Some(guest_cid), Some(path)) => Ok(Some(VsockConfig { guest_cid, uds_path: path.to_owned() })),
        (None, None) => Ok(None),
        (Some(_), None) => Err(MachineError::Socket("the snapshot has a socket device; give its uds_path")),
        (None, Some(_)) => Err(MachineError::Socket("the snapshot has no socket device; leave uds_path out")),
    }
}

fn check_sectors(disks: &[DiskConfig], wanted: &[u64], found: &[u64]) -> Result<(), MachineError> {
    if wanted.len() != disks.len() {
        let (has, named) = (wanted.len(), disks.len());
        return Err(MachineError::State(format!("it has {has} disks and its manifest names {named}")));
    }
    for ((disk, wanted), found) in disks.iter().zip(wanted).zip(found) {
        if wanted != found {
            let (found, wanted) = (*found, *wanted);
            return Err(MachineError::OtherDisk { path: disk.path.clone(), found, wanted });
        }
    }
    Ok(())
}
