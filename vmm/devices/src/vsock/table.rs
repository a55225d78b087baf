//! The bounded table of everything that has a Unix socket, and the round of those with something for the guest.

use std::collections::{HashMap, VecDeque};

use super::connection::Connection;
use super::host::Client;
use super::packet::Ports;

/// Streams at a time, clients that have not yet said what they want included.
pub(super) const MAX_STREAMS: usize = 1024;

/// Assigned host ports begin here, as in Firecracker; services are expected below.
const FIRST_HOST_PORT: u32 = 1 << 30;

/// A place in the table. It outlives its stream: [`Key`] tells a later stream at the same place from an earlier one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Place(u32);

/// A place and the generation of its stream, as epoll carries it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Key {
    place: Place,
    generation: u32,
}

impl Key {
    /// For `epoll_event.data`. Below 2^63, so that values above are free for others.
    pub(super) fn to_data(self) -> u64 {
        u64::from(self.generation) << 32 | u64::from(self.place.0)
    }

    /// The counterpart of [`Self::to_data`].
    #[expect(clippy::cast_possible_truncation, reason = "takes the two halves apart")]
    pub(super) fn from_data(data: u64) -> Self {
        Self { place: Place(data as u32), generation: (data >> 32) as u32 }
    }

    /// Where it is.
    pub(super) fn place(self) -> Place {
        self.place
    }
}

/// What stands at a place.
pub(super) enum Stream {
    /// A host client that has not yet said which port it wants.
    Client(Client),
    /// A connection.
    Connection(Box<Connection>),
}

#[derive(Default)]
struct Slot {
    stream: Option<Stream>,
    generation: u32,
    /// It stands in the round. Belongs to the place, so that the round never has more entries than the table.
    in_round: bool,
}

/// The table.
pub(super) struct Table {
    slots: Vec<Slot>,
    free: Vec<Place>,
    by_ports: HashMap<Ports, Place>,
    round: VecDeque<Place>,
    next_host_port: u32,
}

impl Table {
    /// An empty one.
    pub(super) fn new() -> Self {
        Self {
            slots: Vec::new(),
            free: Vec::new(),
            by_ports: HashMap::new(),
            round: VecDeque::new(),
            next_host_port: FIRST_HOST_PORT,
        }
    }

    /// Streams in it.
    pub(super) fn len(&self) -> usize {
        self.slots.len().saturating_sub(self.free.len())
    }

    /// Adds a stream; `None` when the table is full.
    pub(super) fn insert(&mut self, stream: Stream) -> Option<Key> {
        let place = match self.free.pop() {
            Some(place) => place,
            None if self.slots.len() < MAX_STREAMS => {
                let place = Place(u32::try_from(self.slots.len()).ok()?);
                self.slots.push(Slot::default());
                place
            }
            None => return None,
        };
        if let Stream::Connection(connection) = &stream {
            self.by_ports.insert(connection.ports(), place);
        }
        let slot = self.slot(place)?;
        slot.stream = Some(stream);
        // 31 bits, see `Key::to_data`.
        slot.generation = slot.generation.wrapping_add(1) & 0x7fff_ffff;
        Some(Key { place, generation: slot.generation })
    }

    /// Removes what stands at `place`.
    pub(super) fn remove(&mut self, place: Place) -> Option<Stream> {
        let stream = self.slot(place)?.stream.take()?;
        if let Stream::Connection(connection) = &stream {
            self.release_ports(connection.ports(), place);
        }
        self.free.push(place);
        Some(stream)
    }

    /// Exchanges a client for the connection that it asked for. Its key stays the same.
    pub(super) fn replace(&mut self, place: Place, connection: Box<Connection>) {
        let ports = connection.ports();
        if let Some(slot) = self.slot(place) {
            slot.stream = Some(Stream::Connection(connection));
            self.by_ports.insert(ports, place);
        }
    }

