use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use crate::virtio::queue::testing::{Buf, Descriptor, DriverQueue, memory};
use crate::vsock::host::parse_connect;
use crate::vsock::packet::{HEADER_LEN, Header, Op, Shutdown};
use crate::vsock::segments::{ChainError, RxBuffer, TxPacket};

const DATA: u64 = 0x10_000;

fn header(len: u32) -> Header {
    Header {
        src_cid: 3,
        dst_cid: 2,
        src_port: 1025,
        dst_port: 1 << 30,
        len,
        kind: 1,
        op: 5,
        flags: 0,
        buf_alloc: 4096,
        fwd_cnt: 7,
    }
}

#[test]
fn a_header_has_the_layout_of_the_specification() {
    let bytes = header(0x0102_0304).to_bytes();
    let mut expected = Vec::new();
    expected.extend(3_u64.to_le_bytes());
    expected.extend(2_u64.to_le_bytes());
    expected.extend(1025_u32.to_le_bytes());
    expected.extend((1_u32 << 30).to_le_bytes());
    expected.extend([4, 3, 2, 1, 1, 0, 5, 0, 0, 0, 0, 0, 0, 16, 0, 0, 7, 0, 0, 0]);
    assert_eq!(bytes.as_slice(), expected);
}

#[test]
fn codes_and_flags_round_trip() {
    for code in 0..=u16::MAX {
        assert!(Op::from_code(code).is_none_or(|op| op.code() == code));
    }
    for flags in 0..8 {
        assert_eq!(Shutdown::from_flags(flags).flags(), flags & 3);
    }
}

#[test]
fn greetings() {
    for (line, port) in [
        ("CONNECT 1025", Some(1025)),
        ("connect 0\r", Some(0)),
        ("CONNECT   4294967295", Some(u32::MAX)),
        ("CONNECT 4294967296", None),
        ("CONNECT +1", None),
        ("CONNECT -1", None),
        ("CONNECT", None),
        ("CONNECT 1 2", None),
        ("GET / HTTP/1.1", None),
        ("", None),
    ] {
        assert_eq!(parse_connect(line.as_bytes()), port, "{line:?}");
    }
    assert_eq!(parse_connect(b"CONNECT \xff"), None);
}

#[test]
fn a_chain_too_short_too_long_or_elsewhere_is_no_packet() {
    let memory = memory(0x20_000);
    let mut driver = DriverQueue::new(&memory, 0x1000, 128);
    let mut queue = driver.device_queue();
    let many: Vec<Buf> = (0..65).map(|_| Buf::Read { addr: DATA, len: 1 }).collect();
    for (chain, error) in [
        (vec![Buf::Read { addr: DATA, len: 43 }], ChainError::TooShort),
        (vec![Buf::Write { addr: DATA, len: 44 }], ChainError::TooShort),
        (vec![Buf::Read { addr: 0x20_000, len: 44 }], ChainError::OutsideMemory),
        (vec![Buf::Read { addr: 0x1_ffff, len: 44 }], ChainError::OutsideMemory),
        (vec![Buf::Read { addr: u64::MAX, len: 44 }], ChainError::OutsideMemory),
        (many, ChainError::TooManyPieces),
        (vec![Buf::Read { addr: DATA, len: 0 }; 65], ChainError::TooManyPieces),
        (vec![Buf::Write { addr: DATA, len: 1 }; 65], ChainError::TooManyPieces),
    ] {
        driver.add(&chain);
        let chain = queue.pop(&memory).unwrap();
        assert_eq!(TxPacket::parse(&memory, chain).err(), Some(error));
    }
    driver.add(&[Buf::Write { addr: DATA, len: 44 }]);
    let chain = queue.pop(&memory).unwrap();
    assert_eq!(RxBuffer::parse(&memory, 0, chain).err(), Some(ChainError::TooShort));
}

