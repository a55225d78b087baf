//! A log of events with many agents in it, all of them gone.

use std::collections::BTreeMap;

use ark_tests::World;
use ark_types::agent::Origin;
use ark_types::event::{AgentSpec, Event, Outcome, Stream};
use ark_types::healing::RestartPolicy;
use ark_types::layout::StateDir;
use arkd::store::{Append, EventLog, SqliteLog};

/// Agents in it.
pub(crate) const AGENTS: usize = 10_000;
/// So many of them have the label `app=a7`.
pub(crate) const SELECTED: usize = 100;

/// Writes it for a world whose `arkd` has not been started yet.
pub(crate) fn write(world: &World) {
    let state = StateDir(world.path().join("state"));
    std::fs::create_dir_all(&state.0).expect("a state directory");
    let log = SqliteLog::open(&state.events()).expect("a log of events");
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    runtime.block_on(async {
        for batch in (0..AGENTS).collect::<Vec<_>>().chunks(250) {
            let pending: Vec<_> =
                batch.iter().flat_map(|number| life(*number)).map(|append| log.append(append)).collect();
            for pending in pending {
                pending.await.expect("the log takes it in");
            }
        }
    });
}

/// The life of an agent, from its creation to its removal.
fn life(number: usize) -> impl Iterator<Item = Append> {
    let id = format!("{number:016x}");
    let stream = Stream::agent(&id);
    let app = format!("a{}", number % (AGENTS / SELECTED));
    let labels = BTreeMap::from([("app".to_owned(), app), ("tier".to_owned(), "batch".to_owned())]);
    let agent = AgentSpec {
        id,
        name: format!("old-{number}").parse().expect("a name"),
        owner: "team".to_owned().try_into().expect("an owner"),
        labels: labels.try_into().expect("labels"),
        origin: Origin::Boot,
        image: "base".parse().expect("an image's name"),
        image_digest: format!("sha256:{}", "0".repeat(64)),
        vcpus: 1,
        memory_mib: 256,
        restart: RestartPolicy::Never,
        ttl_s: None,
        idle_timeout_s: None,
        allow: Vec::new(),
        freeze_on_inference: false,
        checkpoint: None,
        health_check: None,
        created_unix_ms: 1_700_000_000_000 + number as u64,
        auto_remove: false,
    };
    let reason = "it was stopped on request".to_owned();
    let events = [
        Event::AgentCreated { agent },
        Event::AgentReady { boot_ms: 50 },
        Event::AgentEnded { outcome: Outcome::Stopped, reason, exit: None },
        Event::AgentRemoved {},
    ];
    (0..).zip(events).map(move |(version, event)| Append::new(stream.clone(), event).at(version))
}
