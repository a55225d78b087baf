//! What is recorded, what it is good for after a crash, and what happens when nothing can be recorded.

use std::sync::Arc;
use std::time::Duration;

use ark_types::agent::{Agent, AgentList, AgentState};
use ark_types::event::{Event, EventList, Recorded, Stream};
use ark_types::health::{Health, HealthStatus, LogState};
use ark_types::problem::{Problem, ProblemKind};
use ark_types::scheduling::{OwnerQuota, Quota};
use arkd::config::Config;
use arkd::core::MAX_FOLLOWERS;
use arkd::daemon::Daemon;
use arkd::ledger::Compaction;
use arkd::store::{
    Append, AppendError, Appended, Condition, EventLog, Pending, ReadError, Retention, Snapshot, SqliteLog,
};
use futures_util::FutureExt as _;
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use hyper::{Method, StatusCode};
use nix::sys::signal::Signal;
use serde_json::json;
use tokio::sync::watch;

use crate::harness::{Ark, Client, Place, eventually, signal, started};

async fn events(client: &Client, query: &str) -> EventList {
    let reply = client.get(&format!("/v1/events?{query}")).await;
    assert_eq!(reply.status(), StatusCode::OK, "{:?}", reply.body);
    reply.json()
}

/// Types of the events of an agent, in order.
pub(crate) async fn life(client: &Client, id: &str) -> Vec<String> {
    let list = events(client, &format!("stream={}&limit=1000", Stream::agent(id))).await;
    list.events.iter().map(|event| event.event.kind().to_owned()).collect()
}

async fn agents(client: &Client, query: &str) -> Vec<Agent> {
    let reply = client.get(&format!("/v1/agents?{query}")).await;
    assert_eq!(reply.status(), StatusCode::OK, "{:?}", reply.body);
    reply.json::<AgentList>().agents
}

/// A stream of server-sent events.
struct Sse {
    body: Incoming,
    text: String,
}

impl Sse {
    async fn open(client: &Client, query: &str, last: Option<u64>) -> Self {
        let mut request = client.request(Method::GET, &format!("/v1/events?{query}"), "");
        request.headers_mut().insert("accept", "text/event-stream".parse().unwrap());
        if let Some(last) = last {
            request.headers_mut().insert("last-event-id", last.to_string().parse().unwrap());
        }
        let response = client.send(request).await;
        assert_eq!(response.status(), StatusCode::OK);
        assert_eq!(response.headers()["content-type"], "text/event-stream");
        Self { body: response.into_body(), text: String::new() }
    }

    /// The next event: its type and data. None at the end.
    async fn next(&mut self) -> Option<(String, String)> {
        loop {
            if let Some((block, rest)) = self.text.split_once("\n\n") {
                let field = |name: &str| {
                    block
                        .lines()
                        .find_map(|line| line.strip_prefix(name))
                        .unwrap_or_default()
                        .trim()
                        .to_owned()
                };
                let told = (field("event:"), field("data:"));
                self.text = rest.to_owned();
                if !told.1.is_empty() {
                    return Some(told);
                }
                continue;
            }
            let frame = tokio::time::timeout(Duration::from_secs(60), self.body.frame()).await.unwrap()?;
            self.text.push_str(std::str::from_utf8(frame.unwrap().data_ref().unwrap()).unwrap());
        }
    }

    async fn recorded(&mut self) -> Recorded {
        let (kind, data) = self.next().await.unwrap();
        let recorded: Recorded = serde_json::from_str(&data).unwrap();
        assert_eq!(recorded.event.kind(), kind);
        recorded
    }
}

