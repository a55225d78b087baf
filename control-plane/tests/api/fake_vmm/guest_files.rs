//! Files of the stand-in's guest, which are this host's.

use std::io::{Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::path::Path;

use ark_types::files::{FileKind, FileStat};
use ark_types::guest::{ErrorCode, FileWrite, Frame, Kind};

use super::{Incoming, fail, send};

pub(super) fn describe(path: &Path) -> std::io::Result<FileStat> {
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

pub(super) fn read_file(stream: &mut UnixStream, path: &str) {
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

pub(super) fn write_file(stream: &mut UnixStream, incoming: &mut Incoming, wanted: &FileWrite) {
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
