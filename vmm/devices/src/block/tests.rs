use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::GuestMemory;
use crate::virtio::VirtioDevice;
use crate::virtio::queue::testing::{
    Buf, Descriptor, DriverQueue, GuardedMemory, INDIRECT, NEXT, WRITE, memory,
};

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;
/// What the status byte holds before a request.
const UNTOUCHED: u8 = 0xee;

const RINGS: u64 = 0x1000;
const HEADER: u64 = 0x8000;
const STATUS: u64 = 0x8100;
const DATA: u64 = 0x10000;
const MEMORY: usize = 0x100000;

struct Fixture {
    memory: GuestMemory,
    driver: DriverQueue,
    device: Block,
    file: File,
}

impl Fixture {
    /// A disk of `sectors` sectors, each filled with its number (mod 251).
    fn new(sectors: u64, read_only: bool) -> Self {
        let file = tempfile::tempfile().unwrap();
        for sector in 0..sectors {
            file.write_all_at(&[u8::try_from(sector % 251).unwrap(); 512], sector * 512).unwrap();
        }
        let memory = memory(MEMORY);
        let driver = DriverQueue::new(&memory, RINGS, 256);
        let mut device = Block::new("block0", file.try_clone().unwrap(), read_only).unwrap();
        let queues = vec![driver.device_queue_with(true)];
        device.activate(memory.clone(), queues, device.features()).unwrap();
        Self { memory, driver, device, file }
    }

    fn write_header(&self, at: u64, kind: u32, sector: u64) {
        self.memory.write_obj(kind, GuestAddress(at)).unwrap();
        self.memory.write_obj(0_u32, GuestAddress(at + 4)).unwrap();
        self.memory.write_obj(sector, GuestAddress(at + 8)).unwrap();
    }

    /// Sends one request with `data` between header and status; its status and the used length.
    fn request(&mut self, kind: u32, sector: u64, data: &[Buf]) -> (u8, u32) {
        self.write_header(HEADER, kind, sector);
        self.memory.write_obj(UNTOUCHED, GuestAddress(STATUS)).unwrap();
        let mut buffers = vec![Buf::Read { addr: HEADER, len: 16 }];
        buffers.extend_from_slice(data);
        buffers.push(Buf::Write { addr: STATUS, len: 1 });
        let head = self.driver.add(&buffers);
        self.device.queue_notified(0);
        let (used, len) = self.driver.used().unwrap();
        assert_eq!(used, head);
        assert!(self.driver.used().is_none());
        (self.memory.read_obj(GuestAddress(STATUS)).unwrap(), len)
    }

    fn ranges(&self, ranges: &[(u64, u32, u32)]) -> [Buf; 1] {
        for (i, &(sector, count, flags)) in (0..).zip(ranges) {
            let at = DATA + 16 * i;
            self.memory.write_obj(sector, GuestAddress(at)).unwrap();
            self.memory.write_obj(count, GuestAddress(at + 8)).unwrap();
            self.memory.write_obj(flags, GuestAddress(at + 12)).unwrap();
        }
        [Buf::Read { addr: DATA, len: u32::try_from(16 * ranges.len()).unwrap() }]
    }

    fn guest(&self, addr: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_slice(&mut bytes, GuestAddress(addr)).unwrap();
        bytes
    }

    fn host(&self, sector: u64) -> u8 {
        let mut bytes = [0; 512];
        self.file.read_exact_at(&mut bytes, sector * 512).unwrap();
        assert!(bytes.iter().all(|&b| b == bytes[0]));
        bytes[0]
    }

    fn counter(&self, name: &str) -> u64 {
        self.device.counters().into_iter().find(|(n, _)| *n == name).unwrap().1
    }
}

