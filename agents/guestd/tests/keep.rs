//! The program that a guest keeps running: started once, followed by whoever asks, its last output kept.

mod common;

use ark_link::Connection;
use ark_types::exec::{ExecEnd, ExecRequest, ExitStatus, TtySize};
use ark_types::guest::{ErrorCode, Frame, GuestError, Kind, MAX_KEPT_OUTPUT, Started};
use common::{Guestd, sh, wait_until};

/// Begins a `Keep`; the connection and the process id that is told.
fn keep(guestd: &Guestd, request: Option<&ExecRequest>) -> (Connection, u32) {
    let mut connection = guestd.ask(Kind::Keep, &request);
    let first = connection.recv().unwrap().unwrap();
    assert_eq!(first.kind, Kind::Started, "{first:?}");
    (connection, first.parse::<Started>().unwrap().pid)
}

fn refusal(frame: &Frame) -> ErrorCode {
    assert_eq!(frame.kind, Kind::Error);
    frame.parse::<GuestError>().unwrap().code
}

/// What is told of its end, with what it wrote last.
fn end(connection: &mut Connection) -> (String, ExitStatus) {
    let mut said = Vec::new();
    loop {
        let frame = connection.recv().unwrap().unwrap();
        match frame.kind {
            Kind::Stdout => said.extend(frame.payload),
            Kind::Exited => {
                return (String::from_utf8(said).unwrap(), frame.parse::<ExecEnd>().unwrap().status);
            }
            other => panic!("{other:?}"),
        }
    }
}

fn output(guestd: &Guestd) -> Vec<u8> {
    let mut connection = guestd.connect();
    connection.send(&Frame::empty(Kind::KeptOutput)).unwrap();
    let mut said = Vec::new();
    loop {
        let frame = connection.recv().unwrap().unwrap();
        match frame.kind {
            Kind::Data => said.extend(frame.payload),
            Kind::End => return said,
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_program_is_started_once_and_outlives_whoever_asked() {
    let guestd = Guestd::start();
    assert_eq!(refusal(&guestd.answer(Kind::Keep, &None::<ExecRequest>)), ErrorCode::NothingKept);
    // What cannot be started leaves the place free.
    let absent = ExecRequest { argv: vec!["/no/such".to_owned()], ..ExecRequest::default() };
    assert_eq!(refusal(&guestd.answer(Kind::Keep, &Some(absent))), ErrorCode::ProgramNotFound);
    let terminal = ExecRequest { tty: Some(TtySize { rows: 1, cols: 1 }), ..sh("true") };
    assert_eq!(refusal(&guestd.answer(Kind::Keep, &Some(terminal))), ErrorCode::BadRequest);

    let gate = guestd.path("gate");
    let script = format!(
        "echo begun >> {0}; echo out; echo err >&2; until test -e {1}; do sleep 0.05; done; exit 3",
        guestd.path("starts").display(),
        gate.display()
    );
    let (first, pid) = keep(&guestd, Some(&sh(&script)));
    drop(first);
    // Whatever is named, that one is told of; without a program, too.
    let (mut second, same) = keep(&guestd, Some(&sh("echo another")));
    let (mut third, also) = keep(&guestd, None);
    assert_eq!((same, also), (pid, pid));
    wait_until("it wrote", || output(&guestd) == b"out\nerr\n");
    std::fs::write(&gate, "").unwrap();
    for connection in [&mut second, &mut third] {
        assert_eq!(end(connection), ("out\nerr\n".to_owned(), ExitStatus::Exited { code: 3 }));
    }
    // Whoever comes too late hears of it, and nothing begins again.
    let (mut late, same) = keep(&guestd, Some(&sh(&script)));
    assert_eq!((same, end(&mut late).1), (pid, ExitStatus::Exited { code: 3 }));
    assert_eq!(std::fs::read_to_string(guestd.path("starts")).unwrap(), "begun\n");
    assert!(guestd.children().is_empty(), "{:?}", guestd.children());
}

#[test]
fn a_program_that_is_killed_is_told_of_and_nobody_has_to_read_what_it_writes() {
    let guestd = Guestd::start();
    let (mut connection, pid) =
        keep(&guestd, Some(&sh("head -c 3000000 /dev/zero | tr '\\0' x; echo end; sleep 1000")));
    wait_until("it wrote", || output(&guestd).ends_with(b"xend\n"));
    assert_eq!(output(&guestd).len(), MAX_KEPT_OUTPUT);
    let group = nix::unistd::Pid::from_raw(i32::try_from(pid).unwrap());
    nix::sys::signal::killpg(group, nix::sys::signal::Signal::SIGKILL).unwrap();
    let (said, status) = end(&mut connection);
    assert_eq!((said.len(), status), (MAX_KEPT_OUTPUT, ExitStatus::Signaled { signal: 9 }));
}
