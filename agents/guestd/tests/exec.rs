//! Running programs: streams, ends, signals, time limits, terminals, refusals.

mod common;

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};
use std::{fs, thread};

use ark_types::exec::{ExecRequest, ExitStatus, TtySize};
use ark_types::guest::{ErrorCode, Frame, Kind};
use common::{Guestd, alive, exec, sh, wait_until};

const fn exited(code: u8) -> ExitStatus {
    ExitStatus::Exited { code }
}

const fn signaled(signal: i32) -> ExitStatus {
    #[expect(clippy::cast_possible_truncation, reason = "signals are below 65")]
    #[expect(clippy::cast_sign_loss, reason = "and positive")]
    ExitStatus::Signaled { signal: signal as u8 }
}

#[test]
fn output_streams_and_exit_code_come_back() {
    let guestd = Guestd::start();
    let output = guestd.sh("echo out; echo err >&2; exit 7");
    assert_eq!(
        (output.text(), output.stderr.as_slice(), output.status()),
        ("out\n", &b"err\n"[..], exited(7))
    );
    assert!(output.end.duration_us > 0);
    assert_eq!(guestd.run(&exec(&["true"])).status(), exited(0));
    assert_eq!(guestd.sh("kill -9 $$").status(), signaled(libc::SIGKILL));
    assert_eq!(guestd.sh("kill -40 $$").status(), signaled(40));
}

#[test]
fn input_reaches_the_program_and_its_end_does_too() {
    let guestd = Guestd::start();
    let mut wc = guestd.start_exec(&exec(&["wc", "-c"])).unwrap();
    let piece = vec![b'x'; 100_000];
    for _ in 0..30 {
        wc.input(&piece);
    }
    wc.send(&Frame::empty(Kind::StdinClose));
    assert_eq!(wc.finish().text().trim(), "3000000");

    let mut cat = guestd.start_exec(&exec(&["cat"])).unwrap();
    for word in ["one", "two"] {
        cat.input(word.as_bytes());
        cat.read_until(word);
    }
    cat.send(&Frame::empty(Kind::StdinClose));
    assert_eq!(cat.finish().status(), exited(0));
}

#[test]
fn input_that_nobody_reads_is_dropped_when_the_program_has_closed_it() {
    let guestd = Guestd::start();
    let mut running = guestd.start_exec(&sh("exec <&-; sleep 0.3; echo done")).unwrap();
    for _ in 0..20 {
        running.input(&vec![0; 200_000]);
    }
    assert_eq!(running.finish().text(), "done\n");
}

#[test]
fn a_signal_passes_a_program_that_does_not_read_its_input() {
    let guestd = Guestd::start();
    let mut running = guestd.start_exec(&exec(&["sleep", "60"])).unwrap();
    running.input(&vec![0; 200_000]);
    running.signal(libc::SIGINT);
    assert_eq!(running.finish().status(), signaled(libc::SIGINT));
}

#[test]
fn signals_reach_the_whole_process_group() {
    let guestd = Guestd::start();
    let mut running = guestd.start_exec(&sh("sleep 60 & echo $!; wait")).unwrap();
    let sleeper: u32 = running.read_until("\n").trim().parse().unwrap();
    assert!(alive(sleeper));
    running.signal(libc::SIGTERM);
    assert_eq!(running.finish().status(), signaled(libc::SIGTERM));
    wait_until("the sleeper is gone", || !alive(sleeper));
}

#[test]
fn a_time_limit_ends_a_program_even_one_that_ignores_sigterm() {
    let guestd = Guestd::start();
    let limited = |script: &str| {
        let begun = Instant::now();
        let output = guestd.run(&ExecRequest { timeout_ms: Some(200), ..sh(script) });
        (output.status(), begun.elapsed())
    };
    let (status, took) = limited("sleep 60");
    assert_eq!(status, ExitStatus::TimedOut);
    assert!(took < Duration::from_millis(1900), "{took:?}");
    let (status, took) = limited("trap '' TERM; while :; do sleep 0.1; done");
    assert_eq!(status, ExitStatus::TimedOut);
    assert!(took > Duration::from_millis(2100), "{took:?}");
    let output = guestd.run(&ExecRequest { timeout_ms: Some(u64::MAX), ..exec(&["true"]) });
    assert_eq!(output.status(), exited(0));
}