#[tokio::test]
async fn a_life_is_told_in_order_and_tells_no_secret() {
    let place = Place::new();
    let ark = place.start().await;
    let client = &ark.client;
    let body = json!({
        "name": "a1", "image": "base", "memory_mib": 64, "env": { "TOKEN": "hunter2" },
        "labels": { "app": "shop" }, "owner": "team-a",
    });
    let agent: Agent = client.post("/v1/agents", &body).await.json();
    assert_eq!((agent.owner.as_ref(), agent.labels.get("app")), ("team-a", Some("shop")));
    client.post("/v1/agents/a1/snapshots", &json!({ "name": "s1" })).await;
    for step in ["pause", "resume"] {
        assert_eq!(client.post(&format!("/v1/agents/a1/{step}"), &json!({})).await.status(), StatusCode::OK);
    }
    let rewound = client.post("/v1/agents/a1/rewind", &json!({ "snapshot": "s1" })).await;
    assert_eq!(rewound.status(), StatusCode::OK);
    assert_eq!(client.delete("/v1/agents/a1").await.status(), StatusCode::NO_CONTENT);
    let told = [
        "agent.created",
        "agent.ready",
        "agent.paused",
        "agent.resumed",
        "agent.rewound",
        "agent.stopping",
        "agent.ended",
        "agent.removed",
    ];
    assert_eq!(life(client, &agent.id).await, told);
    let everything = client.get("/v1/events?limit=1000").await;
    let list: EventList = everything.json();
    assert!(list.events.iter().map(|event| event.position).eq(1..=list.newest));
    let Event::AgentCreated { agent: spec } = &list.events[0].event else { panic!("{list:?}") };
    assert_eq!((&spec.id, spec.name.as_ref(), spec.owner.as_ref()), (&agent.id, "a1", "team-a"));
    let history = client.get("/v1/agents?all=true").await;
    for reply in [&everything, &history] {
        assert!(!String::from_utf8_lossy(&reply.body).contains("hunter2"));
    }
    let log = place.state().events();
    for file in [log.clone(), log.with_extension("db-wal")] {
        let bytes = std::fs::read(&file).unwrap();
        assert!(!bytes.windows(7).any(|window| window == b"hunter2"), "{}", file.display());
    }
    // It is remembered by its id, and its name is free.
    let remembered: Agent = client.get(&format!("/v1/agents/{}", agent.id)).await.json();
    assert_eq!(remembered.state, AgentState::Stopped);
    assert!(remembered.removed_unix_ms.is_some());
    client.get("/v1/agents/a1").await.problem(ProblemKind::AgentNotFound);
    client.delete(&format!("/v1/agents/{}", agent.id)).await.problem(ProblemKind::AgentNotFound);
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn an_agent_that_never_came_up_and_one_that_ended_are_told_with_the_reason() {
    let place = Place::new();
    let ark = place.start().await;
    let client = &ark.client;
    client
        .post("/v1/agents", &json!({ "image": "panics", "memory_mib": 64 }))
        .await
        .problem(ProblemKind::BootFailed);
    let list = events(client, "").await;
    let kinds: Vec<&str> = list.events.iter().map(|event| event.event.kind()).collect();
    assert_eq!(kinds, ["agent.created", "agent.ended", "agent.removed"]);
    let Event::AgentEnded { exit: Some(_), .. } = &list.events[1].event else { panic!("{list:?}") };

    let agent = client.create("b1", "powers-off").await;
    eventually("it stops", async || client.get("/v1/agents/b1").await.json::<Agent>().exit.is_some()).await;
    eventually("that is recorded", async || life(client, &agent.id).await.len() == 3).await;
    assert_eq!(life(client, &agent.id).await[2], "agent.ended");
    ark.daemon.shut_down().await;

    // It is still known by the next arkd, until it is deleted.
    let ark = place.start().await;
    let known: Agent = ark.client.get("/v1/agents/b1").await.json();
    assert_eq!(
        (known.state, known.reason.as_deref()),
        (AgentState::Stopped, Some("the guest powered itself off"))
    );
    let refused = ark.client.exec("b1", &json!({ "argv": ["true"] })).await;
    assert!(refused.problem(ProblemKind::AgentNotRunning).detail.contains("powered itself off"));
    assert_eq!(ark.client.delete("/v1/agents/b1").await.status(), StatusCode::NO_CONTENT);
    assert!(agents(&ark.client, "").await.is_empty());
    assert_eq!(life(&ark.client, &agent.id).await.last().unwrap(), "agent.removed");
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn agents_are_listed_by_what_they_are_and_page_by_page() {
    let place = Place::new();
    let ark = place.start().await;
    let client = &ark.client;
    for (name, app, owner) in [("a1", "x", "one"), ("a2", "y", "one"), ("a3", "x", "two"), ("a4", "z", "two")]
    {
        let body = json!({ "name": name, "image": "base", "memory_mib": 64, "labels": { "app": app }, "owner": owner });
        assert_eq!(client.post("/v1/agents", &body).await.status(), StatusCode::CREATED);
    }
    assert_eq!(client.delete("/v1/agents/a3").await.status(), StatusCode::NO_CONTENT);
    let names = async |query: &str| {
        let agents = agents(client, query).await;
        agents.iter().map(|agent| agent.name.to_string()).collect::<Vec<_>>().join(" ")
    };
    assert_eq!(names("").await, "a1 a2 a4");
    assert_eq!(names("all=true").await, "a1 a2 a3 a4");
    assert_eq!(names("all=true&labels=app%3Dx").await, "a1 a3");
    assert_eq!(names("labels=app%20in%20(x,y),app!%3Dy").await, "a1");
    assert_eq!(names("owner=two&all=true").await, "a3 a4");
    assert_eq!(names("state=stopped&all=true").await, "a3");
    assert_eq!(names("state=running&image=base&labels=!other").await, "a1 a2 a4");
    assert_eq!(names("template=py").await, "");
    for all in [false, true] {
        let (mut pages, mut cursor) = (Vec::new(), String::new());
        loop {
            let page: AgentList = client.get(&format!("/v1/agents?all={all}&limit=1{cursor}")).await.json();
            pages.extend(page.agents.iter().map(|agent| agent.name.to_string()));
            let Some(next) = page.next_cursor else { break };
            cursor = format!("&cursor={next}");
        }
        assert_eq!(pages.join(" "), if all { "a1 a2 a3 a4" } else { "a1 a2 a4" });
    }
    for (query, said) in [
        ("labels=app%20in%20x", "\"x\""),
        ("labels=-%3Dx", "is not a label's key"),
        ("limit=0", "ask for 1 to 1000"),
        ("cursor=there", "is no cursor"),
    ] {
        let detail =
            client.get(&format!("/v1/agents?{query}")).await.problem(ProblemKind::InvalidValue).detail;
        assert!(detail.contains(said), "{query}: {detail}");
    }
    client.get("/v1/agents?state=happy").await.problem(ProblemKind::BadRequest);
    for labels in [json!({ "-": "x" }), json!({ "a": "b c" })] {
        let body = json!({ "image": "base", "labels": labels });
        let detail = client.post("/v1/agents", &body).await.problem(ProblemKind::InvalidValue).detail;
        assert!(detail.contains("is not a label's"), "{detail}");
    }
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn a_stream_is_taken_up_again_without_loss_or_doubles() {
    let place = Place::new();
    let ark = place.start().await;
    let client = ark.client.clone();
    let writer = tokio::spawn({
        let client = client.clone();
        async move {
            for n in 0..12 {
                client.create(&format!("a{n}"), "base").await;
                client.delete(&format!("/v1/agents/a{n}?grace_ms=0")).await;
            }
        }
    });
    // Who vanishes, and who never reads, hold nobody up.
    let mut idle = Vec::new();
    for _ in 0..20 {
        idle.push(Sse::open(&client, "", None).await);
    }
    drop(idle.split_off(10));
    let (mut seen, mut last) = (Vec::new(), None);
    while seen.len() < 60 {
        let mut stream = Sse::open(&client, if last.is_some() { "after=0" } else { "" }, last).await;
        for _ in 0..(seen.len() % 7 + 1).min(60 - seen.len()) {
            let event = stream.recorded().await;
            last = Some(event.position);
            seen.push(event);
        }
    }
    writer.await.unwrap();
    let all = events(&client, "limit=1000").await;
    assert_eq!(seen, all.events[..seen.len()]);
    assert_eq!(all.events.len(), 60, "five events a life");
    // One that reads only now has missed nothing.
    for event in &all.events {
        assert_eq!(idle[0].recorded().await, *event);
    }
    let mut some = Sse::open(&client, "after=30&type=agent.removed", None).await;
    assert!(some.recorded().await.position > 30);
    // Pages, filtered and not, tell the same.
    let (mut paged, mut after) = (Vec::new(), 0);
    loop {
        let page = events(&client, &format!("after={after}&limit=7")).await;
        if page.events.is_empty() {
            break;
        }
        after = page.next_after;
        paged.extend(page.events);
    }
    assert_eq!(paged, all.events);
    assert_eq!(events(&client, "type=agent.ready").await.events.len(), 12);
    client.get("/v1/events?after=61").await.problem(ProblemKind::InvalidValue);
    client.get("/v1/events?limit=0").await.problem(ProblemKind::InvalidValue);
    client.get("/v1/events?stream=nonsense").await.problem(ProblemKind::BadRequest);
    drop(idle);
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn a_killed_arkd_is_followed_by_one_that_knows_the_same() {
    let place = Place::new();
    let (mut first, client) = started(&place, &[]).await;
    let alive = client.create("a1", "base").await;
    let removed = client.create("a2", "base").await;
    client.delete("/v1/agents/a2").await;
    let paused = client.create("a3", "base").await;
    client.post("/v1/agents/a3/pause", &json!({})).await;
    let temporary = json!({ "name": "a4", "image": "base", "memory_mib": 64, "auto_remove": true });
    let temporary: Agent = client.post("/v1/agents", &temporary).await.json();
    let lost = client.create("a5", "base").await;
    let before = events(&client, "limit=1000").await;
    let history: Agent = client.get(&format!("/v1/agents/{}", removed.id)).await.json();
    first.end(Signal::SIGKILL);
    // As a host that was started anew leaves it.
    signal(lost.vmm_pid.unwrap(), Signal::SIGKILL);
    std::fs::remove_dir_all(place.run().agent(&lost.id).0).unwrap();

    let (mut second, client) = started(&place, &[]).await;
    let after = events(&client, "limit=1000").await;
    assert_eq!(after.events[..before.events.len()], before.events);
    assert_eq!(client.get(&format!("/v1/agents/{}", removed.id)).await.json::<Agent>(), history);
    // What went is told as it is, and nothing is made up of what goes on.
    let gone: Agent = client.get(&format!("/v1/agents/{}", lost.id)).await.json();
    assert_eq!(gone.state, AgentState::Failed);
    assert!(gone.reason.unwrap().contains("lost while arkd was away"));
    assert_eq!(life(&client, &lost.id).await, ["agent.created", "agent.ready", "agent.ended"]);
    assert_eq!(life(&client, &alive.id).await, ["agent.created", "agent.ready"]);
    assert_eq!(life(&client, &temporary.id).await.last().unwrap(), "agent.removed");
    assert_eq!(life(&client, &paused.id).await.last().unwrap(), "agent.paused");
    let names = |agents: Vec<Agent>| agents.iter().map(|agent| agent.name.to_string()).collect::<Vec<_>>();
    assert_eq!(names(agents(&client, "").await), ["a1", "a3", "a5"]);
    assert_eq!(names(agents(&client, "all=true").await), ["a1", "a2", "a3", "a4", "a5"]);
    assert_eq!(client.post("/v1/agents/a3/resume", &json!({})).await.status(), StatusCode::OK);
    client.post("/v1/shutdown", &json!({ "agents": "end" })).await;
    assert!(second.wait());

    let (_third, client) = started(&place, &[]).await;
    assert_eq!(names(agents(&client, "").await), ["a5"], "it waits to be deleted");
    for id in [&alive.id, &paused.id] {
        assert_eq!(life(&client, id).await.last().unwrap(), "agent.removed");
    }
    assert_eq!(client.delete("/v1/agents/a5").await.status(), StatusCode::NO_CONTENT);
    assert!(agents(&client, "").await.is_empty());
}

fn resumed(n: u64) -> Append {
    Append::new(Stream::agent(&format!("{:016x}", n % 100)), Event::AgentResumed {})
}

#[tokio::test]
async fn ten_thousand_events_are_replayed_and_what_was_compacted_is_gone_with_a_sentence() {
    let place = Place::new();
    let ark = place.start().await;
    let agent = ark.client.create("a1", "base").await;
    ark.client.delete("/v1/agents/a1").await;
    ark.daemon.shut_down().await;
    let log = SqliteLog::open(&place.state().events()).unwrap();
    let mut pending = Vec::new();
    for n in 0..10_000 {
        pending.push(log.append(resumed(n)));
        if pending.len() == 1000 {
            for pending in pending.drain(..) {
                pending.await.unwrap();
            }
        }
    }
    drop(log);

    let retention = Retention { events: 100, ..Retention::default() };
    let compaction = Compaction { every: 3, retention };
    let ark = place.start_with(Config { compaction, ..place.config() }).await;
    let newest = ark.client.get("/v1/health").await.json::<Health>().log.newest;
    assert_eq!(newest, 10_005);
    let known: Agent = ark.client.get(&format!("/v1/agents/{}", agent.id)).await.json();
    assert!(known.removed_unix_ms.is_some());
    let mut slow = Sse::open(&ark.client, "after=0", None).await;
    ark.client.create("b1", "base").await;
    ark.client.create("b2", "base").await;
    eventually("old events are let go of", async || {
        let list = events(&ark.client, "limit=1").await;
        list.events[0].position > 9000
    })
    .await;
    let detail = ark.client.get("/v1/events?after=5").await.problem(ProblemKind::EventsCompacted).detail;
    assert!(detail.contains("go on with after="), "{detail}");
    // Who was so slow that it lost some is told, instead of missing them.
    let end = loop {
        let (kind, data) = slow.next().await.unwrap();
        if kind == "problem" {
            break serde_json::from_str::<Problem>(&data).unwrap();
        }
    };
    assert_eq!(end.kind, ProblemKind::EventsCompacted);
    assert!(slow.next().await.is_none());
    ark.daemon.shut_down().await;
    let ark = place.start().await;
    assert_eq!(ark.client.get(&format!("/v1/agents/{}", agent.id)).await.json::<Agent>(), known);
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn who_follows_events_is_let_go_when_arkd_ends_and_only_so_many_may() {
    let place = Place::new();
    let (mut arkd, client) = started(&place, &[]).await;
    let mut followers = Vec::new();
    for _ in 0..MAX_FOLLOWERS {
        followers.push(Sse::open(&client, "", None).await);
    }
    let follow = async || {
        let mut request = client.request(Method::GET, "/v1/events", "");
        request.headers_mut().insert("accept", "text/event-stream".parse().unwrap());
        client.send(request).await.status()
    };
    assert_eq!(follow().await, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(client.get("/v1/events").await.status(), StatusCode::OK, "pages are to be had");
    followers.pop();
    eventually("another may follow", async || follow().await == StatusCode::OK).await;

    client.create("a1", "base").await;
    let console = client.send(client.request(Method::GET, "/v1/agents/a1/logs?follow=true", "")).await;
    assert!(arkd.end(Signal::SIGTERM));
    // They end in order, which one that is cut does not.
    for mut follower in followers {
        while follower.next().await.is_some() {}
    }
    console.into_body().collect().await.unwrap();
}

/// A log whose disk fills up and is emptied when the test says so.
#[derive(Debug)]
pub(crate) struct Brittle {
    pub(crate) log: Arc<dyn EventLog>,
    pub(crate) condition: watch::Sender<Condition>,
}

impl EventLog for Brittle {
    fn append(&self, append: Append) -> Pending<Result<Appended, AppendError>> {
        match self.condition.borrow().refusal() {
            Some(error) => std::future::ready(Err(error)).boxed(),
            None => self.log.append(append),
        }
    }
    fn read(&self, after: u64, limit: usize) -> Pending<Result<Vec<Arc<Recorded>>, ReadError>> {
        self.log.read(after, limit)
    }
    fn subscribe(&self) -> watch::Receiver<u64> {
        self.log.subscribe()
    }
    fn condition(&self) -> watch::Receiver<Condition> {
        self.condition.subscribe()
    }
    fn snapshot(&self) -> Pending<Result<Option<Snapshot>, ReadError>> {
        self.log.snapshot()
    }
    fn past(&self) -> Pending<Result<Vec<u8>, ReadError>> {
        self.log.past()
    }
    fn compact(
        &self,
        snapshot: Snapshot,
        past: Vec<u8>,
        retention: Retention,
    ) -> Pending<Result<(), AppendError>> {
        self.log.compact(snapshot, past, retention)
    }
}

#[tokio::test]
async fn a_full_disk_makes_arkd_read_only_until_there_is_room_again() {
    let place = Place::new();
    let condition = watch::Sender::new(Condition::Writable);
    let brittle = |log| Arc::new(Brittle { log, condition: condition.clone() }) as Arc<dyn EventLog>;
    let daemon = Daemon::start_on(place.config(), brittle).await.unwrap();
    let ark = Ark { client: Client::unix(&place.run().api_socket()), daemon };
    let client = &ark.client;
    let agent = client.create("a1", "base").await;
    let other = client.create("a2", "base").await;
    condition.send_replace(Condition::Full("database or disk is full".to_owned()));

    let health: Health = client.get("/v1/health").await.json();
    assert_eq!((health.status, health.log.state), (HealthStatus::ReadOnly, LogState::Full));
    let body = json!({ "name": "b1", "image": "base", "memory_mib": 64 });
    for (path, body) in [
        ("/v1/agents", body.clone()),
        ("/v1/agents/a1/pause", json!({})),
        ("/v1/agents/a1/fork", json!({ "count": 1 })),
    ] {
        let detail = client.post(path, &body).await.problem(ProblemKind::LogFull).detail;
        assert!(detail.contains("make room on the disk of ARK_STATE"), "{detail}");
    }
    let quota = async |agents: u64| {
        client.ask(Method::PUT, "/v1/owners/team", json!({ "agents": agents }).to_string()).await
    };
    quota(3).await.problem(ProblemKind::LogFull);
    assert_eq!(client.get("/v1/owners/team").await.json::<OwnerQuota>().quota, Quota::default());
    // What needs no record goes on; a removal happens, since it makes room, but is not acknowledged.
    assert_eq!(client.exec("a1", &json!({ "argv": ["true"] })).await.status(), StatusCode::OK);
    assert_eq!(agents(client, "").await.len(), 2);
    let detail = client.delete("/v1/agents/a1").await.problem(ProblemKind::LogFull).detail;
    assert!(detail.starts_with("the agent a1 is removed, but that is not recorded yet"), "{detail}");
    // A VMM that dies does not wait for the disk either.
    signal(other.vmm_pid.unwrap(), Signal::SIGKILL);
    eventually("it fails", async || {
        client.get("/v1/agents/a2").await.json::<Agent>().state == AgentState::Failed
    })
    .await;
    assert_eq!(life(client, &agent.id).await.len(), 2, "nothing was half written");

    condition.send_replace(Condition::Writable);
    eventually("what is owed is recorded", async || {
        life(client, &agent.id).await.len() == 5 && life(client, &other.id).await.len() == 3
    })
    .await;
    assert_eq!(life(client, &agent.id).await[2..], ["agent.stopping", "agent.ended", "agent.removed"]);
    assert_eq!(client.post("/v1/agents", &body).await.status(), StatusCode::CREATED);
    assert_eq!(quota(4).await.json::<OwnerQuota>().quota.agents, Some(4));
    let set = events(client, "stream=owner/team").await;
    assert_eq!(set.events.len(), 1, "what was refused is not owed");
    assert_eq!(client.get("/v1/health").await.json::<Health>().status, HealthStatus::Ok);
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn a_log_that_is_none_is_refused_at_the_start() {
    let place = Place::new();
    std::fs::create_dir_all(&place.state().0).unwrap();
    std::fs::write(
        place.state().events(),
        "my diary, which is long enough to be mistaken for something else",
    )
    .unwrap();
    let said = Daemon::start(place.config()).await.unwrap_err().to_string();
    assert!(said.contains("is not a log of events of arkd: move it away"), "{said}");
    assert_eq!(std::fs::read_dir(place.path("run")).unwrap().count(), 0);
}
