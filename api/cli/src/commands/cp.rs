//! `ark cp`: files and directories between this machine and an agent.
//!
//! What an agent says is not trusted: a name in a listing must be one plain name, links are never made here, and a
//! downloaded file appears under its name only when it is whole.

use std::fs::{self, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Component, Path, PathBuf};

use ark_client::{Client, Download, Error};
use ark_types::files::{FileKind, FileStat};
use ark_types::plain::plain;
use serde::Serialize;
use tokio::io::AsyncWriteExt;
use tokio_util::io::InspectReader;

use super::agents::explain;
use crate::failure::Failure;
use crate::host::Context;
use crate::output::{Ui, printable};
use crate::progress::Bar;

/// Permission bits of a file that is made from standard input.
const DEFAULT_MODE: u32 = 0o644;
/// Deepest directory that is followed: an agent could make them without end.
const MAX_DEPTH: usize = 64;

/// One end of a copy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// Standard input or output.
    Standard,
    /// A path on this machine.
    Local(PathBuf),
    /// An absolute path in an agent.
    Agent {
        /// Name or id.
        agent: String,
        /// The path.
        path: String,
    },
}

/// A copy that fails on this machine's side.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CopyError {
    /// Neither end is in an agent.
    #[error("neither SRC nor DST is in an agent: write it as AGENT:/path")]
    NoAgent,
    /// Both ends are in agents.
    #[error("one of SRC and DST must be on this machine: copy in two steps, or pipe through `-`")]
    TwoAgents,
    /// A file operation failed.
    #[error("{} cannot be {done}: {}{}", .path.display(), plain(source), next_step(source))]
    File {
        /// What could not be done with it.
        done: &'static str,
        /// The file.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// Neither a file nor a directory.
    #[error("{0} is neither a file nor a directory")]
    Special(String),
    /// A path without a last name, such as `/`.
    #[error("{0} has no name of its own: give DST a full path")]
    NoName(String),
    /// A path that has no form in JSON or a URL.
    #[error("{} is not UTF-8: rename it first", .0.display())]
    NotUtf8(PathBuf),
    /// The agent lists a name that could lead elsewhere.
    #[error("the agent lists a file named {0:?}, which is no plain name; nothing more is copied from it")]
    BadName(String),
    /// Directories in directories, too many.
    #[error("{0} is more than {MAX_DEPTH} directories deep")]
    TooDeep(String),
}

/// What was copied.
#[derive(Debug, Default, Serialize)]
struct Tally {
    files: u64,
    bytes: u64,
    /// Links and special files that were passed over.
    skipped: Vec<String>,
}

/// `ark cp`.
pub(crate) async fn cp(context: &Context, source: Place, target: Place) -> Result<(), Failure> {
    let (name, inwards) = match (&source, &target) {
        (Place::Agent { .. }, Place::Agent { .. }) => return Err(CopyError::TwoAgents.into()),
        (Place::Agent { agent, .. }, _) => (agent.clone(), false),
        (_, Place::Agent { agent, .. }) => (agent.clone(), true),
        _ => return Err(CopyError::NoAgent.into()),
    };
    if inwards && let Place::Local(path) = &source {
        // Before anything is started for it.
        metadata(path)?;
    }
    let client = context.client().await?;
    let mut copy = Copy { client: &client, agent: &name, ui: context.ui, tally: Tally::default() };
    let result = match (source, target) {
        (Place::Standard, Place::Agent { path, .. }) => copy.upload_standard(&path).await,
        (Place::Local(from), Place::Agent { path, .. }) => copy.upload(&from, &path).await,
        (Place::Agent { path, .. }, Place::Standard) => copy.download_standard(&path).await,
        (Place::Agent { path, .. }, Place::Local(to)) => copy.download(&path, &to).await,
        _ => Err(CopyError::NoAgent.into()),
    };
    match result {
        Err(Failure::Api(error)) => Err(explain(&client, error).await),
        Err(other) => Err(other),
        // Standard output may be the copy itself.
        Ok(()) if context.ui.json && !copy.to_stdout() => context.ui.show(&copy.tally, |_| String::new()),
        Ok(()) => Ok(()),
    }
}

