//! A hypervisor that follows a script, so that code above the traits is tested without `/dev/kvm`.
//!
//! A test writes what each vCPU will do, hands the hypervisor to the code under test, and reads the [`Log`] afterwards:
//!
//! ```
//! use ark_hal::fake::{FakeHypervisor, Script};
//! use ark_hal::{Exit, Hypervisor, VcpuEntry, memory};
//!
//! let hypervisor = FakeHypervisor::new()
//!     .script(0, [Script::IoIn { port: 0x3fd, size: 1 }, Script::IoOut { port: 0x600, data: vec![1] }]);
//! let log = hypervisor.log();
//! let vm = hypervisor.create_vm().unwrap();
//! vm.set_memory(memory::create(4096, memory::HugePages::Never).unwrap()).unwrap();
//! let mut vcpu = vm.create_vcpu(0).unwrap();
//! vcpu.boot(1, VcpuEntry { rip: 0x10_0000, boot_params: 0x7000 }).unwrap();
//! if let Exit::IoIn { port: 0x3fd, data } = vcpu.run().unwrap() {
//!     data.fill(0x60);
//! }
//! assert_eq!(vcpu.run().unwrap(), Exit::IoOut { port: 0x600, data: &[1] });
//! assert_eq!(log.lock().answers, [(0, vec![0x60])]);
//! ```
//!
//! A vCPU whose script has ended waits as a halted guest does, until it is kicked. A vCPU that is restored goes on where the
//! saved one was in its script: give both hypervisors the same one.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use kvm_bindings::kvm_cpuid_entry2;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use crate::kvm::processor;
use crate::{
    Exit, ForeignProcessor, HalError, Hypervisor, Kick, Processor, SystemEvent, Vcpu, VcpuEntry, VcpuState,
    Vm, VmState,
};

/// The vendor of the fake processor.
pub const VENDOR: &str = "FakeHardware";

/// One thing a vCPU does; each but the last two is the [`Exit`] of the same name.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the fields are those of the exits")]
pub enum Script {
    IoIn {
        port: u16,
        size: usize,
    },
    IoOut {
        port: u16,
        data: Vec<u8>,
    },
    MmioRead {
        addr: u64,
        size: usize,
    },
    MmioWrite {
        addr: u64,
        data: Vec<u8>,
    },
    Interrupted,
    Halt,
    Shutdown,
    System(SystemEvent),
    FailEntry {
        reason: u64,
    },
    InternalError {
        suberror: u32,
    },
    Unknown {
        reason: u32,
    },
    /// Guest code that makes no exit: runs until the vCPU is kicked.
    Busy,
    /// [`Vcpu::run`] fails with this errno.
    Fail(i32),
}

/// An operation that a test can make fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Step {
    /// [`Hypervisor::create_vm`].
    CreateVm,
    /// [`Vm::set_memory`].
    SetMemory,
    /// [`Vm::create_vcpu`] of this index.
    CreateVcpu(u8),
    /// [`Vcpu::boot`] of this index.
    Boot(u8),
    /// [`Vcpu::save`] of this index.
    SaveVcpu(u8),
    /// [`Vcpu::restore`] of this index.
    RestoreVcpu(u8),
    /// [`Vm::save`].
    SaveVm,
    /// [`Vm::restore`].
    RestoreVm,
    /// [`Vm::register_irqfd`] of this line.
    RegisterIrqfd(u32),
    /// [`Vm::register_ioeventfd`] at this address.
    RegisterIoeventfd(u64),
}

impl Step {
    fn refused(self, why: &str) -> HalError {
        HalError { what: self.name(), source: io::Error::other(why.to_owned()) }
    }

    fn name(self) -> &'static str {
        match self {
            Self::CreateVm => "create the VM (fake)",
            Self::SetMemory => "give the VM its memory (fake)",
            Self::CreateVcpu(_) => "create a processor (fake)",
            Self::Boot(_) => "boot a processor (fake)",
            Self::SaveVcpu(_) => "save a processor (fake)",
            Self::RestoreVcpu(_) => "restore a processor (fake)",
            Self::SaveVm => "save the VM (fake)",
            Self::RestoreVm => "restore the VM (fake)",
            Self::RegisterIrqfd(_) => "connect an interrupt line (fake)",
            Self::RegisterIoeventfd(_) => "connect a doorbell (fake)",
        }
    }
}

