//! A mixed load on real VMs, with an `arkd` that is killed time and again, and VMMs that are killed, too. `make soak` has more of it.

use std::time::Duration;

use ark_chaos::{Memory, Stage, Storm, storm};
use ark_tests::World;
use ark_types::layout::StateDir;

/// Points at which `arkd` is killed, unless `ARK_CHAOS_ROUNDS` says another number.
const POINTS: usize = 8;
/// Clients at once: guests share a processor or two, so more of them only wait for each other.
const CLIENTS: usize = 3;

#[test]
fn nothing_acknowledged_is_lost_and_nothing_leaks_wherever_arkd_is_killed() {
    let world = World::new();
    let (run, state, dir) = (world.run_dir(), StateDir(world.path().join("state")), world.path().to_owned());
    let stage = Stage {
        arkd: Box::new(|| world.command("arkd")),
        run,
        state,
        dir,
        memory: Memory::File,
        booted_mib: 128,
        most_agents: 8,
        has_pool: false,
        load: Duration::from_secs(4),
        patience: Duration::from_secs(300),
    };
    storm(&stage, Storm::from_env(POINTS, CLIENTS));
    drop(stage);
    world.end();
}
