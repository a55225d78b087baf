//! The life of the VM as a pure state machine: events in, effects out.
//!
//! ```text
//!  event ╲ state   starting        running                   paused                    stopping
//!  ─────────────────────────────────────────────────────────────────────────────────────────────────────────
//!  started         → running: run
//!  pause                           → paused: park
//!  resume                                                    → running: run
//!  stop, no grace                  → ended (deadline)        → ended (deadline)        → ended (deadline)
//!  stop, grace                     → stopping: ask, timer    → stopping: run, ask, …   timer (never later)
//!  power-off                       → ended (power-off)       → ended (power-off)       → ended (stopped)
//!  reset                           → ended (reboot)          → ended (reboot)          → ended (stopped)
//!  panic                           panicked: timer           panicked: timer           panicked: timer
//!  crash                           → ended (crash)           → ended (crash)           → ended (crash)
//!  cannot ask                                                                          → ended (deadline)
//!  timer                           → ended (panic)           → ended (panic)           → ended (deadline)
//!  failed          → ended (…)     → ended (internal)        → ended (internal)        → ended (internal)
//!  signal          → ended (signal) in every state
//! ```
//!
//! A snapshot is taken of a running or a paused VM, and memory is given back by a paused one ([`Life::may_snapshot`],
//! [`Life::may_reclaim`]); neither is a move.
//!
//! Once the guest has said that it panicked, every end that comes from the guest or from the timer is a panic: the reset
//! that follows must not hide it. An empty field means that the event is refused (requests) or of no effect (news).
//! Every move passes [`VmState::may_become`].

use std::time::Duration;

use ark_types::vmm::{ExitReason, VmState};

use crate::mailbox::News;

/// Time a panicking kernel has to print and to reset itself.
pub const PANIC_GRACE: Duration = Duration::from_secs(3);

/// What the owner of the state learns.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The VM is put together.
    Started,
    /// A client asks to stop the vCPUs.
    Pause,
    /// A client asks to let them go on.
    Resume,
    /// A client asks to end the VM; the guest has this long to follow.
    Stop(Duration),
    /// Another thread has news.
    News(News),
    /// The timer set by [`Effect::Timer`] has run out.
    Timer,
    /// SIGTERM, SIGINT or SIGHUP came.
    Signal(i32),
}

/// What the owner then does, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Park the vCPUs and quieten the devices.
    Park,
    /// Let the devices and the vCPUs run.
    Run,
    /// Ask the guest to power off.
    AskPowerOff,
    /// Send [`Event::Timer`] after this time, or earlier when an earlier timer is set.
    Timer(Duration),
    /// The VM has ended.
    End(End),
}

/// How the VM ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct End {
    /// Why.
    pub reason: ExitReason,
    /// What there is more to say.
    pub detail: Option<String>,
}

/// A request that does not fit the state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the VM is {state}: it cannot be {what}")]
pub struct Refused {
    /// The state.
    pub state: VmState,
    /// `paused`, `resumed`, `stopped`, …
    pub what: &'static str,
}

/// The state of one VM.
#[derive(Debug)]
pub struct Life {
    state: VmState,
    panicked: bool,
}

impl Default for Life {
    fn default() -> Self {
        Self { state: VmState::Starting, panicked: false }
    }
}

impl Life {
    /// Where the VM is in its life.
    #[must_use]
    pub fn state(&self) -> VmState {
        self.state
    }

    /// Takes in `event` and says what is to be done.
    ///
    /// # Errors
    /// [`Refused`] for a request that does not fit the state.
    pub fn on(&mut self, event: Event) -> Result<Vec<Effect>, Refused> {
        match event {
            Event::Started => Ok(self.move_to(VmState::Running, vec![Effect::Run])),
            Event::Pause => {
                self.expect(self.state == VmState::Running, "paused")?;
                Ok(self.move_to(VmState::Paused, vec![Effect::Park]))
            }
            Event::Resume => {
                self.expect(self.state == VmState::Paused, "resumed")?;
                Ok(self.move_to(VmState::Running, vec![Effect::Run]))
            }
            Event::Stop(grace) => self.stop(grace),
            Event::News(news) => Ok(self.news(news)),
            Event::Timer => Ok(self.timer()),
            Event::Signal(signal) => Ok(self.end(ExitReason::Signal, Some(signal_name(signal)))),
        }
    }

