//! Code for the interpreter that a guest keeps warm, its output captured.

use ark_types::eval::{EvalEnd, EvalRequest};
use ark_types::guest::{Frame, Kind};
use ark_types::task::OutputStream;

use super::exec::{Kept, Sink, begin};
use super::{Address, FrameReader, GuestFailure};

/// What an evaluation left behind.
#[derive(Debug)]
pub struct Evaluated {
    /// Its value, or the exception that ended it.
    pub end: EvalEnd,
    /// Standard output, the first [`ark_types::exec::MAX_CAPTURE`] bytes.
    pub stdout: Vec<u8>,
    /// Standard error, the first [`ark_types::exec::MAX_CAPTURE`] bytes.
    pub stderr: Vec<u8>,
    /// Whether output was dropped.
    pub truncated: bool,
}

/// Has the evaluator at `address` run the code of `request`.
///
/// # Errors
/// [`GuestFailure`]; an exception of the code is none.
pub async fn evaluate(address: &Address, request: &EvalRequest) -> Result<Evaluated, GuestFailure> {
    let mut output = Kept::default();
    let end = evaluate_to(address, request, &mut output).await?;
    let Kept { stdout, stderr, truncated } = output;
    Ok(Evaluated { end, stdout, stderr, truncated })
}

/// As [`evaluate`], with the output going to `output`.
///
/// # Errors
/// [`GuestFailure`]; an exception of the code is none.
pub async fn evaluate_to(
    address: &Address,
    request: &EvalRequest,
    output: &mut impl Sink,
) -> Result<EvalEnd, GuestFailure> {
    let first = Frame::json(Kind::Eval, request)?.encode();
    let mut connection = begin(address, &first).await?;
    let end = collect(&mut connection.reader, output).await?;
    address.idle.keep(connection);
    Ok(end)
}

async fn collect(reader: &mut FrameReader, output: &mut impl Sink) -> Result<EvalEnd, GuestFailure> {
    loop {
        let frame = reader.next().await?;
        match frame.kind() {
            Kind::Stdout => output.take(OutputStream::Stdout, frame.payload()).await,
            Kind::Stderr => output.take(OutputStream::Stderr, frame.payload()).await,
            Kind::Evaluated => return Ok(frame.parse()?),
            other => return Err(GuestFailure::Unexpected(other)),
        }
    }
}