#[test]
fn a_time_limit_holds_while_the_host_reads_nothing() {
    let guestd = Guestd::start();
    let request = ExecRequest { timeout_ms: Some(300), ..exec(&["yes"]) };
    let mut running = guestd.start_exec(&request).unwrap();
    thread::sleep(Duration::from_millis(800));
    wait_until("yes is gone", || !alive(running.pid));
    assert_eq!(running.finish().status(), ExitStatus::TimedOut);
}

#[test]
fn output_of_a_gigabyte_arrives_whole_in_few_frames_and_constant_memory() {
    let guestd = Guestd::start();
    let mut running = guestd.start_exec(&exec(&["head", "-c", "1073741824", "/dev/zero"])).unwrap();
    let (mut total, mut frames, mut most) = (0, 0, 0);
    loop {
        let frame = running.connection.recv().unwrap().unwrap();
        match frame.kind {
            Kind::Stdout => total += frame.payload.len(),
            _ => break,
        }
        frames += 1;
        if frames % 200 == 0 {
            most = most.max(resident_kib(guestd.pid()));
        }
    }
    assert_eq!(total, 1 << 30);
    assert!(total / frames > 32 << 10, "{frames} frames");
    assert!((1..8 << 10).contains(&most), "guestd grew to {most} KiB");
}

#[test]
fn a_program_that_answers_is_not_kept_waiting_even_after_much_output() {
    let guestd = Guestd::start();
    let mut running = guestd.start_exec(&sh("head -c 5000000 /dev/zero; echo ready; exec cat")).unwrap();
    running.read_until("ready\n");
    let mut times: Vec<Duration> = (0..200)
        .map(|n| {
            let line = format!("line {n}\n");
            let begun = Instant::now();
            running.input(line.as_bytes());
            running.read_until(&line);
            begun.elapsed()
        })
        .collect();
    times.sort();
    // The pause of a program that only writes is 2 ms; a busy machine may make some rounds slow, not a quarter of them.
    assert!(times[50] < Duration::from_micros(1500), "{:?}", times[50]);
}

