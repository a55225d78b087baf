//! What can be made of a machine before anybody knows which one it will be: the VM, its vCPUs, interrupt lines and doorbells
//! cost more time than all the rest of a restore.

use std::sync::Arc;

use ark_hal::{HalError, Hypervisor, Vcpu, Vm};

use super::wiring::Wiring;

/// Queues of the virtio devices that an agent's VM has: one disk, socket, random numbers.
const USUAL_QUEUES: [usize; 3] = [1, 3, 1];

/// A VM without memory, vCPUs with nothing set, and what devices are connected by.
pub struct Prepared {
    pub(super) vm: Arc<dyn Vm>,
    pub(super) vcpus: Vec<Box<dyn Vcpu>>,
    pub(super) wiring: Wiring,
}

impl Prepared {
    /// A VM with `vcpus` vCPUs, to which the devices of an agent can be connected.
    ///
    /// # Errors
    /// [`HalError`] names the step.
    pub fn make(hypervisor: &dyn Hypervisor, vcpus: u8) -> Result<Self, HalError> {
        Self::complete(None, hypervisor, vcpus, &USUAL_QUEUES)
    }

    /// One with exactly `vcpus` vCPUs and doorbells for virtio devices of so many `queues`, of `ahead` as far as possible.
    /// vCPUs and doorbells can be added to a VM, but a surplus one would stay in it for ever: KVM would deliver interrupts to
    /// such a vCPU and count it where it compares the vCPUs' clocks.
    pub(super) fn complete(
        ahead: Option<Self>,
        hypervisor: &dyn Hypervisor,
        vcpus: u8,
        queues: &[usize],
    ) -> Result<Self, HalError> {
        let fits = |ahead: &Self| ahead.vcpus.len() <= vcpus.into() && ahead.wiring.fits(queues);
        let mut prepared = match ahead.filter(fits) {
            Some(ahead) => ahead,
            None => {
                let vm = hypervisor.create_vm()?;
                let wiring = Wiring::new(&*vm)?;
                Self { vm, vcpus: vec![], wiring }
            }
        };
        for index in (0..vcpus).skip(prepared.vcpus.len()) {
            prepared.vcpus.push(prepared.vm.create_vcpu(index)?);
        }
        prepared.wiring.add_up_to(&*prepared.vm, queues)?;
        Ok(prepared)
    }
}

#[cfg(test)]
mod tests {
    use ark_devices::virtio::mmio::QUEUE_NOTIFY;
    use ark_hal::fake::{FakeHypervisor, Step};

    use super::*;
    use crate::map;

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
        let more = Prepared::complete(Some(ahead), &hypervisor, 4, &USUAL_QUEUES).unwrap();
        assert_eq!((more.vcpus.len(), log.lock().vms), (4, 1));
        assert_eq!(log.lock().vcpus, [0, 1, 2, 3]);
        let fewer = Prepared::complete(Some(more), &hypervisor, 1, &USUAL_QUEUES).unwrap();
        assert_eq!((fewer.vcpus.len(), log.lock().vms), (1, 2));
        let none = Prepared::complete(None, &hypervisor, 3, &USUAL_QUEUES).unwrap();
        assert_eq!((none.vcpus.len(), log.lock().vms), (3, 3));
    }

    #[test]
    fn what_an_agent_is_connected_by_is_there_ahead() {
        let hypervisor = FakeHypervisor::new();
        let ahead = Prepared::make(&hypervisor, 1).unwrap();
        let usual = [(0, 0), (1, 0), (1, 1), (1, 2), (2, 0)];
        assert_eq!(doorbells(&hypervisor), usual);
        assert_eq!(lines(&hypervisor), [map::COM1_GSI, map::GENERATION_GSI, 5, 6, 7]);
        Prepared::complete(Some(ahead), &hypervisor, 1, &USUAL_QUEUES).unwrap();
        assert_eq!(doorbells(&hypervisor), usual);
        assert_eq!((lines(&hypervisor).len(), hypervisor.log().lock().vms), (5, 1));
    }

    #[test]
    fn missing_doorbells_are_added_and_a_surplus_makes_the_vm_anew() {
        // Another device; a queue and a device more.
        for queues in [[1, 3, 1, 2].as_slice(), &[1, 3, 2], &[2, 3, 1, 1]] {
            let hypervisor = FakeHypervisor::new();
            let ahead = Prepared::make(&hypervisor, 1).unwrap();
            let complete = Prepared::complete(Some(ahead), &hypervisor, 1, queues).unwrap();
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
            let anew = Prepared::complete(Some(ahead), &hypervisor, 1, queues).unwrap();
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
