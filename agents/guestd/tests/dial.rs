//! Connections to programs of the guest.

mod common;

use std::net::TcpListener;

use ark_types::guest::{DialRequest, ErrorCode, GuestError, Kind};
use common::Guestd;

#[test]
fn a_connection_is_taken_or_it_is_said_that_nobody_does() {
    let guestd = Guestd::start();
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let request = DialRequest { port: listener.local_addr().unwrap().port(), timeout_ms: 10_000 };
    assert_eq!(guestd.answer(Kind::Dial, &request).kind, Kind::Ok);
    // It was made, and closed again.
    let (mut taken, _) = listener.accept().unwrap();
    assert_eq!(std::io::Read::read(&mut taken, &mut [0]).unwrap(), 0);
    drop((taken, listener));
    let refused: GuestError = guestd.answer(Kind::Dial, &request).parse().unwrap();
    assert_eq!(refused.code, ErrorCode::NotTaken);
    assert!(refused.message.contains(&format!("127.0.0.1:{}", request.port)), "{refused}");
    // A wait that is no time at all is still one.
    let hasty = DialRequest { timeout_ms: 0, ..request };
    assert_eq!(guestd.answer(Kind::Dial, &hasty).kind, Kind::Error);
}
