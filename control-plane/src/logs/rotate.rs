//! A log file of bounded size, and the files that it was before.
//!
//! ```text
//!  arkd.log is full:  arkd.log.3 goes, .2 becomes .3, .1 becomes .2, arkd.log becomes .1, another arkd.log begins
//! ```
//!
//! Standard error follows, if it is the same file: `ark` starts `arkd` that way, and what the runtime itself has to say (a
//! panic) belongs into the newest file. Whatever fails, the file that is open goes on being written: a log that is too long
//! is better than none.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use crate::cleanup::make_private_dir;

/// How much is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of a file; a longer line has a file of its own.
    pub bytes: u64,
    /// Files put aside.
    pub keep: usize,
}

/// See the module.
#[derive(Debug)]
pub struct RotatedFile {
    path: PathBuf,
    file: File,
    len: u64,
    limits: Limits,
    /// The length below which no rotation is tried again after one that failed.
    patience: u64,
}

impl RotatedFile {
    /// Goes on at the end of the file at `path`, which is made, mode 0600, with its directory.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn open(path: PathBuf, limits: Limits) -> io::Result<Self> {
        if let Some(dir) = path.parent() {
            make_private_dir(dir)?;
        }
        let file = append_to(&path)?;
        let len = file.metadata()?.len();
        let mut opened = Self { path, file, len, limits, patience: 0 };
        opened.forget_old();
        Ok(opened)
    }

    /// Has other limits from now on.
    pub fn limit(&mut self, limits: Limits) {
        self.limits = limits;
        self.forget_old();
    }

    /// Writes `line`, into another file if this one has no room for it.
    ///
    /// # Errors
    /// When the system refuses; the line is lost then.
    pub fn write_line(&mut self, line: &[u8]) -> io::Result<()> {
        let more = u64::try_from(line.len()).unwrap_or(u64::MAX);
        let wanted = self.len.saturating_add(more);
        if self.len > 0 && wanted > self.limits.bytes && wanted > self.patience {
            match self.rotate() {
                Ok(()) => self.patience = 0,
                // Tried again when as much has been written once more, not with every line.
                Err(_) => self.patience = self.len.saturating_add(self.limits.bytes),
            }
        }
        self.file.write_all(line)?;
        self.len = self.len.saturating_add(more);
        Ok(())
    }

    fn rotate(&mut self) -> io::Result<()> {
        for number in (1..=self.limits.keep).rev() {
            let from = if number == 1 { self.path.clone() } else { aside(&self.path, number - 1) };
            match fs::rename(from, aside(&self.path, number)) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
                _ => {}
            }
        }
        if self.limits.keep == 0 {
            fs::remove_file(&self.path)?;
        }
        let next = append_to(&self.path)?;
        if is_standard_error(&self.file) {
            // Its messages go to a file that was put aside otherwise; no other harm is done.
            let _ = nix::unistd::dup2_stderr(&next);
        }
        self.len = next.metadata()?.len();
        self.file = next;
        Ok(())
    }

    /// Removes files put aside that are more than are to be kept: there were other limits once.
    fn forget_old(&mut self) {
        let mut number = self.limits.keep + 1;
        while fs::remove_file(aside(&self.path, number)).is_ok() {
            number += 1;
        }
    }
}

fn append_to(path: &Path) -> io::Result<File> {
    OpenOptions::new().append(true).create(true).mode(0o600).open(path)
}

/// The name of the file that was put aside `number` rotations ago.
fn aside(path: &Path, number: usize) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{number}"));
    name.into()
}

fn is_standard_error(file: &File) -> bool {
    let (Ok(file), Ok(error)) = (file.metadata(), fs::metadata("/proc/self/fd/2")) else { return false };
    (file.dev(), file.ino()) == (error.dev(), error.ino())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn files(dir: &Path) -> Vec<(String, String)> {
        let mut all: Vec<_> = fs::read_dir(dir)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .map(|path| {
                let name = path.file_name().unwrap().to_str().unwrap().to_owned();
                (name, fs::read_to_string(path).unwrap())
            })
            .collect();
        all.sort();
        all
    }

    fn named(list: &[(&str, &str)]) -> Vec<(String, String)> {
        list.iter().map(|(name, text)| ((*name).to_owned(), (*text).to_owned())).collect()
    }

    #[test]
    fn a_full_file_is_put_aside_and_the_oldest_goes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("logs/arkd.log");
        let mut log = RotatedFile::open(path.clone(), Limits { bytes: 4, keep: 2 }).unwrap();
        for line in ["a\n", "b\n", "c\n", "longer than all\n", "d\n"] {
            log.write_line(line.as_bytes()).unwrap();
        }
        let dir = dir.path().join("logs");
        assert_eq!(
            files(&dir),
            named(&[("arkd.log", "d\n"), ("arkd.log.1", "longer than all\n"), ("arkd.log.2", "c\n")])
        );
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        // Another process goes on where the last one was, with less to keep.
        let mut log = RotatedFile::open(path, Limits { bytes: 4, keep: 1 }).unwrap();
        log.write_line(b"e\n").unwrap();
        assert_eq!(files(&dir), named(&[("arkd.log", "d\ne\n"), ("arkd.log.1", "longer than all\n")]));
        log.limit(Limits { bytes: 4, keep: 0 });
        log.write_line(b"f\n").unwrap();
        assert_eq!(files(&dir), named(&[("arkd.log", "f\n")]));
    }

    #[test]
    fn a_file_that_cannot_be_put_aside_is_written_on() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("arkd.log");
        let mut log = RotatedFile::open(path.clone(), Limits { bytes: 4, keep: 1 }).unwrap();
        // A directory with something in it cannot be renamed over.
        fs::create_dir_all(dir.path().join("arkd.log.1/x")).unwrap();
        for line in ["a\n", "b\n", "c\n", "d\n"] {
            log.write_line(line.as_bytes()).unwrap();
        }
        assert_eq!(fs::read_to_string(&path).unwrap(), "a\nb\nc\nd\n");
        fs::remove_dir_all(dir.path().join("arkd.log.1")).unwrap();
        for line in ["e\n", "f\n", "g\n"] {
            log.write_line(line.as_bytes()).unwrap();
        }
        assert!(dir.path().join("arkd.log.1").is_file(), "it is tried again");
    }

    proptest! {
        #[test]
        fn no_line_is_lost_or_torn_and_sizes_hold(
            lines in proptest::collection::vec("[a-z]{0,12}\n", 0..60), bytes in 1u64..40, keep in 0usize..5,
        ) {
            let dir = tempfile::tempdir().unwrap();
            let mut log = RotatedFile::open(dir.path().join("l"), Limits { bytes, keep }).unwrap();
            for line in &lines {
                log.write_line(line.as_bytes()).unwrap();
            }
            let files = files(dir.path());
            prop_assert!(files.len() <= keep + 1);
            for (_, text) in &files {
                prop_assert!(text.len() as u64 <= bytes || text.matches('\n').count() == 1);
            }
            // Oldest first: the end of all that was written.
            let kept: String = files.iter().rev().map(|(_, text)| text.as_str()).collect();
            prop_assert!(lines.concat().ends_with(&kept));
        }
    }
}
