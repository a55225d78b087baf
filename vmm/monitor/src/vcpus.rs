//! The virtual processors' threads: `vcpu0`, `vcpu1`, … They can be made before there is a processor for them: see [`Crew`].
//!
//! ```text
//!            run                      park, end
//!  parked ───────► running (KVM_RUN) ───────────► parked ──┐ save
//!    │ end                   │ the guest's processor or KVM  └─► parked
//!    │                       │ cannot go on
//!    └────► gone ◄───────────┘
//! ```
//!
//! The owner writes the order (park, run, save, end), then kicks. A vCPU looks at the order when it comes back interrupted; a kick stays in
//! force until the vCPU has taken it back ([`ark_hal::Kick`]), so no order is lost.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ark_devices::bus::Bus;
use ark_hal::{Exit, HalError, Kick, SystemEvent, Vcpu, VcpuState};

use crate::mailbox::{Mailbox, News};
use crate::signals;

/// Stack of a vCPU's thread: it runs the device models' register accesses and nothing deeper.
const STACK: usize = 128 << 10;
/// How long parking may take; a vCPU is in user space, and a device at work, for far less.
pub(crate) const PARK_LIMIT: Duration = Duration::from_secs(5);

/// Threads that wait for a vCPU each: to make a thread takes far longer than to wake one. Those that get none end when this
/// is dropped.
#[derive(Default)]
pub struct Crew(Vec<Member>);

struct Member {
    work: mpsc::Sender<Work>,
    thread: JoinHandle<()>,
}

/// What a thread of the crew is for.
struct Work {
    shared: Arc<Shared>,
    vcpu: Box<dyn Vcpu>,
}

impl Crew {
    /// Makes threads until there are `count`, in the order of the vCPUs.
    ///
    /// # Errors
    /// When the host has no thread left.
    pub fn grow_to(&mut self, count: usize) -> io::Result<()> {
        for index in self.0.len()..count {
            let (work, inbox) = mpsc::channel::<Work>();
            let wait = move || {
                // The thread may be made while signals still have to end the process, and is not to be who they end it by.
                signals::leave_to_others();
                if let Ok(Work { shared, vcpu }) = inbox.recv() {
                    life_of_a_thread(&shared, index, vcpu);
                }
            };
            let thread =
                std::thread::Builder::new().name(format!("vcpu{index}")).stack_size(STACK).spawn(wait)?;
            self.0.push(Member { work, thread });
        }
        Ok(())
    }
}

/// The two address spaces a vCPU can leave the guest for.
pub struct Buses {
    /// Ports.
    pub ports: Bus,
    /// Guest-physical addresses without memory.
    pub mmio: Bus,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Order {
    Park,
    Run,
    /// To be followed by each thread once: it fills its slot of [`Orders::saved`] and is parked again.
    Save,
    End,
}

/// vCPUs that did not park in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0} vCPUs did not stop within {limit} s; the host is overloaded or KVM hangs", limit = PARK_LIMIT.as_secs())]
pub struct StillRunning(usize);

/// vCPUs whose state could not be had.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// One is in a state that nothing can go on from.
    #[error("the processor {index} cannot be saved: {source}")]
    Vcpu {
        /// Which.
        index: usize,
        /// What the hypervisor said.
        source: HalError,
    },
    /// One runs, has gone for good or does not answer.
    #[error("{0} vCPUs do not stand still; the guest has crashed or the host is overloaded")]
    Missing(usize),
}

/// All vCPUs of a VM. Dropping it ends and joins them.
pub struct Vcpus {
    shared: Arc<Shared>,
    kickers: Vec<Arc<dyn Kick>>,
    threads: Vec<JoinHandle<()>>,
}

struct Shared {
    state: Mutex<Orders>,
    changed: Condvar,
    buses: Arc<Buses>,
    mailbox: Mailbox,
    exits: AtomicU64,
    /// When the first of them first ran, nanoseconds of `CLOCK_MONOTONIC`; 0 before.
    first_run: AtomicU64,
}

struct Orders {
    order: Order,
    /// Threads that are in the guest or on their way there.
    running: usize,
    /// Threads that have ended because their processor, or KVM, could not go on.
    gone: usize,
    /// What each vCPU has saved; one slot per vCPU while [`Order::Save`] holds.
    saved: Vec<Option<Result<VcpuState, HalError>>>,
}

