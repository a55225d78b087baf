//! Running programs: streams, signals, terminals, limits.

use std::time::{Duration, Instant};

use ark_tests::{World, eventually};
use nix::sys::signal::Signal;

#[test]
fn input_output_and_errors_stream_apart() {
    let world = World::new();
    let counted = world.ark_with_input(["run", "--image", "base", "--", "wc", "-c"], b"hello\n").ok();
    assert_eq!(counted.stdout.trim(), "6");
    world.create("a1");
    let both = world.sh("a1", "echo out; echo err >&2; exit 3").exits(3);
    assert_eq!((both.stdout.as_str(), both.stderr.as_str()), ("out\n", "err\n"));
    world.end();
}

#[test]
fn arguments_environment_directory_and_user_arrive() {
    let world = World::new();
    let _ = world.ark(["create", "--image", "base", "--name", "a1", "--env", "FROM_CREATE=c"]).ok();
    let args = ["exec", "--env", "FROM_EXEC=a b", "--workdir", "/tmp", "--user", "agent", "a1", "--"];
    let program = [
        "sh",
        "-c",
        "printf '%s|' \"$FROM_CREATE\" \"$FROM_EXEC\" \"$PWD\" \"$(id -un)\" \"$@\"",
        "sh",
        "",
        "x y",
        "ü",
    ];
    let said = world.ark(args.into_iter().chain(program)).ok();
    assert_eq!(said.stdout, "c|a b|/tmp|agent||x y|ü|");
    world.end();
}

#[test]
fn bytes_pass_unchanged_both_ways() {
    let world = World::new();
    world.create("a1");
    let all: Vec<u8> = (0..=255u8).cycle().take(100_000).collect();
    let back = world.ark_with_input(["exec", "-i", "a1", "--", "cat"], &all).ok();
    assert!(back.bytes == all, "{} bytes came back", back.bytes.len());
    world.end();
}

#[test]
fn a_gibibyte_of_output_streams_through() {
    let world = World::new();
    world.create("a1");
    // Counted by a pipe on this side: nothing on the way may hold it in memory.
    let ark = world.command("ark").get_program().to_owned();
    let mut shell = std::process::Command::new("sh");
    let line =
        format!("{} exec a1 -- dd if=/dev/zero bs=1M count=1024 2>/dev/null | wc -c", ark.to_string_lossy());
    shell.args(["-c", &line]);
    for (key, value) in world.command("ark").get_envs() {
        shell.env(key, value.unwrap_or_default());
    }
    let said = ark_tests::Running::start(shell, Duration::from_secs(400)).wait().ok();
    assert_eq!(said.stdout.trim(), "1073741824");
    let pid = world.daemon_pid().expect("arkd runs");
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("arkd has a status");
    let peak = status.lines().find_map(|l| l.strip_prefix("VmHWM:")).expect("a peak");
    let kib: u64 = peak.trim().trim_end_matches(" kB").parse().expect("KiB");
    assert!(kib < 100 * 1024, "arkd held {kib} KiB at its peak");
    world.end();
}

#[test]
fn control_c_reaches_the_program() {
    let world = World::new();
    world.create("a1");
    let mut running = world.start([
        "exec",
        "a1",
        "--",
        "sh",
        "-c",
        "trap 'echo got it; exit 9' INT; echo ready; while :; do sleep 0.1; done",
    ]);
    running.close_stdin();
    std::thread::sleep(Duration::from_secs(3));
    running.signal(Signal::SIGINT);
    let said = running.wait().exits(9);
    assert_eq!(said.stdout, "ready\ngot it\n");
    world.end();
}

#[test]
fn a_program_ended_by_a_signal_says_so() {
    let world = World::new();
    world.create("a1");
    let _ = world.sh("a1", "kill -9 $$").exits(137);
    let _ = world.sh("a1", "kill -TERM $$").exits(143);
    world.end();
}

#[test]
fn a_timeout_ends_the_program_even_when_it_ignores_sigterm() {
    let world = World::new();
    world.create("a1");
    let begin = Instant::now();
    let said = world.ark([
        "exec",
        "--timeout",
        "1s",
        "a1",
        "--",
        "sh",
        "-c",
        "trap '' TERM; while :; do sleep 0.1; done",
    ]);
    said.exits(124).complains_about(&["1s", "timeout"]);
    assert!(begin.elapsed() < Duration::from_secs(30));
    eventually("the program is gone", Duration::from_secs(10), || {
        world.sh("a1", "ps -o args | grep '[t]rap .. TERM' | wc -l").ok().stdout.trim() == "0"
    });
    world.end();
}

#[test]
fn a_program_whose_client_vanishes_is_killed() {
    let world = World::new();
    world.create("a1");
    let running = world.start(["exec", "a1", "--", "sleep", "4242"]);
    let sleeping = || world.ark(["exec", "a1", "--", "pidof", "sleep"]).code == 0;
    eventually("the program runs", Duration::from_secs(20), sleeping);
    running.signal(Signal::SIGKILL);
    let _ = running.wait().exits(137);
    // It has 30 s to come back.
    eventually("the program is gone", Duration::from_secs(90), || !sleeping());
    world.end();
}

#[test]
fn a_background_child_does_not_hold_the_exec_open() {
    let world = World::new();
    world.create("a1");
    let begin = Instant::now();
    let said = world.sh("a1", "sleep 4243 & echo done").ok();
    assert_eq!(said.stdout, "done\n");
    assert!(begin.elapsed() < Duration::from_secs(30));
    world.end();
}

#[test]
fn a_terminal_has_a_size_and_echoes() {
    let world = World::new();
    world.create("a1");
    let mut running = world.start(["exec", "-it", "a1", "--", "sh"]);
    running.write(b"tty; stty size; exit 5\n");
    std::thread::sleep(Duration::from_secs(2));
    let said = running.wait().exits(5);
    assert!(said.stdout.contains("/dev/pts/"), "{:?}", said.stdout);
    assert!(said.stdout.contains("24 80"), "{:?}", said.stdout);
    world.end();
}

#[test]
fn no_zombies_gather() {
    let world = World::new();
    world.create("a1");
    // Each line leaves an orphan that ends after its parent: PID 1 must reap it.
    for _ in 0..10 {
        let _ = world.sh("a1", "(sleep 0.1 &) ; (sleep 0.2 &)").ok();
    }
    eventually("orphans are reaped", Duration::from_secs(20), || {
        world.sh("a1", "grep -l '^State:.Z' /proc/[0-9]*/status 2>/dev/null | wc -l").ok().stdout.trim()
            == "0"
    });
    world.end();
}

#[test]
fn sixty_execs_at_once_in_one_agent() {
    let world = World::new();
    let _ = world.ark(["create", "--image", "base", "--name", "a1", "--vcpus", "2", "--memory", "256"]).ok();
    let running: Vec<_> = (0..60)
        .map(|i| (i, world.start(["exec", "a1", "--", "sh", "-c", &format!("sleep 1; echo {i}")])))
        .collect();
    for (i, one) in running {
        assert_eq!(one.wait().ok().stdout, format!("{i}\n"));
    }
    world.end();
}
