//! Files of a guest: streamed down and up, described, listed.

use ark_types::files::FileStat;
use ark_types::guest::{EncodedFrame, FileWrite, Frame, Kind, PathRequest};
use bytes::Bytes;

use super::{Address, Connection, GuestFailure};

/// Most entries of a listing the host holds.
pub const MAX_ENTRIES: usize = 100_000;
/// Most bytes of a listing's frames the host holds.
const MAX_LISTING: usize = 32 << 20;

fn about(kind: Kind, path: &str) -> Result<Frame, GuestFailure> {
    Ok(Frame::json(kind, &PathRequest { path: path.to_owned() })?)
}

/// What `path` is.
///
/// # Errors
/// [`GuestFailure`].
pub async fn stat(address: &Address, path: &str) -> Result<FileStat, GuestFailure> {
    Ok(Connection::ask(address, &about(Kind::FileStat, path)?, Kind::FileInfo).await?.parse()?)
}

/// What is in the directory `path`, by name.
///
/// # Errors
/// [`GuestFailure::TooMuch`] over [`MAX_ENTRIES`], and the others.
pub async fn list(address: &Address, path: &str) -> Result<Vec<FileStat>, GuestFailure> {
    let mut connection = Connection::open(address, &about(Kind::FileList, path)?.encode()).await?;
    let mut entries: Vec<FileStat> = Vec::new();
    let mut bytes = 0;
    loop {
        let frame = connection.reader.next().await?;
        match frame.kind() {
            Kind::FileInfo => entries.push(frame.parse()?),
            Kind::End => break,
            other => return Err(GuestFailure::Unexpected(other)),
        }
        bytes += frame.payload().len();
        if entries.len() > MAX_ENTRIES || bytes > MAX_LISTING {
            return Err(GuestFailure::TooMuch(format!("{path} has more than {MAX_ENTRIES} entries")));
        }
    }
    entries.sort_unstable_by(|a, b| a.name.cmp(&b.name));
    Ok(entries)
}

/// A file on its way down. Holds one frame at a time.
#[derive(Debug)]
pub struct Download {
    connection: Connection,
    info: FileStat,
    /// The first frame after the file's description: tells an empty file from one whose size is not known ahead.
    first: Option<EncodedFrame>,
    /// Bytes the guest may still send; none when the size is not known ahead.
    left: Option<u64>,
}

impl Download {
    /// Asks for the file at `path`.
    ///
    /// # Errors
    /// [`GuestFailure`].
    pub async fn open(address: &Address, path: &str) -> Result<Self, GuestFailure> {
        let mut connection = Connection::open(address, &about(Kind::FileRead, path)?.encode()).await?;
        let info: FileStat = connection.reader.expect(Kind::FileInfo).await?.parse()?;
        let first = connection.reader.next().await?;
        // Files of /proc and /sys say they are empty and are not.
        let unknown = info.size == 0 && first.kind() == Kind::Data;
        let left = (!unknown).then_some(info.size);
        Ok(Self { connection, info, first: Some(first), left })
    }

    /// What the guest says the file is.
    #[must_use]
    pub const fn info(&self) -> &FileStat {
        &self.info
    }

    /// Bytes that will come, where that is known. Ask before [`Self::next`].
    #[must_use]
    pub const fn length(&self) -> Option<u64> {
        self.left
    }

    /// The next bytes; none at the end of the file.
    ///
    /// # Errors
    /// [`GuestFailure::TooMuch`] when the guest sends more than it announced, [`GuestFailure::Closed`] when less.
    pub async fn next(&mut self) -> Result<Option<Bytes>, GuestFailure> {
        let frame = match self.first.take() {
            Some(frame) => frame,
            None => self.connection.reader.next().await?,
        };
        match (frame.kind(), &mut self.left) {
            (Kind::End, None | Some(0)) => Ok(None),
            (Kind::End, Some(_)) => Err(GuestFailure::Closed),
            (Kind::Data, None) => Ok(Some(frame.into_payload())),
            (Kind::Data, Some(left)) => {
                *left = left.checked_sub(frame.payload().len() as u64).ok_or_else(|| {
                    GuestFailure::TooMuch(format!("{} grew while it was read", self.info.name))
                })?;
                Ok(Some(frame.into_payload()))
            }
            (other, _) => Err(GuestFailure::Unexpected(other)),
        }
    }
}

/// What an answer before the end of an upload means.
fn told(early: Result<EncodedFrame, GuestFailure>) -> GuestFailure {
    early.map_or_else(|failure| failure, |frame| GuestFailure::Unexpected(frame.kind()))
}

/// A file on its way up. Dropped before [`Self::finish`], it leaves nothing in the guest.
#[derive(Debug)]
pub struct Upload {
    connection: Connection,
}

impl Upload {
    /// Announces a file at `path` with permission bits `mode`.
    ///
    /// # Errors
    /// [`GuestFailure`].
    pub async fn open(address: &Address, path: &str, mode: u32) -> Result<Self, GuestFailure> {
        let first = Frame::json(Kind::FileWrite, &FileWrite { path: path.to_owned(), mode })?;
        Ok(Self { connection: Connection::open(address, &first.encode()).await? })
    }

    /// Sends `bytes`; returns early when the guest says that it cannot take them.
    ///
    /// # Errors
    /// [`GuestFailure`].
    pub async fn send(&mut self, bytes: &[u8]) -> Result<(), GuestFailure> {
        let Connection { reader, writer } = &mut self.connection;
        let sent = tokio::select! {
            biased;
            early = reader.next() => return Err(told(early)),
            sent = writer.send_bytes(Kind::Data, bytes) => sent,
        };
        match sent {
            Ok(()) => Ok(()),
            // A guest that refused and closed has said why.
            Err(_) => Err(told(reader.next().await)),
        }
    }

    /// Ends the file: it appears under its name when this returns.
    ///
    /// # Errors
    /// [`GuestFailure`].
    pub async fn finish(mut self) -> Result<(), GuestFailure> {
        // An answer that came early explains better than the broken pipe it causes.
        let sent = self.connection.writer.send(&Frame::empty(Kind::End)).await;
        match self.connection.reader.expect(Kind::Ok).await {
            Ok(_) => Ok(()),
            Err(failure) if failure.is_disconnect() => Err(sent.err().unwrap_or(failure)),
            Err(failure) => Err(failure),
        }
    }
}
