//! The VMM's control socket: one question, one answer.

use std::path::Path;
use std::time::Duration;

use ark_types::plain::plain;
use ark_types::vmm::{ControlReply, ControlRequest, MAX_CONTROL_LINE, VmState};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::UnixStream;

/// A VMM answers from its own state, so one that needs longer hangs or was stopped.
const PATIENCE: Duration = Duration::from_secs(1);

/// Why a VMM did not answer.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// The socket is not there, or broke.
    #[error("the VMM's control socket failed: {}", plain(.0))]
    Socket(#[from] std::io::Error),
    /// The answer is not one.
    #[error("the VMM's answer could not be understood: {0}")]
    Answer(#[from] serde_json::Error),
    /// It does not do it.
    #[error("the VMM refused: {0}")]
    Refused(String),
    /// No answer in time.
    #[error("the VMM did not answer within {} s", .0.as_secs())]
    Silent(Duration),
}

/// Asks the VMM at `socket` for `request`.
///
/// # Errors
/// [`ControlError`].
pub async fn ask(socket: &Path, request: ControlRequest) -> Result<ControlReply, ControlError> {
    ask_for(socket, request, PATIENCE).await
}

/// As [`ask`], for what takes the VMM up to `patience`.
///
/// # Errors
/// [`ControlError`].
pub async fn ask_for(
    socket: &Path,
    request: ControlRequest,
    patience: Duration,
) -> Result<ControlReply, ControlError> {
    let answer = tokio::time::timeout(patience, converse(socket, request)).await;
    answer.map_err(|_| ControlError::Silent(patience))?
}

/// Sets the VMM at `socket` going again if it is paused; whether it was. Each of its answers may take `patience`.
///
/// # Errors
/// [`ControlError`]; it may stand still then.
pub async fn set_going(socket: &Path, patience: Duration) -> Result<bool, ControlError> {
    let refused = |reply: ControlReply| match reply {
        ControlReply::Refused { why } => ControlError::Refused(why),
        other => ControlError::Refused(format!("it answered {other:?}")),
    };
    match ask_for(socket, ControlRequest::State, patience).await? {
        ControlReply::State { state: VmState::Paused } => {}
        ControlReply::State { .. } => return Ok(false),
        other => return Err(refused(other)),
    }
    match ask_for(socket, ControlRequest::Resume, patience).await? {
        ControlReply::State { .. } => Ok(true),
        other => Err(refused(other)),
    }
}

async fn converse(socket: &Path, request: ControlRequest) -> Result<ControlReply, ControlError> {
    let mut stream = UnixStream::connect(socket).await?;
    let mut line = serde_json::to_vec(&request)?;
    line.push(b'\n');
    stream.write_all(&line).await?;
    line.clear();
    BufReader::new(stream).take(MAX_CONTROL_LINE as u64).read_until(b'\n', &mut line).await?;
    if line.is_empty() {
        return Err(std::io::Error::from(std::io::ErrorKind::UnexpectedEof).into());
    }
    Ok(serde_json::from_slice(&line)?)
}
