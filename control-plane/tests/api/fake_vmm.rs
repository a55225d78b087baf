//! A stand-in for `ark-vmm` that needs no KVM: the same process interface and sockets, and a guest that is this host.
//!
//! `bin/ark-vmm` of a test's assets leads here. What the guest does is written in its image file: a word that [`live`],
//! [`serve`] or [`obey`] knows.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, SystemTime};

use ark_types::eval::{EvalEnd, EvalException, EvalRequest};
use ark_types::guest::{
    ClockSet, Decoder, ErrorCode, Frame, GuestError, Heartbeat, Hello, Kind, PathRequest, Renew, Renewed,
};
use ark_types::vmm::{
    ControlReply, ControlRequest, DeviceMetrics, DiskConfig, ExitReason, ExitRecord, ProcessorModel,
    RestoreConfig, RunConfig, SNAPSHOT_VERSION, SnapshotBase, SnapshotId, SnapshotManifest, SnapshotReport,
    VmConfig, VmMetrics, VmState,
};
use serde::{Deserialize, Serialize};

// Beside this file there is the test of files.
#[path = "fake_vmm/dial.rs"]
mod dial;
#[path = "fake_vmm/exec.rs"]
mod exec;
#[path = "fake_vmm/guest_files.rs"]
mod guest_files;
#[path = "fake_vmm/inference.rs"]
mod inference;
#[path = "fake_vmm/keep.rs"]
mod keep;

use exec::{exec, status_of};
use guest_files::{describe, read_file, write_file};

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.join(" ").as_str() {
        probe if probe.starts_with("probe --json") => {
            println!(r#"{{"usable":true,"reason":"a fake","duration_us":1}}"#);
        }
        "run --config -" | "run --prepared 1 --config -" => run(),
        proof if proof.starts_with("verify ") => {
            let dir = Path::new(&arguments[1]);
            if std::fs::read_to_string(dir.join("memory")).unwrap() != "memory" {
                eprintln!("ark-vmm: memory is damaged in its first chunk");
                std::process::exit(ExitReason::BadSnapshot.exit_code().into());
            }
        }
        merge if merge.starts_with("compact ") => compact(Path::new(&arguments[1]), Path::new(&arguments[2])),
        other => panic!("{other}"),
    }
}

/// Where the record of the end goes besides standard output.
static EXIT_FILE: OnceLock<PathBuf> = OnceLock::new();

fn end(reason: ExitReason, detail: Option<&str>) -> ! {
    let record = ExitRecord { reason, detail: detail.map(str::to_owned), at_unix_ms: 1 };
    let record = serde_json::to_string(&record).unwrap();
    // Either may be told to nobody.
    let _ = EXIT_FILE.get().map(|file| std::fs::write(file, &record));
    let _ = writeln!(std::io::stdout(), "{record}");
    std::process::exit(reason.exit_code().into());
}

/// What a snapshot keeps of a guest.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Memory {
    script: String,
    renewals: u64,
    hostname: String,
    machine_id: String,
    names: BTreeMap<String, String>,
    /// The model that its server was started with.
    #[serde(default)]
    serves: Option<String>,
}

/// What the VMM knows of itself.
#[derive(Debug)]
struct Machine {
    memory: Mutex<Memory>,
    base: Mutex<Option<SnapshotBase>>,
    labels: BTreeMap<String, String>,
    size: (u32, u64),
    disks: Vec<DiskConfig>,
    is_restored: bool,
    state: Mutex<VmState>,
    keeper: keep::Keeper,
}

/// Sockets and console.
struct Places {
    vsock: PathBuf,
    console: PathBuf,
    control: PathBuf,
}

