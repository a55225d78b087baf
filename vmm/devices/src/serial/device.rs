//! The serial port on the port bus.

use std::fs::File;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use vm_superio::Trigger;
use vm_superio::serial::{Error, NoEvents};

use super::log::Log;
use super::state::{RestoreSerialError, SerialState};
use crate::IrqLine;
use crate::bus::BusDevice;

/// Ports of a 16550.
pub const WINDOW: u64 = 8;

/// A 16550A whose output goes to a bounded log file, or nowhere. Nothing ever comes in.
pub struct Serial {
    uart: Mutex<vm_superio::Serial<Line, NoEvents, Output>>,
}

/// The interrupt line as vm-superio wants it.
struct Line(IrqLine);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.trigger()
    }
}

/// The log as vm-superio wants it: it writes, and flushes, every single byte.
struct Output(Log);

impl io::Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        bytes.iter().for_each(|byte| self.0.push(*byte));
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Serial {
    /// A port with interrupt line `irq`. Output is appended to `output`, a regular file open for reading and writing, of
    /// which it keeps at most [`super::MAX_BYTES`]; without one it is dropped.
    #[must_use]
    pub fn new(irq: IrqLine, output: Option<File>) -> Self {
        Self { uart: Mutex::new(vm_superio::Serial::new(Line(irq), Output(Log::new(output)))) }
    }

    /// A port as it was when `state` was saved; otherwise as [`Self::new`]. `state` is hostile.
    ///
    /// # Errors
    /// [`RestoreSerialError`]: no port can have this state.
    pub fn restore(
        state: &SerialState,
        irq: IrqLine,
        output: Option<File>,
    ) -> Result<Self, RestoreSerialError> {
        let output = Output(Log::new(output));
        match vm_superio::Serial::from_state(&state.into(), Line(irq), NoEvents, output) {
            Ok(uart) => Ok(Self { uart: Mutex::new(uart) }),
            Err(Error::FullFifo) => Err(RestoreSerialError::Fifo(state.in_buffer.len())),
            Err(Error::Trigger(e) | Error::IOError(e)) => Err(RestoreSerialError::Interrupt(e)),
        }
    }

    /// The registers now. Changes nothing. A line of output that has no end yet is not part of it.
    #[must_use]
    pub fn save(&self) -> SerialState {
        SerialState::from(self.uart().state())
    }

    /// The machine is restored, its interrupt controllers too, and about to run: interrupts again where an interrupt may have
    /// been on its way.
    pub fn wake(&self) {
        let uart = self.uart();
        if SerialState::from(uart.state()).interrupts() {
            // An eventfd write fails only when its counter is full, that is: when the line is already pending.
            let _ = uart.interrupt_evt().trigger();
        }
    }

    /// Writes a line that has no end yet to the log: a VMM does so before it exits.
    pub fn flush(&self) {
        self.uart().writer_mut().0.flush_line();
    }

    /// What was lost: pieces of output the log could not take.
    #[must_use]
    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        vec![("log_writes_failed", self.uart().writer().0.failed)]
    }

    fn uart(&self) -> MutexGuard<'_, vm_superio::Serial<Line, NoEvents, Output>> {
        self.uart.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl BusDevice for Serial {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match (data, u8::try_from(offset)) {
            ([byte], Ok(offset)) => *byte = self.uart().read(offset),
            (data, _) => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let (&[byte], Ok(offset)) = (data, u8::try_from(offset)) {
            // Its only error left is an interrupt that cannot be raised: it is pending already.
            let _ = self.uart().write(offset, byte);
        }
    }
}

impl Drop for Serial {
    fn drop(&mut self) {
        self.flush();
    }
}
