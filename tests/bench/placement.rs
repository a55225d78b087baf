//! The scheduler's decision where an agent goes, among few and many hosts that hold the same number of agents.
//!
//! The cluster is in its steady state, nine tenths full: after every decision the agent is reserved and the oldest one ends.
//! Requests vary in size, a quarter belong to anti-affinity groups of very different sizes, and a quarter would like a warm
//! template. The requests are the same whatever the number of hosts.

use std::collections::VecDeque;
use std::hint::black_box;
use std::time::Instant;

use ark_types::agent::AgentName;
use ark_types::scheduling::{Resources, Spread};
use arkd::scheduler::placement::{HostId, Hosts, Request, place};

use crate::report::{Must, Report};

/// Agents that are placed while the decisions are measured.
const AGENTS: usize = 100_000;
/// Decisions that are measured.
const SAMPLES: usize = 50_000;
/// Templates; a tenth of the hosts has each of them warm.
const TEMPLATES: u64 = 20;

/// Numbers that look random, the same ones in every run (xorshift64*).
struct Dice(u64);

impl Dice {
    /// A number below `sides`.
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 32) % sides
    }
}

fn name(kind: &str, number: u64) -> AgentName {
    format!("{kind}{number}").parse().expect("a name")
}

/// An agent of 64 to 512 MiB and 1 to 4 processors.
fn request(dice: &mut Dice) -> Request {
    let vcpus = 1 + dice.roll(4);
    let needs = Resources { agents: 1, memory_mib: 64 * (1 + dice.roll(8)), vcpus };
    // A few groups are nearly as large as the cluster, most are small.
    let apart = (dice.roll(4) == 0).then(|| {
        let group = if dice.roll(4) == 0 { dice.roll(10) } else { 10 + dice.roll(2000) };
        let spread = if dice.roll(8) == 0 { Spread::Hard } else { Spread::Soft };
        (name("g", group), spread)
    });
    let template = (dice.roll(4) == 0).then(|| name("t", dice.roll(TEMPLATES)));
    Request { needs, apart, template }
}

/// A cluster of `count` hosts of three sizes, which the agents fill to about nine tenths.
fn cluster(count: usize, dice: &mut Dice) -> Hosts {
    // On average an agent has 288 MiB and 2.5 processors.
    let share = AGENTS as u64 / count as u64;
    let limits: Vec<Resources> = (0..count)
        .map(|host| {
            let share = share * [8, 11, 14][host % 3] / 10;
            Resources { agents: share * 2, memory_mib: share * 288, vcpus: share * 5 / 2 }
        })
        .collect();
    let mut hosts = Hosts::new(&limits);
    for host in 0..count {
        for template in 0..TEMPLATES {
            if dice.roll(10) == 0 {
                hosts.set_warm(HostId(host), &name("t", template), true);
            }
        }
    }
    hosts
}

/// Microseconds of each decision among `count` hosts.
fn decisions(count: usize) -> Vec<f64> {
    let mut dice = Dice(0x9E37_79B9_7F4A_7C15);
    let mut hosts = cluster(count, &mut dice);
    let mut placed = VecDeque::with_capacity(AGENTS);
    let put = |hosts: &mut Hosts, placed: &mut VecDeque<_>, request: Request| {
        if let Ok(host) = place(hosts, &request) {
            hosts.take(host, &request);
            placed.push_back((host, request));
        }
    };
    for _ in 0..2 * AGENTS {
        if placed.len() == AGENTS {
            break;
        }
        let request = request(&mut dice);
        put(&mut hosts, &mut placed, request);
    }
    assert_eq!(placed.len(), AGENTS, "{count} hosts take all agents");
    let mut samples = Vec::with_capacity(SAMPLES);
    while samples.len() < SAMPLES {
        let request = request(&mut dice);
        let begin = Instant::now();
        let decided = black_box(place(black_box(&hosts), black_box(&request)));
        samples.push(begin.elapsed().as_secs_f64() * 1e6);
        if let Ok(host) = decided {
            hosts.take(host, &request);
            placed.push_back((host, request));
        }
        while placed.len() > AGENTS {
            if let Some((host, request)) = placed.pop_front() {
                hosts.give(host, &request);
            }
        }
    }
    samples
}

pub(crate) fn measure(report: &mut Report) {
    let few = decisions(10);
    for count in [100, 1000] {
        let many = decisions(count);
        let name = format!("placement among {count} hosts, 100,000 agents");
        let must = if count == 1000 { Must::AtMost(4.0) } else { Must::Shown };
        report.tails(&name, "us", &many, ("10 hosts", &few), must);
    }
}