fn run() {
    let mut text = String::new();
    std::io::stdin().read_to_string(&mut text).unwrap();
    let Ok(config) = serde_json::from_str::<RunConfig>(&text) else { end(ExitReason::BadConfig, None) };
    EXIT_FILE.set(config.exit_file().unwrap().clone()).unwrap();
    let (machine, places) = match config {
        RunConfig::Boot(config) => boot(config),
        RunConfig::Restore(config) => restore(config),
    };
    let script = machine.memory.lock().unwrap().script.clone();
    let is_broken = machine.is_restored && machine.memory.lock().unwrap().names.contains_key("broken");
    let mut console = std::fs::OpenOptions::new().create(true).append(true).open(places.console).unwrap();
    writeln!(console, "Linux version fake\nscript {script}").unwrap();
    let control = UnixListener::bind(places.control).unwrap();
    let guest = UnixListener::bind(&places.vsock).unwrap();
    let machine = Arc::new(machine);
    let controlled = Arc::clone(&machine);
    std::thread::spawn(move || {
        for stream in control.incoming() {
            let machine = Arc::clone(&controlled);
            std::thread::spawn(move || obey(stream.unwrap(), &machine));
        }
    });
    let served = Arc::clone(&machine);
    std::thread::spawn(move || {
        for stream in guest.incoming() {
            let machine = Arc::clone(&served);
            std::thread::spawn(move || serve(stream.unwrap(), &machine));
        }
    });
    let mut hello_socket = places.vsock.into_os_string();
    hello_socket.push("_1024");
    if is_broken {
        std::thread::spawn(|| {
            std::thread::sleep(Duration::from_millis(500));
            end(ExitReason::GuestPanic, Some("it was broken when it was restored"));
        });
    }
    live(&script, machine.is_restored, &PathBuf::from(hello_socket), &mut console);
}

fn boot(config: VmConfig) -> (Machine, Places) {
    let parameter = |key: &str| {
        let found = config.cmdline.split(' ').find_map(|word| word.strip_prefix(key));
        found.unwrap_or_default().to_owned()
    };
    let memory = Memory {
        script: std::fs::read_to_string(&config.disks[0].path).unwrap(),
        hostname: parameter("ark.hostname="),
        machine_id: parameter("ark.machine_id="),
        ..Memory::default()
    };
    let machine = Machine {
        memory: Mutex::new(memory),
        base: Mutex::default(),
        labels: config.labels,
        size: (config.vcpus, config.memory_mib),
        disks: config.disks,
        is_restored: false,
        state: Mutex::new(VmState::Running),
        keeper: keep::Keeper::default(),
    };
    let places = Places {
        vsock: config.vsock.unwrap().uds_path,
        console: config.console.unwrap(),
        control: config.control_socket.unwrap(),
    };
    (machine, places)
}

#[derive(Deserialize, Serialize)]
struct Sealed {
    seal: String,
    manifest: SnapshotManifest,
}

fn manifest_of(dir: &Path) -> SnapshotManifest {
    let text = std::fs::read(dir.join("manifest.json")).unwrap();
    serde_json::from_slice::<Sealed>(&text).unwrap().manifest
}

/// A full snapshot of what `dir` is a diff over something for.
fn compact(dir: &Path, out: &Path) {
    let mut manifest = manifest_of(dir);
    (manifest.id, manifest.base) = (SnapshotId(rand::random()), None);
    std::fs::create_dir(out).unwrap();
    for file in ["state", "sums", "memory"] {
        std::fs::copy(dir.join(file), out.join(file)).unwrap();
    }
    let sealed = Sealed { seal: "0".repeat(64), manifest };
    std::fs::write(out.join("manifest.json"), serde_json::to_vec(&sealed).unwrap()).unwrap();
}

