//! Files, the clock, and requests that are none.

mod common;

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

use ark_link::Connection;
use ark_types::files::{FileKind, FileStat};
use ark_types::guest::{ErrorCode, FileWrite, Frame, GuestError, Kind, PathRequest};
use common::{Guestd, exec, names, wait_until};
use nix::mount::{MsFlags, mount};
use nix::sched::CloneFlags;

fn at(path: &Path) -> PathRequest {
    PathRequest { path: path.to_str().unwrap().to_owned() }
}

fn read(guestd: &Guestd, path: &Path) -> Result<(FileStat, Vec<u8>), GuestError> {
    let mut connection = guestd.ask(Kind::FileRead, &at(path));
    let mut info = None;
    let mut bytes = Vec::new();
    loop {
        let frame = connection.recv().unwrap().unwrap();
        match frame.kind {
            Kind::FileInfo => info = Some(frame.parse().unwrap()),
            Kind::Data => bytes.extend(frame.payload),
            Kind::End => return Ok((info.unwrap(), bytes)),
            Kind::Error => return Err(frame.parse().unwrap()),
            other => panic!("{other:?} in a file"),
        }
    }
}

fn begin(guestd: &Guestd, path: &Path, mode: u32) -> Connection {
    guestd.ask(Kind::FileWrite, &FileWrite { path: path.to_str().unwrap().to_owned(), mode })
}

fn write(guestd: &Guestd, path: &Path, mode: u32, pieces: &[&[u8]]) -> Result<(), GuestError> {
    let mut connection = begin(guestd, path, mode);
    for piece in pieces {
        connection.send(&Frame::raw(Kind::Data, *piece).unwrap()).unwrap();
    }
    connection.send(&Frame::empty(Kind::End)).unwrap();
    let reply = connection.recv().unwrap().unwrap();
    if reply.kind == Kind::Ok { Ok(()) } else { Err(reply.parse().unwrap()) }
}

#[test]
fn files_of_no_one_and_many_bytes_go_both_ways() {
    let guestd = Guestd::start();
    let path = guestd.path("made/on/the/way");
    let big: Vec<u8> = (0u32..20 << 20).map(|n| n.to_le_bytes()[(n % 3) as usize]).collect();
    for content in [&b""[..], b"x", &big, b"shorter again"] {
        let pieces: Vec<&[u8]> = content.chunks(200_000).collect();
        write(&guestd, &path, 0o640, &pieces).unwrap();
        let (info, back) = read(&guestd, &path).unwrap();
        assert!(back == content);
        assert_eq!((info.kind, info.size, info.mode), (FileKind::File, content.len() as u64, 0o640));
        assert_eq!(names(path.parent().unwrap()), ["way"]);
    }
}

#[test]
fn a_broken_upload_leaves_what_was_there() {
    let guestd = Guestd::start();
    let dir = guestd.path("d");
    let path = dir.join("f");
    let mut connection = begin(&guestd, &path, 0o644);
    connection.send(&Frame::raw(Kind::Data, b"half".as_slice()).unwrap()).unwrap();
    wait_until("the upload has begun", || dir.exists() && names(&dir).len() == 1);
    assert!(!path.exists());
    drop(connection);
    wait_until("nothing is left", || names(&dir).is_empty());

    write(&guestd, &path, 0o755, &[b"whole"]).unwrap();
    let mut connection = begin(&guestd, &path, 0o644);
    connection.send(&Frame::empty(Kind::StdinClose)).unwrap();
    let error: GuestError = connection.recv().unwrap().unwrap().parse().unwrap();
    assert_eq!(error.code, ErrorCode::BadRequest);
    assert_eq!(fs::read(&path).unwrap(), b"whole");
    assert_eq!(names(&dir), ["f"]);
}

#[test]
fn an_upload_goes_through_a_link_and_to_no_special_file() {
    let guestd = Guestd::start();
    let (file, link) = (guestd.path("file"), guestd.path("link"));
    fs::write(&file, "old").unwrap();
    symlink("file", &link).unwrap();
    write(&guestd, &link, 0o600, &[b"new"]).unwrap();
    assert_eq!(fs::read(&file).unwrap(), b"new");
    assert!(link.is_symlink());
    let big = vec![0; 200_000];
    for (path, code) in [
        (guestd.path(""), ErrorCode::FileError),
        ("/dev/null".into(), ErrorCode::FileError),
        ("/proc/new".into(), ErrorCode::FileNotFound),
        ("relative".into(), ErrorCode::BadRequest),
        (guestd.path("file/below"), ErrorCode::FileNotFound),
    ] {
        // The answer arrives although the host keeps sending.
        let error = write(&guestd, &path, 0o644, &[big.as_slice(); 40]).unwrap_err();
        assert_eq!(error.code, code, "{}: {error}", path.display());
    }
}

#[test]
fn a_full_disk_is_an_error_that_leaves_nothing() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: a small file system of its own needs root");
        return;
    }
    let guestd = Guestd::start_after(|dir| {
        nix::sched::unshare(CloneFlags::CLONE_NEWNS)?;
        mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)?;
        let small = dir.join("small");
        fs::create_dir(&small)?;
        mount(Some("small"), &small, Some("tmpfs"), MsFlags::empty(), Some("size=64k"))?;
        Ok(())
    });
    let dir = guestd.path("small");
    let error = write(&guestd, &dir.join("f"), 0o644, &[[0; 200_000].as_slice(); 10]).unwrap_err();
    assert_eq!(error.code, ErrorCode::FileError);
    assert!(error.message.contains("no space is left"), "{error}");
    assert_eq!(guestd.ask(Kind::FileList, &at(&dir)).recv().unwrap().unwrap().kind, Kind::End);
}

