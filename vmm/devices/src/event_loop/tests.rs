use std::os::fd::RawFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use super::*;
use crate::GuestMemory;
use crate::bus::BusDevice;
use crate::virtio::mmio::QUEUE_NOTIFY;
use crate::virtio::queue::DeviceQueue;
use crate::virtio::queue::testing::{CountingLine, memory};
use crate::virtio::{ActivateError, VirtioDevice};

#[derive(Default)]
struct Seen {
    kicks: [AtomicU64; 2],
    host: AtomicU64,
}

struct Probe {
    seen: Arc<Seen>,
    host: Arc<EventFd>,
}

impl VirtioDevice for Probe {
    fn id(&self) -> u32 {
        42
    }
    fn name(&self) -> &str {
        "probe"
    }
    fn features(&self) -> u64 {
        0
    }
    fn queue_sizes(&self) -> &[u16] {
        &[8, 8]
    }
    fn read_config(&self, _offset: u64, _data: &mut [u8]) {}
    fn activate(&mut self, _: GuestMemory, _: Vec<DeviceQueue>, _: u64) -> Result<(), ActivateError> {
        Ok(())
    }
    fn queue_notified(&mut self, index: u16) {
        self.seen.kicks[usize::from(index)].fetch_add(1, Ordering::SeqCst);
    }
    fn host_fd(&self) -> Option<RawFd> {
        Some(self.host.as_raw_fd())
    }
    fn host_ready(&mut self) {
        self.host.read().unwrap();
        self.seen.host.fetch_add(1, Ordering::SeqCst);
    }
    fn reset(&mut self) {}
    fn queues(&self) -> Vec<&DeviceQueue> {
        Vec::new()
    }
    fn counters(&self) -> Vec<(&'static str, u64)> {
        Vec::new()
    }
}

struct Fixture {
    transport: MmioTransport,
    seen: Arc<Seen>,
    host: Arc<EventFd>,
    handle: LoopHandle,
    thread: JoinHandle<()>,
    failures: Receiver<io::Error>,
}

/// Far longer than anything here takes.
const LIMIT: Duration = Duration::from_secs(10);

impl Fixture {
    fn new() -> Self {
        Self::prepared(|_| ())
    }

    /// As `new`; `before` sees the loop before it runs.
    fn prepared(before: impl FnOnce(&EventLoop)) -> Self {
        let seen = Arc::new(Seen::default());
        let host = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
        let device: Box<dyn VirtioDevice> = Box::new(Probe { seen: seen.clone(), host: host.clone() });
        let line = Arc::new(CountingLine::default());
        let transport =
            MmioTransport::new(Arc::new(Mutex::new(device)), memory(0x1000), line, vec![]).unwrap();
        let mut event_loop = EventLoop::new().unwrap();
        event_loop.add_device(&transport).unwrap();
        let handle = event_loop.handle();
        before(&event_loop);
        let (failed, failures) = channel();
        let thread = event_loop.spawn(move |error| failed.send(error).unwrap()).unwrap();
        Self { transport, seen, host, handle, thread, failures }
    }

    fn stops(self) {
        self.handle.stop(LIMIT).unwrap();
        self.thread.join().unwrap();
        assert!(self.failures.recv().is_err(), "a loop that was asked to end has not failed");
    }

    fn kick(&self, queue: u32) {
        self.transport.write(QUEUE_NOTIFY, &queue.to_le_bytes());
    }

    fn counts(&self) -> (u64, u64, u64) {
        let [first, second] = &self.seen.kicks;
        (first.load(Ordering::SeqCst), second.load(Ordering::SeqCst), self.seen.host.load(Ordering::SeqCst))
    }

    fn wait_for(&self, counts: (u64, u64, u64)) {
        let deadline = Instant::now() + Duration::from_secs(10);
        while self.counts() != counts {
            assert!(Instant::now() < deadline, "{:?} instead of {counts:?}", self.counts());
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

#[test]
fn kicks_and_host_events_reach_the_device() {
    let f = Fixture::new();
    f.kick(0);
    f.wait_for((1, 0, 0));
    f.kick(1);
    f.wait_for((1, 1, 0));
    f.host.write(1).unwrap();
    f.wait_for((1, 1, 1));
    f.stops();
}

#[test]
fn a_paused_loop_keeps_events_for_later() {
    let f = Fixture::new();
    for round in 0..50 {
        f.handle.pause(LIMIT).unwrap();
        f.handle.pause(LIMIT).unwrap();
        f.kick(0);
        f.host.write(1).unwrap();
        std::thread::sleep(Duration::from_millis(1));
        assert_eq!(f.counts(), (round, 0, round));
        f.handle.resume();
        f.wait_for((round + 1, 0, round + 1));
    }
    f.stops();
}

#[test]
fn a_paused_loop_can_be_stopped_and_then_paused() {
    let f = Fixture::new();
    f.handle.pause(LIMIT).unwrap();
    f.handle.stop(LIMIT).unwrap();
    f.handle.pause(LIMIT).unwrap();
    f.handle.resume();
    f.stops();
}

#[test]
fn pause_holds_no_device_lock() {
    let f = Fixture::new();
    f.handle.pause(LIMIT).unwrap();
    assert!(f.transport.device().try_lock().is_ok());
    f.stops();
}

#[test]
fn a_device_that_does_not_come_back_is_not_waited_for_for_ever() {
    let f = Fixture::new();
    let short = Duration::from_millis(20);
    let device = Arc::clone(f.transport.device());
    let busy = device.lock().unwrap();
    f.kick(0);
    // The loop may need a moment to get to the device.
    while f.handle.pause(short).is_ok() {
        f.handle.resume();
    }
    assert_eq!(f.handle.stop(short), Err(StillBusy(short)));
    drop(busy);
    f.stops();
}

#[test]
fn a_loop_that_fails_says_so_and_keeps_nobody_waiting() {
    let f = Fixture::prepared(|event_loop| {
        let (epoll, other) = (event_loop.epoll.as_raw_fd(), event_loop.control.wake.as_raw_fd());
        // SAFETY: both descriptors are open and stay their owners'; the first now means an eventfd, which epoll refuses.
        assert!(unsafe { libc::dup2(other, epoll) } >= 0);
    });
    let error = f.failures.recv_timeout(LIMIT).unwrap();
    assert_eq!(error.raw_os_error(), Some(libc::EINVAL));
    f.handle.pause(LIMIT).unwrap();
    f.handle.resume();
    f.stops();
}
