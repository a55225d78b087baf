//! A console that is read by offsets, while its VMM writes it.
//!
//! The VMM takes the middle out of a file that is full, at any moment: it cuts the file behind its head, then writes the note and
//! the tail. A piece counts as read only when the note is the same before and after, since each cut leaves out more. What a guest
//! writes in just the place and form of a note is taken for one: that spoils the offsets of its own console, and nothing else.

use std::io::{self, SeekFrom};
use std::path::Path;

use ark_types::console::{HEAD_BYTES, MAX_NOTE, read_note};
use tokio::fs::File;
use tokio::io::{AsyncReadExt as _, AsyncSeekExt as _};

/// Bytes read at a time.
const CHUNK: u64 = 64 << 10;

/// Where to begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Begin {
    /// At this offset.
    From(u64),
    /// With the last so many lines.
    Tail(u64),
}

/// What is read next.
#[derive(Debug, PartialEq, Eq)]
pub enum Piece {
    /// Bytes, the first of them at `offset`.
    Bytes {
        /// Offset of the first.
        offset: u64,
        /// At least one.
        bytes: Vec<u8>,
    },
    /// `bytes` from `offset` on are not there any more.
    LeftOut {
        /// Offset of the first.
        offset: u64,
        /// How many.
        bytes: u64,
    },
}

/// A console being read.
#[derive(Debug)]
pub struct Reading {
    file: File,
    offset: u64,
}

/// How a file and the offsets of its console go together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Layout {
    len: u64,
    /// Bytes that were left out behind the head, and the length of the note that says so.
    gap: Option<(u64, u64)>,
}

/// Where an offset is.
enum Place {
    /// There in the file, and so far it goes on from there.
    At(u64, u64),
    /// So many bytes before what is next in the file.
    Before(u64),
}

impl Layout {
    fn place(&self, offset: u64) -> Place {
        match self.gap {
            Some(_) if offset < HEAD_BYTES => Place::At(offset, HEAD_BYTES.saturating_sub(offset)),
            Some((left_out, note)) => match HEAD_BYTES.saturating_add(left_out).checked_sub(offset) {
                Some(missing) if missing > 0 => Place::Before(missing),
                _ => Place::At(offset.saturating_sub(left_out).saturating_add(note), CHUNK),
            },
            None => Place::At(offset, CHUNK),
        }
    }

    /// The offset of what is at `position` in the file; that of the gap for the note.
    fn offset_of(&self, position: u64) -> u64 {
        match self.gap {
            Some((left_out, note)) if position >= HEAD_BYTES => {
                match position.checked_sub(HEAD_BYTES.saturating_add(note)) {
                    Some(behind) => HEAD_BYTES.saturating_add(left_out).saturating_add(behind),
                    None => HEAD_BYTES,
                }
            }
            _ => position,
        }
    }
}

impl Reading {
    /// The console at `path` from `begin` on; none when its VMM has not begun it.
    ///
    /// # Errors
    /// When it cannot be read.
    pub async fn open(path: &Path, begin: Begin) -> io::Result<Option<Self>> {
        let file = match File::open(path).await {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other?,
        };
        let mut reading = Self { file, offset: 0 };
        reading.offset = match begin {
            Begin::From(offset) => offset,
            Begin::Tail(lines) => {
                let start = start_of_last(&mut reading.file, lines).await?;
                reading.layout().await?.offset_of(start)
            }
        };
        Ok(Some(reading))
    }

    /// Offset of what is read next.
    #[must_use]
    pub const fn offset(&self) -> u64 {
        self.offset
    }

    /// Bytes that the guest wrote so far.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub async fn end(&mut self) -> io::Result<u64> {
        let layout = self.layout().await?;
        Ok(layout.offset_of(layout.len))
    }

    /// What comes next; none where there is no more for now.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub async fn next(&mut self) -> io::Result<Option<Piece>> {
        loop {
            let (layout, offset) = (self.layout().await?, self.offset);
            let (position, most) = match layout.place(offset) {
                Place::Before(bytes) => {
                    self.offset = offset.saturating_add(bytes);
                    return Ok(Some(Piece::LeftOut { offset, bytes }));
                }
                Place::At(position, most) => (position, most.min(CHUNK)),
            };
            let mut bytes = Vec::with_capacity(usize::try_from(most).unwrap_or_default());
            self.file.seek(SeekFrom::Start(position)).await?;
            (&mut self.file).take(most).read_to_end(&mut bytes).await?;
            if bytes.is_empty() {
                return Ok(None);
            }
            if self.layout().await?.gap == layout.gap {
                self.offset = offset.saturating_add(bytes.len() as u64);
                return Ok(Some(Piece::Bytes { offset, bytes }));
            }
        }
    }

    async fn layout(&mut self) -> io::Result<Layout> {
        let len = self.file.metadata().await?.len();
        if len <= HEAD_BYTES {
            return Ok(Layout { len, gap: None });
        }
        let mut note = Vec::with_capacity(MAX_NOTE);
        self.file.seek(SeekFrom::Start(HEAD_BYTES)).await?;
        (&mut self.file).take(MAX_NOTE as u64).read_to_end(&mut note).await?;
        Ok(Layout { len, gap: read_note(&note).map(|(left_out, len)| (left_out, len as u64)) })
    }
}

