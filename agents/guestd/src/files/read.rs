//! Sending a file.
//!
//! The announced size is what follows: a file that grows meanwhile is cut there. Files of /proc and /sys do not know their
//! size; when the first piece holds all of one, its true size is announced, else 0, and everything is sent.

use std::fs::OpenOptions;
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;

use ark_link::Connection;
use ark_types::guest::{ErrorCode, Frame, Kind};

use super::{absolute, describe, file_failure};
use crate::failure::{Failure, failure};

/// Bytes of a `Data` frame: with its header it fits four vsock packets (64 KiB each).
const PIECE: usize = 252 << 10;

/// Serves `FileRead`.
pub(crate) fn read(connection: &mut Connection, path: &str) -> Result<(), Failure> {
    let name = absolute(path)?;
    let failed = |e: io::Error| file_failure("read", &name, &e);
    // Non-blocking, because opening a pipe would wait for its other end before it could be refused.
    let mut file =
        OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&name).map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    if !metadata.is_file() {
        let what = if metadata.is_dir() { "is a directory" } else { "is not a regular file" };
        return Err(failure(ErrorCode::FileError, format!("{} {what}", name.display())).into());
    }
    let mut info = describe(path.to_owned(), &name, &metadata);
    let mut piece = next_piece(&mut file, PIECE).map_err(failed)?;
    if piece.len() < PIECE {
        info.size = u64::try_from(piece.len()).unwrap_or(u64::MAX);
    }
    connection.send(&Frame::json(Kind::FileInfo, &info)?)?;
    let mut left = if info.size == 0 { u64::MAX } else { info.size };
    while !piece.is_empty() {
        left = left.saturating_sub(u64::try_from(piece.len()).unwrap_or(u64::MAX));
        connection.send(&Frame::raw(Kind::Data, piece)?)?;
        let wanted = usize::try_from(left).unwrap_or(usize::MAX).min(PIECE);
        piece = next_piece(&mut file, wanted).map_err(failed)?;
    }
    Ok(connection.send(&Frame::empty(Kind::End))?)
}

/// The next `wanted` bytes, fewer only at the end of the file.
fn next_piece(file: &mut impl Read, wanted: usize) -> io::Result<Vec<u8>> {
    let mut piece = Vec::with_capacity(wanted);
    file.take(u64::try_from(wanted).unwrap_or(u64::MAX)).read_to_end(&mut piece)?;
    Ok(piece)
}
