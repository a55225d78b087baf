//! Snapshots that a machine cannot go on from, and what is made of a machine ahead.

use ark_hal::fake::{FakeHypervisor, Step};
use ark_types::vmm::{ExitReason, SnapshotId};
use proptest::prelude::*;
use tempfile::TempDir;

use super::*;
use crate::boot::testing;
use crate::run::StartError;
use crate::snapshot::Draft;

/// A snapshot of a VM of two processors with an image and a socket device.
struct Taken {
    dir: TempDir,
    config: RestoreConfig,
}

impl Taken {
    fn new() -> Self {
        Self::with_state(|state| state.encode().unwrap())
    }

    fn with_state(state: impl FnOnce(MachineState) -> Vec<u8>) -> Self {
        let dir = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
        let (image, uds_path) = (dir.path().join("image"), dir.path().join("v.sock"));
        std::fs::write(&image, vec![7; 8192]).unwrap();
        let config = VmConfig {
            kernel: testing::kernel(dir.path()),
            initrd: None,
            cmdline: String::new(),
            vcpus: 2,
            memory_mib: 64,
            disks: vec![DiskConfig { path: image.clone(), read_only: true }],
            vsock: Some(VsockConfig { guest_cid: 5, uds_path: uds_path.clone() }),
            console: None,
            control_socket: None,
            exit_file: None,
            labels: std::collections::BTreeMap::new(),
        };
        let mailbox = Mailbox::new().unwrap();
        let hypervisor = FakeHypervisor::new();
        let makers = Makers { hypervisor: &hypervisor, prepared: None, mailbox: &mailbox };
        let payload = Payload::open(&config).unwrap();
        let machine = Machine::build(&config, payload, Generation([1; 16]), makers).unwrap();
        machine.park().unwrap();
        let snapshot = dir.path().join("s");
        let state = state(machine.save().unwrap());
        let draft = Draft::begin(&snapshot, machine.about().clone(), None).unwrap();
        draft.write(machine.memory(), &state).unwrap();
        let config = RestoreConfig {
            snapshot,
            generation: Generation([2; 16]),
            disks: vec![image],
            uds_path: Some(uds_path),
            console: None,
            control_socket: None,
            exit_file: None,
        };
        Self { dir, config }
    }

    fn restore(
        &self,
        hypervisor: &FakeHypervisor,
        prepared: Option<Prepared>,
    ) -> Result<Machine, MachineError> {
        let mailbox = Mailbox::new().unwrap();
        let chain = Chain::open(&self.config.snapshot).unwrap();
        Machine::restore(&chain, &self.config, Makers { hypervisor, prepared, mailbox: &mailbox })
    }

    /// Why it cannot be restored: the end's reason and the sentence.
    fn refused(&self, hypervisor: &FakeHypervisor) -> (ExitReason, String) {
        let Err(error) = self.restore(hypervisor, None) else { panic!("it was restored") };
        let error = StartError::Machine(error);
        (error.reason(), error.to_string())
    }
}

fn check((reason, why): (ExitReason, String), expected: ExitReason, words: &str) {
    assert_eq!(reason, expected, "{why}");
    assert!(why.contains(words), "{why}");
}

#[test]
fn what_was_prepared_is_what_is_restored() {
    let taken = Taken::new();
    let hypervisor = FakeHypervisor::new();
    let prepared = Prepared::make(&hypervisor, 2).unwrap();
    let machine = taken.restore(&hypervisor, Some(prepared)).unwrap();
    let log = hypervisor.log();
    let log = log.lock();
    assert_eq!((log.vms, log.vcpus.len(), log.boots.len(), log.restores.len()), (1, 2, 0, 2));
    drop(log);
    let base = machine.base().unwrap();
    assert_eq!(base.path, taken.config.snapshot);
    assert_ne!(base.id, SnapshotId([0; 16]));
}

#[test]
fn a_snapshot_of_another_kind_of_processor_is_refused_before_anything_is_made() {
    let taken = Taken::new();
    let hypervisor = FakeHypervisor::new().vendor("Elsewhere");
    check(taken.refused(&hypervisor), ExitReason::BadSnapshot, "Elsewhere");
    assert_eq!(hypervisor.log().lock().vms, 0);
    assert!(!taken.dir.path().join("v.sock").exists());
}

#[test]
fn a_state_that_is_none_is_refused() {
    type Damage = fn(MachineState) -> Vec<u8>;
    let damaged: [(&str, Damage); 5] = [
        ("state", |_| vec![]),
        ("state", |state| state.encode().unwrap()[..100].to_vec()),
        ("3 bytes too many", |state| [state.encode().unwrap(), vec![0; 3]].concat()),
        ("1 processors", |mut state| {
            state.vcpus.pop();
            state.encode().unwrap()
        }),
        ("2 devices", |mut state| {
            state.transports.pop();
            state.encode().unwrap()
        }),
    ];
    for (words, damage) in damaged {
        let taken = Taken::with_state(damage);
        check(taken.refused(&FakeHypervisor::new()), ExitReason::BadSnapshot, words);
    }
}

#[test]
fn devices_that_are_not_the_snapshots_are_refused() {
    let mut taken = Taken::new();
    let image = taken.config.disks.pop().unwrap();
    check(taken.refused(&FakeHypervisor::new()), ExitReason::BadConfig, "1 disks and 0 paths");
    let other = taken.dir.path().join("other");
    std::fs::write(&other, vec![7; 4096]).unwrap();
    taken.config.disks.push(other);
    check(taken.refused(&FakeHypervisor::new()), ExitReason::BadConfig, "has 8 sectors");
    taken.config.disks = vec![taken.dir.path().join("none")];
    check(taken.refused(&FakeHypervisor::new()), ExitReason::BadConfig, "cannot be opened");
    taken.config.disks = vec![image];
    taken.config.uds_path = None;
    check(taken.refused(&FakeHypervisor::new()), ExitReason::BadConfig, "uds_path");
}

#[test]
fn a_hypervisor_that_does_not_take_the_state_makes_it_a_bad_snapshot() {
    for step in [Step::RestoreVcpu(1), Step::RestoreVm] {
        let hypervisor = FakeHypervisor::new().failing(step, libc::EINVAL);
        check(Taken::new().refused(&hypervisor), ExitReason::BadSnapshot, "refused");
    }
    let hypervisor = FakeHypervisor::new().failing(Step::CreateVm, libc::ENOMEM);
    check(Taken::new().refused(&hypervisor), ExitReason::HostError, "create the VM");
}

proptest! {
    #[test]
    fn no_bytes_are_too_hostile_to_be_read_as_a_state(
        flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..8),
        end in any::<prop::sample::Index>(),
    ) {
        thread_local! {
            static BYTES: Vec<u8> = {
                let taken = Taken::new();
                Chain::open(&taken.config.snapshot).unwrap().state().to_vec()
            };
        }
        let mut bytes = BYTES.with(Clone::clone);
        for (at, value) in flips {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        bytes.truncate(end.index(bytes.len() * 2));
        // Either is fine; what matters is that neither memory nor the stack runs out.
        let _ = MachineState::decode(&bytes);
    }
}
