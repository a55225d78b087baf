//! A stand-in for `ark-vmm` that needs no KVM: the same process interface and sockets, and a guest that is this host.
//!
//! `bin/ark-vmm` of a test's assets leads here. What the guest does is written in its image file: a word that [`live`],
//! [`serve`] or [`obey`] knows.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use ark_types::exec::{ExecEnd, ExecRequest, ExitStatus};
use ark_types::files::{FileKind, FileStat};
use ark_types::guest::{
    Decoder, ErrorCode, FileWrite, Frame, GuestError, Heartbeat, Hello, Kind, PathRequest, SignalRequest,
    Started,
};
use ark_types::vmm::{ControlReply, ControlRequest, ExitReason, ExitRecord, VmConfig, VmState};

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.join(" ").as_str() {
        probe if probe.starts_with("probe --json") => {
            println!(r#"{{"usable":true,"reason":"a fake","duration_us":1}}"#);
        }
        "run --config -" => run(),
        other => panic!("{other}"),
    }
}

fn end(reason: ExitReason, detail: Option<&str>) -> ! {
    let record = ExitRecord { reason, detail: detail.map(str::to_owned), at_unix_ms: 1 };
    println!("{}", serde_json::to_string(&record).unwrap());
    std::process::exit(reason.exit_code().into());
}

fn run() {
    let mut text = String::new();
    std::io::stdin().read_to_string(&mut text).unwrap();
    let Ok(config) = serde_json::from_str::<VmConfig>(&text) else { end(ExitReason::BadConfig, None) };
    let script = std::fs::read_to_string(&config.disks[0].path).unwrap();
    let vsock = config.vsock.unwrap().uds_path;
    let mut console = std::fs::File::create(config.console.unwrap()).unwrap();
    writeln!(console, "Linux version fake\nscript {script}").unwrap();
    let control = UnixListener::bind(config.control_socket.unwrap()).unwrap();
    let guest = UnixListener::bind(&vsock).unwrap();
    let deaf = script == "ignores-stop";
    std::thread::spawn(move || control.incoming().for_each(|stream| obey(stream.unwrap(), deaf)));
    let script = Arc::new(script);
    let scripted = Arc::clone(&script);
    std::thread::spawn(move || {
        for stream in guest.incoming() {
            let script = Arc::clone(&scripted);
            std::thread::spawn(move || serve(stream.unwrap(), &script));
        }
    });
    let mut hello_socket = vsock.into_os_string();
    hello_socket.push("_1024");
    live(&script, &PathBuf::from(hello_socket), &mut console);
}

/// The guest from hello to end.
fn live(script: &str, hello_socket: &Path, console: &mut std::fs::File) {
    match script {
        "panics" => {
            writeln!(console, "Kernel panic - not syncing: no init found").unwrap();
            end(ExitReason::GuestPanic, Some("panic after 0.1 s"));
        }
        "silent" => std::thread::sleep(Duration::from_secs(1000)),
        "no-record" => {
            eprintln!("the fake broke");
            std::process::exit(22);
        }
        _ => {}
    }
    let mut stream = UnixStream::connect(hello_socket).unwrap();
    if script == "babbles" {
        stream.write_all(b"\xff\xff\xff\xff\x99\x99\x99\x99").unwrap();
        std::thread::sleep(Duration::from_secs(1000));
    }
    let hello = Hello { guestd: "fake".into(), kernel: "fake".into(), uptime_ms: 1, cpus: 1 };
    send(&mut stream, &Frame::json(Kind::Hello, &hello).unwrap());
    for sequence in 1.. {
        let beat = Heartbeat { sequence, uptime_ms: sequence, mem_available_kib: 64, load1_x100: 7 };
        send(&mut stream, &Frame::json(Kind::Heartbeat, &beat).unwrap());
        std::thread::sleep(Duration::from_millis(100));
        if script == "powers-off" {
            end(ExitReason::GuestPoweroff, None);
        }
    }
}

fn obey(stream: UnixStream, deaf: bool) {
    let mut line = String::new();
    BufReader::new(&stream).read_line(&mut line).unwrap();
    let ControlRequest::Stop { grace_ms } = serde_json::from_str(&line).unwrap() else { return };
    let reply = serde_json::to_string(&ControlReply::State { state: VmState::Stopping }).unwrap();
    writeln!(&stream, "{reply}").unwrap();
    if deaf {
        std::thread::sleep(Duration::from_millis(grace_ms));
        end(ExitReason::StopDeadline, None);
    }
    end(ExitReason::Stopped, None);
}

fn send(stream: &mut UnixStream, frame: &Frame) {
    // A peer that left is noticed by reading.
    let _ = stream.write_all(&frame.encode());
}

fn fail(stream: &mut UnixStream, code: ErrorCode, message: &str) {
    send(stream, &Frame::json(Kind::Error, &GuestError { code, message: message.into() }).unwrap());
}

/// Frames from the host.
struct Incoming(UnixStream, Decoder);