impl Shared {
    fn orders(&self) -> MutexGuard<'_, Orders> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Vcpus {
    /// A parked thread for each of `vcpus`, of `crew` as far as possible.
    ///
    /// # Errors
    /// When the host has no thread left.
    pub fn spawn(
        vcpus: Vec<Box<dyn Vcpu>>,
        mut crew: Crew,
        buses: Arc<Buses>,
        mailbox: Mailbox,
    ) -> io::Result<Self> {
        crew.grow_to(vcpus.len())?;
        let state = Mutex::new(Orders { order: Order::Park, running: 0, gone: 0, saved: vec![] });
        let (exits, first_run) = (AtomicU64::new(0), AtomicU64::new(0));
        let shared = Arc::new(Shared { state, changed: Condvar::new(), buses, mailbox, exits, first_run });
        let kickers = vcpus.iter().map(|vcpu| vcpu.kicker()).collect();
        let threads = vcpus.into_iter().zip(crew.0).map(|(vcpu, Member { work, thread })| {
            // A thread that waits takes what comes.
            let _ = work.send(Work { shared: Arc::clone(&shared), vcpu });
            thread
        });
        let threads = threads.collect();
        Ok(Self { shared, kickers, threads })
    }

    /// Lets them run.
    pub fn run(&self) {
        self.shared.orders().order = Order::Run;
        self.shared.changed.notify_all();
    }

    /// Gets them out of the guest and waits until all are.
    ///
    /// # Errors
    /// [`StillRunning`] after five seconds.
    pub fn park(&self) -> Result<(), StillRunning> {
        self.halt(Order::Park)
    }

    /// The state of each vCPU, in order, saved by its own thread. All have to be parked, and are so afterwards.
    ///
    /// # Errors
    /// [`SaveError`].
    pub fn save(&self) -> Result<Vec<VcpuState>, SaveError> {
        let deadline = Instant::now() + PARK_LIMIT;
        let mut orders = self.shared.orders();
        if orders.running + orders.gone > 0 {
            return Err(SaveError::Missing(orders.running + orders.gone));
        }
        orders.saved = self.threads.iter().map(|_| None).collect();
        orders.order = Order::Save;
        self.shared.changed.notify_all();
        while orders.saved.iter().any(Option::is_none) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            orders = self.shared.changed.wait_timeout(orders, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        orders.order = Order::Park;
        let saved = std::mem::take(&mut orders.saved);
        drop(orders);
        let missing = saved.iter().filter(|slot| slot.is_none()).count();
        if missing > 0 {
            return Err(SaveError::Missing(missing));
        }
        let states = saved.into_iter().flatten().enumerate();
        states.map(|(index, state)| state.map_err(|source| SaveError::Vcpu { index, source })).collect()
    }

    /// Exits handled in user space so far.
    #[must_use]
    pub fn exits(&self) -> u64 {
        self.shared.exits.load(Ordering::Relaxed)
    }

    /// When the first of them first ran, nanoseconds of `CLOCK_MONOTONIC`; 0 before.
    #[must_use]
    pub fn first_run_ns(&self) -> u64 {
        self.shared.first_run.load(Ordering::Relaxed)
    }

    fn halt(&self, order: Order) -> Result<(), StillRunning> {
        let deadline = Instant::now() + PARK_LIMIT;
        let mut orders = self.shared.orders();
        orders.order = order;
        self.shared.changed.notify_all();
        self.kickers.iter().for_each(|kicker| kicker.kick());
        while orders.running > 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(StillRunning(orders.running));
            }
            let woken = self.shared.changed.wait_timeout(orders, left);
            orders = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(())
    }
}

impl Drop for Vcpus {
    fn drop(&mut self) {
        // Threads that hang in the kernel are left to the end of the process.
        if self.halt(Order::End).is_ok() {
            for thread in self.threads.drain(..) {
                let _ = thread.join();
            }
        }
    }
}