fn resident_kib(pid: u32) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = text.lines().find(|l| l.starts_with("VmRSS")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
fn a_descendant_that_keeps_the_pipes_open_does_not_hold_up_the_end() {
    let guestd = Guestd::start();
    let begun = Instant::now();
    let output = guestd.sh("sleep 60 & echo started");
    assert_eq!((output.text(), output.status()), ("started\n", exited(0)));
    assert!(begun.elapsed() < Duration::from_secs(5));
    // Nor does one that never stops talking; and it gets no signal, only nobody to talk to.
    assert_eq!(guestd.sh("yes & exit 3").status(), exited(3));
}

#[test]
fn a_host_that_leaves_takes_the_process_group_with_it() {
    let guestd = Guestd::start();
    let mut running = guestd.start_exec(&sh("trap '' TERM HUP; sleep 60 & echo $!; wait; sleep 60")).unwrap();
    let sleeper: u32 = running.read_until("\n").trim().parse().unwrap();
    let shell = running.pid;
    drop(running);
    wait_until("both are gone", || !alive(shell) && !alive(sleeper));
    // The same while guestd waits to send output.
    let running = guestd.start_exec(&exec(&["yes"])).unwrap();
    thread::sleep(Duration::from_millis(100));
    let yes = running.pid;
    drop(running);
    wait_until("yes is gone", || !alive(yes));
}

#[test]
fn a_terminal_is_one_with_its_size_and_follows_it() {
    let guestd = Guestd::start();
    let request = ExecRequest {
        tty: Some(TtySize { rows: 33, cols: 101 }),
        ..sh("stty size; tty; echo $TERM; read x; stty size; echo err >&2; exit 4")
    };
    let mut running = guestd.start_exec(&request).unwrap();
    let seen = running.read_until("xterm");
    assert!(seen.contains("33 101") && seen.contains("/dev/pts/"), "{seen:?}");
    running.resize(20, 40);
    running.input(b"\n");
    let output = running.finish();
    assert!(output.text().contains("20 40") && output.text().contains("err"), "{output:?}");
    assert_eq!((output.status(), output.stderr.len()), (exited(4), 0));
}

#[test]
fn a_terminal_controls_its_programs() {
    let guestd = Guestd::start();
    let tty = Some(TtySize { rows: 24, cols: 80 });
    // Ctrl-C goes through the line discipline to the foreground process group.
    let mut running = guestd.start_exec(&ExecRequest { tty, ..sh("echo up; exec sleep 60") }).unwrap();
    running.read_until("up");
    running.input(b"\x03");
    assert_eq!(running.finish().status(), signaled(libc::SIGINT));
    // The end of the input is typed, in the middle of a line as well.
    let mut cat = guestd.start_exec(&ExecRequest { tty, ..exec(&["cat"]) }).unwrap();
    cat.input(b"half a line");
    cat.send(&Frame::empty(Kind::StdinClose));
    let output = cat.finish();
    assert_eq!(output.status(), exited(0));
    assert_eq!(output.text().matches("half a line").count(), 2, "{output:?}");
    // A host that leaves hangs up.
    let script = "trap 'echo hup > \"$0\"; exit' HUP; echo up; while :; do sleep 0.1; done";
    let file = guestd.path("hup");
    let mut request = ExecRequest { tty, ..sh(script) };
    request.argv.push(file.to_str().unwrap().to_owned());
    let mut running = guestd.start_exec(&request).unwrap();
    running.read_until("up");
    drop(running);
    wait_until("the hang-up was noticed", || fs::read_to_string(&file).is_ok_and(|t| t == "hup\n"));
}

#[test]
fn everything_a_program_wrote_to_its_terminal_arrives() {
    let guestd = Guestd::start();
    let tty = Some(TtySize { rows: 24, cols: 80 });
    for _ in 0..20 {
        let output = guestd.run(&ExecRequest { tty, ..sh("stty -opost; seq 1 3000") });
        assert!(output.text().ends_with("2999\n3000\n"), "{:?}", output.text().len());
    }
}

#[test]
fn environment_directory_and_user_are_the_requested() {
    let guestd = Guestd::start();
    let dir = guestd.path("");
    let mut request = sh("pwd; echo $GREETING $HOME $PATH");
    request.env = BTreeMap::from([("GREETING".into(), "hi".into()), ("PATH".into(), "/usr/bin:/bin".into())]);
    request.cwd = Some(dir.to_str().unwrap().into());
    let expected = format!("{}\nhi /root /usr/bin:/bin\n", dir.to_str().unwrap().trim_end_matches('/'));
    assert_eq!(guestd.run(&request).text(), expected);
    let request = ExecRequest { user: Some("daemon:tty".into()), ..sh("id -u; id -g; id -G; echo $USER") };
    if nix::unistd::geteuid().is_root() {
        assert_eq!(guestd.run(&request).text(), "1\n5\n5\ndaemon\n");
        let output = guestd.run(&ExecRequest { user: Some("54321".into()), ..sh("id -u; id -g; cd; pwd") });
        assert_eq!(output.text(), "54321\n0\n/\n");
    } else {
        assert_eq!(guestd.refusal(&request), ErrorCode::UnknownUser);
    }
}

#[test]
fn programs_start_with_nothing_of_guestds() {
    let guestd = Guestd::start();
    let output =
        guestd.sh("grep -E 'Sig(Blk|Ign)' /proc/self/status; ls /proc/self/fd; ps -o pid=,pgid=,sid= -p $$");
    let mut lines = output.text().lines().collect::<Vec<_>>();
    let ids: Vec<&str> = lines.pop().unwrap().split_whitespace().collect();
    assert!(ids.iter().all(|id| *id == ids[0]), "own session and group: {ids:?}");
    for line in &lines[..2] {
        let mask = u64::from_str_radix(line.split_whitespace().last().unwrap(), 16).unwrap();
        // 32 and 33 are the C library's own: nobody can reset them if this test was started with them ignored.
        assert_eq!(mask & !(3 << 31), 0, "{line}");
    }
    assert_eq!(lines[2..], ["0", "1", "2", "3"], "3 is ls' own");
}

#[test]
fn what_cannot_be_run_is_refused_with_its_reason() {
    let guestd = Guestd::start();
    let script = |name: &str, text: &str, mode| {
        let path = guestd.path(name);
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let plain = script("plain", "#!/bin/sh\n", 0o644);
    let headless = script("headless", "echo hi\n", 0o755);
    let lost = script("lost", "#!/no/such/interpreter\n", 0o755);
    for (program, code) in [
        ("no-such-program", ErrorCode::ProgramNotFound),
        ("/no/such/program", ErrorCode::ProgramNotFound),
        ("/etc/passwd/x", ErrorCode::ProgramNotFound),
        (plain.as_str(), ErrorCode::ProgramNotExecutable),
        (headless.as_str(), ErrorCode::ProgramNotExecutable),
        (lost.as_str(), ErrorCode::ProgramNotExecutable),
        ("/etc", ErrorCode::ProgramNotExecutable),
    ] {
        assert_eq!(guestd.refusal(&exec(&[program])), code, "{program}");
    }
    for cwd in ["/no/such/dir", "/etc/passwd"] {
        let request = ExecRequest { cwd: Some(cwd.into()), ..exec(&["true"]) };
        assert_eq!(guestd.refusal(&request), ErrorCode::BadWorkingDirectory);
    }
    let request = ExecRequest { user: Some("nobody-here".into()), ..exec(&["true"]) };
    assert_eq!(guestd.refusal(&request), ErrorCode::UnknownUser);
    assert_eq!(guestd.refusal(&exec(&[])), ErrorCode::BadRequest);
    let long = "x".repeat(200_000);
    assert_eq!(guestd.refusal(&exec(&["true", &long])), ErrorCode::BadRequest);
    wait_until("no failed child is left", || guestd.children().is_empty());
}

#[test]
fn many_programs_at_once_each_get_their_own() {
    let guestd = Guestd::start();
    thread::scope(|scope| {
        for worker in 0..32 {
            let guestd = &guestd;
            scope.spawn(move || {
                for round in 0..10 {
                    let code = u8::try_from((worker * 10 + round) % 256).unwrap();
                    let output = guestd.sh(&format!("echo {worker}.{round}; exit {code}"));
                    assert_eq!(
                        (output.text(), output.status()),
                        (format!("{worker}.{round}\n").as_str(), exited(code))
                    );
                }
            });
        }
    });
    wait_until("nothing is left", || guestd.children().is_empty());
}

#[test]
fn orphans_are_collected_while_programs_come_and_go() {
    let guestd = Guestd::start();
    for _ in 0..50 {
        let output = guestd.sh("for i in 1 2 3 4 5; do (setsid sleep 0.01 >&- 2>&- &) ; done; exit 9");
        assert_eq!(output.status(), exited(9));
    }
    wait_until("no zombie is left", || guestd.children().is_empty());
}

#[test]
fn too_many_operations_are_refused_and_the_next_ones_are_not() {
    let guestd = Guestd::start();
    let mut sleepers: Vec<_> =
        (0..256).map(|_| guestd.start_exec(&exec(&["sleep", "60"])).unwrap()).collect();
    assert_eq!(guestd.refusal(&exec(&["true"])), ErrorCode::Exhausted);
    sleepers.truncate(200);
    wait_until("there is room again", || guestd.start_exec(&exec(&["true"])).is_ok());
}
