//! Can this host run guests? There is only one way to know: run one.
//!
//! A `/dev/kvm` that opens and has every capability may still be a KVM in software that cannot run a kernel. So the probe
//! makes a VM the way every VM is made here and runs a small guest in it, all within a time limit: [`TIME_LIMIT`], or more
//! where a host is known to be slow (emulated, busy) rather than broken.

mod guest;

use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use vm_memory::GuestMemoryMmap;

use crate::kvm::{Kvm, OpenError, PAGE_TABLES};
use crate::memory::{self, HugePages};
use crate::{Exit, HalError, Hypervisor, Kick, Vcpu, VcpuEntry};
use guest::Stage;

/// After so long the probe's guest is stopped, unless the caller has more patience.
pub const TIME_LIMIT: Duration = Duration::from_millis(900);

/// So long a stopped guest has to come back before its thread is given up.
const GRACE: Duration = Duration::from_millis(80);

/// What the probe found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProbeOutcome {
    /// KVM runs guests here.
    pub usable: bool,
    /// Why, or why not and what to do next; a sentence for the user.
    pub reason: String,
    /// How long the probe took, at most about the limit.
    pub duration: Duration,
}

/// Why KVM is not usable.
#[derive(Debug, thiserror::Error)]
enum Unusable {
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error("KVM cannot set up a VM: {0}; see the kernel's log (dmesg)")]
    SetUp(String),
    #[error(
        "/dev/kvm opens, but a guest fails at {stage} ({how}): this KVM is incomplete, as software KVM in sandboxes is, \
         and no Linux can run on it; use a host with VT-x or AMD-V, or the emulated host (ark machine start)"
    )]
    Guest { stage: Stage, how: String },
    #[error(
        "/dev/kvm opens, but a guest of a hundred instructions did not end within {} ms (it was at {stage}): use a host \
         with VT-x or AMD-V, or the emulated host (ark machine start)", limit.as_millis()
    )]
    Slow { stage: Stage, limit: Duration },
    #[error(
        "/dev/kvm opens, but KVM did not answer within {} ms and could not be interrupted: see the kernel's log (dmesg), \
         use another host, or the emulated host (ark machine start)", limit.as_millis()
    )]
    Stuck { limit: Duration },
}

impl From<HalError> for Unusable {
    fn from(error: HalError) -> Self {
        match error.source.raw_os_error() {
            // KVM_CREATE_VM is what takes hold of the processor's virtualisation.
            Some(libc::EBUSY) => Self::Open(OpenError::Busy),
            _ => Self::SetUp(error.to_string()),
        }
    }
}

/// Where the probe's thread leaves the means to stop it.
type KickerSlot = Arc<Mutex<Option<Arc<dyn Kick>>>>;

/// Runs the probe; returns within about `limit`, whatever the host's KVM does.
#[must_use]
pub fn probe(limit: Duration) -> ProbeOutcome {
    probe_with(limit, || Ok(Box::new(Kvm::open()?)))
}

fn probe_with(
    limit: Duration,
    open: impl FnOnce() -> Result<Box<dyn Hypervisor>, Unusable> + Send + 'static,
) -> ProbeOutcome {
    let began = Instant::now();
    let verdict = within_limit(limit, move |slot| attempt(open()?.as_ref(), slot, limit));
    let duration = began.elapsed();
    let reason = match &verdict {
        Ok(()) => format!("KVM works: a guest went to ring 3 and back in {} ms", duration.as_millis()),
        Err(unusable) => unusable.to_string(),
    };
    ProbeOutcome { usable: verdict.is_ok(), reason, duration }
}

/// Runs `attempt` on a thread of its own, because each of its system calls may hang on a broken host.
fn within_limit(
    limit: Duration,
    attempt: impl FnOnce(&KickerSlot) -> Result<(), Unusable> + Send + 'static,
) -> Result<(), Unusable> {
    let slot = KickerSlot::default();
    let (answer, verdict) = channel();
    let thread = {
        let slot = Arc::clone(&slot);
        // Nobody listens any more once the time is over.
        move || answer.send(attempt(&slot)).unwrap_or_default()
    };
    thread::Builder::new()
        .name("kvm-probe".into())
        .spawn(thread)
        .map_err(|e| Unusable::SetUp(format!("start a thread: {e}")))?;
    match verdict.recv_timeout(limit) {
        Ok(verdict) => return verdict,
        Err(RecvTimeoutError::Disconnected) => return Err(Unusable::Stuck { limit }),
        Err(RecvTimeoutError::Timeout) => {}
    }
    if let Some(kicker) = slot.lock().unwrap_or_else(PoisonError::into_inner).as_ref() {
        kicker.kick();
    }
    verdict.recv_timeout(GRACE).unwrap_or(Err(Unusable::Stuck { limit }))
}

