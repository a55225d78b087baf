//! Code in a warm interpreter, against an interpreter of its own.

use ark_tests::{Rest, World};

use crate::peers::Bench;
use crate::report::{Must, Report};

pub(crate) fn measure(bench: &Bench, report: &mut Report) {
    let world = World::new();
    world.create_fork("python", "bench");
    let mut rest = Rest::connect(&world);
    let eval = |rest: &mut Rest| rest.call("POST", "/v1/agents/bench/eval", "{\"code\":\"6*7\"}").1;
    let exec = |rest: &mut Rest| {
        let body = "{\"argv\":[\"python3\",\"-c\",\"print(6*7)\"]}";
        rest.call("POST", "/v1/agents/bench/exec", body).1
    };
    eval(&mut rest);
    exec(&mut rest);
    let (mut warm, mut cold) = (Vec::new(), Vec::new());
    for _ in 0..bench.samples(40) {
        cold.push(exec(&mut rest));
        warm.extend((0..5).map(|_| eval(&mut rest)));
    }
    let other = ("exec of python3 -c", cold.as_slice());
    report.against("eval in a warm interpreter, round trip", "ms", &warm, other, Must::AtMost(0.1));
    drop(rest);
    world.end();
}