/// A vCPU that was booted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Boot {
    /// Its index.
    pub index: u8,
    /// How many there were to be.
    pub count: u8,
    /// Where it begins.
    pub entry: VcpuEntry,
}

/// A doorbell that was registered.
#[derive(Debug)]
pub struct Ioeventfd {
    /// Where it listens, guest-physical.
    pub address: u64,
    /// To which value.
    pub value: u32,
    /// What it rings: write to it as the guest would.
    pub event: EventFd,
}

/// What the code under test has done.
#[derive(Debug, Default)]
pub struct Log {
    /// How many VMs were made.
    pub vms: usize,
    /// The memory each VM was given.
    pub memories: Vec<GuestMemoryMmap>,
    /// Indices of the vCPUs made, in order.
    pub vcpus: Vec<u8>,
    /// The vCPUs booted, in order.
    pub boots: Vec<Boot>,
    /// What was saved of vCPUs, in order.
    pub saves: Vec<VcpuState>,
    /// What vCPUs were restored from, in order.
    pub restores: Vec<VcpuState>,
    /// What was saved of VMs, in order.
    pub vm_saves: Vec<VmState>,
    /// What VMs were restored from, in order.
    pub vm_restores: Vec<VmState>,
    /// The interrupt lines connected: line and the eventfd that raises it.
    pub irqfds: Vec<(u32, EventFd)>,
    /// The doorbells connected.
    pub ioeventfds: Vec<Ioeventfd>,
    /// Answers to port and memory reads, with the index of the vCPU that read; logged when that vCPU runs again.
    pub answers: Vec<(u8, Vec<u8>)>,
    /// Index of each vCPU that was told of a pause.
    pub pauses: Vec<u8>,
}

/// The [`Log`], shared with the fake.
#[derive(Clone, Debug, Default)]
pub struct SharedLog(Arc<Mutex<Log>>);

impl SharedLog {
    /// Looks at the log; the fake waits meanwhile.
    pub fn lock(&self) -> MutexGuard<'_, Log> {
        lock(&self.0)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A test that panics with the lock held fails by itself.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The scripted [`Hypervisor`]. The scripts serve the first VM that asks; vCPUs without one just wait.
#[derive(Debug, Default)]
pub struct FakeHypervisor {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    log: SharedLog,
    scripts: Mutex<HashMap<u8, VecDeque<Script>>>,
    failures: Mutex<HashMap<Step, i32>>,
    vendor: Mutex<Option<String>>,
}

impl Shared {
    /// The only CPUID leaf that the fake processor has: EBX, EDX and ECX are its vendor.
    fn cpuid(&self) -> Vec<kvm_cpuid_entry2> {
        let vendor = lock(&self.vendor);
        let mut bytes = vendor.as_deref().unwrap_or(VENDOR).bytes();
        let mut word = || u32::from_le_bytes(std::array::from_fn(|_| bytes.next().unwrap_or(0)));
        let (ebx, edx, ecx) = (word(), word(), word());
        vec![kvm_cpuid_entry2 { ebx, edx, ecx, ..Default::default() }]
    }

    fn check(&self, step: Step) -> Result<(), HalError> {
        match lock(&self.failures).get(&step) {
            Some(errno) => Err(HalError { what: step.name(), source: io::Error::from_raw_os_error(*errno) }),
            None => Ok(()),
        }
    }
}

impl FakeHypervisor {
    /// One whose vCPUs do nothing and whose operations all succeed.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// What vCPU `index` does.
    #[must_use]
    pub fn script(self, index: u8, steps: impl IntoIterator<Item = Script>) -> Self {
        lock(&self.shared.scripts).insert(index, steps.into_iter().collect());
        self
    }

    /// Makes `step` fail with `errno`, every time.
    #[must_use]
    pub fn failing(self, step: Step, errno: i32) -> Self {
        lock(&self.shared.failures).insert(step, errno);
        self
    }

    /// The host's processor is of this `vendor` (at most 12 characters), not of [`VENDOR`].
    #[must_use]
    pub fn vendor(self, vendor: &str) -> Self {
        *lock(&self.shared.vendor) = Some(vendor.to_owned());
        self
    }