    /// Takes a client out of its place, which stays reserved until [`Self::replace`], [`Self::put_back`] or
    /// [`Self::vacate`].
    pub(super) fn take_client(&mut self, key: Key) -> Option<Client> {
        let slot = self.slot(key.place).filter(|slot| slot.generation == key.generation)?;
        match slot.stream.take() {
            Some(Stream::Client(client)) => Some(client),
            other => {
                slot.stream = other;
                None
            }
        }
    }

    /// Returns what [`Self::take_client`] took.
    pub(super) fn put_back(&mut self, place: Place, client: Client) {
        if let Some(slot) = self.slot(place) {
            slot.stream = Some(Stream::Client(client));
        }
    }

    /// Gives up a place from which [`Self::take_client`] took the client.
    pub(super) fn vacate(&mut self, place: Place) {
        self.free.push(place);
    }

    /// The guest knows nothing of the connection any more, so its ports may be used again.
    pub(super) fn release_ports(&mut self, ports: Ports, place: Place) {
        if self.by_ports.get(&ports) == Some(&place) {
            self.by_ports.remove(&ports);
        }
    }

    /// The place of the connection with `ports`.
    pub(super) fn find(&self, ports: Ports) -> Option<Place> {
        self.by_ports.get(&ports).copied()
    }

    /// The place of `key` if its stream is still there.
    pub(super) fn current(&self, key: Key) -> Option<Place> {
        let index = usize::try_from(key.place.0).ok()?;
        let slot = self.slots.get(index)?;
        (slot.generation == key.generation && slot.stream.is_some()).then_some(key.place)
    }

    /// The key of what stands at `place`.
    pub(super) fn key(&self, place: Place) -> Option<Key> {
        let index = usize::try_from(place.0).ok()?;
        self.slots.get(index).map(|slot| Key { place, generation: slot.generation })
    }

    /// The connection at `place`.
    pub(super) fn connection(&mut self, place: Place) -> Option<&mut Connection> {
        match self.slot(place)?.stream.as_mut()? {
            Stream::Connection(connection) => Some(connection),
            Stream::Client(_) => None,
        }
    }

    /// Everything in the table.
    pub(super) fn streams(&mut self) -> impl Iterator<Item = (Place, &mut Stream)> {
        (0_u32..).zip(&mut self.slots).filter_map(|(i, slot)| Some((Place(i), slot.stream.as_mut()?)))
    }

    /// The ports of all connections that the guest may know of.
    pub(super) fn ports(&self) -> impl Iterator<Item = Ports> + '_ {
        self.by_ports.keys().copied()
    }

    /// A host port that no connection with the guest's `port` uses.
    pub(super) fn free_host_port(&mut self, guest: u32) -> u32 {
        // The table is far smaller than the range, so this ends.
        loop {
            let host = self.next_host_port;
            self.next_host_port = host.wrapping_add(1).max(FIRST_HOST_PORT);
            if !self.by_ports.contains_key(&Ports { host, guest }) {
                return host;
            }
        }
    }

    /// The host port that is tried next.
    pub(super) fn next_host_port(&self) -> u32 {
        self.next_host_port
    }

    /// Goes on with host ports at `port`.
    pub(super) fn set_next_host_port(&mut self, port: u32) {
        self.next_host_port = port.max(FIRST_HOST_PORT);
    }

    /// Puts `place` at the end of the round unless it stands there.
    pub(super) fn join_round(&mut self, place: Place) {
        if let Some(slot) = self.slot(place).filter(|slot| !slot.in_round) {
            slot.in_round = true;
            self.round.push_back(place);
        }
    }

    /// Whose turn it is.
    pub(super) fn front(&self) -> Option<Place> {
        self.round.front().copied()
    }

    /// Ends the turn of [`Self::front`].
    pub(super) fn leave_round(&mut self) {
        if let Some(slot) = self.round.pop_front().and_then(|place| self.slot(place)) {
            slot.in_round = false;
        }
    }

    fn slot(&mut self, place: Place) -> Option<&mut Slot> {
        self.slots.get_mut(usize::try_from(place.0).ok()?)
    }
}
