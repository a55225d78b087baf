//! Wire formats of what operators ask, frozen: see `schema.rs`.

mod frozen;

use std::collections::BTreeMap;

use ark_types::agent::AgentState;
use ark_types::console::{KeptConsole, KeptConsoleList};
use ark_types::stats::{AgentStats, StatsList};
use frozen::Frozen;

#[test]
fn consoles() {
    let kept = KeptConsole {
        id: "0123456789abcdef".to_owned(),
        name: "a1".parse().unwrap(),
        image: "base".parse().unwrap(),
        ended_unix_ms: 1_700_000_000_000,
        reason: "the guest's kernel panicked".to_owned(),
        bytes: 4096,
    };
    Frozen::default().with("list", &KeptConsoleList { consoles: vec![kept] }).check("consoles");
}

#[test]
fn stats() {
    let least = AgentStats {
        id: "0123456789abcdef".to_owned(),
        name: "a1".parse().unwrap(),
        image: "base".parse().unwrap(),
        state: AgentState::Paused,
        created_unix_ms: 1_700_000_000_000,
        heartbeat_age_ms: None,
        memory_mib: 256,
        vcpus: 1,
        at_unix_ms: 1_700_000_001_000,
        cpu_us: None,
        pss_bytes: None,
        rss_bytes: None,
        guest_bytes: None,
        exits: None,
        devices: BTreeMap::new(),
    };
    let counters = BTreeMap::from([("read_bytes".to_owned(), 512)]);
    let most = AgentStats {
        state: AgentState::Running,
        heartbeat_age_ms: Some(900),
        cpu_us: Some(1_000_000),
        pss_bytes: Some(2 << 20),
        rss_bytes: Some(3 << 20),
        guest_bytes: Some(1 << 20),
        exits: Some(77),
        devices: BTreeMap::from([("block0".to_owned(), counters)]),
        ..least.clone()
    };
    let list = StatsList { agents: vec![most.clone()], left_out: 1 };
    Frozen::default().with("least", &least).with("most", &most).with("list", &list).check("stats");
}
