//! The one program that a guest keeps running, whoever is connected.

use std::time::Duration;

use ark_types::exec::{ExecEnd, ExecRequest, ExitStatus};
use ark_types::guest::{Frame, Kind, MAX_KEPT_OUTPUT};

use super::{Address, Connection, GuestFailure};

/// How long a guest may take to start a program, or to tell what one wrote; on an emulated host it is slow.
const LIMIT: Duration = Duration::from_secs(30);

/// A connection that tells of the end of a guest's program. Without it that goes on.
#[derive(Debug)]
pub(crate) struct Keeping(Connection);

/// How a program ended, and what it wrote last.
#[derive(Debug)]
pub(crate) struct KeptEnd {
    pub(crate) status: ExitStatus,
    /// At most [`MAX_KEPT_OUTPUT`] bytes.
    pub(crate) output: Vec<u8>,
}

/// Has the guest at `address` keep `program` running, unless it keeps one already; without a program it is only asked for that.
///
/// # Errors
/// [`GuestFailure`].
pub(crate) async fn keep(address: &Address, program: Option<&ExecRequest>) -> Result<Keeping, GuestFailure> {
    let request = Frame::json(Kind::Keep, &program)?.encode();
    let begin = async {
        let mut connection = Connection::open(address, &request).await?;
        connection.reader.expect(Kind::Started).await?;
        Ok(Keeping(connection))
    };
    tokio::time::timeout(LIMIT, begin).await.unwrap_or(Err(GuestFailure::Late(LIMIT)))
}

impl Keeping {
    /// Waits for the program's end.
    ///
    /// # Errors
    /// [`GuestFailure`]; the program may go on then.
    pub(crate) async fn ended(mut self) -> Result<KeptEnd, GuestFailure> {
        let mut output = Vec::new();
        loop {
            let frame = self.0.reader.next().await?;
            match frame.kind() {
                Kind::Stdout => add(&mut output, frame.payload())?,
                Kind::Exited => return Ok(KeptEnd { status: frame.parse::<ExecEnd>()?.status, output }),
                other => return Err(GuestFailure::Unexpected(other)),
            }
        }
    }
}

/// What the program that the guest at `address` keeps wrote last, at most [`MAX_KEPT_OUTPUT`] bytes.
///
/// # Errors
/// [`GuestFailure`].
pub(crate) async fn kept_output(address: &Address) -> Result<Vec<u8>, GuestFailure> {
    let ask = async {
        let mut connection = Connection::open(address, &Frame::empty(Kind::KeptOutput).encode()).await?;
        let mut output = Vec::new();
        loop {
            let frame = connection.reader.next().await?;
            match frame.kind() {
                Kind::Data => add(&mut output, frame.payload())?,
                Kind::End => return Ok(output),
                other => return Err(GuestFailure::Unexpected(other)),
            }
        }
    };
    tokio::time::timeout(LIMIT, ask).await.unwrap_or(Err(GuestFailure::Late(LIMIT)))
}

fn add(output: &mut Vec<u8>, bytes: &[u8]) -> Result<(), GuestFailure> {
    if output.len() + bytes.len() > MAX_KEPT_OUTPUT {
        let why = format!("its program's last output has more than {MAX_KEPT_OUTPUT} bytes");
        return Err(GuestFailure::TooMuch(why));
    }
    output.extend_from_slice(bytes);
    Ok(())
}