proptest! {
    #[test]
    fn any_header_round_trips(bytes: [u8; HEADER_LEN]) {
        let header = Header::from_bytes(&bytes);
        prop_assert_eq!(header.to_bytes(), bytes);
        let refused = header.refusal();
        prop_assert_eq!(refused.refusal().src_port, header.src_port);
        prop_assert_eq!((refused.dst_cid, refused.len), (header.src_cid, 0));
    }

    #[test]
    fn any_line_is_parsed_or_refused(line: Vec<u8>, port: u32) {
        let _ = parse_connect(&line);
        prop_assert_eq!(parse_connect(format!("CONNECT {port}").as_bytes()), Some(port));
    }

    /// However a packet is cut into descriptors, header and data come out whole.
    #[test]
    fn any_cut_of_a_packet_is_the_same_packet(
        data in prop::collection::vec(any::<u8>(), 0..600),
        cuts in prop::collection::btree_set(1_usize..640, 0..20),
        extra in 0_usize..50,
    ) {
        let memory = memory(0x20_000);
        let mut driver = DriverQueue::new(&memory, 0x1000, 128);
        let mut bytes = header(u32::try_from(data.len()).unwrap()).to_bytes().to_vec();
        bytes.extend(&data);
        bytes.resize(bytes.len() + extra, 0xee);
        let mut buffers = Vec::new();
        let mut ends: Vec<usize> = cuts.into_iter().filter(|cut| *cut < bytes.len()).collect();
        ends.push(bytes.len());
        let mut start = 0;
        for (i, end) in ends.into_iter().enumerate() {
            // Apart in memory, so that reading across a piece's end shows.
            let addr = DATA + u64::try_from(start + i * 16).unwrap();
            memory.write_slice(&bytes[start..end], GuestAddress(addr)).unwrap();
            buffers.push(Buf::Read { addr, len: u32::try_from(end - start).unwrap() });
            start = end;
        }
        driver.add(&buffers);
        let chain = driver.device_queue().pop(&memory).unwrap();
        let packet = TxPacket::parse(&memory, chain).unwrap().unwrap();
        prop_assert_eq!(packet.header, header(u32::try_from(data.len()).unwrap()));
        for offset in [0, data.len() / 2, data.len()] {
            let mut copy = vec![0; data.len() - offset];
            packet.copy_data(offset, &mut copy);
            prop_assert_eq!(&copy, &data[offset..]);
        }
    }

    /// Any descriptors at all: an answer, no panic, and never more data than the chain holds.
    #[test]
    fn any_chain_is_parsed_or_refused(
        descriptors in prop::collection::vec(
            (0_u64..0x30_000, prop_oneof![0_u32..5000, any::<u32>()], 0_u16..8, 0_u16..16), 16),
        noise in prop::collection::vec(any::<u8>(), 4096),
    ) {
        let memory = memory(0x20_000);
        memory.write_slice(&noise, GuestAddress(DATA)).unwrap();
        let mut driver = DriverQueue::new(&memory, 0x1000, 16);
        for (i, (addr, len, flags, next)) in (0_u16..).zip(&descriptors) {
            driver.write_descriptor(i, Descriptor { addr: *addr, len: *len, flags: *flags, next: *next });
        }
        driver.make_available(0);
        let mut queue = driver.device_queue();
        if let Some(chain) = queue.pop(&memory) {
            if let Ok(Ok(packet)) = TxPacket::parse(&memory, chain.clone()) {
                let readable: u64 =
                    chain.clone().readable().map(|d| u64::from(d.len())).sum();
                prop_assert!(u64::from(packet.header.len) + 44 <= readable);
                let mut copy = vec![0; packet.data_len().min(1 << 20)];
                prop_assert_eq!(packet.copy_data(0, &mut copy), copy.len());
            }
            if let Ok(mut buffer) = RxBuffer::parse(&memory, 0, chain.clone()) {
                let writable: u64 = chain.writable().map(|d| u64::from(d.len())).sum();
                prop_assert!(u64::try_from(buffer.room()).unwrap() + 44 <= writable);
                buffer.finish(&header(0));
                prop_assert_eq!(buffer.written(), 44);
            }
        }
    }
}
