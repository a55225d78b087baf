//! What can be made of a machine before anybody knows which one it will be: the VM, its vCPUs with their threads, interrupt
//! lines, doorbells and the memory slot cost more time than all the rest of a restore.

use std::sync::Arc;

use ark_devices::GuestMemory;
use ark_hal::memory::{self, HugePages};
use ark_hal::{Hypervisor, Vcpu, Vm};
use ark_types::agent::DEFAULT_MEMORY_MIB;

use super::MachineError;
use super::wiring::Wiring;
use crate::vcpus::Crew;

/// Queues of the virtio devices that an agent's VM has: one disk, socket, random numbers.
const USUAL_QUEUES: [usize; 3] = [1, 3, 1];

/// Guest memory of an agent that asks for none, bytes.
const USUAL_MEMORY: u64 = DEFAULT_MEMORY_MIB << 20;

/// A VM with memory that nobody has touched, vCPUs with nothing set, threads for them, and what devices are connected by.
pub struct Prepared {
    pub(super) vm: Arc<dyn Vm>,
    pub(super) memory: GuestMemory,
    pub(super) vcpus: Vec<Box<dyn Vcpu>>,
    pub(super) crew: Crew,
    pub(super) wiring: Wiring,
}

/// What is wanted of a [`Prepared`].
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape<'a> {
    pub(super) vcpus: u8,
    /// Bytes.
    pub(super) memory: u64,
    /// Of each virtio device, in order.
    pub(super) queues: &'a [usize],
}

impl Prepared {
    /// A VM with `vcpus` vCPUs, to which the devices of an agent can be connected.
    ///
    /// # Errors
    /// [`MachineError`] names the step.
    pub fn make(hypervisor: &dyn Hypervisor, vcpus: u8) -> Result<Self, MachineError> {
        Self::complete(None, hypervisor, Shape { vcpus, memory: USUAL_MEMORY, queues: &USUAL_QUEUES })
    }

    /// One of exactly this `shape`, of `ahead` as far as possible. vCPUs and doorbells can be added to a VM, but a surplus one
    /// would stay in it for ever: KVM would deliver interrupts to such a vCPU and count it where it compares the vCPUs' clocks.
    pub(super) fn complete(
        ahead: Option<Self>,
        hypervisor: &dyn Hypervisor,
        shape: Shape<'_>,
    ) -> Result<Self, MachineError> {
        let fits = |ahead: &Self| ahead.vcpus.len() <= shape.vcpus.into() && ahead.wiring.fits(shape.queues);
        let mut prepared = match ahead.filter(fits) {
            Some(ahead) if memory::size(&ahead.memory) == shape.memory => ahead,
            Some(ahead) => Self { memory: give_memory(&*ahead.vm, shape.memory)?, ..ahead },
            None => {
                let vm = hypervisor.create_vm()?;
                let wiring = Wiring::new(&*vm)?;
                let memory = give_memory(&*vm, shape.memory)?;
                Self { vm, memory, vcpus: vec![], crew: Crew::default(), wiring }
            }
        };
        for index in (0..shape.vcpus).skip(prepared.vcpus.len()) {
            prepared.vcpus.push(prepared.vm.create_vcpu(index)?);
        }
        let threads = prepared.crew.grow_to(shape.vcpus.into());
        threads.map_err(MachineError::host("start the vCPUs' threads"))?;
        prepared.wiring.add_up_to(&*prepared.vm, shape.queues)?;
        Ok(prepared)
    }
}

/// Zeroed memory of `bytes`, which `vm` has from then on in place of any other.
fn give_memory(vm: &dyn Vm, bytes: u64) -> Result<GuestMemory, MachineError> {
    let memory = memory::create(bytes, HugePages::WhenPossible)?;
    vm.set_memory(memory.clone())?;
    Ok(memory)
}

#[cfg(test)]
mod tests {
    use ark_devices::virtio::mmio::QUEUE_NOTIFY;
    use ark_hal::fake::{FakeHypervisor, Step};

    use super::*;
    use crate::map;

