//! Streams over connections that break: nothing is lost, nothing comes twice, and the user sees nothing of it.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use ark_tests::{Running, World};

/// A way to `arkd` as over a tunnel: a socket like its own, from there over TCP, and on to the real one. The connection over TCP
/// breaks when it has carried so many bytes of either direction, as long as there are breaks left.
struct Tunnel {
    /// A run directory for `ark`, with this way in the place of `arkd`'s socket.
    run: PathBuf,
    breaks: Arc<AtomicUsize>,
}

/// What is read at once.
const CHUNK: usize = 16 << 10;

impl Tunnel {
    fn dig(world: &World, breaks: usize, size: usize) -> Self {
        let run = world.path().join("tunnel");
        std::fs::create_dir(&run).expect("a directory");
        let entry = UnixListener::bind(run.join("arkd.sock")).expect("a socket");
        let exit = TcpListener::bind("127.0.0.1:0").expect("a port");
        let (address, arkd) = (exit.local_addr().expect("an address"), world.run_dir().api_socket());
        let breaks = Arc::new(AtomicUsize::new(breaks));
        let left = Arc::clone(&breaks);
        std::thread::spawn(move || {
            for near in entry.incoming().flatten() {
                let far = TcpStream::connect(address).expect("the other end of the tunnel");
                join(Box::new(near), Box::new(far), None);
            }
        });
        std::thread::spawn(move || {
            for near in exit.incoming().flatten() {
                let Some(far) = reach(&arkd) else { continue };
                join(Box::new(near), Box::new(far), Some((Arc::clone(&left), size)));
            }
        });
        Self { run, breaks }
    }
}

fn reach(arkd: &Path) -> Option<UnixStream> {
    UnixStream::connect(arkd).ok()
}

/// A connection of either kind.
trait End: Read + Write + Send {
    fn twin(&self) -> Box<dyn End>;
    fn cut(&self);
}

macro_rules! end {
    ($($stream:ty),*) => { $(impl End for $stream {
        fn twin(&self) -> Box<dyn End> {
            Box::new(self.try_clone().expect("a descriptor"))
        }
        fn cut(&self) {
            // The other direction may have cut it already.
            let _ = self.shutdown(Shutdown::Both);
        }
    })* };
}
end!(UnixStream, TcpStream);

/// Passes bytes on, both ways, until one end closes or the connection breaks.
fn join(near: Box<dyn End>, far: Box<dyn End>, breaks: Option<(Arc<AtomicUsize>, usize)>) {
    for (from, to) in [(near.twin(), far.twin()), (far, near)] {
        let breaks = breaks.clone();
        std::thread::spawn(move || {
            pass(from, to, breaks);
        });
    }
}

fn pass(mut from: Box<dyn End>, mut to: Box<dyn End>, breaks: Option<(Arc<AtomicUsize>, usize)>) {
    let (mut buffer, mut passed) = (vec![0; CHUNK], 0);
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        if to.write_all(buffer.get(..count).unwrap_or_default()).is_err() {
            break;
        }
        passed += count;
        if let Some((breaks, size)) = &breaks
            && passed >= *size
            && breaks.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)).is_ok()
        {
            break;
        }
    }
    from.cut();
    to.cut();
}

#[test]
fn eight_mebibytes_both_ways_survive_a_connection_that_breaks() {
    let world = World::new();
    world.create("a1");
    let tunnel = Tunnel::dig(&world, 12, 900_000);
    let bytes: Vec<u8> = (0..2u32 << 20).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    let mut command = world.command("ark");
    command.env("ARK_RUN", &tunnel.run).args(["exec", "a1", "--", "sh", "-c", "cat; sleep 1; exit 5"]);
    let mut ark = Running::start(command, Duration::from_secs(300));
    ark.write(&bytes);
    let said = ark.wait().exits(5);
    assert!(said.bytes == bytes, "{} bytes came back of {}: {}", said.bytes.len(), bytes.len(), said.stderr);
    assert_eq!(said.stderr, "", "the user sees nothing of it");
    assert_eq!(tunnel.breaks.load(Ordering::SeqCst), 0, "every break came");
    // The same program over the same way, and what the guest has to say about the bytes.
    let sum = |bytes: &[u8]| world.ark_with_input(["exec", "a1", "--", "sha256sum"], bytes).ok().stdout;
    assert_eq!(sum(&said.bytes), sum(&bytes));
    world.end();
}