fn attempt(hypervisor: &dyn Hypervisor, slot: &KickerSlot, limit: Duration) -> Result<(), Unusable> {
    let deadline = Instant::now() + limit;
    let set_up = |e: &dyn std::fmt::Display| Unusable::SetUp(e.to_string());
    let memory = memory::create(guest::MEMORY_SIZE, HugePages::Never).map_err(|e| set_up(&e))?;
    guest::load(&memory).map_err(|e| set_up(&e))?;
    let vm = hypervisor.create_vm()?;
    vm.set_memory(memory.clone())?;
    let mut vcpu = vm.create_vcpu(0)?;
    vcpu.boot(1, VcpuEntry { rip: guest::CODE, boot_params: 0 })?;
    guest::open_to_ring_3(&memory, &PAGE_TABLES).map_err(|e| set_up(&e))?;
    *slot.lock().unwrap_or_else(PoisonError::into_inner) = Some(vcpu.kicker());
    run(vcpu.as_mut(), &memory, deadline, limit)
}

fn run(
    vcpu: &mut dyn Vcpu,
    memory: &GuestMemoryMmap,
    deadline: Instant,
    limit: Duration,
) -> Result<(), Unusable> {
    loop {
        let how = match vcpu.run() {
            Ok(Exit::IoOut { port: guest::PORT, data }) if guest::is_success(data) => return Ok(()),
            Ok(Exit::Interrupted) if Instant::now() < deadline => continue,
            Ok(Exit::Interrupted) => return Err(Unusable::Slow { stage: Stage::read(memory), limit }),
            Ok(Exit::Shutdown) => "triple fault".to_owned(),
            Ok(Exit::InternalError { suberror: 1 }) => "KVM cannot emulate an instruction".to_owned(),
            Ok(Exit::InternalError { suberror }) => format!("KVM internal error {suberror}"),
            Ok(Exit::FailEntry { reason }) => {
                format!("the processor refuses to enter the guest, {reason:#x}")
            }
            Ok(other) => format!("unexpected exit {other:x?}"),
            Err(error) => error.to_string(),
        };
        return Err(Unusable::Guest { stage: Stage::read(memory), how });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::{FakeHypervisor, Script, Step};

    fn probe_fake(hypervisor: FakeHypervisor) -> ProbeOutcome {
        probe_with(TIME_LIMIT, move || Ok(Box::new(hypervisor)))
    }

    fn probe_script(script: Script) -> ProbeOutcome {
        probe_fake(FakeHypervisor::new().script(0, [script]))
    }

    #[test]
    fn a_guest_that_writes_the_port_at_ring_0_makes_kvm_usable() {
        let outcome =
            probe_script(Script::IoOut { port: guest::PORT, data: 0x41b2_0008_u32.to_le_bytes().to_vec() });
        assert!(outcome.usable, "{}", outcome.reason);
        assert!(outcome.reason.starts_with("KVM works"));
    }

    #[test]
    fn a_guest_that_fails_is_reported_with_where_and_how() {
        for (script, how) in [
            (Script::Shutdown, "triple fault"),
            (Script::InternalError { suberror: 1 }, "cannot emulate"),
            (Script::InternalError { suberror: 3 }, "internal error 3"),
            (Script::FailEntry { reason: 0x8000_0021 }, "0x80000021"),
            (Script::IoOut { port: guest::PORT, data: 0x41b2_002b_u32.to_le_bytes().to_vec() }, "unexpected"),
            (Script::Fail(libc::EFAULT), "Bad address"),
        ] {
            let outcome = probe_script(script);
            assert!(!outcome.usable);
            for part in ["segments and MSRs at ring 0", how, "ark machine start"] {
                assert!(outcome.reason.contains(part), "{part:?} is not in {:?}", outcome.reason);
            }
        }
    }

    #[test]
    fn what_the_host_refuses_is_reported_with_what_to_do() {
        let busy = probe_fake(FakeHypervisor::new().failing(Step::CreateVm, libc::EBUSY));
        assert!(busy.reason.contains("another hypervisor"), "{}", busy.reason);
        let other = probe_fake(FakeHypervisor::new().failing(Step::CreateVcpu(0), libc::ENOMEM));
        assert!(other.reason.contains("create a processor"), "{}", other.reason);
        let missing = probe_with(TIME_LIMIT, || Err(OpenError::Missing.into()));
        assert!(missing.reason.contains("modprobe"), "{}", missing.reason);
        assert!(!busy.usable && !other.usable && !missing.usable);
    }

    #[test]
    fn a_guest_without_end_is_stopped_within_a_second() {
        let outcome = probe_script(Script::Busy);
        assert!(!outcome.usable);
        assert!(outcome.reason.contains("did not end within 900 ms"), "{}", outcome.reason);
        assert!(outcome.duration < Duration::from_secs(2), "{:?}", outcome.duration);
    }

    #[test]
    fn a_kvm_that_hangs_is_given_up_within_a_second() {
        let outcome = probe_with(TIME_LIMIT, || {
            thread::sleep(Duration::from_secs(3));
            Err(OpenError::Missing.into())
        });
        assert!(!outcome.usable);
        assert!(outcome.reason.contains("could not be interrupted"), "{}", outcome.reason);
        assert!(outcome.duration < Duration::from_secs(2), "{:?}", outcome.duration);
    }
}
