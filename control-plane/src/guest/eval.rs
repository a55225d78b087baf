//! Code for the interpreter that a guest keeps warm, its output captured.

use ark_types::eval::{EvalEnd, EvalRequest};
use ark_types::guest::{Frame, Kind};

use super::exec::{begin, keep};
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
    let first = Frame::json(Kind::Eval, request)?.encode();
    let mut connection = begin(address, &first).await?;
    let evaluated = collect(&mut connection.reader).await?;
    address.idle.keep(connection);
    Ok(evaluated)
}

async fn collect(reader: &mut FrameReader) -> Result<Evaluated, GuestFailure> {
    let (mut stdout, mut stderr, mut truncated) = (Vec::new(), Vec::new(), false);
    loop {
        let frame = reader.next().await?;
        match frame.kind() {
            Kind::Stdout => truncated |= keep(&mut stdout, frame.payload()),
            Kind::Stderr => truncated |= keep(&mut stderr, frame.payload()),
            Kind::Evaluated => return Ok(Evaluated { end: frame.parse()?, stdout, stderr, truncated }),
            other => return Err(GuestFailure::Unexpected(other)),
        }
    }
}