    /// What has been done so far, and from now on.
    #[must_use]
    pub fn log(&self) -> SharedLog {
        self.shared.log.clone()
    }
}

impl Hypervisor for FakeHypervisor {
    fn create_vm(&self) -> Result<Arc<dyn Vm>, HalError> {
        self.shared.check(Step::CreateVm)?;
        self.shared.log.lock().vms += 1;
        Ok(Arc::new(FakeVm {
            shared: Arc::clone(&self.shared),
            memory: Arc::default(),
            clock: Mutex::new(0),
        }))
    }

    fn check_processor(&self, vcpu: &VcpuState) -> Result<(), ForeignProcessor> {
        processor::check(&vcpu.cpuid, &self.shared.cpuid())
    }

    fn processor(&self) -> Processor {
        Processor::of(&self.shared.cpuid())
    }
}

/// What is known of a VM's memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Memory {
    #[default]
    None,
    Given,
    /// A vCPU was booted or restored.
    InUse,
}

struct FakeVm {
    shared: Arc<Shared>,
    memory: Arc<Mutex<Memory>>,
    /// Goes on by one with each save.
    clock: Mutex<u64>,
}

impl Vm for FakeVm {
    fn set_memory(&self, memory: GuestMemoryMmap) -> Result<(), HalError> {
        self.shared.check(Step::SetMemory)?;
        let mut given = lock(&self.memory);
        if *given == Memory::InUse {
            return Err(Step::SetMemory.refused("a processor knows what it has already"));
        }
        *given = Memory::Given;
        self.shared.log.lock().memories.push(memory);
        Ok(())
    }

    fn create_vcpu(&self, index: u8) -> Result<Box<dyn Vcpu>, HalError> {
        self.shared.check(Step::CreateVcpu(index))?;
        self.shared.log.lock().vcpus.push(index);
        let script = lock(&self.shared.scripts).remove(&index).unwrap_or_default();
        Ok(Box::new(FakeVcpu {
            index,
            script,
            position: 0,
            pending: false,
            buffer: Vec::new(),
            flag: Arc::default(),
            memory: Arc::clone(&self.memory),
            shared: Arc::clone(&self.shared),
        }))
    }

    fn save(&self) -> Result<VmState, HalError> {
        self.shared.check(Step::SaveVm)?;
        let mut clock = lock(&self.clock);
        *clock += 1;
        let mut state = VmState::default();
        state.clock.clock = *clock;
        self.shared.log.lock().vm_saves.push(state.clone());
        Ok(state)
    }

    fn restore(&self, state: &VmState) -> Result<(), HalError> {
        self.shared.check(Step::RestoreVm)?;
        *lock(&self.clock) = state.clock.clock;
        self.shared.log.lock().vm_restores.push(state.clone());
        Ok(())
    }

    fn register_irqfd(&self, event: &EventFd, gsi: u32) -> Result<(), HalError> {
        let step = Step::RegisterIrqfd(gsi);
        self.shared.check(step)?;
        let event = event.try_clone().map_err(|source| HalError { what: step.name(), source })?;
        self.shared.log.lock().irqfds.push((gsi, event));
        Ok(())
    }

    fn register_ioeventfd(&self, event: &EventFd, address: u64, value: u32) -> Result<(), HalError> {
        let step = Step::RegisterIoeventfd(address);
        self.shared.check(step)?;
        let event = event.try_clone().map_err(|source| HalError { what: step.name(), source })?;
        self.shared.log.lock().ioeventfds.push(Ioeventfd { address, value, event });
        Ok(())
    }
}

/// `immediate_exit`, and a way to wait for it.
#[derive(Default)]
struct ExitFlag {
    on: Mutex<bool>,
    changed: Condvar,
}

impl ExitFlag {
    fn set(&self, on: bool) {
        *lock(&self.on) = on;
        self.changed.notify_all();
    }

    fn wait(&self) {
        let guard = lock(&self.on);
        drop(self.changed.wait_while(guard, |on| !*on));
    }
}

impl Kick for ExitFlag {
    fn kick(&self) {
        self.set(true);
    }
}

