//! A mixed load on an `arkd` that is killed at 50 random points, with VMMs that are killed, too.

use std::time::Duration;

use ark_chaos::{Memory, Stage, Storm, storm};

use crate::harness::{Place, arkd, hasty_arkd};

/// Points at which it is killed.
const POINTS: usize = 50;

fn weather(place: Place, pool: bool) -> Stage<'static> {
    let (run, state, dir) = (place.run(), place.state(), place.dir.path().to_owned());
    Stage {
        arkd: Box::new(move || {
            if !pool {
                return arkd(&place, &[]);
            }
            let mut command = hasty_arkd(&place);
            command.env("ARK_POOL", "1").env("ARK_STANDBY", "1");
            command
        }),
        run,
        state,
        dir,
        memory: Memory::Evaluator,
        booted_mib: 64,
        most_agents: 16,
        has_pool: pool,
        load: Duration::from_millis(600),
        patience: Duration::from_secs(60),
    }
}

/// Half of the points, each half with seeds of its own.
fn half(pool: bool) {
    let plan = Storm::from_env(POINTS, 4);
    let seed = plan.seed.wrapping_add(pool.into());
    storm(&weather(Place::new(), pool), Storm { seed, rounds: plan.rounds.div_ceil(2), ..plan });
}

#[test]
fn nothing_acknowledged_is_lost_and_nothing_leaks_wherever_arkd_is_killed() {
    half(false);
}

#[test]
fn the_same_with_vmms_and_forks_that_are_made_ahead_and_many_checkpoints() {
    half(true);
}
