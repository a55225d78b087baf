//! How many standbys there are to be of a template: decided from when agents were asked for, without a clock or anything else
//! of the world.
//!
//! Were there no standby at all and the requests were served one after the other, each for as long as it takes to make one,
//! a queue would form and dissolve. A pool that has as many standbys as that queue is long lets nobody wait, because what is
//! taken is made again at the same pace; with fewer, one that comes to a queue longer than the pool waits for the rest of it.
//! So the pool has to be as large as the longest queue lately, less those who may wait for `target_wait`.
//!
//! ```text
//!  queue   one longer with each request, one shorter each `make`
//!  peak    the longest queue, which fades: after `half_life` half of it is forgotten
//!  level   peak - target_wait / make, rounded; between min and max that is what is wanted
//! ```
//!
//! A request raises the level at once. In calm it falls by halves: a burst of 16 is forgotten after six half-lives. Half an
//! agent more is no reason to make one, and a quarter less none to give one up, so what is asked for steadily wants the same
//! number for ever.

use std::time::Duration;

use ark_types::pool::{MAX_STANDBYS, PoolPolicy};

/// Time that making a standby is taken for until one was made.
const MAKE_AT_FIRST: Duration = Duration::from_millis(250);
/// Bounds of that time: what is outside is a slip of a clock.
const MAKE: (Duration, Duration) = (Duration::from_millis(1), Duration::from_secs(600));
/// Part that the newest measurement has in the time that making one takes.
const NEWEST: f64 = 0.25;
/// The level rises when this much is lacking, in standbys.
const RISE: f64 = 0.5;
/// And falls when less than one is needed by this much.
const FALL: f64 = 0.25;

/// What is known of the demand for a template. Times are since any beginning, and do not go back.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Demand {
    half_life: Duration,
    /// When the rest was last brought up to date.
    at: Duration,
    /// Requests that would wait, were there no standby.
    queue: f64,
    /// The longest that was, fading.
    peak: f64,
    /// Requests per second, fading.
    rate: f64,
    /// Time that making one takes.
    make: Option<Duration>,
    /// What the demand wants, before min and max.
    level: u32,
}

impl Demand {
    /// No demand, of which half is forgotten after each `half_life`.
    pub(super) const fn none(half_life: Duration) -> Self {
        let (at, make) = (Duration::ZERO, None);
        Self { half_life, at, queue: 0.0, peak: 0.0, rate: 0.0, make, level: 0 }
    }

    /// An agent is asked for.
    pub(super) fn asked(&mut self, at: Duration, policy: &PoolPolicy) {
        self.pass(at);
        // What comes faster than it can be made wants all there may be, and is forgotten like anything else.
        self.queue = (self.queue + 1.0).min(f64::from(MAX_STANDBYS) * 2.0 + self.may_wait(policy));
        self.peak = self.peak.max(self.queue);
        // So that a steady rate is told as what it is.
        self.rate += std::f64::consts::LN_2 / self.half_life.as_secs_f64().max(1e-9);
    }

    /// One was made in `elapsed`.
    pub(super) fn made(&mut self, elapsed: Duration) {
        let elapsed = elapsed.clamp(MAKE.0, MAKE.1);
        let known = self.make.unwrap_or(elapsed);
        self.make = Some(known.mul_f64(1.0 - NEWEST) + elapsed.mul_f64(NEWEST));
    }

    /// How many are wanted under `policy`.
    pub(super) fn wanted(&mut self, at: Duration, policy: &PoolPolicy) -> u32 {
        self.pass(at);
        let need = self.peak - self.may_wait(policy);
        let (least, most) = (whole(need - RISE), whole(need - FALL));
        self.level = self.level.clamp(least, most);
        self.level.min(policy.max).max(policy.min)
    }

    /// Requests per second, as it was lately.
    pub(super) fn per_second(&mut self, at: Duration) -> f64 {
        self.pass(at);
        self.rate
    }

    /// Time that making one takes, once one was made.
    pub(super) const fn measured(&self) -> Option<Duration> {
        self.make
    }

    fn make(&self) -> Duration {
        self.make.unwrap_or(MAKE_AT_FIRST)
    }

    /// How many may wait for those before them.
    fn may_wait(&self, policy: &PoolPolicy) -> f64 {
        Duration::from_millis(policy.target_wait_ms).as_secs_f64() / self.make().as_secs_f64()
    }

    /// Lets time pass.
    fn pass(&mut self, at: Duration) {
        let passed = at.saturating_sub(self.at).as_secs_f64();
        self.at = self.at.max(at);
        let left = (-passed / self.half_life.as_secs_f64().max(1e-9)).exp2();
        self.queue = (self.queue - passed / self.make().as_secs_f64()).max(0.0);
        (self.peak, self.rate) = ((self.peak * left).max(self.queue), self.rate * left);
    }
}

