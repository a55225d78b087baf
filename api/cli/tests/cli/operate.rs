//! `ark top` and `ark logs --kept`, against a small server that answers as `arkd` would.

use std::io::{Read as _, Write as _};
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::host::{Host, agent, problem};
use ark_types::problem::ProblemKind;
use axum::routing::get;
use axum::{Json, Router};
use nix::pty::openpty;
use serde_json::{Value, json};

/// Two agents; the second is busier with every look, by half a processor.
fn stats() -> Router {
    let looks = Arc::new(AtomicU64::new(0));
    let answer = move || {
        let look = looks.fetch_add(1, Ordering::SeqCst);
        let used = |name: &str, cpu_us: u64| {
            let mut stats = agent(name);
            stats["id"] = json!(name);
            for (key, value) in [("at_unix_ms", 1000 * look), ("cpu_us", cpu_us), ("pss_bytes", 2 << 20)] {
                stats[key] = json!(value);
            }
            stats
        };
        let agents = [used("idle", 7), used("busy", 500_000 * look)];
        async move { Json(json!({ "agents": agents, "left_out": 0 })) }
    };
    Router::new().route("/v1/stats", get(answer))
}

#[test]
fn one_look_shows_what_is_used_meanwhile() {
    let host = Host::start(stats());
    let (code, shown, errors) = host.run(&["top", "--once"], "");
    assert_eq!((code, errors.as_str()), (0, ""));
    let lines: Vec<&str> = shown.lines().collect();
    assert_eq!(lines[0], "2 agents, 2 running; CPU 50.0 %, memory 4.0 MiB");
    assert!(lines[2].starts_with("NAME  STATE    IMAGE  CPU %  MEMORY"), "{shown}");
    assert!(lines[3].starts_with("busy  running  base   50.0   2.0 MiB  256 MiB"), "{shown}");
    assert!(lines[4].starts_with("idle  running  base   0.0"), "{shown}");

    let (code, shown, _) = host.run(&["top", "--once", "--json"], "");
    let shown: Value = serde_json::from_str(&shown).unwrap();
    assert_eq!((code, &shown["agents"][0]["cpu_percent"]), (0, &json!(50.0)));
    assert_eq!(shown["agents"][0]["cpu_us"].as_u64().unwrap() % 500_000, 0);
}

#[test]
fn an_arkd_that_does_not_tell_is_an_error() {
    let refuses = get(|| async { problem(ProblemKind::NoRoute, "there is nothing at GET /v1/stats") });
    let (code, shown, errors) =
        Host::start(Router::new().route("/v1/stats", refuses)).run(&["top", "--once"], "");
    assert_eq!((code, shown.as_str()), (125, ""));
    assert!(errors.contains("there is nothing at"), "{errors}");
}

#[test]
fn where_nothing_can_be_drawn_it_says_what_can_be_had() {
    let (code, shown, errors) = Host::start(stats()).run(&["top"], "");
    assert_eq!((code, shown.as_str()), (125, ""));
    assert!(errors.contains("--once") && errors.contains("--json"), "{errors}");
}

#[test]
fn it_is_drawn_on_a_terminal_until_q_is_pressed_and_the_terminal_is_as_before() {
    let host = Host::start(stats());
    let pty = openpty(None, None).unwrap();
    let mut terminal = std::fs::File::from(pty.master);
    let mut reader = terminal.try_clone().unwrap();
    let (drawn, parts) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        // It fails when nobody has the other end any more.
        while let Ok(count @ 1..) = reader.read(&mut buffer) {
            let _ = drawn.send(String::from_utf8_lossy(&buffer[..count]).into_owned());
        }
    });
    let slave = || Stdio::from(pty.slave.try_clone().unwrap());
    let before = nix::sys::termios::tcgetattr(&pty.slave).unwrap();
    let mut command = host.command(&["top"]);
    let mut child = command.env("TERM", "xterm").stdin(slave()).stdout(slave()).spawn().unwrap();
    drop(command);
    let mut seen = String::new();
    // Half a processor is known after the second look.
    while !seen.contains("50.0") {
        seen += &parts.recv_timeout(Duration::from_secs(30)).unwrap_or_else(|e| panic!("{e}: {seen:?}"));
    }
    terminal.write_all(b"q").unwrap();
    assert!(child.wait().unwrap().success());
    let after = nix::sys::termios::tcgetattr(&pty.slave).unwrap();
    assert_eq!(before.local_flags, after.local_flags, "the terminal takes lines again");
    drop(pty.slave);
    seen.extend(parts);
    assert!(seen.contains("\x1b[?1049h") && seen.contains("\x1b[?1049l"), "{seen:?}");
    assert!(seen.contains("busy") && seen.contains("q: quit"), "{seen:?}");
}

#[test]
fn kept_consoles_are_listed() {
    let kept = json!({ "consoles": [{
        "id": "0011223344556677", "name": "a1", "image": "base", "ended_unix_ms": 0,
        "reason": "the guest's kernel\u{1b}[2J panicked", "bytes": 2048,
    }] });
    let host = Host::start(Router::new().route("/v1/consoles", get(|| async move { Json(kept) })));
    let (code, shown, _) = host.run(&["logs", "--kept"], "");
    assert_eq!(code, 0);
    assert!(shown.starts_with("NAME  ID                IMAGE  ENDED"), "{shown}");
    assert!(shown.contains("2.0 KiB  the guest's kernel\\u{1b}[2J panicked"), "{shown}");
    let (code, _, errors) = host.run(&["logs"], "");
    assert!(code == 125 && errors.contains("<AGENT>"), "{errors}");
}
