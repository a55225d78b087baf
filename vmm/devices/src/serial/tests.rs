use std::fs::{File, OpenOptions};
use std::io::Read;
use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use crate::bus::BusDevice;
use crate::virtio::queue::testing::CountingLine;

const DATA: u64 = 0;
const INTERRUPT_ENABLE: u64 = 1;
const INTERRUPT_IDENTIFICATION: u64 = 2;
const LINE_STATUS: u64 = 5;
const SCRATCH: u64 = 7;

fn serial(file: Option<File>) -> (Serial, Arc<CountingLine>) {
    let line = Arc::new(CountingLine::default());
    (Serial::new(line.clone(), file), line)
}

fn print(serial: &Serial, text: &[u8]) {
    for byte in text {
        serial.write(DATA, &[*byte]);
    }
}

struct LogFile {
    directory: tempfile::TempDir,
}

impl LogFile {
    fn new() -> Self {
        Self { directory: tempfile::tempdir().unwrap() }
    }

    fn open(&self) -> File {
        let path = self.directory.path().join("log");
        OpenOptions::new().create(true).append(true).read(true).open(path).unwrap()
    }

    fn text(&self) -> Vec<u8> {
        let mut text = Vec::new();
        File::open(self.directory.path().join("log")).unwrap().read_to_end(&mut text).unwrap();
        text
    }
}

#[test]
fn lines_reach_the_log_when_they_end() {
    let log = LogFile::new();
    let (serial, _) = serial(Some(log.open()));
    print(&serial, b"one\ntwo");
    assert_eq!(log.text(), b"one\n");
    serial.flush();
    assert_eq!(log.text(), b"one\ntwo");
    print(&serial, &[b'x'; 300]);
    assert_eq!(log.text().len(), 7 + 256);
    drop(serial);
    assert_eq!(log.text().len(), 307);
}

#[test]
fn a_log_goes_on_where_it_ended() {
    let log = LogFile::new();
    for _ in 0..2 {
        print(&serial(Some(log.open())).0, b"again\n");
    }
    assert_eq!(log.text(), b"again\nagain\n");
}

#[test]
fn a_full_log_keeps_its_head_and_its_end() {
    let log = LogFile::new();
    let mut console = serial(Some(log.open())).0;
    let limit = usize::try_from(MAX_BYTES).unwrap();
    let mut printed = 0;
    for line in 0..200_000 {
        if line == 120_000 {
            // The next VMM of the same agent goes on with the file.
            console = serial(Some(log.open())).0;
        }
        let text = format!("line {line:07}\n");
        print(&console, text.as_bytes());
        printed += text.len();
        if line % 10_000 == 0 {
            assert!(log.text().len() <= limit);
        }
    }
    let text = String::from_utf8(log.text()).unwrap();
    assert!(text.len() <= limit && text.len() > limit / 2);
    assert!(text.starts_with("line 0000000\nline 0000001\n"));
    assert!(text.ends_with("line 0199998\nline 0199999\n"));
    // One note, and its number is true.
    let (head, rest) = text.split_once("\n[console: ").unwrap();
    let (count, tail) = rest.split_once(" bytes left out here]\n").unwrap();
    assert!(!tail.contains("[console: "));
    assert_eq!(head.len(), usize::try_from(HEAD_BYTES).unwrap());
    assert_eq!(head.len() + count.parse::<usize>().unwrap() + tail.len(), printed);
}

#[test]
fn a_log_that_cannot_be_written_does_not_stop_the_guest() {
    let (serial, _) = serial(Some(File::open("/dev/null").unwrap()));
    print(&serial, b"lost\n");
    assert_eq!(serial.counters(), [("log_writes_failed", 1)]);
}

#[test]
fn registers_answer_like_a_16550() {
    let (serial, line) = serial(None);
    let mut byte = [0];
    serial.read(LINE_STATUS, &mut byte);
    assert_eq!(byte, [0x60], "transmitter empty, nothing received");
    serial.write(DATA, b"x");
    assert_eq!(line.count(), 0, "no interrupt is enabled");
    serial.write(INTERRUPT_ENABLE, &[2]);
    assert_eq!(line.count(), 1, "the transmitter is empty");
    serial.read(INTERRUPT_IDENTIFICATION, &mut byte);
    assert_eq!(byte, [0xc2], "which reading acknowledges");
    serial.write(DATA, b"x");
    assert_eq!(line.count(), 2, "it is empty again");
}

#[test]
fn a_port_goes_on_after_a_restore_and_its_log_begins_anew() {
    let log = LogFile::new();
    let (source, _) = serial(Some(log.open()));
    print(&source, b"before\nhalf a line");
    for (register, value) in [(INTERRUPT_ENABLE, 2), (SCRATCH, 0x5a)] {
        source.write(register, &[value]);
    }
    let state = source.save();
    let state: SerialState = serde_json::from_slice(&serde_json::to_vec(&state).unwrap()).unwrap();
    assert_eq!(state, source.save());

    let (line, second_log) = (Arc::new(CountingLine::default()), LogFile::new());
    let fork = Serial::restore(&state, line.clone(), Some(second_log.open())).unwrap();
    let before = line.count();
    fork.wake();
    assert_eq!(line.count(), before + 1, "the transmitter is empty, which the guest has not heard of");
    let mut byte = [0];
    fork.read(SCRATCH, &mut byte);
    assert_eq!(byte, [0x5a]);
    fork.read(INTERRUPT_IDENTIFICATION, &mut byte);
    assert_eq!(byte, [0xc2]);
    fork.wake();
    assert_eq!(line.count(), before + 1, "now it has");
    print(&fork, b"after\n");
    print(&source, b"!\n");
    assert_eq!(second_log.text(), b"after\n");
    assert_eq!(log.text(), b"before\nhalf a line!\n");
}

#[test]
fn a_port_that_received_more_than_it_holds_is_refused() {
    let mut state = serial(None).0.save();
    state.in_buffer = vec![0; 64];
    assert!(Serial::restore(&state, Arc::new(CountingLine::default()), None).is_ok());
    state.in_buffer.push(0);
    let error = Serial::restore(&state, Arc::new(CountingLine::default()), None).err().unwrap();
    assert!(error.to_string().contains("65 received bytes"), "{error}");
}

proptest! {
    #[test]
    fn no_saved_port_panics(registers: [u8; 9], received in prop::collection::vec(any::<u8>(), 0..=64), written: [u8; 8]) {
        let [low, high, enable, identification, line_control, line_status, control, status, scratch] = registers;
        let state = SerialState {
            baud_divisor_low: low,
            baud_divisor_high: high,
            interrupt_enable: enable,
            interrupt_identification: identification,
            line_control,
            line_status,
            modem_control: control,
            modem_status: status,
            scratch,
            in_buffer: received,
        };
        let serial = Serial::restore(&state, Arc::new(CountingLine::default()), None).unwrap();
        prop_assert_eq!(serial.save(), state);
        serial.wake();
        for (offset, value) in (0..).zip(written) {
            serial.write(offset, &[value]);
            serial.read(offset, &mut [0]);
        }
    }
}

#[test]
fn odd_accesses_are_ignored() {
    let (serial, _) = serial(None);
    let mut data = [0; 4];
    serial.read(DATA, &mut data);
    assert_eq!(data, [0xff; 4]);
    for offset in [0, 7, 300, u64::MAX] {
        serial.write(offset, &data);
        serial.read(offset, &mut data);
        serial.write(offset, &[]);
        serial.read(offset, &mut [0]);
    }
}
