//! What tells one agent from another: machine-id, host name, and the dice that they and every challenge come from.

use std::fmt::Write as _;

use ark_types::agent::AgentName;

/// `bytes` as lower-case hexadecimal digits.
pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        // Writing to a text cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// `N` random bytes as hexadecimal digits.
pub(super) fn dice<const N: usize>() -> String {
    hex(&rand::random::<[u8; N]>())
}

/// A new machine-id as systemd makes them, machine-id(5): the bits of a random (version 4) UUID.
pub(super) fn machine_id() -> String {
    let mut bytes = rand::random::<[u8; 16]>();
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    hex(&bytes)
}

/// The name of an agent that no list shows; `what` says why it is there.
pub(super) fn hidden_name(what: char, id: &str) -> Option<AgentName> {
    format!("{what}-{id}").parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_id_is_a_random_uuid_without_its_dashes() {
        let id = machine_id();
        assert_eq!((id.len(), id.as_bytes()[12]), (32, b'4'));
        assert!(matches!(id.as_bytes()[16], b'8' | b'9' | b'a' | b'b'), "{id}");
        assert_ne!(id, machine_id());
    }
}
