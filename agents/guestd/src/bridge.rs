//! Two connections become one.

use std::io::{self, Read, Write};
use std::thread;

use ark_link::Stream;

/// Stack of the second thread, which copies through a buffer on the heap.
const STACK: usize = 64 << 10;
/// Bytes copied at a time.
const BUFFER: usize = 64 << 10;

/// Copies both ways until both sides are done. The end of one side is passed on to the other, whose answer may go on; a failure
/// ends both.
///
/// # Errors
/// When the second thread cannot be made; both are ended then.
pub(crate) fn bridge(one: &Stream, other: &Stream) -> io::Result<()> {
    thread::scope(|scope| {
        let thread = thread::Builder::new().stack_size(STACK).spawn_scoped(scope, || pass(one, other));
        if let Err(e) = thread {
            end(one, other);
            return Err(e);
        }
        pass(other, one);
        Ok(())
    })
}

/// Passes on what `from` sends, and its end.
fn pass(from: &Stream, to: &Stream) {
    match copy(from, to) {
        // One that is gone has been told.
        Ok(()) => drop(to.finish()),
        Err(_) => end(from, to),
    }
}

fn end(one: &Stream, other: &Stream) {
    one.end();
    other.end();
}

fn copy(mut from: impl Read, mut to: impl Write) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(n) => to.write_all(buffer.get(..n).unwrap_or_default())?,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
}