struct Copy<'a> {
    client: &'a Client,
    agent: &'a str,
    ui: Ui,
    tally: Tally,
}

impl Copy<'_> {
    /// Whether the copy went to standard output: nothing is tallied then.
    fn to_stdout(&self) -> bool {
        self.tally.files == 0
    }

    fn skip(&mut self, path: &str, what: &str) {
        self.ui.note(&format!("skipped {}: {what}", printable(path)));
        self.tally.skipped.push(path.to_owned());
    }

    async fn upload_standard(&mut self, to: &str) -> Result<(), Failure> {
        if to.ends_with('/') || self.is_directory(to).await? {
            return Err(CopyError::NoName(format!("standard input, going to the directory {to},")).into());
        }
        let bar = Bar::new(self.ui, to, None);
        let (count, source) = counted(tokio::io::stdin(), bar);
        self.client.write_file(self.agent, to, DEFAULT_MODE, None, source).await?;
        self.tally.files += 1;
        self.tally.bytes += count.load(std::sync::atomic::Ordering::Relaxed);
        Ok(())
    }

    async fn upload(&mut self, from: &Path, to: &str) -> Result<(), Failure> {
        let meta = metadata(from)?;
        let to = if to.ends_with('/') || self.is_directory(to).await? {
            let whole = fs::canonicalize(from).map_err(file("found", from))?;
            let name = whole.file_name().ok_or_else(|| CopyError::NoName(from.display().to_string()))?;
            let name = name.to_str().ok_or_else(|| CopyError::NotUtf8(from.to_owned()))?;
            format!("{}/{name}", to.trim_end_matches('/'))
        } else {
            to.to_owned()
        };
        if meta.is_file() {
            self.upload_file(from, &to).await
        } else if meta.is_dir() {
            self.upload_directory(from.to_owned(), to).await
        } else {
            Err(CopyError::Special(from.display().to_string()).into())
        }
    }

    async fn upload_file(&mut self, from: &Path, to: &str) -> Result<(), Failure> {
        let opened = tokio::fs::File::open(from).await.map_err(file("opened", from))?;
        let meta = opened.metadata().await.map_err(file("read", from))?;
        let bar = Bar::new(self.ui, to, Some(meta.len()));
        let (_, source) = counted(opened, bar);
        let mode = meta.permissions().mode() & 0o7777;
        self.client.write_file(self.agent, to, mode, Some(meta.len()), source).await?;
        self.tally.files += 1;
        self.tally.bytes += meta.len();
        Ok(())
    }

    /// Walks without recursion, so that deep trees need no stack. Files make the directories they are in.
    async fn upload_directory(&mut self, from: PathBuf, to: String) -> Result<(), Failure> {
        let mut waiting = vec![(from, to)];
        while let Some((from, to)) = waiting.pop() {
            let mut entries = fs::read_dir(&from)
                .and_then(Iterator::collect::<io::Result<Vec<_>>>)
                .map_err(file("listed", &from))?;
            entries.sort_by_key(fs::DirEntry::file_name);
            if entries.is_empty() {
                self.skip(&from.display().to_string(), "an empty directory");
            }
            for entry in entries {
                let path = entry.path();
                let kind = entry.file_type().map_err(file("read", &path))?;
                let name = entry.file_name().into_string().map_err(|_| CopyError::NotUtf8(path.clone()))?;
                let target = format!("{to}/{name}");
                if kind.is_file() {
                    self.upload_file(&path, &target).await?;
                } else if kind.is_dir() {
                    waiting.push((path, target));
                } else {
                    self.skip(&path.display().to_string(), "a link or special file");
                }
            }
        }
        Ok(())
    }

    async fn download_standard(&mut self, from: &str) -> Result<(), Failure> {
        let mut content = self.client.read_file(self.agent, from).await?.content;
        let mut stdout = tokio::io::stdout();
        while let Some(bytes) = content.next().await? {
            stdout.write_all(&bytes).await.map_err(Failure::Output)?;
        }
        stdout.flush().await.map_err(Failure::Output)
    }

    async fn download(&mut self, from: &str, to: &Path) -> Result<(), Failure> {
        let stat = self.client.stat(self.agent, from).await?;
        let is_directory = match stat.kind {
            FileKind::Directory => true,
            FileKind::File => false,
            FileKind::Symlink => self.is_directory(from).await?,
            FileKind::Other => return Err(CopyError::Special(format!("{}:{from}", self.agent)).into()),
        };
        let to = if to.is_dir() || to.as_os_str().as_encoded_bytes().ends_with(b"/") {
            let name = Path::new(from).file_name().ok_or_else(|| CopyError::NoName(from.to_owned()))?;
            to.join(name)
        } else {
            to.to_owned()
        };
        if is_directory {
            self.download_directory(from.to_owned(), to).await
        } else {
            self.download_file(from, &to).await
        }
    }

    async fn download_file(&mut self, from: &str, to: &Path) -> Result<(), Failure> {
        let Download { size, mode, mut content } = self.client.read_file(self.agent, from).await?;
        let bar = Bar::new(self.ui, from, size);
        let mut sink = Sink::open(to, mode)?;
        let mut count = 0;
        while let Some(bytes) = content.next().await? {
            sink.write(&bytes).map_err(file("written", to))?;
            bar.advance(bytes.len());
            count += bytes.len() as u64;
        }
        sink.finish(to).map_err(file("written", to))?;
        self.tally.files += 1;
        self.tally.bytes += count;
        Ok(())
    }

    async fn download_directory(&mut self, from: String, to: PathBuf) -> Result<(), Failure> {
        let mut waiting = vec![(from, to, 0)];
        while let Some((from, to, depth)) = waiting.pop() {
            if depth > MAX_DEPTH {
                return Err(CopyError::TooDeep(from).into());
            }
            make_directory(&to)?;
            for entry in self.client.list(self.agent, &from).await?.entries {
                let target = to.join(plain_name(&entry)?);
                let path = format!("{}/{}", from.trim_end_matches('/'), entry.name);
                match entry.kind {
                    FileKind::File => self.download_file(&path, &target).await?,
                    FileKind::Directory => waiting.push((path, target, depth + 1)),
                    FileKind::Symlink | FileKind::Other => self.skip(&path, "a link or special file"),
                }
            }
        }
        Ok(())
    }

    /// Whether `path` leads to a directory in the agent; links are followed, because of the dot.
    async fn is_directory(&self, path: &str) -> Result<bool, Error> {
        match self.client.stat(self.agent, &format!("{}/.", path.trim_end_matches('/'))).await {
            Ok(stat) => Ok(stat.kind == FileKind::Directory),
            Err(Error::Problem(problem))
                if matches!(problem.status, 404 | 422) && is_about_file(problem.kind) =>
            {
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }
}

const fn is_about_file(kind: ark_types::problem::ProblemKind) -> bool {
    use ark_types::problem::ProblemKind::{FileError, FileNotFound};
    matches!(kind, FileNotFound | FileError)
}

/// A reader that advances `bar`, and the count of bytes read.
fn counted<R: tokio::io::AsyncRead + Send + 'static>(
    reader: R,
    bar: Bar,
) -> (std::sync::Arc<std::sync::atomic::AtomicU64>, impl tokio::io::AsyncRead + Send + 'static) {
    let count = std::sync::Arc::new(std::sync::atomic::AtomicU64::new(0));
    let total = count.clone();
    let reader = InspectReader::new(reader, move |bytes: &[u8]| {
        bar.advance(bytes.len());
        total.fetch_add(bytes.len() as u64, std::sync::atomic::Ordering::Relaxed);
    });
    (count, reader)
}

