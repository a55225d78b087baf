//! A program run to its end, its output captured.

use ark_types::exec::{ExecEnd, MAX_CAPTURE};
use ark_types::guest::{Frame, Kind, MAX_PAYLOAD};
use ark_types::task::OutputStream;

use super::{Address, Connection, FrameReader, FrameWriter, GuestFailure};

/// What a program left behind.
#[derive(Debug)]
pub struct Captured {
    /// How it ended.
    pub end: ExecEnd,
    /// Standard output, the first [`MAX_CAPTURE`] bytes.
    pub stdout: Vec<u8>,
    /// Standard error, the first [`MAX_CAPTURE`] bytes.
    pub stderr: Vec<u8>,
    /// Whether output was dropped.
    pub truncated: bool,
}

/// What takes the output of a program or of code as it comes.
pub trait Sink: Send {
    /// Takes the next bytes of `stream`. Whoever writes them waits for that.
    fn take(&mut self, stream: OutputStream, bytes: &[u8]) -> impl Future<Output = ()> + Send;
}

/// The first [`MAX_CAPTURE`] bytes of each stream.
#[derive(Debug, Default)]
pub(super) struct Kept {
    pub(super) stdout: Vec<u8>,
    pub(super) stderr: Vec<u8>,
    /// Whether there was more.
    pub(super) truncated: bool,
}

impl Sink for Kept {
    async fn take(&mut self, stream: OutputStream, bytes: &[u8]) {
        let kept = match stream {
            OutputStream::Stdout => &mut self.stdout,
            OutputStream::Stderr => &mut self.stderr,
        };
        self.truncated |= keep(kept, bytes);
    }
}

/// Runs the program that `request` (an [`Kind::Exec`] frame) names at `address`, with `stdin` as its input.
///
/// # Errors
/// [`GuestFailure`].
pub async fn capture(address: &Address, request: &Frame, stdin: &[u8]) -> Result<Captured, GuestFailure> {
    let mut output = Kept::default();
    let end = capture_to(address, request, stdin, &mut output).await?;
    let Kept { stdout, stderr, truncated } = output;
    Ok(Captured { end, stdout, stderr, truncated })
}

/// As [`capture`], with the output going to `output`.
///
/// # Errors
/// [`GuestFailure`].
pub async fn capture_to(
    address: &Address,
    request: &Frame,
    stdin: &[u8],
    output: &mut impl Sink,
) -> Result<ExecEnd, GuestFailure> {
    debug_assert_eq!(request.kind, Kind::Exec);
    let mut first = request.encode();
    // Little or no input goes out with the request: one system call here, one wake-up in the VMM.
    let with_request = stdin.len() <= MAX_PAYLOAD;
    if with_request {
        if !stdin.is_empty() {
            first.extend_from_slice(&Frame::raw(Kind::Stdin, stdin)?.encode());
        }
        first.extend_from_slice(&Frame::empty(Kind::StdinClose).encode());
    }
    if with_request {
        let mut connection = begin(address, &first).await?;
        let end = collect(&mut connection.reader, output).await?;
        address.idle.keep(connection);
        return Ok(end);
    }
    let Connection { mut reader, mut writer } = Connection::open(address, &first).await?;
    let collect = collect(&mut reader, output);
    tokio::pin!(collect);
    tokio::select! {
        end = &mut collect => end,
        // A guest that takes no more input may still have said why, or how the program ended.
        _ = feed(&mut writer, stdin) => collect.await,
    }
}

/// Sends `request`, all that the operation has to say, on a kept connection where there is one.
pub(super) async fn begin(address: &Address, request: &[u8]) -> Result<Connection, GuestFailure> {
    while let Some(mut kept) = address.idle.take().await {
        // guestd ends a kept connection only while no operation runs on it: without an answer, nothing was begun.
        if kept.writer.send_encoded(request).await.is_ok() && kept.reader.is_answered().await {
            return Ok(kept);
        }
    }
    Connection::open(address, request).await
}

async fn feed(writer: &mut FrameWriter, stdin: &[u8]) -> Result<(), GuestFailure> {
    writer.send_bytes(Kind::Stdin, stdin).await?;
    writer.send(&Frame::empty(Kind::StdinClose)).await
}

async fn collect(reader: &mut FrameReader, output: &mut impl Sink) -> Result<ExecEnd, GuestFailure> {
    loop {
        let frame = reader.next().await?;
        match frame.kind() {
            Kind::Started => {}
            Kind::Stdout => output.take(OutputStream::Stdout, frame.payload()).await,
            Kind::Stderr => output.take(OutputStream::Stderr, frame.payload()).await,
            Kind::Exited => return Ok(frame.parse()?),
            other => return Err(GuestFailure::Unexpected(other)),
        }
    }
}

/// Adds `bytes` to `kept` as far as [`MAX_CAPTURE`] allows; whether some were dropped.
fn keep(kept: &mut Vec<u8>, bytes: &[u8]) -> bool {
    let room = MAX_CAPTURE.saturating_sub(kept.len());
    let fits = bytes.get(..room).unwrap_or(bytes);
    kept.extend_from_slice(fits);
    fits.len() < bytes.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn captured_output_stops_at_the_limit() {
        let mut kept = vec![0; MAX_CAPTURE - 2];
        assert!(!keep(&mut kept, b"12"));
        assert!(keep(&mut kept, b"3"));
        assert_eq!(kept.len(), MAX_CAPTURE);
    }
}
