//! The program that the fake guest keeps running: a process of this host, which ends with the guest.

use std::io::Read as _;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::process::{Command, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Instant;

use ark_types::exec::{ExecEnd, ExecRequest};
use ark_types::guest::{ErrorCode, Frame, Kind, MAX_KEPT_OUTPUT, Started};

use super::{Machine, fail, inference, send, status_of};

/// The place of the program.
#[derive(Debug, Default)]
pub(super) struct Keeper(Mutex<Option<Arc<Kept>>>);

#[derive(Debug)]
struct Kept {
    pid: u32,
    known: Mutex<(Vec<u8>, Option<ExecEnd>)>,
    ended: Condvar,
}

impl Kept {
    fn tail(&self) -> Vec<u8> {
        let known = self.known.lock().unwrap();
        known.0[known.0.len().saturating_sub(MAX_KEPT_OUTPUT)..].to_vec()
    }
}

fn start(request: &ExecRequest) -> std::io::Result<Arc<Kept>> {
    let mut command = Command::new(&request.argv[0]);
    command.args(&request.argv[1..]).env_clear().envs(&request.env).env("PATH", "/usr/bin:/bin");
    command.current_dir(request.cwd.as_deref().unwrap_or("/"));
    let (mut reader, writer) = std::io::pipe()?;
    command.stdin(Stdio::null()).stdout(writer.try_clone()?).stderr(writer);
    let end_with_us = || Ok(nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)?);
    // SAFETY: prctl may be called between fork and exec.
    unsafe { command.pre_exec(end_with_us) };
    let (told, started) = std::sync::mpsc::channel();
    // The one who starts it lives as long as it does: its end would be that of the program.
    std::thread::spawn(move || {
        let begun = Instant::now();
        let mut child = match command.spawn() {
            Ok(child) => child,
            Err(error) => return told.send(Err(error)).unwrap(),
        };
        drop(command);
        let kept = Arc::new(Kept { pid: child.id(), known: Mutex::default(), ended: Condvar::new() });
        told.send(Ok(Arc::clone(&kept))).unwrap();
        let reading = Arc::clone(&kept);
        let pump = std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(n @ 1..) = reader.read(&mut buffer) {
                reading.known.lock().unwrap().0.extend(&buffer[..n]);
            }
        });
        let status = status_of(&mut child);
        pump.join().unwrap();
        let duration_us = u64::try_from(begun.elapsed().as_micros()).unwrap();
        kept.known.lock().unwrap().1 = Some(ExecEnd { status, duration_us });
        kept.ended.notify_all();
    });
    started.recv().unwrap()
}

/// As `ark-guestd` does it; a server of models is one of [`inference`].
pub(super) fn keep(stream: UnixStream, mut request: Option<ExecRequest>, machine: &Machine) {
    if let Some(request) = request.as_mut().filter(|request| request.argv[0] == inference::PROGRAM) {
        match inference::start(&request.argv, machine) {
            Ok(argv) => request.argv = argv,
            Err((code, why)) => return fail(&mut { stream }, code, &why),
        }
    }
    machine.keeper.keep(stream, request);
}

impl Keeper {
    /// As `ark-guestd` does it.
    fn keep(&self, mut stream: UnixStream, request: Option<ExecRequest>) {
        let mut slot = self.0.lock().unwrap();
        let kept = match (&*slot, request) {
            (Some(kept), _) => Arc::clone(kept),
            (None, None) => return fail(&mut stream, ErrorCode::NothingKept, "nothing is kept"),
            (None, Some(request)) => match start(&request) {
                Ok(kept) => Arc::clone(slot.insert(kept)),
                Err(e) => {
                    let why = format!("{}: {e}", request.argv[0]);
                    return fail(&mut stream, ErrorCode::ProgramNotFound, &why);
                }
            },
        };
        drop(slot);
        send(&mut stream, &Frame::json(Kind::Started, &Started { pid: kept.pid }).unwrap());
        let known = kept.known.lock().unwrap();
        let known = kept.ended.wait_while(known, |known| known.1.is_none()).unwrap();
        let end = known.1.unwrap();
        drop(known);
        send(&mut stream, &Frame::raw(Kind::Stdout, kept.tail()).unwrap());
        send(&mut stream, &Frame::json(Kind::Exited, &end).unwrap());
    }

    pub(super) fn tell_output(&self, mut stream: UnixStream) {
        match &*self.0.lock().unwrap() {
            Some(kept) => {
                send(&mut stream, &Frame::raw(Kind::Data, kept.tail()).unwrap());
                send(&mut stream, &Frame::empty(Kind::End));
            }
            None => fail(&mut stream, ErrorCode::NothingKept, "nothing is kept"),
        }
    }
}