#[test]
fn the_configuration_tells_capacity_and_limits() {
    let f = Fixture::new(100, false);
    let mut config = [0xff; 64];
    f.device.read_config(0, &mut config);
    assert_eq!(config[..8], 100_u64.to_le_bytes());
    assert_eq!(config[12..16], 254_u32.to_le_bytes());
    assert_eq!(config[20..24], 512_u32.to_le_bytes());
    assert_eq!(config[24..32], [3, 0, 8, 0, 0, 2, 0, 0]);
    assert_eq!(config[60..], [0; 4]);
    f.device.read_config(u64::MAX, &mut config);
    assert_eq!(config, [0; 64]);
    assert_eq!(f.device.features(), 0x6646);
    assert_eq!(Fixture::new(1, true).device.features(), 0x666);
}

#[test]
fn reads_scatter_over_buffers() {
    let mut f = Fixture::new(100, true);
    let data = [Buf::Write { addr: DATA, len: 512 }, Buf::Write { addr: DATA + 0x2000, len: 1024 }];
    assert_eq!(f.request(IN, 97, &data), (OK, 1537));
    assert_eq!(f.guest(DATA, 513), [vec![97; 512], vec![0]].concat());
    assert_eq!(f.guest(DATA + 0x2000, 1024), [[98; 512], [99; 512]].concat());
    assert_eq!((f.counter("reads"), f.counter("read_bytes")), (1, 1536));
}

#[test]
fn writes_gather_from_buffers_and_flush() {
    let mut f = Fixture::new(100, false);
    f.memory.write_slice(&[0xaa; 512], GuestAddress(DATA)).unwrap();
    f.memory.write_slice(&[0xbb; 512], GuestAddress(DATA + 0x2000)).unwrap();
    let data = [Buf::Read { addr: DATA, len: 512 }, Buf::Read { addr: DATA + 0x2000, len: 512 }];
    assert_eq!(f.request(OUT, 10, &data), (OK, 1));
    assert_eq!([9, 10, 11, 12].map(|sector| f.host(sector)), [9, 0xaa, 0xbb, 12]);
    assert_eq!(f.request(FLUSH, 0, &[]), (OK, 1));
    assert_eq!((f.counter("writes"), f.counter("written_bytes"), f.counter("flushes")), (1, 1024, 1));
}

#[test]
fn a_read_only_disk_stays_as_it_is() {
    let mut f = Fixture::new(10, true);
    assert_eq!(f.request(OUT, 1, &[Buf::Read { addr: DATA, len: 512 }]), (IOERR, 1));
    for kind in [DISCARD, WRITE_ZEROES] {
        let ranges = f.ranges(&[(0, 8, 0)]);
        assert_eq!(f.request(kind, 0, &ranges), (IOERR, 1));
    }
    assert_eq!(f.request(FLUSH, 0, &[]), (OK, 1));
    assert_eq!([0, 1].map(|sector| f.host(sector)), [0, 1]);
}

