//! What the hypervisor connects guest and devices by. To connect one line or doorbell takes KVM far longer than any other
//! step of a restore but making the VM: it waits until no processor can be looking at the old list any more.

use std::io;
use std::sync::Arc;

use ark_devices::virtio::mmio::{MmioTransport, QUEUE_NOTIFY};
use ark_devices::{Interrupt, IrqLine};
use ark_hal::{HalError, Vm};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::map;

/// An interrupt line whose eventfd KVM turns into an interrupt.
struct Irqfd(EventFd);

impl Interrupt for Irqfd {
    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// The interrupt lines and doorbells of a VM.
pub(super) struct Wiring {
    /// The serial port's line.
    pub(super) com1: IrqLine,
    /// Says that the generation id has changed.
    pub(super) renewed: IrqLine,
    /// Of each virtio device, in order.
    pub(super) windows: Vec<Window>,
}

/// What a virtio device is connected by.
pub(super) struct Window {
    pub(super) line: IrqLine,
    /// One for each queue.
    pub(super) doorbells: Vec<Arc<EventFd>>,
}

impl Wiring {
    /// The lines that every machine has.
    pub(super) fn new(vm: &dyn Vm) -> Result<Self, HalError> {
        let (com1, renewed) = (line(vm, map::COM1_GSI)?, line(vm, map::GENERATION_GSI)?);
        Ok(Self { com1, renewed, windows: vec![] })
    }

    /// Whether virtio devices of so many `queues` can be connected by adding to what there is. A doorbell without a queue
    /// would stay in the VM, and what a guest writes there would not come to the transport, which ignores and counts it.
    pub(super) fn fits(&self, queues: &[usize]) -> bool {
        self.windows.len() <= queues.len()
            && self.windows.iter().zip(queues).all(|(window, queues)| window.doorbells.len() <= *queues)
    }

    /// Connects what virtio devices of so many `queues` need and is not there.
    pub(super) fn add_up_to(&mut self, vm: &dyn Vm, queues: &[usize]) -> Result<(), HalError> {
        for gsi in map::VIRTIO_GSIS.take(queues.len()).skip(self.windows.len()) {
            self.windows.push(Window { line: line(vm, gsi)?, doorbells: vec![] });
        }
        for ((index, window), queues) in (0..).zip(&mut self.windows).zip(queues) {
            let address = map::virtio_window(index) + QUEUE_NOTIFY;
            for queue in (0..).take(*queues).skip(window.doorbells.len()) {
                let what = "make a device's doorbell";
                let event = MmioTransport::kick().map_err(|source| HalError { what, source })?;
                vm.register_ioeventfd(&event, address, queue)?;
                window.doorbells.push(event);
            }
        }
        Ok(())
    }
}

/// Line `gsi` of `vm`.
fn line(vm: &dyn Vm, gsi: u32) -> Result<IrqLine, HalError> {
    let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)
        .map_err(|source| HalError { what: "make an interrupt line", source })?;
    vm.register_irqfd(&event, gsi)?;
    Ok(Arc::new(Irqfd(event)))
}