    /// Whether a snapshot can be taken; if so, whether the VM runs and has to stand still for it.
    ///
    /// # Errors
    /// [`Refused`] unless the VM is running or paused. The kernel that goes on from a panic would only panic again.
    pub fn may_snapshot(&self) -> Result<bool, Refused> {
        self.expect(matches!(self.state, VmState::Running | VmState::Paused), "snapshotted")?;
        self.expect(!self.panicked, "snapshotted, for its kernel has panicked")?;
        Ok(self.state == VmState::Running)
    }

    /// Whether the VM's memory can be given back: nobody may be at work in it.
    ///
    /// # Errors
    /// [`Refused`] unless the VM is paused.
    pub fn may_reclaim(&self) -> Result<(), Refused> {
        self.expect(self.state == VmState::Paused, "relieved of its memory; pause and snapshot it first")
    }

    fn stop(&mut self, grace: Duration) -> Result<Vec<Effect>, Refused> {
        let lives = matches!(self.state, VmState::Running | VmState::Paused | VmState::Stopping);
        self.expect(lives, "stopped")?;
        if grace.is_zero() {
            return Ok(self.end(ExitReason::StopDeadline, Some("no time was given to the guest".into())));
        }
        let ask = vec![Effect::AskPowerOff, Effect::Timer(grace)];
        Ok(match self.state {
            // Asked already: only the time can get shorter.
            VmState::Stopping => vec![Effect::Timer(grace)],
            // A guest that stands still cannot power itself off.
            VmState::Paused => {
                self.move_to(VmState::Stopping, [Effect::Run].into_iter().chain(ask).collect())
            }
            VmState::Starting | VmState::Running | VmState::Ended => self.move_to(VmState::Stopping, ask),
        })
    }

    fn news(&mut self, news: News) -> Vec<Effect> {
        let stopping = self.state == VmState::Stopping;
        match news {
            News::GuestPowerOff if stopping => self.end_by_guest(ExitReason::Stopped, None),
            News::GuestReset if stopping => self.end_by_guest(ExitReason::Stopped, None),
            News::GuestPowerOff => self.end_by_guest(ExitReason::GuestPoweroff, None),
            News::GuestReset => self.end_by_guest(ExitReason::GuestReboot, None),
            News::GuestCrash(how) => self.end_by_guest(ExitReason::GuestCrash, Some(how)),
            News::GuestPanic => {
                self.panicked = true;
                vec![Effect::Timer(PANIC_GRACE)]
            }
            News::CannotAsk(why) if stopping => self.end_by_guest(ExitReason::StopDeadline, Some(why)),
            News::CannotAsk(_) => vec![],
            News::Failed(why) => {
                let never_ran = self.state == VmState::Starting;
                let reason = if never_ran { ExitReason::HostError } else { ExitReason::Internal };
                self.end(reason, Some(why))
            }
        }
    }

    fn timer(&mut self) -> Vec<Effect> {
        match self.state {
            VmState::Stopping => self.end_by_guest(ExitReason::StopDeadline, None),
            VmState::Running | VmState::Paused if self.panicked => {
                self.end_by_guest(ExitReason::GuestPanic, None)
            }
            VmState::Starting | VmState::Running | VmState::Paused | VmState::Ended => vec![],
        }
    }

    fn expect(&self, fits: bool, what: &'static str) -> Result<(), Refused> {
        if fits { Ok(()) } else { Err(Refused { state: self.state, what }) }
    }

    /// An end for `reason`, unless the guest panicked before.
    fn end_by_guest(&mut self, reason: ExitReason, detail: Option<String>) -> Vec<Effect> {
        if self.panicked {
            let detail = "the console log has the kernel's last words".to_owned();
            return self.end(ExitReason::GuestPanic, Some(detail));
        }
        self.end(reason, detail)
    }

    fn end(&mut self, reason: ExitReason, detail: Option<String>) -> Vec<Effect> {
        self.move_to(VmState::Ended, vec![Effect::End(End { reason, detail })])
    }