fn life_of_a_thread(shared: &Shared, index: usize, mut vcpu: Box<dyn Vcpu>) {
    loop {
        match next_task(shared, index) {
            Task::Run => {
                note_first_run(&shared.first_run);
                let goes_on = run_until_interrupted(shared, &mut *vcpu);
                if goes_on {
                    vcpu.note_pause();
                }
                let mut orders = shared.orders();
                orders.running -= 1;
                orders.gone += usize::from(!goes_on);
                drop(orders);
                shared.changed.notify_all();
                if !goes_on {
                    return;
                }
            }
            Task::Save => {
                let state = vcpu.save();
                // The owner may have stopped waiting.
                if let Some(slot) = shared.orders().saved.get_mut(index) {
                    *slot = Some(state);
                }
                shared.changed.notify_all();
            }
            Task::End => return,
        }
    }
}

/// Writes the time down unless one is written already.
fn note_first_run(first_run: &AtomicU64) {
    if first_run.load(Ordering::Relaxed) == 0 {
        let _ = first_run.compare_exchange(0, monotonic_ns(), Ordering::Relaxed, Ordering::Relaxed);
    }
}

/// `CLOCK_MONOTONIC`, nanoseconds.
fn monotonic_ns() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is valid for the call, which only writes the struct.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    let (seconds, ns) = (time.tv_sec.unsigned_abs(), time.tv_nsec.unsigned_abs());
    seconds.saturating_mul(1_000_000_000).saturating_add(ns)
}

/// What a parked thread is to do next.
enum Task {
    Run,
    Save,
    End,
}

/// Waits for an order that concerns vCPU `index`.
fn next_task(shared: &Shared, index: usize) -> Task {
    let mut orders = shared.orders();
    loop {
        match orders.order {
            Order::Run => {
                orders.running += 1;
                return Task::Run;
            }
            Order::Save if orders.saved.get(index).is_some_and(Option::is_none) => return Task::Save,
            Order::End => return Task::End,
            Order::Park | Order::Save => {
                orders = shared.changed.wait(orders).unwrap_or_else(PoisonError::into_inner);
            }
        }
    }
}

/// Runs the guest until there is an order to look at (true) or the processor cannot go on (false).
fn run_until_interrupted(shared: &Shared, vcpu: &mut dyn Vcpu) -> bool {
    loop {
        let outcome = match vcpu.run() {
            Ok(exit) => handle(&shared.buses, exit),
            Err(error) => Outcome::Dead(News::Failed(format!("{error}; see the host kernel's log"))),
        };
        match outcome {
            Outcome::Again => {
                shared.exits.fetch_add(1, Ordering::Relaxed);
            }
            Outcome::Look => {
                vcpu.set_immediate_exit(false);
                if shared.orders().order != Order::Run {
                    return true;
                }
            }
            Outcome::Dead(news) => {
                shared.mailbox.send(news);
                return false;
            }
        }
    }
}

/// What an exit leads to.
#[derive(Debug, PartialEq, Eq)]
enum Outcome {
    /// Back into the guest.
    Again,
    /// Look whether there is an order.
    Look,
    /// This processor never runs again.
    Dead(News),
}

fn handle(buses: &Buses, exit: Exit<'_>) -> Outcome {
    let crash = |how: String| Outcome::Dead(News::GuestCrash(how));
    match exit {
        Exit::IoIn { port, data } => buses.ports.read(port.into(), data),
        Exit::IoOut { port, data } => buses.ports.write(port.into(), data),
        Exit::MmioRead { addr, data } => buses.mmio.read(addr, data),
        Exit::MmioWrite { addr, data } => buses.mmio.write(addr, data),
        Exit::Interrupted => return Outcome::Look,
        Exit::Halt => return crash("it halted with nothing to wake it".into()),
        Exit::Shutdown => return crash("triple fault".into()),
        Exit::System(SystemEvent::Shutdown) => return Outcome::Dead(News::GuestPowerOff),
        Exit::System(SystemEvent::Reset) => return Outcome::Dead(News::GuestReset),
        Exit::System(SystemEvent::Crash) => return Outcome::Dead(News::GuestPanic),
        Exit::System(SystemEvent::Other(kind)) => return crash(format!("unknown machine event {kind}")),
        Exit::FailEntry { reason } => {
            return crash(format!("the host's processor refused to enter the guest, reason {reason:#x}"));
        }
        Exit::InternalError { suberror } => {
            return crash(format!("KVM could not emulate an instruction, suberror {suberror}"));
        }
        Exit::Unknown { reason } => return crash(format!("KVM left the guest for unknown reason {reason}")),
    }
    Outcome::Again
}
