//! What can be made of a machine before anybody knows which one it will be: the VM and its vCPUs cost more time than all
//! the rest of a restore.

use std::sync::Arc;

use ark_hal::{HalError, Hypervisor, Vcpu, Vm};

/// A VM without memory, and vCPUs with nothing set.
pub struct Prepared {
    pub(super) vm: Arc<dyn Vm>,
    pub(super) vcpus: Vec<Box<dyn Vcpu>>,
}

impl Prepared {
    /// A VM with `vcpus` vCPUs.
    ///
    /// # Errors
    /// [`HalError`] names the step.
    pub fn make(hypervisor: &dyn Hypervisor, vcpus: u8) -> Result<Self, HalError> {
        let mut prepared = Self { vm: hypervisor.create_vm()?, vcpus: vec![] };
        prepared.add_up_to(vcpus)?;
        Ok(prepared)
    }

    /// One with exactly `vcpus` vCPUs, of `ahead` as far as possible. vCPUs can be added to a VM, but a surplus one would
    /// stay in it for ever: KVM would deliver interrupts to it and count it where it compares the vCPUs' clocks.
    pub(super) fn complete(
        ahead: Option<Self>,
        hypervisor: &dyn Hypervisor,
        vcpus: u8,
    ) -> Result<Self, HalError> {
        match ahead.filter(|ahead| ahead.vcpus.len() <= vcpus.into()) {
            Some(mut ahead) => {
                ahead.add_up_to(vcpus)?;
                Ok(ahead)
            }
            None => Self::make(hypervisor, vcpus),
        }
    }

    fn add_up_to(&mut self, vcpus: u8) -> Result<(), HalError> {
        for index in (0..vcpus).skip(self.vcpus.len()) {
            self.vcpus.push(self.vm.create_vcpu(index)?);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use ark_hal::fake::FakeHypervisor;

    use super::*;

    #[test]
    fn missing_vcpus_are_added_and_a_surplus_makes_the_vm_anew() {
        let hypervisor = FakeHypervisor::new();
        let log = hypervisor.log();
        let ahead = Prepared::make(&hypervisor, 2).unwrap();
        let more = Prepared::complete(Some(ahead), &hypervisor, 4).unwrap();
        assert_eq!((more.vcpus.len(), log.lock().vms), (4, 1));
        assert_eq!(log.lock().vcpus, [0, 1, 2, 3]);
        let fewer = Prepared::complete(Some(more), &hypervisor, 1).unwrap();
        assert_eq!((fewer.vcpus.len(), log.lock().vms), (1, 2));
        let none = Prepared::complete(None, &hypervisor, 3).unwrap();
        assert_eq!((none.vcpus.len(), log.lock().vms), (3, 3));
    }
}