struct FakeVcpu {
    index: u8,
    script: VecDeque<Script>,
    /// Steps of the script that were taken.
    position: u64,
    /// A read waits in `buffer` for the answer to be taken.
    pending: bool,
    /// What the exits' slices borrow.
    buffer: Vec<u8>,
    flag: Arc<ExitFlag>,
    memory: Arc<Mutex<Memory>>,
    shared: Arc<Shared>,
}

impl FakeVcpu {
    /// Fills the buffer for a read that the next run takes the answer of.
    fn expect_answer(&mut self, size: usize) -> &mut [u8] {
        self.pending = true;
        self.buffer = vec![0; size];
        &mut self.buffer
    }

    /// Takes the answer to the last read, if that was the last exit.
    fn complete_access(&mut self) {
        if std::mem::take(&mut self.pending) {
            self.shared.log.lock().answers.push((self.index, std::mem::take(&mut self.buffer)));
        }
    }

    fn needs_memory(&self, step: Step) -> Result<(), HalError> {
        self.shared.check(step)?;
        let mut memory = lock(&self.memory);
        if *memory == Memory::None {
            return Err(step.refused("the VM has no memory yet"));
        }
        *memory = Memory::InUse;
        Ok(())
    }
}

impl Vcpu for FakeVcpu {
    fn boot(&mut self, count: u8, entry: VcpuEntry) -> Result<(), HalError> {
        self.needs_memory(Step::Boot(self.index))?;
        self.shared.log.lock().boots.push(Boot { index: self.index, count, entry });
        Ok(())
    }

    fn save(&mut self) -> Result<VcpuState, HalError> {
        self.shared.check(Step::SaveVcpu(self.index))?;
        self.flag.set(true);
        self.complete_access();
        let mut state = VcpuState { index: self.index, cpuid: self.shared.cpuid(), ..VcpuState::default() };
        state.regs.rip = self.position;
        self.shared.log.lock().saves.push(state.clone());
        Ok(state)
    }

    fn restore(&mut self, state: &VcpuState) -> Result<(), HalError> {
        let step = Step::RestoreVcpu(self.index);
        self.needs_memory(step)?;
        if state.index != self.index {
            return Err(step.refused("it was another processor"));
        }
        self.position = state.regs.rip;
        let taken = usize::try_from(self.position).unwrap_or(usize::MAX).min(self.script.len());
        self.script.drain(..taken);
        self.shared.log.lock().restores.push(state.clone());
        Ok(())
    }

    fn run(&mut self) -> Result<Exit<'_>, HalError> {
        self.complete_access();
        if *lock(&self.flag.on) {
            return Ok(Exit::Interrupted);
        }
        let next = self.script.pop_front();
        self.position += u64::from(next.is_some());
        Ok(match next.unwrap_or(Script::Busy) {
            Script::IoIn { port, size } => Exit::IoIn { port, data: self.expect_answer(size) },
            Script::IoOut { port, data } => {
                self.buffer = data;
                Exit::IoOut { port, data: &self.buffer }
            }
            Script::MmioRead { addr, size } => Exit::MmioRead { addr, data: self.expect_answer(size) },
            Script::MmioWrite { addr, data } => {
                self.buffer = data;
                Exit::MmioWrite { addr, data: &self.buffer }
            }
            Script::Interrupted => Exit::Interrupted,
            Script::Halt => Exit::Halt,
            Script::Shutdown => Exit::Shutdown,
            Script::System(event) => Exit::System(event),
            Script::FailEntry { reason } => Exit::FailEntry { reason },
            Script::InternalError { suberror } => Exit::InternalError { suberror },
            Script::Unknown { reason } => Exit::Unknown { reason },
            Script::Busy => {
                self.flag.wait();
                Exit::Interrupted
            }
            Script::Fail(errno) => {
                let source = io::Error::from_raw_os_error(errno);
                return Err(HalError { what: "run the processor (fake)", source });
            }
        })
    }

    fn set_immediate_exit(&mut self, on: bool) {
        self.flag.set(on);
    }

    fn note_pause(&mut self) {
        self.shared.log.lock().pauses.push(self.index);
    }

    fn kicker(&self) -> Arc<dyn Kick> {
        Arc::<ExitFlag>::clone(&self.flag)
    }
}

#[cfg(test)]
mod tests;
