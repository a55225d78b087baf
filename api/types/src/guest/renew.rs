//! A fork's new identity: what the host tells a restored guest, and what the guest shows for it.

use serde::{Deserialize, Serialize};

use crate::vmm::Generation;

/// The host's order to a guest that was restored: be somebody else from here on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Renew {
    /// The VM generation id that the VMM gave this VM.
    pub generation: Generation,
    /// Fresh for every challenge, 32 hexadecimal digits; comes back in the answer.
    pub nonce: String,
    /// New host name.
    pub hostname: String,
    /// New machine-id, 32 hexadecimal digits (machine-id(5)).
    pub machine_id: String,
    /// New seed for the kernel's and the programs' random generators, 64 hexadecimal digits: added to what the kernel
    /// gathers itself, never instead of it.
    pub seed: String,
    /// The time it is, nanoseconds since the Unix epoch.
    pub unix_ns: u64,
}

/// What the guest answers once it is that. The host checks what it can; the rest is marked as guest-reported.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Renewed {
    /// [`Renew::nonce`].
    pub nonce: String,
    /// How often this guest, with its parents, was renewed: one more than before.
    pub renewals: u64,
    /// 32 bytes of getrandom(2) taken after the reseed, 64 hexadecimal digits.
    pub random: String,
    /// 16 bytes that the evaluator's own random generator gave after its reseed, 32 hexadecimal digits; none where no
    /// evaluator runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub evaluator_random: Option<String>,
    /// Host name, read back from the kernel.
    pub hostname: String,
    /// `/etc/machine-id`, read back.
    pub machine_id: String,
    /// `/proc/sys/kernel/random/boot_id`, read back.
    pub boot_id: String,
    /// Secrets of the parent that were dropped: files below `/run/secrets`.
    pub dropped_secrets: u64,
    /// The guest's clock as it answers, nanoseconds since the Unix epoch.
    pub unix_ns: u64,
}
