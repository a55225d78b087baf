//! exec of `/bin/true`: a REST call to its reply, against fork and exec inside the guest.

use ark_tests::{Rest, World};

use crate::peers::Bench;
use crate::report::{Must, Report};

/// Spawns `/bin/true` N times in the guest with fork and exec and prints each time in microseconds.
const FORK_EXEC: &str = "
import os, sys, time
for _ in range(int(sys.argv[1])):
    a = time.perf_counter_ns()
    pid = os.fork()
    if pid == 0: os.execv('/bin/true', ['true'])
    os.waitpid(pid, 0)
    print((time.perf_counter_ns() - a) // 1000)
";
/// The same with posix_spawn: no copy of the interpreter's page tables.
const SPAWN: &str = "
import os, sys, time
for _ in range(int(sys.argv[1])):
    a = time.perf_counter_ns()
    os.waitpid(os.posix_spawn('/bin/true', ['true'], {}), 0)
    print((time.perf_counter_ns() - a) // 1000)
";

pub(crate) fn measure(bench: &Bench, report: &mut Report) {
    let world = World::new();
    let _ = world.ark(["create", "--image", "python", "--name", "bench", "--memory", "256"]).ok();
    let mut rest = Rest::connect(&world);
    let in_guest = |program: &str| -> Vec<f64> {
        let said = world.ark(["exec", "bench", "--", "python3", "-c", program, "20"]).ok();
        said.stdout.lines().map(|l| l.parse::<f64>().expect("microseconds") / 1e3).collect()
    };
    rest.exec_true("bench");
    let (mut calls, mut fork, mut spawn) = (Vec::new(), Vec::new(), Vec::new());
    // In turns, so that all meet the same moods of the host.
    for _ in 0..bench.samples(10) {
        calls.extend((0..20).map(|_| rest.exec_true("bench")));
        fork.extend(in_guest(FORK_EXEC));
        spawn.extend(in_guest(SPAWN));
    }
    let name = "exec of /bin/true, REST call to reply";
    report.against(name, "ms", &calls, ("fork+exec in guest", &fork), Must::AtMost(3.0));
    report.against(
        "the same, against posix_spawn",
        "ms",
        &calls,
        ("posix_spawn in guest", &spawn),
        Must::Shown,
    );
    drop(rest);
    world.end();
}