/// The next whole number, at least 0.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "it is not below 0, and what is too much is as much as there can be"
)]
fn whole(number: f64) -> u32 {
    number.ceil().max(0.0) as u32
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const HALF_LIFE: Duration = Duration::from_secs(60);

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn policies() -> impl Strategy<Value = PoolPolicy> {
        (0..=MAX_STANDBYS, 0..=MAX_STANDBYS, 0..5000_u64).prop_map(|(a, b, target_wait_ms)| PoolPolicy {
            min: a.min(b),
            max: a.max(b),
            target_wait_ms,
        })
    }

    /// Demand after requests with so many milliseconds between each, and when the last one was.
    fn after(policy: &PoolPolicy, gaps: &[u64], make_ms: u64) -> (Demand, Duration) {
        let (mut demand, mut at) = (Demand::none(HALF_LIFE), Duration::ZERO);
        demand.made(ms(make_ms));
        for gap in gaps {
            at += ms(*gap);
            demand.asked(at, policy);
        }
        (demand, at)
    }

    #[test]
    fn a_burst_wants_one_for_each_less_those_who_may_wait() {
        let policy = PoolPolicy { min: 1, max: 100, target_wait_ms: 0 };
        let (mut demand, at) = after(&policy, &[0; 20], 100);
        let mut patient = demand;
        assert_eq!(demand.wanted(at, &policy), 20);
        assert_eq!(patient.wanted(at, &PoolPolicy { target_wait_ms: 500, ..policy }), 15, "five may wait");
        assert_eq!(patient.wanted(at, &PoolPolicy { target_wait_ms: 60_000, ..policy }), 1, "all may");
        // Slowly: a half-life later half of them are kept, and after six nothing is left of it.
        assert_eq!(demand.wanted(at + HALF_LIFE, &policy), 10);
        assert!(demand.wanted(at + HALF_LIFE * 3, &policy) > 1);
        assert_eq!(demand.wanted(at + HALF_LIFE * 7, &PoolPolicy { min: 0, ..policy }), 0);
    }

    #[test]
    fn what_comes_no_faster_than_it_is_made_wants_one() {
        let policy = PoolPolicy { min: 0, max: 100, target_wait_ms: 0 };
        let (mut demand, at) = after(&policy, &[200; 3000], 100);
        assert_eq!(demand.wanted(at, &policy), 1);
        assert!((demand.per_second(at) - 5.0).abs() < 0.5, "{demand:?}");
        // What comes faster than it can be made wants all there may be.
        let (mut demand, at) = after(&policy, &[50; 1000], 100);
        assert_eq!(demand.wanted(at, &policy), 100);
    }

    proptest! {
        #[test]
        fn it_is_never_below_min_nor_above_max(
            policy in policies(),
            gaps in prop::collection::vec(0..20_000_u64, 0..200),
            makes in prop::collection::vec(0..2_000_000_u64, 0..20),
        ) {
            let (mut demand, mut at) = (Demand::none(HALF_LIFE), Duration::ZERO);
            for (n, gap) in gaps.iter().enumerate() {
                at += ms(*gap);
                demand.asked(at, &policy);
                if let Some(make) = makes.get(n) {
                    demand.made(ms(*make));
                }
                let wanted = demand.wanted(at, &policy);
                prop_assert!((policy.min..=policy.max).contains(&wanted), "{wanted} of {policy:?}");
                prop_assert!(demand.per_second(at).is_finite());
            }
        }

        #[test]
        fn a_request_never_lowers_it_and_calm_never_raises_it(
            policy in policies(),
            gaps in prop::collection::vec(0..5000_u64, 1..100),
            make_ms in 1..2000_u64,
        ) {
            let (mut demand, mut at) = after(&policy, &[], make_ms);
            let mut before = demand.wanted(at, &policy);
            for gap in gaps {
                at += ms(gap);
                let calm = demand.wanted(at, &policy);
                prop_assert!(calm <= before, "{calm} after {before}");
                demand.asked(at, &policy);
                before = demand.wanted(at, &policy);
                prop_assert!(before >= calm, "{before} after {calm}");
            }
        }

        #[test]
        fn constant_demand_settles(policy in policies(), gap in 1..15_000_u64, make_ms in 1..30_000_u64) {
            // What is asked for just a little faster than it can be made takes its time to grow.
            prop_assume!(make_ms <= gap || 2 * make_ms >= 3 * gap);
            let (mut demand, mut at) = after(&policy, &vec![gap; 10_000], make_ms);
            let settled = demand.wanted(at, &policy);
            // Looked at between requests, too: it stays as it is.
            for step in 0..200 {
                at += ms(gap / 2);
                prop_assert_eq!(demand.wanted(at, &policy), settled, "in step {}", step);
                at += ms(gap - gap / 2);
                demand.asked(at, &policy);
                prop_assert_eq!(demand.wanted(at, &policy), settled, "in step {}", step);
            }
        }

        #[test]
        fn without_demand_it_comes_down_to_min(
            policy in policies(),
            gaps in prop::collection::vec(0..1000_u64, 0..300),
            make_ms in 1..1000_u64,
        ) {
            let (mut demand, at) = after(&policy, &gaps, make_ms);
            demand.wanted(at, &policy);
            // The queue of twice as many as there may be, and then half of it ten times over.
            let long = ms(make_ms) * MAX_STANDBYS * 2 + HALF_LIFE * 12;
            prop_assert_eq!(demand.wanted(at + long, &policy), policy.min);
        }
    }
}
