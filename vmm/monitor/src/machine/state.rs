//! What a snapshot keeps of a machine besides its memory. The bytes are postcard's; which format they are in is said by the
//! version in the snapshot's manifest, and that they are what was written by its checksum.

use ark_devices::serial::SerialState;
use ark_devices::virtio::mmio::TransportState;
use ark_hal::{VcpuState, VmState};
use serde::{Deserialize, Serialize};

use super::MachineError;

/// Processors, interrupt controllers and devices of a machine that stands still.
#[derive(Debug, Serialize, Deserialize)]
pub struct MachineState {
    /// In the order of their indexes.
    pub(super) vcpus: Vec<VcpuState>,
    pub(super) vm: VmState,
    /// In the order of their windows.
    pub(super) transports: Vec<TransportState>,
    pub(super) serial: SerialState,
    /// Sectors of 512 bytes of each disk: an image of another size cannot be the same one.
    pub(super) sectors: Vec<u64>,
}

impl MachineState {
    /// The bytes that [`Self::decode`] reads.
    ///
    /// # Errors
    /// Why this state has no such form; a defect.
    pub fn encode(&self) -> Result<Vec<u8>, postcard::Error> {
        postcard::to_allocvec(self)
    }

    /// Reads what [`Self::encode`] wrote, to the last byte.
    pub(super) fn decode(bytes: &[u8]) -> Result<Self, MachineError> {
        let bad = |error: postcard::Error| MachineError::State(error.to_string());
        match postcard::take_from_bytes(bytes).map_err(bad)? {
            (state, []) => Ok(state),
            (_, rest) => Err(MachineError::State(format!("{} bytes too many", rest.len()))),
        }
    }
}