#[test]
fn what_is_no_regular_file_is_not_read() {
    let guestd = Guestd::start();
    nix::unistd::mkfifo(&guestd.path("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    for (path, code) in [
        (guestd.path(""), ErrorCode::FileError),
        (guestd.path("fifo"), ErrorCode::FileError),
        ("/dev/zero".into(), ErrorCode::FileError),
        (guestd.path("missing"), ErrorCode::FileNotFound),
        ("relative".into(), ErrorCode::BadRequest),
    ] {
        assert_eq!(read(&guestd, &path).unwrap_err().code, code, "{}", path.display());
    }
}

#[test]
fn files_that_do_not_know_their_size_are_read_whole() {
    let guestd = Guestd::start();
    let (info, bytes) = read(&guestd, Path::new("/proc/version")).unwrap();
    assert_eq!(info.size, bytes.len() as u64);
    assert_eq!(bytes, fs::read("/proc/version").unwrap());
    let (_, symbols) = read(&guestd, Path::new("/proc/kallsyms")).unwrap();
    assert_eq!(symbols.len(), fs::read("/proc/kallsyms").unwrap().len());
}

#[test]
fn files_are_described_and_listed_by_name() {
    let guestd = Guestd::start();
    let dir = guestd.path("d");
    fs::create_dir(&dir).unwrap();
    for name in ["b", "a", "c"] {
        fs::write(dir.join(name), name.repeat(3)).unwrap();
    }
    fs::set_permissions(dir.join("a"), fs::Permissions::from_mode(0o4711)).unwrap();
    symlink("a", dir.join("link")).unwrap();

    let link: FileStat = guestd.answer(Kind::FileStat, &at(&dir.join("link"))).parse().unwrap();
    assert_eq!((link.kind, link.target.as_deref()), (FileKind::Symlink, Some("a")));
    let a: FileStat = guestd.answer(Kind::FileStat, &at(&dir.join("a"))).parse().unwrap();
    assert_eq!((a.size, a.mode, a.kind), (3, 0o4711, FileKind::File));
    assert!(a.mtime_unix_ms > 1_600_000_000_000);

    let mut connection = guestd.ask(Kind::FileList, &at(&dir));
    let mut listed = Vec::new();
    loop {
        let frame = connection.recv().unwrap().unwrap();
        if frame.kind == Kind::End {
            break;
        }
        listed.push(frame.parse::<FileStat>().unwrap().name);
    }
    assert_eq!(listed, ["a", "b", "c", "link"]);

    for (kind, path, code) in [
        (Kind::FileStat, dir.join("missing"), ErrorCode::FileNotFound),
        (Kind::FileList, dir.join("missing"), ErrorCode::FileNotFound),
        (Kind::FileList, dir.join("a"), ErrorCode::FileError),
    ] {
        let error: GuestError = guestd.answer(kind, &at(&path)).parse().unwrap();
        assert_eq!(error.code, code);
    }
}

#[test]
fn requests_that_are_none_are_refused_and_the_server_goes_on() {
    let guestd = Guestd::start();
    for frame in [
        Frame::empty(Kind::Stdin),
        Frame::empty(Kind::Hello),
        Frame::raw(Kind::Exec, b"{".as_slice()).unwrap(),
        Frame::raw(Kind::FileStat, b"[]".as_slice()).unwrap(),
        Frame::empty(Kind::PowerOff),
    ] {
        let mut connection = guestd.connect();
        connection.send(&frame).unwrap();
        let error: GuestError = connection.recv().unwrap().unwrap().parse().unwrap();
        assert_eq!(error.code, ErrorCode::BadRequest, "{frame:?}");
    }
    for garbage in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0xff; 100], b"\0"] {
        let mut connection = guestd.connect();
        connection.send_encoded(garbage).unwrap();
        connection.stream().finish().unwrap();
        assert!(matches!(connection.recv(), Ok(None) | Err(_)));
    }
    assert_eq!(guestd.run(&exec(&["echo", "still here"])).text(), "still here\n");
}

#[test]
fn a_second_server_at_the_same_path_is_refused_and_a_stale_socket_is_not() {
    let guestd = Guestd::start();
    let path = guestd.path("s");
    let mut serve = std::process::Command::new(env!("CARGO_BIN_EXE_ark-guestd"));
    serve.args(["serve", "--listen"]).arg(&path);
    let output = serve.output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("cannot listen at"));
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);

    let stale = guestd.path("stale");
    drop(std::os::unix::net::UnixListener::bind(&stale).unwrap());
    let mut second = std::process::Command::new(env!("CARGO_BIN_EXE_ark-guestd"))
        .args(["serve", "--listen"])
        .arg(&stale)
        .spawn()
        .unwrap();
    let serves = || std::os::unix::net::UnixStream::connect(&stale).is_ok();
    for _ in 0..500 {
        if serves() {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    let served = serves();
    second.kill().unwrap();
    second.wait().unwrap();
    assert!(served, "a stale socket is in the way");
}
