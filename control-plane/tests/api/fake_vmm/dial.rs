//! Programs of the fake guest that take connections.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;

use ark_types::guest::{DialRequest, ErrorCode, Frame, Kind};

use super::{Machine, fail, send};

/// At port 7, a program that sends back what it receives, in capitals and with its host's name first, until that ends. Elsewhere
/// whatever listens on this host, of which a connection is made and closed.
pub(super) fn dial(mut stream: UnixStream, request: &DialRequest, machine: &Machine) {
    if request.port != 7 {
        let port = request.port;
        return match TcpStream::connect(("127.0.0.1", port)) {
            Ok(_) => send(&mut stream, &Frame::empty(Kind::Ok)),
            Err(e) => fail(&mut stream, ErrorCode::NotListening, &format!("127.0.0.1:{port}: {e}")),
        };
    }
    send(&mut stream, &Frame::empty(Kind::Ok));
    let _ = writeln!(stream, "{}", machine.memory.lock().unwrap().hostname);
    let mut buffer = [0; 4096];
    while let Ok(n @ 1..) = stream.read(&mut buffer) {
        buffer[..n].make_ascii_uppercase();
        let _ = stream.write_all(&buffer[..n]);
    }
    let _ = stream.write_all(b"bye\n");
}
