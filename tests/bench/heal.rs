//! A killed VMM is noticed and its agent is back, against a plain create of the same template.

use std::time::{Duration, Instant};

use ark_chaos::http::Connection;
use ark_tests::{Rest, World};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::peers::Bench;
use crate::report::{Must, Report};

const IMAGE: &str = "base";
/// Time the pool has to fill up again.
const BREATH: Duration = Duration::from_millis(2500);
/// Longest time until an agent is back.
const LIMIT: Duration = Duration::from_secs(120);

pub(crate) fn measure(bench: &Bench, report: &mut Report) {
    let world = World::new().with_pool(2, 2);
    world.create_fork(IMAGE, "first");
    let _ = world.ark(["rm", "first"]).ok();
    let mut rest = Rest::connect(&world);
    let (mut back, mut created) = (Vec::new(), Vec::new());
    let body = format!("{{\"name\":\"heal\",\"image\":\"{IMAGE}\",\"restart\":{{\"when\":\"always\"}}}}");
    for _ in 0..bench.samples(20) {
        std::thread::sleep(BREATH);
        let (agent, ms) = rest.call("POST", "/v1/agents", &body);
        created.push(ms);
        let pid = agent["vmm_pid"].as_i64().and_then(|pid| i32::try_from(pid).ok()).expect("it has a VMM");
        // The first restart of each: later ones are meant to wait.
        let mut events = Connection::open(&world.run_dir().api_socket(), LIMIT).expect("arkd listens");
        let newest = rest.call("GET", "/v1/health", "").0["log"]["newest"].clone();
        events.follow(&format!("/v1/events?after={newest}")).expect("arkd reads");
        std::thread::sleep(BREATH);
        let begin = Instant::now();
        kill(Pid::from_raw(pid), Signal::SIGKILL).expect("the VMM is there");
        events.wait_for("agent.restarted").expect("it is back");
        back.push(begin.elapsed().as_secs_f64() * 1e3);
        rest.exec_true("heal");
        rest.delete("heal");
    }
    let name = "kill -9 of a VMM to its agent's being back, event read";
    report.against(name, "ms", &back, ("plain create", &created), Must::AtMost(3.0));
    drop(rest);
    world.end();
}
