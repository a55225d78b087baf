//! The projection against the events it is made of.

use std::collections::{BTreeMap, HashSet};

use ark_types::agent::{AgentState, Origin};
use ark_types::event::{AgentSpec, Event, Outcome, Stream};
use ark_types::healing::{Continuity, RestartPolicy};
use ark_types::label::{Labels, Selector};
use ark_types::pool::PoolPolicy;
use ark_types::scheduling::Quota;
use ark_types::service::ServiceSpec;
use proptest::prelude::*;

use super::*;

fn id(n: u64) -> String {
    format!("{n:016x}")
}

fn labels(n: u64) -> Labels {
    let pairs = [("app", n % 3), ("tier", n % 2), ("n", n)].into_iter().take(usize::try_from(n % 4).unwrap());
    let pairs = pairs.map(|(key, value)| (key.to_owned(), format!("v{value}")));
    pairs.collect::<BTreeMap<_, _>>().try_into().unwrap()
}

fn created(n: u64) -> Event {
    let template = |name: &str| Origin::Template { name: name.parse().unwrap() };
    Event::AgentCreated {
        agent: AgentSpec {
            id: id(n),
            name: format!("a{}", n % 5).parse().unwrap(),
            owner: format!("o{}", n % 2).parse().unwrap(),
            labels: labels(n),
            origin: if n.is_multiple_of(3) { template("py") } else { Origin::Boot },
            image: if n.is_multiple_of(2) { "base" } else { "python" }.parse().unwrap(),
            image_digest: "sha256:0".to_owned(),
            vcpus: 1,
            memory_mib: 64,
            // Several at a time, and not quite in order.
            created_unix_ms: 1000 + (n ^ 1) / 3,
            auto_remove: false,
            restart: RestartPolicy::Never,
            ttl_s: None,
            idle_timeout_s: None,
            allow: Vec::new(),
            freeze_on_inference: false,
            checkpoint: None,
            health_check: None,
        },
    }
}

fn service(n: u64) -> ServiceSpec {
    let spec = format!(r#"{{ "name": "s{}", "replicas": {n}, "image": "base" }}"#, n % 3);
    serde_json::from_str(&spec).unwrap()
}

fn continuity(n: u64) -> Continuity {
    Continuity {
        restarts: 1,
        cause: "it broke".to_owned(),
        restored_from: Origin::Boot,
        lost_ms: n,
        at_unix_ms: 2000,
    }
}

fn policy(n: u64) -> PoolPolicy {
    PoolPolicy { min: 0, max: u32::try_from(n).unwrap(), target_wait_ms: 0 }
}

/// What may happen to the agent `n`, whether or not it makes sense.
fn event(n: u64, kind: u8) -> Event {
    match kind {
        0 | 1 => created(n),
        2 => Event::AgentReady { boot_ms: n },
        3 => Event::AgentPaused { snapshot: "s".to_owned() },
        4 => Event::AgentResumed {},
        5 => Event::AgentRewound { origin: Origin::Snapshot { name: "s".parse().unwrap() } },
        6 => Event::AgentStopping {},
        7 => Event::AgentEnded { outcome: Outcome::Failed, reason: "it broke".to_owned(), exit: None },
        8 => Event::AgentRemoved {},
        9 => Event::AgentRestarting { cause: "it broke".to_owned(), attempt: 1, after_ms: 1000 },
        10 => Event::AgentRestarted { continuity: continuity(n), boot_ms: n },
        11 => Event::OwnerQuotaSet {
            quota: Quota { agents: (!n.is_multiple_of(3)).then_some(n), ..Quota::default() },
        },
        12 if n.is_multiple_of(3) => Event::PoolRemoved {},
        12 => Event::PoolSet { policy: policy(n) },
        13 => Event::ServiceSet {
            service: Box::new(service(n)),
            env: (0..n % 3).map(|n| format!("KEY{n}")).collect(),
            generation: n / 2,
            request: n.is_multiple_of(3).then(|| id(n)),
        },
        14 => Event::ServiceRemoved {},
        _ => Event::AgentLabelled { labels: labels(n / 2) },
    }
}

fn recorded(events: impl IntoIterator<Item = (u64, u8)>) -> Vec<Recorded> {
    let record = |(position, (n, kind)): (u64, (u64, u8))| {
        let event = event(n, kind);
        let stream = match event {
            Event::OwnerQuotaSet { .. } => Stream::owner(&format!("o{}", n % 2).parse().unwrap()),
            Event::PoolSet { .. } | Event::PoolRemoved {} => {
                Stream::pool(&format!("t{}", n % 2).parse().unwrap())
            }
            Event::ServiceSet { .. } | Event::ServiceRemoved {} => Stream::service(&service(n).name),
            _ => Stream::agent(&id(n)),
        };
        Recorded { position, at_unix_ms: 1000 + position, stream, version: 1, event }
    };
    (1..).zip(events).map(record).collect()
}

fn projection<'a>(events: impl IntoIterator<Item = &'a Recorded>) -> Projection {
    let mut projection = Projection::default();
    events.into_iter().for_each(|event| projection.apply(event));
    projection
}

