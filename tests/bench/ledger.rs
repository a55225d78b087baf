//! What `arkd` records and remembers, over REST and without a VM: durable writes of many clients, and lists of a long history.

use std::fs::File;
use std::io::Write;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use ark_tests::{Rest, World, assets};

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
/// Lists that are measured.
const LISTS: usize = 200;
/// Most of the agents that a list without a page's limit shows.
const LIST: &str = "/v1/agents?all=true&labels=app%3Da7";

pub(crate) fn measure(report: &mut Report) {
    let empty = World::with_assets(assets());
    let _ = empty.ark(["ps"]).ok();
    writes(&empty, report);
    let mut rest = Rest::connect(&empty);
    let nothing = lists(&mut rest, 0);
    drop(rest);
    empty.end();

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

/// Quotas are set by many clients at once: each is in the log, durable, before it is acknowledged.
fn writes(world: &World, report: &mut Report) {
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
    let single = singles(world);
    let alone: Vec<f64> = single.iter().map(|ms| 1e3 / ms).collect();
    let other = ("an fsync each", alone.as_slice());
    report.against("durable writes acknowledged over REST", "/s", &rates, other, Must::AtLeast(20.0));
    let name = format!("the same, reply to each of {CLIENTS} clients");
    report.against(&name, "ms", &replies, ("an fsync each", &single), Must::Shown);
}

/// Writes on the same disk, each with an fsync of its own, milliseconds.
fn singles(world: &World) -> Vec<f64> {
    let mut file = File::create(world.path().join("singles")).expect("a file");
    let once = |_| {
        let begin = Instant::now();
        file.write_all(&SINGLE).expect("room on the disk");
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
