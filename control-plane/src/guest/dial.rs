//! Whether somebody in a guest takes a connection.

use std::time::Duration;

use ark_types::guest::{DialRequest, Frame, Kind};

use super::{Address, Connection, GuestFailure};
use crate::host::millis;

/// Has the guest connect to `port` on its own 127.0.0.1 within `limit`, and close that connection again.
///
/// # Errors
/// [`GuestFailure`]; [`GuestFailure::Said`] when nobody took it.
pub async fn dial(address: &Address, port: u16, limit: Duration) -> Result<(), GuestFailure> {
    let question = Frame::json(Kind::Dial, &DialRequest { port, timeout_ms: millis(limit) })?;
    Connection::ask(address, &question, Kind::Ok).await.map(drop)
}