/// What `snapshot` and its past are of.
fn restore((snapshot, past): (Snapshot, Vec<u8>)) -> Result<Projection, UnusableSnapshot> {
    let mut projection = Projection::restore(&snapshot)?;
    projection.absorb(read_past(snapshot.position, &past)?);
    Ok(projection)
}

#[test]
fn the_end_is_the_end() {
    let life = [0, 2, 3, 7, 3, 8, 4];
    let told = |count| {
        let projection = projection(&recorded(life.iter().take(count).map(|kind| (1, *kind))));
        let agent = projection.agents().get(&id(1)).unwrap().clone();
        (agent.state, agent.reason, agent.removed_unix_ms)
    };
    assert_eq!(told(2), (AgentState::Running, None, None));
    assert_eq!(told(3), (AgentState::Paused, None, None));
    let reason = Some("it broke".to_owned());
    assert_eq!(told(5), (AgentState::Failed, reason.clone(), None), "what came late changes nothing");
    assert_eq!(told(7), (AgentState::Failed, reason, Some(1006)));
}

#[test]
fn only_a_restart_leads_back_from_the_end() {
    let projection = projection(&recorded([0, 2, 7, 10, 11].map(|kind| (1, kind))));
    let agent = projection.agents().get(&id(1)).unwrap();
    assert_eq!((agent.state, &agent.reason, &agent.exit), (AgentState::Running, &None, &None));
    assert_eq!((&agent.continuity, &agent.origin), (&Some(continuity(1)), &Origin::Boot));
}

#[test]
fn the_oldest_history_is_forgotten_whole() {
    let count = agents::MAX_HISTORY as u64 + 10;
    let lives = (0..count).flat_map(|n| [(n, 0), (n, 2), (n, 8)]);
    let projection = projection(&recorded(lives.chain([(count, 0)])));
    assert_eq!(projection.agents().iter().count() as u64, count - 10 + 1);
    assert_eq!(projection.agents().iter().last().unwrap().state, AgentState::Creating);
    let labelled = AgentFilter { labels: "n=v3".parse().unwrap(), ..AgentFilter::default() };
    assert_eq!(projection.agents().select(&labelled, None).count(), 0);
    assert_eq!(projection.agents().get(&id(1)), None);
    // What is forgotten is in no snapshot either.
    assert_eq!(restore(projection.still().snapshot()).unwrap(), projection);
}