/// Where the last `lines` lines of `file` begin, found from its end, a chunk at a time.
async fn start_of_last(file: &mut File, lines: u64) -> io::Result<u64> {
    let len = file.seek(SeekFrom::End(0)).await?;
    let (mut end, mut seen, mut chunk) = (len, 0, Vec::new());
    while end > 0 {
        let start = end.saturating_sub(CHUNK);
        file.seek(SeekFrom::Start(start)).await?;
        chunk.clear();
        (&mut *file).take(end - start).read_to_end(&mut chunk).await?;
        for (at, byte) in chunk.iter().enumerate().rev() {
            let next_line = start + at as u64 + 1;
            // The newline that ends the file begins no line.
            if *byte == b'\n' && next_line < len {
                seen += 1;
                if seen == lines {
                    return Ok(next_line);
                }
            }
        }
        end = start;
    }
    Ok(if lines == 0 { len } else { 0 })
}

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;
    use std::io::Write as _;

    use ark_types::console::note;

    use super::*;

    async fn all(reading: &mut Reading) -> (String, Vec<(u64, u64)>) {
        let (mut text, mut gaps) = (String::new(), Vec::new());
        while let Some(piece) = reading.next().await.unwrap() {
            match piece {
                Piece::Bytes { bytes, .. } => text.push_str(std::str::from_utf8(&bytes).unwrap()),
                Piece::LeftOut { offset, bytes } => gaps.push((offset, bytes)),
            }
        }
        (text, gaps)
    }

    async fn tail(text: &str, lines: u64) -> String {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console.log");
        std::fs::write(&path, text).unwrap();
        all(&mut Reading::open(&path, Begin::Tail(lines)).await.unwrap().unwrap()).await.0
    }

    #[tokio::test]
    async fn the_last_lines_are_found_with_and_without_a_final_newline() {
        assert_eq!(tail("a\nb\nc\n", 2).await, "b\nc\n");
        assert_eq!(tail("a\nb\nc", 2).await, "b\nc");
        assert_eq!(tail("a\nb\n", 9).await, "a\nb\n");
        assert_eq!(tail("a\nb\n", 0).await, "");
        assert_eq!(tail("", 3).await, "");
        assert_eq!(tail("\n\n\n", 1).await, "\n");
    }

    #[tokio::test]
    async fn a_tail_longer_than_a_chunk_is_found() {
        let line = format!("{}\n", "x".repeat(999));
        let text = line.repeat(200);
        assert_eq!(tail(&text, 150).await.len(), 150_000);
    }

    #[tokio::test]
    async fn a_console_that_was_not_begun_is_nothing() {
        let nothing = Reading::open(Path::new("/nonexistent/console.log"), Begin::From(0)).await;
        assert!(nothing.unwrap().is_none());
    }

    #[tokio::test]
    async fn offsets_go_on_where_the_limit_took_the_middle() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console.log");
        let head: String = "head\n".chars().cycle().take(usize::try_from(HEAD_BYTES).unwrap()).collect();
        std::fs::write(&path, format!("{head}0123456789")).unwrap();
        let mut reading = Reading::open(&path, Begin::From(HEAD_BYTES - 3)).await.unwrap().unwrap();
        assert_eq!(all(&mut reading).await, (format!("{}0123456789", &head[head.len() - 3..]), vec![]));
        assert_eq!((reading.offset(), reading.end().await.unwrap()), (HEAD_BYTES + 10, HEAD_BYTES + 10));

        // 100 bytes were left out, 90 of which nobody read.
        std::fs::write(&path, format!("{head}{}tail 1\n", note(100))).unwrap();
        assert_eq!(all(&mut reading).await, ("tail 1\n".to_owned(), vec![(HEAD_BYTES + 10, 90)]));
        OpenOptions::new().append(true).open(&path).unwrap().write_all(b"tail 2\n").unwrap();
        assert_eq!(all(&mut reading).await, ("tail 2\n".to_owned(), vec![]));
        assert_eq!(reading.end().await.unwrap(), HEAD_BYTES + 114);

        let mut whole = Reading::open(&path, Begin::From(0)).await.unwrap().unwrap();
        assert_eq!(all(&mut whole).await, (format!("{head}tail 1\ntail 2\n"), vec![(HEAD_BYTES, 100)]));
        let mut last = Reading::open(&path, Begin::Tail(1)).await.unwrap().unwrap();
        assert_eq!(last.offset(), HEAD_BYTES + 107);
        assert_eq!(all(&mut last).await.0, "tail 2\n");
        // The note counts as lines of the file; it stands for what it says.
        let mut note = Reading::open(&path, Begin::Tail(3)).await.unwrap().unwrap();
        assert_eq!(all(&mut note).await, ("tail 1\ntail 2\n".to_owned(), vec![(HEAD_BYTES, 100)]));
    }

    #[tokio::test]
    async fn a_note_of_absurd_size_does_no_harm() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console.log");
        let head = "x".repeat(usize::try_from(HEAD_BYTES).unwrap());
        std::fs::write(&path, format!("{head}{}tail", note(u64::MAX))).unwrap();
        let mut reading = Reading::open(&path, Begin::From(HEAD_BYTES)).await.unwrap().unwrap();
        let gap = Piece::LeftOut { offset: HEAD_BYTES, bytes: u64::MAX - HEAD_BYTES };
        assert_eq!(reading.next().await.unwrap(), Some(gap));
        assert_eq!(reading.end().await.unwrap(), u64::MAX);
        let _ = reading.next().await.unwrap();
    }
}
