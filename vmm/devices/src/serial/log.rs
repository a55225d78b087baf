//! The console's log file, bounded: what the guest prints must not fill the host's disk.
//!
//! The file holds at most [`MAX_BYTES`] of output. When it is full, its first [`HEAD_BYTES`] (the boot) stay, its last
//! [`TAIL_BYTES`] (what led to now: a panic is the last thing a guest says) move up behind a line that tells how much was
//! left out, and output goes on from there. A reader that follows the file sees it become shorter then.
//!
//! Output is written a line at a time; [`Log::flush_line`] writes a line that has no end yet.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Most bytes of the log file.
pub const MAX_BYTES: u64 = 1 << 20;
/// Bytes from the beginning that stay for ever.
pub const HEAD_BYTES: u64 = MAX_BYTES / 4;
/// Bytes from the end that stay when the middle goes.
const TAIL_BYTES: u64 = MAX_BYTES / 4;
/// Longest piece of a line that is held back.
const LINE: usize = 256;

/// What the line that tells of the bytes left out begins with.
const NOTE_BEGINS: &str = "\n[console: ";
/// What it ends with.
const NOTE_ENDS: &str = " bytes left out here]\n";
/// Longest such line.
const NOTE: usize = 64;

/// Where the guest's output goes: a file, or nowhere.
pub(super) struct Log {
    file: Option<File>,
    /// Bytes in the file.
    len: u64,
    /// Bytes of the guest's output left out so far.
    left_out: u64,
    /// Bytes of the line that says so.
    note: u64,
    line: Vec<u8>,
    /// Writes that failed; the bytes are lost, the guest goes on.
    pub(super) failed: u64,
}

impl Log {
    /// A log that goes on at the end of `file`, which should be open for reading too: else nothing is kept from the end when
    /// the file is full.
    pub(super) fn new(file: Option<File>) -> Self {
        let len = file.as_ref().and_then(|file| file.metadata().ok()).map_or(0, |metadata| metadata.len());
        let (left_out, note) = file.as_ref().and_then(read_note).unwrap_or_default();
        Self { file, len, left_out, note, line: Vec::with_capacity(LINE), failed: 0 }
    }

    /// Takes one byte of output.
    pub(super) fn push(&mut self, byte: u8) {
        if self.file.is_none() {
            return;
        }
        self.line.push(byte);
        if byte == b'\n' || self.line.len() >= LINE {
            self.flush_line();
        }
    }

    /// Writes what was held back.
    pub(super) fn flush_line(&mut self) {
        if self.line.is_empty() {
            return;
        }
        let mut line = std::mem::take(&mut self.line);
        if self.write(&line).is_err() {
            self.failed = self.failed.wrapping_add(1);
        }
        line.clear();
        self.line = line;
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        let Some(file) = &self.file else { return Ok(()) };
        let more = len(bytes);
        if self.len.saturating_add(more) > MAX_BYTES {
            let tail = read_tail(file, self.len);
            let middle =
                self.len.saturating_sub(HEAD_BYTES).saturating_sub(len(&tail)).saturating_sub(self.note);
            self.left_out = self.left_out.saturating_add(middle);
            let note = format!("{NOTE_BEGINS}{}{NOTE_ENDS}", self.left_out);
            // Cut before it is written, so that a file opened for appending (where offsets are ignored) gets it right too.
            file.set_len(HEAD_BYTES)?;
            self.len = HEAD_BYTES;
            self.note = len(note.as_bytes());
            for part in [note.as_bytes(), &tail] {
                file.write_all_at(part, self.len)?;
                self.len = self.len.saturating_add(len(part));
            }
        }
        file.write_all_at(bytes, self.len)?;
        self.len = self.len.saturating_add(more);
        Ok(())
    }
}

/// How many bytes an earlier VMM left out of `file`, and the length of its line that says so.
fn read_note(file: &File) -> Option<(u64, u64)> {
    let mut text = [0; NOTE];
    let count = file.read_at(&mut text, HEAD_BYTES).ok()?;
    let rest = text.get(..count)?.strip_prefix(NOTE_BEGINS.as_bytes())?;
    let digits = rest.iter().take_while(|byte| byte.is_ascii_digit()).count();
    let (number, rest) = rest.split_at_checked(digits)?;
    let left_out = std::str::from_utf8(number).ok()?.parse().ok()?;
    let note = NOTE_BEGINS.len() + digits + NOTE_ENDS.len();
    rest.starts_with(NOTE_ENDS.as_bytes()).then_some((left_out, u64::try_from(note).ok()?))
}

/// The last [`TAIL_BYTES`] of `file`; nothing when it cannot be read.
fn read_tail(file: &File, end: u64) -> Vec<u8> {
    let mut tail = vec![0; usize::try_from(TAIL_BYTES).unwrap_or(0)];
    let from = end.saturating_sub(TAIL_BYTES).max(HEAD_BYTES);
    if file.read_exact_at(&mut tail, from).is_err() {
        tail.clear();
    }
    tail
}

fn len(bytes: &[u8]) -> u64 {
    u64::try_from(bytes.len()).unwrap_or(u64::MAX)
}