    fn shape(vcpus: u8, queues: &[usize]) -> Shape<'_> {
        Shape { vcpus, memory: USUAL_MEMORY, queues }
    }

    /// Window and value of each doorbell in the log of a fake.
    fn doorbells(hypervisor: &FakeHypervisor) -> Vec<(u64, u32)> {
        let log = hypervisor.log();
        let log = log.lock();
        let window = |address: u64| (address - QUEUE_NOTIFY - map::VIRTIO) / map::VIRTIO_LEN;
        log.ioeventfds.iter().map(|doorbell| (window(doorbell.address), doorbell.value)).collect()
    }

    fn lines(hypervisor: &FakeHypervisor) -> Vec<u32> {
        hypervisor.log().lock().irqfds.iter().map(|(gsi, _)| *gsi).collect()
    }

    #[test]
    fn missing_vcpus_are_added_and_a_surplus_makes_the_vm_anew() {
        let hypervisor = FakeHypervisor::new();
        let log = hypervisor.log();
        let ahead = Prepared::make(&hypervisor, 2).unwrap();
        let more = Prepared::complete(Some(ahead), &hypervisor, shape(4, &USUAL_QUEUES)).unwrap();
        assert_eq!((more.vcpus.len(), log.lock().vms), (4, 1));
        assert_eq!(log.lock().vcpus, [0, 1, 2, 3]);
        let fewer = Prepared::complete(Some(more), &hypervisor, shape(1, &USUAL_QUEUES)).unwrap();
        assert_eq!((fewer.vcpus.len(), log.lock().vms), (1, 2));
        let none = Prepared::complete(None, &hypervisor, shape(3, &USUAL_QUEUES)).unwrap();
        assert_eq!((none.vcpus.len(), log.lock().vms), (3, 3));
    }

    #[test]
    fn memory_of_the_usual_size_is_there_ahead_and_another_takes_its_place() {
        let hypervisor = FakeHypervisor::new();
        for (bytes, given) in [(USUAL_MEMORY, 1), (USUAL_MEMORY / 2, 3)] {
            let ahead = Prepared::make(&hypervisor, 1).unwrap();
            let wanted = Shape { memory: bytes, ..shape(1, &USUAL_QUEUES) };
            let complete = Prepared::complete(Some(ahead), &hypervisor, wanted).unwrap();
            assert_eq!(memory::size(&complete.memory), bytes);
            assert_eq!(hypervisor.log().lock().memories.len(), given);
        }
        assert_eq!(hypervisor.log().lock().vms, 2);
    }

    #[test]
    fn what_an_agent_is_connected_by_is_there_ahead() {
        let hypervisor = FakeHypervisor::new();
        let ahead = Prepared::make(&hypervisor, 1).unwrap();
        let usual = [(0, 0), (1, 0), (1, 1), (1, 2), (2, 0)];
        assert_eq!(doorbells(&hypervisor), usual);
        assert_eq!(lines(&hypervisor), [map::COM1_GSI, map::GENERATION_GSI, 5, 6, 7]);
        Prepared::complete(Some(ahead), &hypervisor, shape(1, &USUAL_QUEUES)).unwrap();
        assert_eq!(doorbells(&hypervisor), usual);
        assert_eq!((lines(&hypervisor).len(), hypervisor.log().lock().vms), (5, 1));
    }

    #[test]
    fn missing_doorbells_are_added_and_a_surplus_makes_the_vm_anew() {
        // Another device; a queue and a device more.
        for queues in [[1, 3, 1, 2].as_slice(), &[1, 3, 2], &[2, 3, 1, 1]] {
            let hypervisor = FakeHypervisor::new();
            let ahead = Prepared::make(&hypervisor, 1).unwrap();
            let complete = Prepared::complete(Some(ahead), &hypervisor, shape(1, queues)).unwrap();
            assert_eq!(hypervisor.log().lock().vms, 1, "{queues:?}");
            let rung = complete.wiring.windows.iter().map(|window| window.doorbells.len());
            assert!(rung.eq(queues.iter().copied()), "{queues:?}");
            let mut found = doorbells(&hypervisor);
            found.sort_unstable();
            found.dedup();
            assert_eq!(found.len(), queues.iter().sum::<usize>(), "{queues:?}");
            assert_eq!(lines(&hypervisor).len(), 2 + queues.len(), "{queues:?}");
        }
        // Two disks; no socket; no disk; nothing but random numbers.
        for queues in [[1, 1, 3, 1].as_slice(), &[1, 1], &[3, 1], &[1]] {
            let hypervisor = FakeHypervisor::new();
            let ahead = Prepared::make(&hypervisor, 1).unwrap();
            let before = doorbells(&hypervisor).len();
            let anew = Prepared::complete(Some(ahead), &hypervisor, shape(1, queues)).unwrap();
            assert_eq!(hypervisor.log().lock().vms, 2, "{queues:?}");
            assert_eq!(anew.wiring.windows.len(), queues.len());
            assert_eq!(doorbells(&hypervisor).len() - before, queues.iter().sum::<usize>(), "{queues:?}");
        }
    }

    #[test]
    fn a_line_or_doorbell_that_cannot_be_connected_is_an_error() {
        for step in [
            Step::RegisterIrqfd(map::GENERATION_GSI),
            Step::RegisterIrqfd(6),
            Step::RegisterIoeventfd(map::virtio_window(2) + QUEUE_NOTIFY),
        ] {
            let hypervisor = FakeHypervisor::new().failing(step, libc::ENOSPC);
            let Err(error) = Prepared::make(&hypervisor, 1) else { panic!("{step:?}") };
            assert!(error.to_string().contains("connect"), "{error}");
        }
    }
}