fn restore(config: RestoreConfig) -> (Machine, Places) {
    let manifest = manifest_of(&config.snapshot);
    let mut base = manifest.base.clone();
    while let Some(below) = base {
        assert!(below.path.join("manifest.json").exists(), "a base is missing");
        base = manifest_of(&below.path).base;
    }
    let memory: Memory =
        serde_json::from_slice(&std::fs::read(config.snapshot.join("state")).unwrap()).unwrap();
    if memory.script == "unrestorable" {
        end(ExitReason::BadSnapshot, Some("it was taken on another kind of processor; take it again here"));
    }
    assert_eq!(config.disks.len(), manifest.disks.len(), "every disk is given again");
    let disks = config.disks.into_iter().map(|path| DiskConfig { path, read_only: true }).collect();
    let machine = Machine {
        memory: Mutex::new(memory),
        base: Mutex::new(Some(SnapshotBase { id: manifest.id, path: config.snapshot })),
        labels: manifest.labels,
        size: (manifest.vcpus, manifest.memory_mib),
        disks,
        is_restored: true,
        state: Mutex::new(VmState::Running),
        keeper: keep::Keeper::default(),
    };
    let places = Places {
        vsock: config.uds_path.unwrap(),
        console: config.console.unwrap(),
        control: config.control_socket.unwrap(),
    };
    (machine, places)
}

/// Writes what a snapshot consists of, as far as `arkd` looks at it.
fn snapshot(machine: &Machine, dir: &Path) -> ControlReply {
    let memory = machine.memory.lock().unwrap().clone();
    if memory.script == "full-disk" {
        return ControlReply::Refused { why: "memory: No space left on device".into() };
    }
    let state = serde_json::to_vec(&memory).unwrap();
    let id = SnapshotId(rand::random());
    let base = machine.base.lock().unwrap().clone();
    let manifest = SnapshotManifest {
        version: SNAPSHOT_VERSION,
        id,
        base: base.clone(),
        created_unix_ms: 1,
        vcpus: machine.size.0,
        memory_mib: machine.size.1,
        processor: ProcessorModel {
            vendor: "fake".into(),
            family: 1,
            model: 1,
            stepping: 1,
            brand: "fake".into(),
        },
        disks: machine.disks.clone(),
        guest_cid: Some(3),
        labels: machine.labels.clone(),
        state_bytes: state.len() as u64,
        state_sha256: "0".repeat(64),
        sums_bytes: 0,
        sums_sha256: "0".repeat(64),
        written_bytes: 4096,
    };
    let beside = PathBuf::from(format!("{}.tmp", dir.display()));
    std::fs::create_dir_all(&beside).unwrap();
    std::fs::write(beside.join("state"), state).unwrap();
    std::fs::write(beside.join("sums"), "").unwrap();
    std::fs::write(beside.join("memory"), "memory").unwrap();
    let sealed = Sealed { seal: "0".repeat(64), manifest };
    std::fs::write(beside.join("manifest.json"), serde_json::to_vec(&sealed).unwrap()).unwrap();
    std::fs::rename(beside, dir).unwrap();
    let base = base.map(|base| base.id);
    ControlReply::Snapshot(SnapshotReport { id, base, pause_us: 7, durable_us: 70, written_bytes: 4096 })
}

