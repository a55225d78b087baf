//! What `arkd` records and remembers, over REST and without a VM: durable writes of many clients, and lists of a long history.

use std::fs::File;
use std::io::Write;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use ark_tests::{Rest, World, assets};

use crate::flush::Serving;
use crate::history;
use crate::report::{Must, Report};

/// Clients that write at once.
const CLIENTS: usize = 128;
/// Writes that are measured, in turns.
const WRITES: usize = 4_000;
const TURNS: usize = 5;
/// Single writes with an fsync each that they are compared with.
const SINGLES: usize = 200;
/// Bytes of such a write: about those of an event.
const SINGLE: [u8; 256] = [b'x'; 256];
/// Milliseconds that other disks take longer to flush: where a flush costs next to nothing, so does one for each write.
const SLOWER: [u64; 2] = [2, 5];
/// Lists that are measured.
const LISTS: usize = 200;
/// Most of the agents that a list without a page's limit shows.
const LIST: &str = "/v1/agents?all=true&labels=app%3Da7";

pub(crate) fn measure(report: &mut Report) {
    let empty = World::with_assets(assets());
    let _ = empty.ark(["ps"]).ok();
    writes(&empty, Duration::ZERO, report);
    let mut rest = Rest::connect(&empty);
    let nothing = lists(&mut rest, 0);
    drop(rest);
    empty.end();

    for pause in SLOWER.map(Duration::from_millis) {
        let world = World::with_assets(assets());
        let serving = Serving::start(&world, pause);
        writes(&world, pause, report);
        serving.end();
    }

    let world = World::with_assets(assets());
    history::write(&world);
    let _ = world.ark(["ps"]).ok();
    let mut rest = Rest::connect(&world);
    let selected = lists(&mut rest, history::SELECTED);
    drop(rest);
    world.end();
    let name = format!("list {} of {} agents by a label", history::SELECTED, history::AGENTS);
    report.tails(&name, "ms", &selected, ("empty list", &nothing), Must::AtMost(20.0));
}

/// Quotas are set by many clients at once: each is in the log, durable, before it is acknowledged. `pause` is what a flush of the
/// disk takes longer than this one's, for `arkd` and for what it is compared with; what is judged is the disk as it is.
fn writes(world: &World, pause: Duration, report: &mut Report) {
    let (mut rates, mut replies) = (Vec::new(), Vec::new());
    for turn in 0..TURNS {
        let next = AtomicUsize::new(0);
        let times = Mutex::new(Vec::with_capacity(WRITES));
        let begin = Instant::now();
        std::thread::scope(|scope| {
            for _ in 0..CLIENTS {
                scope.spawn(|| {
                    let mut rest = Rest::connect(world);
                    let mut own = Vec::new();
                    loop {
                        let number = next.fetch_add(1, Ordering::Relaxed);
                        if number >= WRITES {
                            break;
                        }
                        let path = format!("/v1/owners/o{}", number % CLIENTS);
                        own.push(
                            rest.call(
                                "PUT",
                                &path,
                                &format!("{{\"agents\":{}}}", turn * WRITES + number + 1),
                            )
                            .1,
                        );
                    }
                    times.lock().expect("no thread failed").extend(own);
                });
            }
        });
        rates.push(WRITES as f64 / begin.elapsed().as_secs_f64());
        replies.extend(times.into_inner().expect("no thread failed"));
    }
    let single = singles(world, pause);
    let alone: Vec<f64> = single.iter().map(|ms| 1e3 / ms).collect();
    let other = ("an fsync each", alone.as_slice());
    let (of, must) = match pause.as_millis() {
        0 => (String::new(), Must::AtLeast(20.0)),
        ms => (format!(", {ms} ms before each flush"), Must::Shown),
    };
    report.against(&format!("durable writes over REST{of}"), "/s", &rates, other, must);
    let name = format!("the same, reply to each of {CLIENTS} clients");
    report.against(&name, "ms", &replies, ("an fsync each", &single), Must::Shown);
}

/// Writes on the same disk, each with an fsync of its own after `pause`, milliseconds.
fn singles(world: &World, pause: Duration) -> Vec<f64> {
    let mut file = File::create(world.path().join("singles")).expect("a file");
    let once = |_| {
        let begin = Instant::now();
        file.write_all(&SINGLE).expect("room on the disk");
        std::thread::sleep(pause);
        file.sync_data().expect("the disk syncs");
        begin.elapsed().as_secs_f64() * 1e3
    };
    (0..SINGLES).map(once).collect()
}

fn lists(rest: &mut Rest, expected: usize) -> Vec<f64> {
    let once = |_| {
        let (list, ms) = rest.call("GET", LIST, "");
        assert_eq!(list["agents"].as_array().map(Vec::len), Some(expected));
        ms
    };
    (0..LISTS).map(once).collect()
}
