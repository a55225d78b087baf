use std::time::Duration;

use super::*;
use crate::memory::{HugePages, create};

const ENTRY: VcpuEntry = VcpuEntry { rip: 0x100_0000, boot_params: 0x7000 };

fn vm(hypervisor: &FakeHypervisor) -> Arc<dyn Vm> {
    let vm = hypervisor.create_vm().unwrap();
    vm.set_memory(create(4096, HugePages::Never).unwrap()).unwrap();
    vm
}

#[test]
fn reads_are_answered_writes_are_seen_and_errors_come_up() {
    let hypervisor = FakeHypervisor::new().script(
        0,
        [
            Script::MmioRead { addr: 0xd000_0000, size: 4 },
            Script::MmioWrite { addr: 0xd000_0050, data: vec![1, 0, 0, 0] },
            Script::Fail(libc::EFAULT),
            Script::Shutdown,
        ],
    );
    let mut vcpu = vm(&hypervisor).create_vcpu(0).unwrap();
    let Exit::MmioRead { addr: 0xd000_0000, data } = vcpu.run().unwrap() else { panic!("not the read") };
    data.copy_from_slice(b"virt");
    assert!(hypervisor.log().lock().answers.is_empty());
    assert_eq!(vcpu.run().unwrap(), Exit::MmioWrite { addr: 0xd000_0050, data: &[1, 0, 0, 0] });
    assert_eq!(hypervisor.log().lock().answers, [(0, b"virt".to_vec())]);
    assert_eq!(vcpu.run().unwrap_err().source.raw_os_error(), Some(libc::EFAULT));
    assert_eq!(vcpu.run().unwrap(), Exit::Shutdown);
}

#[test]
fn immediate_exit_completes_a_read_and_runs_nothing_until_it_is_off() {
    let hypervisor =
        FakeHypervisor::new().script(0, [Script::IoIn { port: 0x3f8, size: 1 }, Script::Shutdown]);
    let mut vcpu = vm(&hypervisor).create_vcpu(0).unwrap();
    let Exit::IoIn { data, .. } = vcpu.run().unwrap() else { panic!("not the read") };
    data.fill(7);
    vcpu.set_immediate_exit(true);
    assert_eq!(vcpu.run().unwrap(), Exit::Interrupted);
    assert_eq!(vcpu.run().unwrap(), Exit::Interrupted);
    assert_eq!(hypervisor.log().lock().answers, [(0, vec![7])]);
    vcpu.set_immediate_exit(false);
    assert_eq!(vcpu.run().unwrap(), Exit::Shutdown);
}

#[test]
fn a_busy_vcpu_comes_back_when_kicked_whether_before_or_during_the_run() {
    let hypervisor = FakeHypervisor::new();
    let mut vcpu = vm(&hypervisor).create_vcpu(3).unwrap();
    let kicker = vcpu.kicker();
    kicker.kick();
    assert_eq!(vcpu.run().unwrap(), Exit::Interrupted);
    vcpu.set_immediate_exit(false);
    let thread = std::thread::spawn(move || matches!(vcpu.run(), Ok(Exit::Interrupted)));
    std::thread::sleep(Duration::from_millis(20));
    kicker.kick();
    assert!(thread.join().unwrap());
    kicker.kick();
}

#[test]
fn what_was_registered_is_logged_and_can_be_rung() {
    let hypervisor = FakeHypervisor::new();
    let vm = vm(&hypervisor);
    let event = EventFd::new(libc::EFD_NONBLOCK).unwrap();
    vm.register_irqfd(&event, 5).unwrap();
    vm.register_ioeventfd(&event, 0xd000_0050, 1).unwrap();
    vm.create_vcpu(1).unwrap().boot(2, ENTRY).unwrap();
    let log = hypervisor.log();
    let log = log.lock();
    assert_eq!((log.vms, log.memories.len(), log.vcpus.as_slice()), (1, 1, &[1][..]));
    assert_eq!(log.boots, [Boot { index: 1, count: 2, entry: ENTRY }]);
    assert_eq!(log.irqfds[0].0, 5);
    assert_eq!(log.ioeventfds[0].address, 0xd000_0050);
    assert_eq!(log.ioeventfds[0].value, 1);
    log.ioeventfds[0].event.write(1).unwrap();
    assert_eq!(event.read().unwrap(), 1);
}