/// The guest from hello to end.
fn live(script: &str, is_restored: bool, hello_socket: &Path, console: &mut std::fs::File) {
    match script {
        "never-calls" if is_restored => std::thread::sleep(Duration::from_secs(1000)),
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
    let hello = Frame::json(Kind::Hello, &hello).unwrap();
    send(&mut stream, &hello);
    if script == "falls-silent" && is_restored {
        std::thread::sleep(Duration::from_secs(1000));
    }
    // Longer than any test, so that one which is killed leaves nothing for good.
    for sequence in 1..6000 {
        let beat = Heartbeat { sequence, uptime_ms: sequence, mem_available_kib: 64, load1_x100: 7 };
        let beat = Frame::json(Kind::Heartbeat, &beat).unwrap();
        // When its arkd is gone it calls the next one.
        while stream.write_all(&beat.encode()).is_err() {
            std::thread::sleep(Duration::from_millis(20));
            if let Ok(anew) = UnixStream::connect(hello_socket) {
                stream = anew;
                send(&mut stream, &hello);
            }
        }
        std::thread::sleep(Duration::from_millis(100));
        if script == "powers-off" {
            end(ExitReason::GuestPoweroff, None);
        }
    }
}

fn obey(stream: UnixStream, machine: &Machine) {
    let mut line = String::new();
    BufReader::new(&stream).read_line(&mut line).unwrap();
    let state = |state| ControlReply::State { state };
    let answer = |reply: ControlReply| {
        // Whoever asked may have left.
        let _ = writeln!(&stream, "{}", serde_json::to_string(&reply).unwrap());
    };
    let script = machine.memory.lock().unwrap().script.clone();
    if script.strip_prefix("slow-").is_some_and(|what| line.contains(&format!("\"do\":\"{what}\""))) {
        std::thread::sleep(Duration::from_secs(2));
    }
    match serde_json::from_str(&line).unwrap() {
        ControlRequest::Stop { grace_ms } => {
            answer(state(VmState::Stopping));
            if script == "ignores-stop" {
                std::thread::sleep(Duration::from_millis(grace_ms));
                end(ExitReason::StopDeadline, None);
            }
            end(ExitReason::Stopped, None);
        }
        ControlRequest::Pause | ControlRequest::Resume => {
            let now = if line.contains("pause") { VmState::Paused } else { VmState::Running };
            *machine.state.lock().unwrap() = now;
            answer(state(now));
            if script == "dies-on-resume" && now == VmState::Running {
                end(ExitReason::GuestPanic, Some("it woke up"));
            }
        }
        ControlRequest::State => answer(state(*machine.state.lock().unwrap())),
        ControlRequest::Snapshot { dir } => {
            stream.set_nonblocking(true).unwrap();
            // Given up when nobody would know of it.
            if matches!((&stream).read(&mut [0]), Ok(0)) {
                eprintln!("a snapshot is given up");
            } else {
                answer(snapshot(machine, &dir));
            }
        }
        ControlRequest::Reclaim { dir } => {
            let id = manifest_of(&dir).id;
            *machine.base.lock().unwrap() = Some(SnapshotBase { id, path: dir });
            eprintln!("memory is reclaimed");
            answer(state(VmState::Paused));
        }
        ControlRequest::Metrics => {
            let counters = BTreeMap::from([("read_bytes".to_owned(), 512)]);
            let devices = vec![DeviceMetrics { name: "block0".to_owned(), counters }];
            let metrics = VmMetrics { first_run_ns: 1, exits: 7, guest_resident_bytes: 1 << 20, devices };
            answer(ControlReply::Metrics(metrics));
        }
    }
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
fn serve(mut stream: UnixStream, machine: &Machine) {
    let script = machine.memory.lock().unwrap().script.clone();
    let mut line = [0; 13];
    stream.read_exact(&mut line).unwrap();
    if line == *inference::CONNECT {
        return inference::serve(stream, machine);
    }
    assert_eq!(&line, b"CONNECT 1025\n");
    stream.write_all(b"OK 1073741824\n").unwrap();
    let mut incoming = Incoming(stream.try_clone().unwrap(), Decoder::new());
    let mut first = incoming.next();
    // These take no time, and others follow on the same connection.
    while let Some(frame) =
        first.take_if(|frame| matches!(frame.kind, Kind::Renew | Kind::ClockSet | Kind::Eval))
    {
        match frame.kind {
            Kind::Renew => renew(&mut stream, machine, frame.parse().unwrap()),
            Kind::ClockSet => {
                let wrong = u64::from(script == "wrong-clock") * 1_000_000_000;
                send(
                    &mut stream,
                    &Frame::json(Kind::ClockSet, &ClockSet { unix_ns: now() + wrong }).unwrap(),
                );
            }
            _ => eval(&mut stream, machine, &frame.parse().unwrap()),
        }
        first = incoming.next();
    }
    let Some(first) = first else { return };
    match (first.kind, script.as_str()) {
        (_, "lies") => send(&mut stream, &Frame::empty(Kind::PowerOff)),
        (_, "dies-in-exec") => end(ExitReason::GuestPanic, Some("out of memory")),
        (Kind::Dial, _) => dial::dial(stream, &first.parse().unwrap(), machine),
        (Kind::Keep, _) => keep::keep(stream, first.parse().unwrap(), machine),
        (Kind::KeptOutput, _) => machine.keeper.tell_output(stream),
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

fn now() -> u64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
    u64::try_from(now.as_nanos()).unwrap()
}

fn renew(stream: &mut UnixStream, machine: &Machine, order: Renew) {
    let mut memory = machine.memory.lock().unwrap();
    let script = memory.script.clone();
    let does = |what: &str| script == what;
    memory.renewals += u64::from(!does("counts-no-renewal"));
    if does("slow-second-renewal") && memory.renewals > 1 {
        std::thread::sleep(Duration::from_secs(3));
    }
    if !does("keeps-its-name") {
        memory.hostname = order.hostname;
    }
    if !does("keeps-its-machine-id") {
        memory.machine_id = order.machine_id;
    }
    let random = if does("same-random") { [7u8; 32] } else { rand::random() };
    let evaluator_random = if does("same-evaluator-random") { 7 } else { rand::random::<u128>() };
    let random: String = random.iter().map(|byte| format!("{byte:02x}")).collect();
    let answer = Renewed {
        nonce: if does("another-nonce") { "0".repeat(32) } else { order.nonce },
        renewals: memory.renewals,
        random: if does("no-random") { String::new() } else { random },
        evaluator_random: Some(format!("{evaluator_random:032x}")),
        hostname: memory.hostname.clone(),
        machine_id: memory.machine_id.clone(),
        boot_id: "fake".into(),
        dropped_secrets: 0,
        unix_ns: now() + u64::from(memory.script == "wrong-clock") * 1_000_000_000,
    };
    drop(memory);
    send(stream, &Frame::json(Kind::Renewed, &answer).unwrap());
}

/// An interpreter of `name=value`, `name`, `hostname`, `machine_id`, `renewals`, `raise` and `sleep`, whose environment is among its
/// names.
fn eval(stream: &mut UnixStream, machine: &Machine, request: &EvalRequest) {
    if request.code == "sleep" {
        std::thread::sleep(Duration::from_secs(1000));
    }
    let mut memory = machine.memory.lock().unwrap();
    let mut answer = EvalEnd { value: None, exception: None, duration_us: 3 };
    let environment = request.code.strip_prefix("__import__('os').environ.update(");
    if let Some(environment) = environment.and_then(|rest| rest.strip_suffix(')')) {
        let names: BTreeMap<String, String> = serde_json::from_str(environment).unwrap();
        memory.names.extend(names);
        drop(memory);
        return send(stream, &Frame::json(Kind::Evaluated, &answer).unwrap());
    }
    match request.code.split_once('=') {
        Some((name, value)) => drop(memory.names.insert(name.to_owned(), value.to_owned())),
        None => match request.code.as_str() {
            "hostname" => answer.value = Some(memory.hostname.clone()),
            "machine_id" => answer.value = Some(memory.machine_id.clone()),
            "renewals" => answer.value = Some(memory.renewals.to_string()),
            "raise" => {
                let (kind, message) = ("Error".to_owned(), "raised".to_owned());
                answer.exception = Some(EvalException { kind, message, traceback: "Error: raised".into() });
            }
            name => answer.value = memory.names.get(name).cloned(),
        },
    }
    drop(memory);
    send(stream, &Frame::raw(Kind::Stdout, b"out\n".to_vec()).unwrap());
    send(stream, &Frame::raw(Kind::Stderr, b"err\n".to_vec()).unwrap());
    send(stream, &Frame::json(Kind::Evaluated, &answer).unwrap());
}
