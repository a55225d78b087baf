//! Programs in the fake guest: processes of this host.

use std::io::Write as _;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use ark_types::exec::{ExecEnd, ExecRequest, ExitStatus};
use ark_types::guest::{ErrorCode, Frame, Kind, SignalRequest, Started};

use super::{Incoming, fail, send};

pub(super) fn exec(mut stream: UnixStream, mut incoming: Incoming, request: &ExecRequest) {
    let started = Instant::now();
    let mut command = Command::new(&request.argv[0]);
    command.args(&request.argv[1..]).env_clear().envs(&request.env).env("PATH", "/usr/bin:/bin");
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(e) => return fail(&mut stream, ErrorCode::ProgramNotFound, &format!("{}: {e}", request.argv[0])),
    };
    send(&mut stream, &Frame::json(Kind::Started, &Started { pid: child.id() }).unwrap());
    let out = Arc::new(Mutex::new(stream.try_clone().unwrap()));
    let pumps = [
        pump(child.stdout.take().unwrap(), Kind::Stdout, &out),
        pump(child.stderr.take().unwrap(), Kind::Stderr, &out),
    ];
    let mut stdin = child.stdin.take();
    let pid = nix::unistd::Pid::from_raw(i32::try_from(child.id()).unwrap());
    std::thread::spawn(move || {
        while let Some(frame) = incoming.next() {
            match frame.kind {
                Kind::Stdin => drop(stdin.as_mut().map(|s| s.write_all(&frame.payload))),
                Kind::StdinClose => stdin = None,
                Kind::Signal => {
                    let signal = frame.parse::<SignalRequest>().unwrap().signal;
                    let signal = nix::sys::signal::Signal::try_from(i32::from(signal)).unwrap();
                    let _ = nix::sys::signal::kill(pid, signal);
                }
                _ => {}
            }
        }
        // The host left before the end, or after it, when there is nobody to kill.
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
    });
    for pump in pumps {
        pump.join().unwrap();
    }
    let end = ExecEnd {
        status: status_of(&mut child),
        duration_us: u64::try_from(started.elapsed().as_micros()).unwrap(),
    };
    send(&mut stream, &Frame::json(Kind::Exited, &end).unwrap());
    // A guest that takes one operation per connection: arkd finds its kept one closed and makes another.
    let _ = stream.shutdown(std::net::Shutdown::Both);
}

fn pump(
    mut from: impl std::io::Read + Send + 'static,
    kind: Kind,
    out: &Arc<Mutex<UnixStream>>,
) -> std::thread::JoinHandle<()> {
    let out = Arc::clone(out);
    std::thread::spawn(move || {
        let mut buffer = vec![0; 64 << 10];
        while let Ok(n @ 1..) = from.read(&mut buffer) {
            send(&mut out.lock().unwrap(), &Frame::raw(kind, &buffer[..n]).unwrap());
        }
    })
}

pub(super) fn status_of(child: &mut Child) -> ExitStatus {
    use std::os::unix::process::ExitStatusExt as _;
    let status = child.wait().unwrap();
    match (status.code(), status.signal()) {
        (Some(code), _) => ExitStatus::Exited { code: u8::try_from(code).unwrap() },
        (None, signal) => ExitStatus::Signaled { signal: u8::try_from(signal.unwrap()).unwrap() },
    }
}
