//! The serial port in a snapshot.

use std::io;

use serde::{Deserialize, Serialize};

/// Interrupt Enable Register: received data, transmitter empty.
const ENABLE_RECEIVED: u8 = 1;
const ENABLE_EMPTY: u8 = 2;
/// Interrupt Identification Register as vm-superio keeps it: transmitter empty, received data.
const PENDING_EMPTY: u8 = 2;
const PENDING_RECEIVED: u8 = 4;

/// The registers of the serial port, and what it received.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct SerialState {
    /// Divisor Latch, low byte.
    pub baud_divisor_low: u8,
    /// Divisor Latch, high byte.
    pub baud_divisor_high: u8,
    /// Interrupt Enable Register.
    pub interrupt_enable: u8,
    /// Interrupt Identification Register.
    pub interrupt_identification: u8,
    /// Line Control Register.
    pub line_control: u8,
    /// Line Status Register.
    pub line_status: u8,
    /// Modem Control Register.
    pub modem_control: u8,
    /// Modem Status Register.
    pub modem_status: u8,
    /// Scratch Register.
    pub scratch: u8,
    /// Received and not yet read, at most 64 bytes. Something comes in only in loopback mode.
    pub in_buffer: Vec<u8>,
}

/// A state that no serial port can have.
#[derive(Debug, thiserror::Error)]
pub enum RestoreSerialError {
    /// More received bytes than the port holds.
    #[error("the serial port's state has {0} received bytes where 64 fit; the snapshot is damaged")]
    Fifo(usize),
    /// Its interrupt was pending and could not be raised.
    #[error("cannot raise the serial port's interrupt: {0}")]
    Interrupt(io::Error),
}

impl SerialState {
    /// Whether it has raised an interrupt that the guest has not acknowledged.
    pub(super) fn interrupts(&self) -> bool {
        let (enabled, pending) = (self.interrupt_enable, self.interrupt_identification);
        (enabled & ENABLE_EMPTY != 0 && pending & PENDING_EMPTY != 0)
            || (enabled & ENABLE_RECEIVED != 0 && pending & PENDING_RECEIVED != 0)
    }
}

impl From<vm_superio::SerialState> for SerialState {
    fn from(state: vm_superio::SerialState) -> Self {
        let vm_superio::SerialState {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
            in_buffer,
        } = state;
        Self {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
            in_buffer,
        }
    }
}

impl From<&SerialState> for vm_superio::SerialState {
    fn from(state: &SerialState) -> Self {
        Self {
            baud_divisor_low: state.baud_divisor_low,
            baud_divisor_high: state.baud_divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: state.in_buffer.clone(),
        }
    }
}