/// What to do about a failed file operation, where that is plain.
fn next_step(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::NotFound => "; check its path, which is one on this machine",
        io::ErrorKind::PermissionDenied => "; change its permissions, or use the account it belongs to",
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => "; free some space there",
        _ => "",
    }
}

/// Gives a failed file operation its name.
fn file(done: &'static str, path: &Path) -> impl FnOnce(io::Error) -> CopyError {
    let path = path.to_owned();
    move |source| CopyError::File { done, path, source }
}

fn metadata(path: &Path) -> Result<fs::Metadata, CopyError> {
    fs::metadata(path).map_err(file("read", path))
}

/// A directory that is there, or a new one. A link to one counts: it is the user's own.
fn make_directory(path: &Path) -> Result<(), CopyError> {
    match fs::create_dir(path) {
        Err(_) if path.is_dir() => Ok(()),
        made => made.map_err(file("made", path)),
    }
}

/// The name of a listed file, if it is one plain name.
fn plain_name(entry: &FileStat) -> Result<&str, CopyError> {
    let name = entry.name.as_str();
    let mut parts = Path::new(name).components();
    match (parts.next(), parts.next()) {
        (Some(Component::Normal(only)), None) if only == name && !name.contains('\0') => Ok(name),
        _ => Err(CopyError::BadName(name.to_owned())),
    }
}

