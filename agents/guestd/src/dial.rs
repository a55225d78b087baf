//! A connection becomes one to a program that listens at 127.0.0.1.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpStream};
use std::thread;
use std::time::Duration;

use ark_link::{Connection, Stream};
use ark_types::guest::{DialRequest, ErrorCode, Frame, Kind};
use ark_types::plain::plain;

use crate::failure::{Failure, failure, system_failure};

/// How long the program may take to accept.
const PATIENCE: Duration = Duration::from_secs(10);
/// Stack of the second thread, which copies through a buffer on the heap.
const STACK: usize = 64 << 10;
/// Bytes copied at a time.
const BUFFER: usize = 64 << 10;

/// Connects with the program at the port of `request`, says so, and passes on what either side sends until both are done.
pub(crate) fn serve(connection: &mut Connection, request: DialRequest) -> Result<(), Failure> {
    let DialRequest { port } = request;
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let program = TcpStream::connect_timeout(&address, PATIENCE).map_err(|e| {
        let message =
            format!("no program accepts connections at 127.0.0.1:{port} in the agent: {}", plain(&e));
        failure(ErrorCode::NotListening, message)
    })?;
    // Small answers are not held back for more.
    let _ = program.set_nodelay(true);
    connection.send(&Frame::empty(Kind::Ok))?;
    bridge(connection.stream(), &program)
}

/// Copies both ways. The end of one side is passed on to the other, whose answer may go on; a failure ends both.
fn bridge(host: &Stream, program: &TcpStream) -> Result<(), Failure> {
    let end = || {
        host.end();
        let _ = program.shutdown(Shutdown::Both);
    };
    thread::scope(|scope| {
        let towards = || match copy(host, program) {
            Ok(()) => drop(program.shutdown(Shutdown::Write)),
            Err(_) => end(),
        };
        let thread = thread::Builder::new().stack_size(STACK).spawn_scoped(scope, towards);
        if let Err(e) = thread {
            end();
            return Err(system_failure("no thread could be started", &e).into());
        }
        match copy(program, host) {
            // One that is gone has been told.
            Ok(()) => drop(host.finish()),
            Err(_) => end(),
        }
        Ok(())
    })
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