#[test]
fn the_id_is_the_name() {
    let mut f = Fixture::new(1, true);
    assert_eq!(f.request(GET_ID, 0, &[Buf::Write { addr: DATA, len: 20 }]), (OK, 21));
    assert_eq!(f.guest(DATA, 20), b"block0\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
    assert_eq!(f.request(GET_ID, 0, &[Buf::Write { addr: DATA, len: 19 }]), (IOERR, 1));
}

#[test]
fn discard_gives_space_back_and_zeroes_zero() {
    let mut f = Fixture::new(64 * 1024 / 512, false);
    let before = f.file.metadata().unwrap().blocks();
    let ranges = f.ranges(&[(8, 16, 0), (64, 32, 0)]);
    assert_eq!(f.request(DISCARD, 0, &ranges), (OK, 1));
    assert!(f.file.metadata().unwrap().blocks() < before);
    assert_eq!([7, 8, 23, 24, 64, 95, 96].map(|sector| f.host(sector)), [7, 0, 0, 24, 0, 0, 96]);
    for flags in [0, 1] {
        let ranges = f.ranges(&[(1 + u64::from(flags), 1, flags)]);
        assert_eq!(f.request(WRITE_ZEROES, 0, &ranges), (OK, 1));
    }
    assert_eq!([0, 1, 2, 3].map(|sector| f.host(sector)), [0, 0, 0, 3]);
}

#[test]
fn hostile_ranges_are_refused() {
    let mut f = Fixture::new(100, false);
    for (kind, range, status) in [
        (DISCARD, (0, 101, 0), IOERR),
        (DISCARD, (u64::MAX, 2, 0), IOERR),
        (DISCARD, (0, 1, 1), UNSUPP),
        (DISCARD, (0, 1, 2), UNSUPP),
        (WRITE_ZEROES, (100, 1, 0), IOERR),
        (WRITE_ZEROES, (99, u32::MAX, 0), IOERR),
        (WRITE_ZEROES, (0, 1, 2), UNSUPP),
    ] {
        let ranges = f.ranges(&[range]);
        assert_eq!(f.request(kind, 0, &ranges), (status, 1), "{kind} {range:?}");
    }
    // None, half of one, too many.
    for len in [0, 8, 24, 65 * 16] {
        let data = [Buf::Read { addr: DATA, len }];
        assert_eq!(f.request(DISCARD, 0, &data), (IOERR, 1), "{len}");
    }
    let ranges = f.ranges(&[(1, 1, 0), (2, 1, 0)]);
    assert_eq!(f.request(WRITE_ZEROES, 0, &ranges), (IOERR, 1), "only one range may be zeroed at a time");
    assert_eq!([0, 1, 2, 99].map(|sector| f.host(sector)), [0, 1, 2, 99]);
}

#[test]
fn hostile_requests_are_refused() {
    let mut f = Fixture::new(100, false);
    let end = u64::try_from(MEMORY).unwrap();
    for (kind, sector, data, status) in [
        (IN, 100, Buf::Write { addr: DATA, len: 512 }, IOERR),
        (IN, 99, Buf::Write { addr: DATA, len: 1024 }, IOERR),
        (IN, u64::MAX, Buf::Write { addr: DATA, len: 512 }, IOERR),
        (IN, u64::MAX / 512, Buf::Write { addr: DATA, len: 512 }, IOERR),
        (IN, 0, Buf::Write { addr: DATA, len: 511 }, IOERR),
        (IN, 0, Buf::Write { addr: end, len: 512 }, IOERR),
        (IN, 0, Buf::Write { addr: end - 256, len: 512 }, IOERR),
        (IN, 0, Buf::Write { addr: u64::MAX - 100, len: 512 }, IOERR),
        (IN, 0, Buf::Write { addr: DATA, len: 1 << 30 }, IOERR),
        (OUT, 100, Buf::Read { addr: DATA, len: 512 }, IOERR),
        (OUT, 0, Buf::Read { addr: DATA, len: 1 }, IOERR),
        (OUT, 0, Buf::Read { addr: end - 1, len: 512 }, IOERR),
        (2, 0, Buf::Read { addr: DATA, len: 512 }, UNSUPP),
        (u32::MAX, 0, Buf::Write { addr: DATA, len: 512 }, UNSUPP),
    ] {
        assert_eq!(f.request(kind, sector, &[data]), (status, 1), "{kind} {sector} {data:?}");
    }
    assert_eq!(f.counter("failed"), 12);
    assert_eq!(f.counter("unsupported"), 2);
    assert_eq!(f.request(IN, 0, &[Buf::Write { addr: DATA, len: 512 }]), (OK, 513));
}

#[test]
fn a_disk_that_shrank_answers_errors() {
    let mut f = Fixture::new(100, false);
    f.file.set_len(50 * 512).unwrap();
    let data = [Buf::Write { addr: DATA, len: 1024 }];
    assert_eq!(f.request(IN, 49, &data), (IOERR, 1));
    assert_eq!(f.request(IN, 48, &data), (OK, 1025));
}

#[test]
fn the_cut_into_descriptors_does_not_matter() {
    let mut f = Fixture::new(100, true);
    f.write_header(HEADER, IN, 7);
    // Header in two parts with an empty one between; status in the same buffer as the data.
    let head = f.driver.add(&[
        Buf::Read { addr: HEADER, len: 3 },
        Buf::Read { addr: DATA, len: 0 },
        Buf::Read { addr: HEADER + 3, len: 13 },
        Buf::Write { addr: DATA, len: 513 },
        Buf::Write { addr: DATA, len: 0 },
    ]);
    f.memory.write_obj(UNTOUCHED, GuestAddress(DATA + 512)).unwrap();
    f.device.queue_notified(0);
    assert_eq!(f.driver.used(), Some((head, 513)));
    assert_eq!(f.guest(DATA, 513), [vec![7; 512], vec![OK]].concat());
}

#[test]
fn indirect_requests_work() {
    let mut f = Fixture::new(300, true);
    f.write_header(HEADER, IN, 20);
    let mut buffers = vec![Buf::Read { addr: HEADER, len: 16 }];
    buffers.extend((0..254).map(|i| Buf::Write { addr: DATA + 512 * i, len: 512 }));
    buffers.push(Buf::Write { addr: STATUS, len: 1 });
    let head = f.driver.add_indirect(0x80000, &buffers);
    f.device.queue_notified(0);
    assert_eq!(f.driver.used(), Some((head, 254 * 512 + 1)));
    assert_eq!(f.guest(STATUS, 1), [OK]);
    assert_eq!(
        (f.guest(DATA, 1), f.guest(DATA + 512 * 253, 1)),
        (vec![20], vec![u8::try_from(273 % 251).unwrap()])
    );
}

#[test]
fn chains_without_a_status_are_given_back() {
    let mut f = Fixture::new(100, true);
    f.write_header(HEADER, IN, 0);
    for buffers in [
        &[Buf::Read { addr: HEADER, len: 16 }][..],
        &[Buf::Read { addr: HEADER, len: 16 }, Buf::Write { addr: STATUS, len: 0 }],
        &[Buf::Read { addr: HEADER, len: 16 }, Buf::Write { addr: u64::MAX, len: 2 }],
        // More than 4 GiB in one chain is more than a chain may have.
        &[
            Buf::Read { addr: HEADER, len: 16 },
            Buf::Write { addr: DATA, len: u32::MAX },
            Buf::Write { addr: STATUS, len: 1 },
        ],
    ] {
        let head = f.driver.add(buffers);
        f.device.queue_notified(0);
        assert_eq!(f.driver.used(), Some((head, 0)));
    }
    // No header, but a status.
    let head = f.driver.add(&[Buf::Read { addr: HEADER, len: 15 }, Buf::Write { addr: STATUS, len: 1 }]);
    f.device.queue_notified(0);
    assert_eq!((f.driver.used(), f.guest(STATUS, 1)), (Some((head, 1)), vec![IOERR]));
    // Readable after writable.
    let head = f.driver.add(&[Buf::Write { addr: STATUS, len: 1 }, Buf::Read { addr: HEADER, len: 16 }]);
    f.device.queue_notified(0);
    assert_eq!((f.driver.used(), f.guest(STATUS, 1)), (Some((head, 1)), vec![IOERR]));
}

#[test]
fn all_available_requests_take_one_kick_and_one_interrupt() {
    let mut f = Fixture::new(100, true);
    f.write_header(HEADER, IN, 5);
    for i in 0..80 {
        f.driver.add(&[
            Buf::Read { addr: HEADER, len: 16 },
            Buf::Write { addr: DATA + 1024 * i, len: 512 },
            Buf::Write { addr: STATUS, len: 1 },
        ]);
    }
    f.device.queue_notified(0);
    assert_eq!(std::iter::from_fn(|| f.driver.used()).count(), 80);
    assert_eq!((f.driver.line.count(), f.counter("batches")), (1, 1));
    assert!(f.driver.kick.read().is_err());
}

#[test]
fn a_full_ring_leaves_the_rest_for_the_next_turn() {
    let mut f = Fixture::new(1, true);
    for _ in 0..256 {
        f.driver.add(&[Buf::Write { addr: STATUS, len: 1 }]);
    }
    f.device.queue_notified(0);
    assert_eq!(std::iter::from_fn(|| f.driver.used()).count(), 256);
    assert_eq!(f.driver.kick.read().unwrap(), 1, "it asked to be called again");
    f.device.queue_notified(0);
    assert!(f.driver.kick.read().is_err());
}

#[test]
fn what_the_hosts_disk_has_to_answer_ends_a_turn() {
    let mut f = Fixture::new(1, false);
    f.write_header(HEADER, FLUSH, 0);
    for _ in 0..3 {
        f.driver.add(&[Buf::Read { addr: HEADER, len: 16 }, Buf::Write { addr: STATUS, len: 1 }]);
    }
    for _ in 0..3 {
        f.device.queue_notified(0);
        assert_eq!(f.driver.used().map(|(_, len)| len), Some(1));
        assert!(f.driver.used().is_none());
        assert_eq!(f.driver.kick.read().unwrap(), 1, "it asked to be called again");
    }
    f.device.queue_notified(0);
    assert!(f.driver.kick.read().is_err());
}

#[test]
fn a_turn_moves_so_many_bytes_and_a_request_no_more_than_was_offered() {
    let mut f = Fixture::new(1, true);
    f.file.set_len(512 << 20).unwrap();
    f.device = Block::new("block0", f.file.try_clone().unwrap(), true).unwrap();
    f.memory = memory(17 << 20);
    f.driver = DriverQueue::new(&f.memory, RINGS, 256);
    let queues = vec![f.driver.device_queue_with(true)];
    f.device.activate(f.memory.clone(), queues, f.device.features()).unwrap();
    f.write_header(HEADER, IN, 0);
    let sixteen_mib = Buf::Write { addr: 1 << 20, len: 16 << 20 };
    let request = |buffers: usize| {
        let mut all = vec![Buf::Read { addr: HEADER, len: 16 }];
        all.extend(vec![sixteen_mib; buffers]);
        all.push(Buf::Write { addr: STATUS, len: 1 });
        all
    };
    let heads: Vec<u16> = (0..6).map(|_| f.driver.add(&request(1))).collect();
    let done = |f: &mut Fixture| -> Vec<u16> {
        f.device.queue_notified(0);
        std::iter::from_fn(|| f.driver.used()).map(|(head, _)| head).collect()
    };
    assert_eq!(done(&mut f), heads[..4]);
    assert_eq!(done(&mut f), heads[4..]);

    f.driver.add(&request(16));
    f.device.queue_notified(0);
    assert_eq!(f.driver.used().map(|(_, len)| len), Some(1));
    assert_eq!(f.guest(STATUS, 1), [IOERR], "256 MiB are more than 254 buffers of 1 MiB");
}

#[test]
fn a_chain_of_too_many_descriptors_is_given_back() {
    let mut f = Fixture::new(1, true);
    let mut buffers = vec![Buf::Read { addr: HEADER, len: 0 }; 2048];
    buffers.push(Buf::Write { addr: STATUS, len: 1 });
    let head = f.driver.add_indirect(0x80000, &buffers);
    f.device.queue_notified(0);
    assert_eq!((f.driver.used(), f.counter("malformed")), (Some((head, 0)), 1));
}

#[test]
fn a_reset_device_does_nothing() {
    let mut f = Fixture::new(100, true);
    f.device.reset();
    f.driver.add(&[Buf::Write { addr: STATUS, len: 1 }]);
    f.device.queue_notified(0);
    assert!(f.driver.used().is_none());
    let unused = Vec::new();
    assert!(f.device.activate(f.memory.clone(), unused, 0).is_err());
}

fn any_address() -> impl Strategy<Value = u64> {
    let low_end = u64::try_from(GuardedMemory::LOW).unwrap();
    let high_end = GuardedMemory::HIGH_START + u64::try_from(GuardedMemory::HIGH).unwrap();
    prop_oneof![
        2 => 0..high_end + 0x1000,
        1 => low_end - 0x400..low_end,
        1 => high_end - 0x400..high_end,
        1 => prop_oneof![Just(HEADER), Just(STATUS), Just(RINGS)],
        1 => prop_oneof![any::<u64>(), (0..0x1000_u64).prop_map(|near| u64::MAX - near)],
    ]
}

fn any_descriptor() -> impl Strategy<Value = Descriptor> {
    let len = prop_oneof![Just(0), Just(1), Just(16), Just(512), 0..0x2000_u32, any::<u32>()];
    let flags =
        prop_oneof![0..8_u16, Just(NEXT), Just(WRITE), Just(NEXT | WRITE), Just(INDIRECT), any::<u16>()];
    let next = prop_oneof![0..16_u16, any::<u16>()];
    (any_address(), len, flags, next).prop_map(|(addr, len, flags, next)| Descriptor {
        addr,
        len,
        flags,
        next,
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    /// Random chains (loops, zero lengths, tables and buffers outside of memory, the rings themselves as buffers): the
    /// device neither panics nor hangs, writes nothing outside of guest memory, and a read-only disk stays as it is.
    #[test]
    fn no_chain_panics_or_changes_a_read_only_disk(
        descriptors in prop::collection::vec(any_descriptor(), 16),
        table in prop::collection::vec(any_descriptor(), 16),
        heads in prop::collection::vec(prop_oneof![8 => 0..16_u16, 1 => any::<u16>()], 0..20),
        kind in prop_oneof![Just(IN), Just(OUT), Just(DISCARD), Just(WRITE_ZEROES), Just(GET_ID), any::<u32>()],
        sector in prop_oneof![0..4_u64, any::<u64>()],
        event_idx: bool,
        likely: bool,
    ) {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[9; 2048], 0).unwrap();
        let guarded = GuardedMemory::new();
        let memory = &guarded.memory;
        let mut driver = DriverQueue::new(memory, RINGS, 16);
        let mut device = Block::new("block0", file.try_clone().unwrap(), true).unwrap();
        device.activate(memory.clone(), vec![driver.device_queue_with(event_idx)], 0).unwrap();
        memory.write_obj(kind, GuestAddress(HEADER)).unwrap();
        memory.write_obj(sector, GuestAddress(HEADER + 8)).unwrap();
        for (index, (&direct, &indirect)) in (0..).zip(descriptors.iter().zip(&table)) {
            driver.write_descriptor(index, direct);
            driver.write_table_entry(DATA, index, indirect);
        }
        if likely {
            // A request that is right but for its data.
            let data = descriptors[1];
            driver.write_descriptor(0, Descriptor { addr: HEADER, len: 16, flags: NEXT, next: 1 });
            driver.write_descriptor(1, Descriptor { flags: NEXT | data.flags & WRITE, next: 2, ..data });
            driver.write_descriptor(2, Descriptor { addr: STATUS, len: 1, flags: WRITE, next: 0 });
        }
        for head in heads {
            driver.make_available(head);
            device.queue_notified(0);
        }
        let mut bytes = [0; 2048];
        file.read_exact_at(&mut bytes, 0).unwrap();
        prop_assert_eq!(bytes, [9; 2048]);
        prop_assert!(guarded.is_untouched_outside());
    }

    /// The same against a writable disk: it keeps its size.
    #[test]
    fn no_chain_grows_a_disk(
        descriptors in prop::collection::vec(any_descriptor(), 16),
        kind in prop_oneof![Just(OUT), Just(DISCARD), Just(WRITE_ZEROES)],
        sector in prop_oneof![0..4_u64, any::<u64>()],
        range in (prop_oneof![0..4_u64, any::<u64>()], prop_oneof![0..4_u32, any::<u32>()], 0..2_u32),
    ) {
        let mut f = Fixture::new(4, false);
        f.ranges(&[range]);
        f.write_header(HEADER, kind, sector);
        for (index, &descriptor) in (0..).zip(&descriptors) {
            f.driver.write_descriptor(index, descriptor);
        }
        for head in 0..16 {
            f.driver.make_available(head);
        }
        f.device.queue_notified(0);
        prop_assert_eq!(f.file.metadata().unwrap().len(), 2048);
    }
}