#[test]
fn a_snapshot_that_is_none_is_refused() {
    let whole = r#"{"form":1,"agents":[]}"#;
    let data = [("", "[]"), ("{}", "[]"), (r#"{"form":2,"agents":[]}"#, "[]"), (whole, "[{}]"), (whole, "[")];
    for (data, past) in data {
        let snapshot = Snapshot { position: 7, data: data.into() };
        let said = restore((snapshot, past.into())).unwrap_err().to_string();
        assert!(said.contains("at position 7"), "{said}");
    }
}

#[test]
fn the_last_quota_of_an_owner_counts() {
    let quotas = |events: &[(u64, u8)]| {
        let projection = projection(&recorded(events.iter().copied()));
        let quotas = projection.quotas().iter();
        quotas.map(|(owner, quota)| (owner.to_string(), quota.agents.unwrap())).collect::<Vec<_>>()
    };
    assert_eq!(quotas(&[(1, 11), (2, 11), (5, 11)]), [("o0".to_owned(), 2), ("o1".to_owned(), 5)]);
    assert_eq!(quotas(&[(1, 11), (2, 11), (3, 11)]), [("o0".to_owned(), 2)], "the third has no bound");
}

#[test]
fn the_last_policy_of_a_pool_counts() {
    let pools = |events: &[(u64, u8)]| {
        let projection = projection(&recorded(events.iter().copied()));
        let pools = projection.pools().iter();
        pools.map(|(template, policy)| (template.to_string(), policy)).collect::<Vec<_>>()
    };
    let (t0, t1) = ("t0".to_owned(), "t1".to_owned());
    assert_eq!(pools(&[(1, 12), (2, 12), (5, 12)]), [(t0.clone(), policy(2)), (t1, policy(5))]);
    assert_eq!(pools(&[(1, 12), (2, 12), (3, 12)]), [(t0, policy(2))], "the third removes that of t1");
}

#[test]
fn a_service_is_as_it_was_set_last_until_it_is_removed() {
    let told = |events: &[(u64, u8)]| {
        let projection = projection(&recorded(events.iter().copied()));
        let services = projection.services().iter();
        services
            .map(|(name, wanted)| (name.to_string(), wanted.spec.replicas, wanted.generation))
            .collect::<Vec<_>>()
    };
    assert_eq!(told(&[(1, 13), (4, 13), (2, 13)]), [("s1".to_owned(), 4, 2), ("s2".to_owned(), 2, 1)]);
    assert_eq!(told(&[(1, 13), (2, 13), (4, 14)]), [("s2".to_owned(), 2, 1)]);
}

#[test]
fn a_snapshot_from_before_there_was_anything_but_agents_is_read() {
    let snapshot = Snapshot { position: 7, data: br#"{"form":1,"agents":[]}"#.into() };
    let restored = restore((snapshot, Vec::new())).unwrap();
    assert_eq!(restored, Projection { position: 7, ..Projection::default() });
}

fn filters() -> impl Strategy<Value = AgentFilter> {
    let states = prop::sample::select(vec![AgentState::Creating, AgentState::Running, AgentState::Failed]);
    let images = prop::sample::select(vec!["base", "python"]);
    let selectors = vec![
        "",
        "app=v1",
        "app in (v0,v2)",
        "app,tier=v1",
        "!tier",
        "app!=v1",
        "n=v7,tier",
        "app notin (v0,v1),n",
    ];
    (
        prop::option::of(states),
        prop::option::of(images),
        any::<bool>(),
        prop::option::of(0..2_u8),
        prop::sample::select(selectors),
    )
        .prop_map(|(state, image, template, owner, labels)| AgentFilter {
            state,
            image: image.map(|image| image.parse().unwrap()),
            template: template.then(|| "py".parse().unwrap()),
            owner: owner.map(|owner| format!("o{owner}").parse().unwrap()),
            labels: labels.parse::<Selector>().unwrap(),
        })
}

fn lives() -> impl Strategy<Value = Vec<Recorded>> {
    prop::collection::vec((0..24_u64, 0..16_u8), 0..200).prop_map(recorded)
}

/// Those of `events` that a log takes in: a removal is the last of its stream.
fn until_removed(events: Vec<Recorded>) -> Vec<Recorded> {
    let mut ended = HashSet::new();
    let is_taken = |event: &Recorded| {
        let is_taken = !ended.contains(&event.stream);
        if event.event.is_last() {
            ended.insert(event.stream.clone());
        }
        is_taken
    };
    let taken: Vec<Recorded> = events.into_iter().filter(is_taken).collect();
    taken.into_iter().zip(1..).map(|(event, position)| Recorded { position, ..event }).collect()
}

proptest! {
    #[test]
    fn a_snapshot_and_the_rest_are_the_same_as_everything(events in lives(), cut in 0..200_usize) {
        let (before, after) = events.split_at(cut.min(events.len()));
        let mut from_snapshot = restore(projection(before).still().snapshot()).unwrap();
        after.iter().for_each(|event| from_snapshot.apply(event));
        prop_assert_eq!(from_snapshot, projection(&events));
    }

    #[test]
    fn the_past_may_come_last(events in lives(), cut in 0..200_usize) {
        let events = until_removed(events);
        let (before, after) = events.split_at(cut.min(events.len()));
        let (snapshot, past) = projection(before).still().snapshot();
        let mut late = Projection::restore(&snapshot).unwrap();
        prop_assert!(late.agents().iter().all(|agent| agent.removed_unix_ms.is_none()));
        after.iter().for_each(|event| late.apply(event));
        late.absorb(read_past(snapshot.position, &past).unwrap());
        prop_assert_eq!(late, projection(&events));
    }

    #[test]
    fn what_is_selected_is_what_the_filter_lets_through(events in lives(), filter in filters(), page in 1..5_usize) {
        let projection = projection(&events);
        let wanted: Vec<&Agent> = projection.agents().iter().filter(|agent| filter.lets(agent)).collect();
        let all: Vec<&Agent> = projection.agents().select(&filter, None).collect();
        prop_assert_eq!(&all, &wanted);
        prop_assert!(wanted.is_sorted_by_key(|agent| place(agent)));
        // And page by page.
        let (mut pages, mut after) = (Vec::new(), None);
        loop {
            let next: Vec<&Agent> = projection.agents().select(&filter, after.as_ref()).take(page).collect();
            let Some(last) = next.last() else { break };
            after = Some(place(last));
            pages.extend(next);
        }
        prop_assert_eq!(pages, wanted);
    }
}
