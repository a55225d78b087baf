//! The ledger over a log that refuses now and then.

use std::sync::atomic::{AtomicU32, Ordering};

use ark_types::agent::AgentState;
use ark_types::event::Recorded;
use futures_util::FutureExt as _;
use futures_util::future::join_all;

use super::*;
use crate::store::{Appended, Pending, Snapshot, SqliteLog};

/// A log that takes only one of so many appends in, and none while it is full.
#[derive(Debug)]
struct Moody {
    log: SqliteLog,
    tries: AtomicU32,
    takes_one_of: u32,
    condition: watch::Sender<Condition>,
}

impl Moody {
    fn new(dir: &tempfile::TempDir, takes_one_of: u32) -> Arc<Self> {
        let log = SqliteLog::open(&dir.path().join("events.db")).unwrap();
        let condition = watch::Sender::new(Condition::Writable);
        Arc::new(Self { log, tries: AtomicU32::new(0), takes_one_of, condition })
    }

    async fn events(&self) -> Vec<Arc<Recorded>> {
        self.log.read(0, usize::MAX).await.unwrap()
    }
}

impl EventLog for Moody {
    fn append(&self, append: Append) -> Pending<Result<Appended, AppendError>> {
        let refusal = self.condition.borrow().refusal();
        let moody = !self.tries.fetch_add(1, Ordering::Relaxed).is_multiple_of(self.takes_one_of);
        match refusal.or_else(|| moody.then_some(AppendError::Busy)) {
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

fn stream(n: u64) -> Stream {
    Stream::agent(&format!("{n:016x}"))
}

fn created(n: u64) -> Event {
    let agent = serde_json::json!({
        "id": format!("{n:016x}"), "name": "a1", "origin": { "from": "boot" }, "image": "base",
        "image_digest": "sha256:00", "vcpus": 1, "memory_mib": 64, "created_unix_ms": 0, "auto_remove": false,
    });
    Event::AgentCreated { agent: serde_json::from_value(agent).unwrap() }
}

#[tokio::test]
async fn what_is_refused_stays_owed_and_comes_in_order_and_once() {
    let dir = tempfile::tempdir().unwrap();
    let log = Moody::new(&dir, 3);
    let ledger = Ledger::open(Arc::clone(&log) as Arc<dyn EventLog>, Compaction::default()).await.unwrap();
    let mut recordings = Vec::new();
    for boot_ms in 0..30 {
        for n in 0..4 {
            recordings.push(ledger.record(stream(n), vec![Event::AgentReady { boot_ms }]));
        }
    }
    let refused = join_all(recordings).await.into_iter().filter(Result::is_err).count();
    assert!(refused > 0);
    while (0..4).any(|n| ledger.settled(&stream(n)).is_err()) {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let events = log.events().await;
    for n in 0..4 {
        let told = events.iter().filter(|event| event.stream == stream(n)).map(|event| event.event.clone());
        assert!(told.eq((0..30).map(|boot_ms| Event::AgentReady { boot_ms })));
    }
    ledger.caught_up().await;
    assert_eq!(ledger.projection().position(), 120);
}

#[tokio::test]
async fn what_began_and_ended_unheard_is_nothing_and_what_was_heard_of_ends() {
    let dir = tempfile::tempdir().unwrap();
    let log = Moody::new(&dir, 1);
    let ledger = Ledger::open(Arc::clone(&log) as Arc<dyn EventLog>, Compaction::default()).await.unwrap();
    ledger.begin(stream(1), vec![created(1)]).await.unwrap();
    log.condition.send_replace(Condition::Full("no room".to_owned()));
    assert_eq!(ledger.ready(), Err(AppendError::Full("no room".to_owned())));
    ledger.begin(stream(2), vec![created(2)]).await.unwrap_err();
    ledger.record(stream(1), vec![Event::AgentRemoved {}]).await.unwrap_err();
    assert!(ledger.settled(&stream(1)).is_err());
    ledger.record(stream(2), vec![Event::AgentRemoved {}]).await.unwrap();
    ledger.settled(&stream(2)).unwrap();
    log.condition.send_replace(Condition::Writable);
    while ledger.settled(&stream(1)).is_err() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let told: Vec<_> = log.events().await.iter().map(|e| (e.stream.clone(), e.event.kind())).collect();
    assert_eq!(told, [(stream(1), "agent.created"), (stream(1), "agent.removed")]);
    ledger.caught_up().await;
    let state = ledger.projection().agents().get(&format!("{:016x}", 1)).unwrap().state;
    assert_eq!(state, AgentState::Stopped);
    // What cannot follow is not owed for ever.
    ledger.record(stream(1), vec![Event::AgentResumed {}]).await.unwrap_err();
    ledger.settled(&stream(1)).unwrap();
}

#[tokio::test]
async fn who_was_removed_before_the_snapshot_is_known_as_soon_as_somebody_asks() {
    let dir = tempfile::tempdir().unwrap();
    let log = Moody::new(&dir, 1);
    let compaction = Compaction { every: 3, ..Compaction::default() };
    let id = |n: u64| format!("{n:016x}");
    let ledger = Ledger::open(Arc::clone(&log) as Arc<dyn EventLog>, compaction).await.unwrap();
    ledger.begin(stream(1), vec![created(1)]).await.unwrap();
    ledger.record(stream(1), vec![Event::AgentRemoved {}]).await.unwrap();
    ledger.begin(stream(2), vec![created(2)]).await.unwrap();
    while log.snapshot().await.unwrap().is_none() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let whole = ledger.projection().clone();

    let next = Ledger::open(Arc::clone(&log) as Arc<dyn EventLog>, compaction).await.unwrap();
    assert!(next.projection().agents().get(&id(1)).is_none());
    assert!(!next.is_removed(&id(2)).await, "who lives is found without history");
    assert!(next.projection().agents().get(&id(1)).is_none());
    assert!(next.is_removed(&id(1)).await);
    assert!(!next.is_removed(&id(3)).await, "nobody knows the third");
    assert_eq!(*next.projection(), whole);
    // A snapshot that is made before anybody asked has lost nothing.
    drop(next);
    let next = Ledger::open(Arc::clone(&log) as Arc<dyn EventLog>, compaction).await.unwrap();
    for boot_ms in 0..3 {
        next.record(stream(2), vec![Event::AgentReady { boot_ms }]).await.unwrap();
    }
    while log.snapshot().await.unwrap().is_none_or(|snapshot| snapshot.position < 6) {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let last = Ledger::open(Arc::clone(&log) as Arc<dyn EventLog>, compaction).await.unwrap();
    assert!(last.is_removed(&id(1)).await);
}