/// Where a download goes: beside its place until it is whole, or straight into a device or pipe.
enum Sink {
    Draft { draft: tempfile::NamedTempFile, mode: u32 },
    Direct(fs::File),
}

impl Sink {
    fn open(to: &Path, mode: u32) -> Result<Self, CopyError> {
        if let Ok(meta) = fs::metadata(to)
            && !meta.is_file()
        {
            let open = fs::OpenOptions::new().write(true).open(to);
            return Ok(Self::Direct(open.map_err(file("opened", to))?));
        }
        let parent = to.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let draft = tempfile::NamedTempFile::new_in(parent).map_err(file("made", to))?;
        // What an agent made is never set-user-ID here.
        Ok(Self::Draft { draft, mode: mode & 0o777 })
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Draft { draft, .. } => draft.write_all(bytes),
            Self::Direct(open) => open.write_all(bytes),
        }
    }

    fn finish(self, to: &Path) -> io::Result<()> {
        if let Self::Draft { draft, mode } = self {
            draft.as_file().set_permissions(Permissions::from_mode(mode))?;
            // A link of the user's keeps pointing where it did; its target gets the content.
            let place = fs::canonicalize(to).unwrap_or_else(|_| to.to_owned());
            match draft.persist(&place) {
                Ok(_) => {}
                // The link's target is on another file system: it cannot be renamed there.
                Err(failed) if failed.error.kind() == io::ErrorKind::CrossesDevices => {
                    fs::copy(failed.file.path(), &place)?;
                }
                Err(failed) => return Err(failed.error),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listed(name: &str) -> FileStat {
        let kind = FileKind::File;
        FileStat {
            name: name.to_owned(),
            kind,
            size: 0,
            mode: 0,
            uid: 0,
            gid: 0,
            mtime_unix_ms: 0,
            target: None,
        }
    }

    #[test]
    fn a_listed_name_cannot_lead_out_of_the_directory() {
        for good in ["a", "a b", "..a", "ü", "-"] {
            assert_eq!(plain_name(&listed(good)).unwrap(), good);
        }
        for bad in ["", ".", "..", "/", "/etc/passwd", "a/b", "../x", "a/", "./a", "a\0b"] {
            assert!(plain_name(&listed(bad)).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_download_appears_whole_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let to = dir.path().join("x");
        let mut sink = Sink::open(&to, 0o4755).unwrap();
        sink.write(b"half").unwrap();
        drop(sink);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        let mut sink = Sink::open(&to, 0o4755).unwrap();
        sink.write(b"whole").unwrap();
        sink.finish(&to).unwrap();
        assert_eq!(fs::read(&to).unwrap(), b"whole");
        assert_eq!(fs::metadata(&to).unwrap().permissions().mode() & 0o7777, 0o755, "never set-user-ID");
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&to, &link).unwrap();
        let mut sink = Sink::open(&link, 0o600).unwrap();
        sink.write(b"through").unwrap();
        sink.finish(&link).unwrap();
        assert_eq!(fs::read(&to).unwrap(), b"through");
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
    }

    #[test]
    fn a_device_is_written_to_and_not_replaced() {
        let null = Path::new("/dev/null");
        let mut sink = Sink::open(null, 0o644).unwrap();
        sink.write(b"gone").unwrap();
        sink.finish(null).unwrap();
        assert!(!fs::metadata(null).unwrap().is_file());
    }
}