#[test]
fn a_restored_vcpu_goes_on_where_the_saved_one_was() {
    let script = [Script::IoIn { port: 0x3f8, size: 1 }, Script::Halt, Script::Shutdown];
    let source = FakeHypervisor::new().script(1, script.clone());
    let made = vm(&source);
    let mut vcpu = made.create_vcpu(1).unwrap();
    vcpu.boot(2, ENTRY).unwrap();
    let Exit::IoIn { data, .. } = vcpu.run().unwrap() else { panic!("not the read") };
    data.fill(9);
    let state = vcpu.save().unwrap();
    let machine = (made.save().unwrap(), made.save().unwrap()).1;
    // The read is over, and nothing runs before somebody has looked around.
    assert_eq!(source.log().lock().answers, [(1, vec![9])]);
    assert_eq!(vcpu.run().unwrap(), Exit::Interrupted);
    vcpu.set_immediate_exit(false);
    assert_eq!(vcpu.run().unwrap(), Exit::Halt);
    assert_eq!(source.log().lock().saves.as_slice(), std::slice::from_ref(&state));

    let bytes = postcard::to_stdvec(&(&state, &machine)).unwrap();
    let (state, machine): (VcpuState, VmState) = postcard::from_bytes(&bytes).unwrap();
    let target = FakeHypervisor::new().script(1, script);
    target.check_processor(&state).unwrap();
    let made = vm(&target);
    assert!(made.create_vcpu(0).unwrap().restore(&state).is_err());
    let mut vcpu = made.create_vcpu(1).unwrap();
    vcpu.restore(&state).unwrap();
    made.restore(&machine).unwrap();
    assert_eq!(vcpu.run().unwrap(), Exit::Halt);
    assert_eq!(vcpu.save().unwrap().regs.rip, 2);
    assert_eq!(made.save().unwrap().clock.clock, 3);
    let log = target.log();
    let log = log.lock();
    assert_eq!((log.restores.as_slice(), log.vm_restores.len()), (&[state][..], 1));
}

#[test]
fn memory_is_given_before_a_vcpu_gets_anything_and_stays_from_then_on() {
    let hypervisor = FakeHypervisor::new();
    let vm = hypervisor.create_vm().unwrap();
    let mut vcpu = vm.create_vcpu(0).unwrap();
    assert!(vcpu.boot(1, ENTRY).is_err());
    assert!(vcpu.restore(&VcpuState::default()).is_err());
    vm.set_memory(create(4096, HugePages::Never).unwrap()).unwrap();
    vm.set_memory(create(8192, HugePages::Never).unwrap()).unwrap();
    vcpu.boot(1, ENTRY).unwrap();
    assert!(vm.set_memory(create(4096, HugePages::Never).unwrap()).is_err());
    assert_eq!(hypervisor.log().lock().memories.len(), 2);
}

#[test]
fn another_vendors_state_is_foreign() {
    let source = FakeHypervisor::new();
    let state = vm(&source).create_vcpu(0).unwrap().save().unwrap();
    let other = FakeHypervisor::new().vendor("OtherVendor");
    let error = other.check_processor(&state).unwrap_err().to_string();
    assert!(error.contains(VENDOR) && error.contains("OtherVendor"), "{error}");
    assert_eq!(other.processor().vendor, "OtherVendor");
}

#[test]
fn a_named_step_fails_and_the_others_do_not() {
    let hypervisor = FakeHypervisor::new()
        .failing(Step::CreateVcpu(1), libc::EEXIST)
        .failing(Step::RegisterIrqfd(6), libc::EBUSY);
    let vm = vm(&hypervisor);
    let event = EventFd::new(0).unwrap();
    vm.create_vcpu(0).unwrap();
    let error = vm.create_vcpu(1).err().unwrap();
    assert_eq!(error.source.raw_os_error(), Some(libc::EEXIST));
    vm.register_irqfd(&event, 5).unwrap();
    assert!(vm.register_irqfd(&event, 6).is_err());
    let hypervisor = FakeHypervisor::new().failing(Step::CreateVm, libc::ENOMEM);
    assert!(hypervisor.create_vm().is_err());
}
