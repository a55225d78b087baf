//! vsock: throughput both ways and round trip, against QEMU with vhost-vsock and against a plain Unix socket.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use crate::guest::Address;
use crate::peers::{Bench, Vmm};
use crate::report::{Must, Report};

/// Bytes of one throughput sample.
const BULK: usize = 64 << 20;
/// Bytes of one read or write.
const CHUNK: usize = 256 << 10;
/// Guest port of the server below.
const PORT: u32 = 5000;

/// Serves one connection after another: the first byte says what to do.
const SERVER: &str = "
import socket, sys
s = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM); s.bind((0xffffffff, 5000)); s.listen()
buffer = memoryview(bytearray(256 << 10)); bulk = int(sys.argv[1])
while True:
    c, _ = s.accept(); what = c.recv(1)
    if what == b's':
        left = bulk
        while left: left -= c.recv_into(buffer, min(left, len(buffer)))
        c.sendall(b'k')
    elif what == b'r':
        left = bulk
        while left: left -= c.send(buffer[:min(left, len(buffer))])
    else:
        while (b := c.recv(1)): c.sendall(b)
    c.close()
";

/// MiB/s to the peer, MiB/s from the peer, and round trips in microseconds.
#[derive(Default)]
struct Samples {
    send: Vec<f64>,
    receive: Vec<f64>,
    round_trip: Vec<f64>,
}

impl Samples {
    fn take(&mut self, mut open: impl FnMut() -> Box<dyn ReadWrite>, rounds: usize) {
        let mib =
            |elapsed: Duration| f64::from(u32::try_from(BULK >> 20).expect("small")) / elapsed.as_secs_f64();
        let mut buffer = vec![0; CHUNK];
        for _ in 0..rounds {
            let mut stream = open();
            stream.write_all(b"s").expect("write");
            let begin = Instant::now();
            for _ in 0..BULK / CHUNK {
                stream.write_all(&buffer).expect("write");
            }
            stream.read_exact(&mut buffer[..1]).expect("read");
            self.send.push(mib(begin.elapsed()));

            let mut stream = open();
            stream.write_all(b"r").expect("write");
            let begin = Instant::now();
            for _ in 0..BULK / CHUNK {
                stream.read_exact(&mut buffer).expect("read");
            }
            self.receive.push(mib(begin.elapsed()));

            let mut stream = open();
            stream.write_all(b"p").expect("write");
            for _ in 0..200 {
                let begin = Instant::now();
                stream.write_all(b"x").expect("write");
                stream.read_exact(&mut buffer[..1]).expect("read");
                self.round_trip.push(begin.elapsed().as_secs_f64() * 1e6);
            }
        }
    }
}

trait ReadWrite: Read + Write {}
impl<T: Read + Write> ReadWrite for T {}

/// The same server over a Unix socket on the host, in Rust.
fn plain_socket() -> Box<dyn ReadWrite> {
    let (ours, mut theirs) = UnixStream::pair().expect("a pair");
    std::thread::spawn(move || {
        let mut buffer = vec![0; CHUNK];
        let mut what = [0];
        if theirs.read_exact(&mut what).is_err() {
            return;
        }
        match &what {
            b"s" => {
                for _ in 0..BULK / CHUNK {
                    theirs.read_exact(&mut buffer).expect("read");
                }
                theirs.write_all(b"k").expect("write");
            }
            b"r" => {
                for _ in 0..BULK / CHUNK {
                    theirs.write_all(&buffer).expect("write");
                }
            }
            _ => {
                while theirs.read_exact(&mut what).is_ok() {
                    theirs.write_all(&what).expect("write");
                }
            }
        }
    });
    Box::new(ours)
}

fn guest_samples(bench: &Bench, vmm: Vmm) -> Samples {
    let guest = bench.boot(vmm, "python", 256, &[]);
    let address: Address = guest.address.clone();
    let server = address.clone();
    let bulk = BULK.to_string();
    // The server ends with its guest: the exec then breaks, which is the end of this thread too.
    std::thread::spawn(move || match server.try_exec(&["python3", "-c", SERVER, &bulk]) {
        Ok((said, end)) => eprintln!("the server in the guest ended early, {:?}: {said}", end.status),
        Err(_gone) => {}
    });
    let begin = Instant::now();
    while address.connect(PORT).and_then(|mut s| s.write_all(b"p")).is_err() {
        assert!(begin.elapsed() < Duration::from_secs(30), "the server in the guest does not start");
        std::thread::sleep(Duration::from_millis(50));
    }
    let mut samples = Samples::default();
    samples.take(|| Box::new(address.connect(PORT).expect("the server listens")), bench.samples(5));
    samples
}

pub(crate) fn measure(bench: &Bench, report: &mut Report) {
    let ours = guest_samples(bench, Vmm::Ark);
    let qemu = guest_samples(bench, Vmm::Qemu);
    let mut plain = Samples::default();
    plain.take(plain_socket, bench.samples(5));
    for (other, theirs) in [("QEMU vhost", &qemu), ("Unix socket", &plain)] {
        let pairs = [
            ("vsock, host to guest", "MiB/s", &ours.send, &theirs.send),
            ("vsock, guest to host", "MiB/s", &ours.receive, &theirs.receive),
            ("vsock, round trip of a byte", "us", &ours.round_trip, &theirs.round_trip),
        ];
        for (name, unit, a, b) in pairs {
            report.against(name, unit, a, (other, b), Must::Shown);
        }
    }
}