    /// The only place that changes the state; an illegal move has no effects.
    fn move_to(&mut self, next: VmState, effects: Vec<Effect>) -> Vec<Effect> {
        if !self.state.may_become(next) {
            return vec![];
        }
        self.state = next;
        effects
    }
}

fn signal_name(signal: i32) -> String {
    match signal {
        libc::SIGTERM => "SIGTERM".to_owned(),
        libc::SIGINT => "SIGINT".to_owned(),
        libc::SIGHUP => "SIGHUP".to_owned(),
        other => format!("signal {other}"),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const GRACE: Duration = Duration::from_secs(5);

    fn running() -> Life {
        let mut life = Life::default();
        assert_eq!(life.on(Event::Started), Ok(vec![Effect::Run]));
        life
    }

    fn reason(effects: &[Effect]) -> Option<ExitReason> {
        effects.iter().find_map(|e| if let Effect::End(end) = e { Some(end.reason) } else { None })
    }

    fn news(life: &mut Life, news: News) -> Option<ExitReason> {
        reason(&life.on(Event::News(news)).unwrap())
    }

    #[test]
    fn a_guest_that_ends_by_itself_says_how() {
        for (what, why) in [
            (News::GuestPowerOff, ExitReason::GuestPoweroff),
            (News::GuestReset, ExitReason::GuestReboot),
            (News::GuestCrash("triple fault".into()), ExitReason::GuestCrash),
            (News::Failed("KVM".into()), ExitReason::Internal),
        ] {
            let mut life = running();
            assert_eq!(news(&mut life, what), Some(why));
            assert_eq!(life.state(), VmState::Ended);
        }
    }

    #[test]
    fn a_panic_wins_over_the_reset_that_follows_and_over_the_deadline() {
        for follows in [
            Event::News(News::GuestReset),
            Event::News(News::GuestPowerOff),
            Event::News(News::GuestCrash(String::new())),
            Event::Timer,
        ] {
            for stop_first in [false, true] {
                let mut life = running();
                if stop_first {
                    life.on(Event::Stop(GRACE)).unwrap();
                }
                let effects = life.on(Event::News(News::GuestPanic)).unwrap();
                assert_eq!(effects, [Effect::Timer(PANIC_GRACE)]);
                assert_eq!(reason(&life.on(follows.clone()).unwrap()), Some(ExitReason::GuestPanic));
            }
        }
    }

    #[test]
    fn a_stop_asks_then_waits_and_then_ends() {
        let mut life = running();
        assert_eq!(life.on(Event::Stop(GRACE)), Ok(vec![Effect::AskPowerOff, Effect::Timer(GRACE)]));
        assert_eq!(life.state(), VmState::Stopping);
        assert_eq!(life.on(Event::Stop(GRACE / 2)), Ok(vec![Effect::Timer(GRACE / 2)]));
        assert_eq!(reason(&life.on(Event::Timer).unwrap()), Some(ExitReason::StopDeadline));
    }

    #[test]
    fn a_guest_that_follows_a_stop_was_stopped_whether_it_powers_off_or_resets() {
        for what in [News::GuestPowerOff, News::GuestReset] {
            let mut life = running();
            life.on(Event::Stop(GRACE)).unwrap();
            assert_eq!(news(&mut life, what), Some(ExitReason::Stopped));
        }
    }

    #[test]
    fn a_stop_without_grace_or_of_a_guest_that_cannot_be_asked_ends_at_once() {
        assert_eq!(
            reason(&running().on(Event::Stop(Duration::ZERO)).unwrap()),
            Some(ExitReason::StopDeadline)
        );
        let mut life = running();
        life.on(Event::Stop(GRACE)).unwrap();
        assert_eq!(news(&mut life, News::CannotAsk("no vsock".into())), Some(ExitReason::StopDeadline));
    }

    #[test]
    fn a_paused_guest_runs_again_to_stop() {
        let mut life = running();
        assert_eq!(life.on(Event::Pause), Ok(vec![Effect::Park]));
        let effects = life.on(Event::Stop(GRACE)).unwrap();
        assert_eq!(effects, [Effect::Run, Effect::AskPowerOff, Effect::Timer(GRACE)]);
    }

    #[test]
    fn requests_that_do_not_fit_the_state_are_refused_with_a_sentence() {
        let mut life = Life::default();
        let refused = life.on(Event::Pause).unwrap_err();
        assert_eq!(refused.to_string(), "the VM is starting: it cannot be paused");
        let mut life = running();
        assert!(life.on(Event::Resume).is_err());
        life.on(Event::Pause).unwrap();
        assert!(life.on(Event::Pause).is_err());
        life.on(Event::Signal(libc::SIGTERM)).unwrap();
        for event in [Event::Pause, Event::Resume, Event::Stop(GRACE)] {
            assert!(life.on(event).is_err());
        }
    }

    #[test]
    fn a_snapshot_is_of_a_living_vm_and_memory_is_taken_from_a_paused_one_only() {
        let mut life = Life::default();
        assert!(life.may_snapshot().is_err() && life.may_reclaim().is_err());
        life.on(Event::Started).unwrap();
        assert_eq!(life.may_snapshot(), Ok(true));
        let refused = life.may_reclaim().unwrap_err().to_string();
        assert!(refused.contains("running") && refused.contains("pause"), "{refused}");
        life.on(Event::Pause).unwrap();
        assert_eq!(life.may_snapshot(), Ok(false));
        assert_eq!(life.may_reclaim(), Ok(()));
        life.on(Event::News(News::GuestPanic)).unwrap();
        assert!(life.may_snapshot().unwrap_err().to_string().contains("panicked"));
        life.on(Event::Signal(libc::SIGTERM)).unwrap();
        assert!(life.may_snapshot().is_err() && life.may_reclaim().is_err());
    }

    #[test]
    fn a_signal_ends_every_living_state() {
        let mut paused = running();
        paused.on(Event::Pause).unwrap();
        let mut stopping = running();
        stopping.on(Event::Stop(GRACE)).unwrap();
        for mut life in [Life::default(), running(), paused, stopping] {
            let effects = life.on(Event::Signal(libc::SIGHUP)).unwrap();
            let end = End { reason: ExitReason::Signal, detail: Some("SIGHUP".into()) };
            assert_eq!(effects, [Effect::End(end)]);
        }
    }

    fn any_event() -> impl Strategy<Value = Event> {
        prop_oneof![
            Just(Event::Started),
            Just(Event::Pause),
            Just(Event::Resume),
            (0u64..3).prop_map(|s| Event::Stop(Duration::from_secs(s))),
            Just(Event::Timer),
            Just(Event::Signal(libc::SIGTERM)),
            prop::sample::select(vec![
                News::GuestPowerOff,
                News::GuestReset,
                News::GuestPanic,
                News::GuestCrash("x".into()),
                News::Failed("x".into()),
                News::CannotAsk("x".into()),
            ])
            .prop_map(Event::News),
        ]
    }

    proptest! {
        #[test]
        fn every_move_is_in_the_table_and_the_end_is_told_once(events in prop::collection::vec(any_event(), 0..30)) {
            let mut life = Life::default();
            let mut ends = 0;
            let mut vcpus_run = false;
            for event in events {
                let before = life.state();
                let effects = life.on(event).unwrap_or_default();
                prop_assert!(before == life.state() || before.may_become(life.state()));
                prop_assert!(before != VmState::Ended || effects.iter().all(|e| matches!(e, Effect::Timer(_))));
                for effect in effects {
                    match effect {
                        Effect::Run => { prop_assert!(!vcpus_run); vcpus_run = true; }
                        Effect::Park => { prop_assert!(vcpus_run); vcpus_run = false; }
                        Effect::End(_) => ends += 1,
                        Effect::AskPowerOff | Effect::Timer(_) => {}
                    }
                }
                match life.state() {
                    VmState::Running | VmState::Stopping => prop_assert!(vcpus_run),
                    VmState::Starting | VmState::Paused => prop_assert!(!vcpus_run),
                    VmState::Ended => {}
                }
            }
            prop_assert_eq!(ends, u32::from(life.state() == VmState::Ended));
        }
    }
}
