//! What the device counts.

/// A counter that wraps.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Count(u64);

impl Count {
    /// One more.
    pub(super) fn inc(&mut self) {
        self.add(1);
    }

    /// `n` more.
    pub(super) fn add(&mut self, n: u64) {
        self.0 = self.0.wrapping_add(n);
    }

    /// Its value.
    pub(super) fn get(self) -> u64 {
        self.0
    }
}

/// All counters, from the device's creation on.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Metrics {
    /// Packets sent to the guest.
    pub(super) to_guest_packets: Count,
    /// Bytes of data in them.
    pub(super) to_guest_bytes: Count,
    /// Packets of the guest.
    pub(super) from_guest_packets: Count,
    /// Bytes of data in them that reached a connection.
    pub(super) from_guest_bytes: Count,
    /// Connections that a host client asked for.
    pub(super) host_connects: Count,
    /// Connections that the guest asked for and that a host service took.
    pub(super) guest_connects: Count,
    /// Guest's requests refused: nobody listens, or too many connections.
    pub(super) refused: Count,
    /// Host clients turned away: no `CONNECT <port>` line in time, or too many connections.
    pub(super) bad_clients: Count,
    /// Packets of the guest that make no sense: malformed chain, foreign address, unknown operation.
    pub(super) malformed: Count,
    /// Connections ended because the guest broke the protocol: no credit, wrong state.
    pub(super) violations: Count,
    /// Connections ended because the guest did not answer in time.
    pub(super) timeouts: Count,
    /// Times when the guest had no buffer for a packet.
    pub(super) starved: Count,
}

impl Metrics {
    /// Names and values, for the control socket.
    pub(super) fn pairs(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("to_guest_packets", self.to_guest_packets.get()),
            ("to_guest_bytes", self.to_guest_bytes.get()),
            ("from_guest_packets", self.from_guest_packets.get()),
            ("from_guest_bytes", self.from_guest_bytes.get()),
            ("host_connects", self.host_connects.get()),
            ("guest_connects", self.guest_connects.get()),
            ("refused", self.refused.get()),
            ("bad_clients", self.bad_clients.get()),
            ("malformed", self.malformed.get()),
            ("violations", self.violations.get()),
            ("timeouts", self.timeouts.get()),
            ("starved", self.starved.get()),
        ]
    }
}
