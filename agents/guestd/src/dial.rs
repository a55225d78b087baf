//! A connection becomes one to a program that listens at 127.0.0.1.

use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::time::Duration;

use ark_link::{Connection, Stream};
use ark_types::guest::{DialRequest, ErrorCode, Frame, Kind};
use ark_types::plain::plain;

use crate::bridge::bridge;
use crate::failure::{Failure, failure, system_failure};

/// How long the program may take to accept.
const PATIENCE: Duration = Duration::from_secs(10);

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
    let program = Stream::from(OwnedFd::from(program));
    bridge(connection.stream(), &program).map_err(|e| system_failure("no thread could be started", &e).into())
}