impl Incoming {
    fn next(&mut self) -> Option<Frame> {
        let mut buffer = vec![0; 64 << 10];
        loop {
            if let Some(frame) = self.1.next().unwrap() {
                return Some(frame);
            }
            match self.0.read(&mut buffer) {
                Ok(n) if n > 0 => self.1.feed(&buffer[..n]),
                _ => return None,
            }
        }
    }
}

/// One operation.
fn serve(mut stream: UnixStream, script: &str) {
    let mut line = [0; 13];
    stream.read_exact(&mut line).unwrap();
    assert_eq!(&line, b"CONNECT 1025\n");
    stream.write_all(b"OK 1073741824\n").unwrap();
    let mut incoming = Incoming(stream.try_clone().unwrap(), Decoder::new());
    let Some(first) = incoming.next() else { return };
    match (first.kind, script) {
        (_, "lies") => send(&mut stream, &Frame::empty(Kind::PowerOff)),
        (_, "dies-in-exec") => end(ExitReason::GuestPanic, Some("out of memory")),
        (Kind::Exec, _) => exec(stream, incoming, &first.parse().unwrap()),
        (Kind::FileRead, "shrinks") => {
            let mut info = describe(Path::new("/bin/sh")).unwrap();
            info.size = 10;
            send(&mut stream, &Frame::json(Kind::FileInfo, &info).unwrap());
            send(&mut stream, &Frame::raw(Kind::Data, b"12345".to_vec()).unwrap());
            send(&mut stream, &Frame::empty(Kind::End));
        }
        (Kind::FileRead, _) => read_file(&mut stream, &first.parse::<PathRequest>().unwrap().path),
        (Kind::FileWrite, _) => write_file(&mut stream, &mut incoming, &first.parse().unwrap()),
        (Kind::FileStat, _) => {
            let path = first.parse::<PathRequest>().unwrap().path;
            match describe(Path::new(&path)) {
                Ok(info) => send(&mut stream, &Frame::json(Kind::FileInfo, &info).unwrap()),
                Err(e) => fail(&mut stream, ErrorCode::FileNotFound, &format!("{path}: {e}")),
            }
        }
        (Kind::FileList, _) => {
            for entry in std::fs::read_dir(first.parse::<PathRequest>().unwrap().path).unwrap() {
                let entry = entry.unwrap();
                let mut info = describe(&entry.path()).unwrap();
                info.name = entry.file_name().into_string().unwrap();
                send(&mut stream, &Frame::json(Kind::FileInfo, &info).unwrap());
            }
            send(&mut stream, &Frame::empty(Kind::End));
        }
        (other, _) => panic!("{other:?}"),
    }
}

fn describe(path: &Path) -> std::io::Result<FileStat> {
    let meta = std::fs::symlink_metadata(path)?;
    Ok(FileStat {
        name: path.to_str().unwrap().to_owned(),
        kind: if meta.is_dir() { FileKind::Directory } else { FileKind::File },
        size: meta.len(),
        mode: meta.permissions().mode() & 0o7777,
        uid: 0,
        gid: 0,
        mtime_unix_ms: 0,
        target: None,
    })
}

fn read_file(stream: &mut UnixStream, path: &str) {
    let Ok(mut file) = std::fs::File::open(path) else {
        return fail(stream, ErrorCode::FileNotFound, &format!("there is no {path}"));
    };
    send(stream, &Frame::json(Kind::FileInfo, &describe(Path::new(path)).unwrap()).unwrap());
    let mut buffer = vec![0; 200 << 10];
    loop {
        match file.read(&mut buffer).unwrap() {
            0 => break,
            n => stream.write_all(&Frame::raw(Kind::Data, &buffer[..n]).unwrap().encode()).unwrap(),
        }
    }
    send(stream, &Frame::empty(Kind::End));
}

fn write_file(stream: &mut UnixStream, incoming: &mut Incoming, wanted: &FileWrite) {
    if wanted.path.starts_with("/full/") {
        fail(stream, ErrorCode::FileError, "no space left in the agent");
        return;
    }
    let beside = format!("{}.part", wanted.path);
    let mut file = std::fs::File::create(&beside).unwrap();
    loop {
        match incoming.next() {
            Some(Frame { kind: Kind::Data, payload }) => file.write_all(&payload).unwrap(),
            Some(_) => break,
            None => return std::fs::remove_file(&beside).unwrap(),
        }
    }
    std::fs::set_permissions(&beside, std::fs::Permissions::from_mode(wanted.mode)).unwrap();
    std::fs::rename(&beside, &wanted.path).unwrap();
    send(stream, &Frame::empty(Kind::Ok));
}

fn exec(mut stream: UnixStream, mut incoming: Incoming, request: &ExecRequest) {
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

fn status_of(child: &mut Child) -> ExitStatus {
    use std::os::unix::process::ExitStatusExt as _;
    let status = child.wait().unwrap();
    match (status.code(), status.signal()) {
        (Some(code), _) => ExitStatus::Exited { code: u8::try_from(code).unwrap() },
        (None, signal) => ExitStatus::Signaled { signal: u8::try_from(signal.unwrap()).unwrap() },
    }
}
