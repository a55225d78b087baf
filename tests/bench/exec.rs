//! exec of `/bin/true`: a REST call to its reply, against fork and exec inside the guest.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use ark_tests::World;

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

/// One REST call over a connection that stays open, in milliseconds.
fn rest_exec(stream: &mut BufReader<UnixStream>) -> f64 {
    let body = "{\"argv\":[\"/bin/true\"]}";
    let request = format!(
        "POST /v1/agents/bench/exec HTTP/1.1\r\nhost: ark\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    let begin = Instant::now();
    stream.get_mut().write_all(request.as_bytes()).expect("arkd reads");
    let (mut line, mut length) = (String::new(), 0);
    let mut first = true;
    loop {
        line.clear();
        stream.read_line(&mut line).expect("arkd answers");
        if std::mem::take(&mut first) {
            assert!(line.contains(" 200 "), "{line}");
        }
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().expect("a length");
        }
        if line == "\r\n" {
            break;
        }
    }
    let mut reply = vec![0; length];
    stream.read_exact(&mut reply).expect("the body");
    begin.elapsed().as_secs_f64() * 1e3
}

pub(crate) fn measure(bench: &Bench, report: &mut Report) {
    let world = World::new();
    let _ = world.ark(["create", "--image", "python", "--name", "bench", "--memory", "256"]).ok();
    let socket = UnixStream::connect(world.run_dir().api_socket()).expect("arkd listens");
    let mut stream = BufReader::new(socket);
    let in_guest = |program: &str| -> Vec<f64> {
        let said = world.ark(["exec", "bench", "--", "python3", "-c", program, "20"]).ok();
        said.stdout.lines().map(|l| l.parse::<f64>().expect("microseconds") / 1e3).collect()
    };
    rest_exec(&mut stream);
    let (mut rest, mut fork, mut spawn) = (Vec::new(), Vec::new(), Vec::new());
    // In turns, so that all meet the same moods of the host.
    for _ in 0..bench.samples(10) {
        rest.extend((0..20).map(|_| rest_exec(&mut stream)));
        fork.extend(in_guest(FORK_EXEC));
        spawn.extend(in_guest(SPAWN));
    }
    let name = "exec of /bin/true, REST call to reply";
    report.against(name, "ms", &rest, ("fork+exec in guest", &fork), Must::AtMost(3.0));
    report.against(
        "the same, against posix_spawn",
        "ms",
        &rest,
        ("posix_spawn in guest", &spawn),
        Must::Shown,
    );
    drop(stream);
    world.end();
}
