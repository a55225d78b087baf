//! The 16550A serial port (vm-superio) behind `console=ttyS0`, and the bounded log it writes.

mod device;
mod log;
mod state;
#[cfg(test)]
mod tests;

pub use self::device::{Serial, WINDOW};
pub use self::log::{HEAD_BYTES, MAX_BYTES};
pub use self::state::{RestoreSerialError, SerialState};
