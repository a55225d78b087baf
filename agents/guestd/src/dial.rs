//! A connection to a program of this guest, to see whether it is taken.

use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::time::Duration;

use ark_types::guest::{DialRequest, ErrorCode, GuestError};
use ark_types::plain::plain;

use crate::failure::failure;

/// Longest time that a connection is waited for, whatever is asked.
const LONGEST: Duration = Duration::from_secs(600);

/// Connects to 127.0.0.1 and closes again.
pub(crate) fn dial(request: DialRequest) -> Result<(), GuestError> {
    let DialRequest { port, timeout_ms } = request;
    let limit = Duration::from_millis(timeout_ms.max(1)).min(LONGEST);
    match TcpStream::connect_timeout(&SocketAddr::from((Ipv4Addr::LOCALHOST, port)), limit) {
        Ok(_) => Ok(()),
        Err(error) => {
            let is_late = error.kind() == io::ErrorKind::TimedOut;
            let code = if is_late { ErrorCode::DeadlinePassed } else { ErrorCode::NotTaken };
            Err(failure(code, format!("no connection to 127.0.0.1:{port} in the guest: {}", plain(&error))))
        }
    }
}
