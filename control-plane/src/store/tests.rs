//! The log over its whole life: what it refuses, what it keeps through crashes, and the log against a simple model.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use ark_types::event::{Event, Outcome};
use proptest::prelude::*;
use tokio::runtime::Runtime;

use super::*;

/// A directory for logs, and where the log in use is.
struct Place {
    dir: tempfile::TempDir,
    lives: usize,
}

impl Place {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap(), lives: 0 }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join(format!("{}.db", self.lives))
    }

    fn open(&self) -> SqliteLog {
        SqliteLog::open(&self.path()).unwrap()
    }

    /// What a crash leaves: the files as they are while the log is open. The log goes on there.
    fn crash(&mut self) {
        let before = self.path();
        self.lives += 1;
        for end in ["", "-wal"] {
            let end_of = |path: &Path| PathBuf::from(format!("{}{end}", path.display()));
            std::fs::copy(end_of(&before), end_of(&self.path())).unwrap();
        }
    }
}

fn stream(n: u8) -> Stream {
    Stream::agent(&format!("{n:016x}"))
}

fn ready(boot_ms: u64) -> Event {
    Event::AgentReady { boot_ms }
}

async fn append(log: &SqliteLog, n: u8, event: Event) -> Result<Appended, AppendError> {
    log.append(Append::new(stream(n), event)).await
}

async fn all(log: &SqliteLog, mut after: u64) -> Vec<Arc<Recorded>> {
    let mut events = Vec::new();
    loop {
        let page = log.read(after, 7).await.unwrap();
        let Some(last) = page.last() else { return events };
        after = last.position;
        events.extend(page);
    }
}

#[tokio::test]
async fn appends_have_positions_versions_and_conflicts() {
    let place = Place::new();
    let log = place.open();
    let first = Append { events: vec![ready(1), ready(2)], ..Append::new(stream(1), ready(0)) };
    assert_eq!(log.append(first.at(0)).await, Ok(Appended { position: 2, version: 2 }));
    assert_eq!(append(&log, 2, ready(3)).await, Ok(Appended { position: 3, version: 1 }));
    let late = log.append(Append::new(stream(1), ready(9)).at(1)).await;
    assert_eq!(late, Err(AppendError::Conflict { stream: stream(1), expected: 1, actual: 2 }));
    assert_eq!(append(&log, 1, Event::AgentRemoved {}).await, Ok(Appended { position: 4, version: 3 }));
    assert_eq!(append(&log, 1, ready(9)).await, Err(AppendError::Ended(stream(1))));
    assert_eq!(*log.subscribe().borrow(), 4);
    let events = all(&log, 0).await;
    let told: Vec<_> = events.iter().map(|e| (e.position, e.version, e.event.kind())).collect();
    let kinds =
        [(1, 1, "agent.ready"), (2, 2, "agent.ready"), (3, 1, "agent.ready"), (4, 3, "agent.removed")];
    assert_eq!(told, kinds);
    // Those on disk are the same.
    drop(log);
    assert_eq!(all(&place.open(), 0).await, events);
}

#[test]
fn nobody_else_reads_the_log() {
    use std::os::unix::fs::PermissionsExt as _;
    let place = Place::new();
    let _log = place.open();
    assert_eq!(std::fs::metadata(place.path()).unwrap().permissions().mode() & 0o777, 0o600);
}

#[test]
fn what_is_no_log_or_a_later_one_is_refused_with_a_sentence_and_left_alone() {
    let place = Place::new();
    let refused = || SqliteLog::open(&place.path()).unwrap_err().to_string();
    std::fs::write(place.path(), "something else entirely, and long enough to be a header of a database")
        .unwrap();
    assert!(refused().contains("is not a log of events of arkd"));
    std::fs::remove_file(place.path()).unwrap();

    let other = rusqlite::Connection::open(place.path()).unwrap();
    other.execute_batch("CREATE TABLE mine (x)").unwrap();
    drop(other);
    let before = std::fs::read(place.path()).unwrap();
    assert!(refused().contains("is not a log of events of arkd"));
    assert_eq!(std::fs::read(place.path()).unwrap(), before);
    std::fs::remove_file(place.path()).unwrap();

    drop(place.open());
    let ours = rusqlite::Connection::open(place.path()).unwrap();
    ours.pragma_update(None, "user_version", 99).unwrap();
    drop(ours);
    let said = refused();
    assert!(said.contains("is of form 99, and this arkd knows forms up to 2"), "{said}");
    let ours = rusqlite::Connection::open(place.path()).unwrap();
    ours.pragma_update(None, "user_version", 2).unwrap();
    drop(ours);

    let mut bytes = std::fs::read(place.path()).unwrap();
    bytes.iter_mut().skip(100).for_each(|byte| *byte ^= 0x55);
    std::fs::write(place.path(), bytes).unwrap();
    assert!(refused().contains("cannot be used"));
    std::fs::remove_file(place.path()).unwrap();
    std::fs::create_dir(place.path()).unwrap();
    assert!(refused().contains("cannot be opened"));
}

#[tokio::test]
async fn many_appends_at_once_are_few_transactions_and_keep_their_order() {
    let place = Place::new();
    let log = place.open();
    let mut changes = log.subscribe();
    let counting = tokio::spawn(async move {
        let mut commits = 0;
        while *changes.borrow_and_update() < 1000 {
            changes.changed().await.unwrap();
            commits += 1;
        }
        commits
    });
    let pending: Vec<_> = (0..1000).map(|n| log.append(Append::new(stream(1), ready(n)).at(n))).collect();
    for (n, pending) in (1..).zip(pending) {
        assert_eq!(pending.await, Ok(Appended { position: n, version: n }));
    }
    assert!(counting.await.unwrap() < 500);
}

#[tokio::test]
async fn more_than_may_wait_is_refused_and_what_waits_is_kept() {
    let place = Place::new();
    let log = place.open();
    let pending: Vec<_> = (0..20_000).map(|n| log.append(Append::new(stream(1), ready(n)))).collect();
    let mut kept = 0;
    for pending in pending {
        match pending.await {
            Ok(_) => kept += 1,
            Err(error) => assert_eq!(error, AppendError::Busy),
        }
    }
    assert!(kept >= 4096);
    assert_eq!(*log.subscribe().borrow(), kept);
}

/// A file system of its own that has room for next to nothing.
struct Tiny(PathBuf);

impl Tiny {
    fn mount(path: &Path) -> Result<Self, nix::Error> {
        use nix::mount::{MsFlags, mount};
        std::fs::create_dir(path).unwrap();
        mount(Some("tiny"), path, Some("tmpfs"), MsFlags::empty(), Some("size=512k"))?;
        Ok(Self(path.to_owned()))
    }
}

impl Drop for Tiny {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(&self.0, nix::mount::MntFlags::MNT_DETACH);
    }
}

/// Fills whatever room is left around `log`, until an append is refused.
async fn fill_up(log: &SqliteLog) -> (u64, AppendError) {
    for n in 0..10_000 {
        let reason = "x".repeat(1000);
        let event = Event::AgentEnded { outcome: Outcome::Failed, reason, exit: None };
        if let Err(error) = append(log, 1, event).await {
            return (n, error);
        }
    }
    panic!("it never filled up");
}

/// Set where a user who may not mount anything is root, of a namespace of the test's own.
const IN_NAMESPACE: &str = "ARK_TEST_IN_NAMESPACE";

/// Runs the test `name` of this module in a namespace where this user may mount.
fn in_a_namespace(name: &str, refusal: nix::Error) {
    let sentence = "a full disk cannot be shown here: this user may neither mount a file system nor make a user namespace; run the tests as root, or with kernel.unprivileged_userns_clone=1";
    assert!(std::env::var_os(IN_NAMESPACE).is_none(), "{sentence} ({refusal})");
    let (_, module) = module_path!().split_once("::").unwrap();
    let status = std::process::Command::new("unshare")
        .args(["--user", "--map-root-user", "--mount"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", &format!("{module}::{name}")])
        .env(IN_NAMESPACE, "1")
        .status();
    assert!(
        status.as_ref().is_ok_and(std::process::ExitStatus::success),
        "{sentence} ({refusal}, {status:?})"
    );
}

#[tokio::test]
async fn a_full_disk_refuses_appends_and_nothing_else_and_ends_by_itself() {
    let dir = tempfile::tempdir().unwrap();
    let tiny = match Tiny::mount(&dir.path().join("tiny")) {
        Ok(tiny) => tiny,
        Err(refusal) => {
            return in_a_namespace(
                "a_full_disk_refuses_appends_and_nothing_else_and_ends_by_itself",
                refusal,
            );
        }
    };
    let ballast = tiny.0.join("ballast");
    std::fs::write(&ballast, vec![1; 256 << 10]).unwrap();
    let log = SqliteLog::open(&tiny.0.join("events.db")).unwrap();
    let (count, error) = fill_up(&log).await;
    assert!(matches!(error, AppendError::Full(_)), "{error:?}");
    assert!(error.to_string().contains("make room on the disk"), "{error}");
    let mut condition = log.condition();
    assert!(matches!(*condition.borrow_and_update(), Condition::Full(_)));
    assert_eq!(all(&log, 0).await.len() as u64, count, "what was acknowledged is there, and can be read");
    std::fs::remove_file(&ballast).unwrap();
    condition.wait_for(|now| *now == Condition::Writable).await.unwrap();
    assert_eq!(append(&log, 2, ready(1)).await, Ok(Appended { position: count + 1, version: 1 }));
    drop(log);
    let log = SqliteLog::open(&tiny.0.join("events.db")).unwrap();
    assert_eq!(all(&log, 0).await.len() as u64, count + 1);
}

#[tokio::test]
async fn a_torn_tail_costs_nothing_that_was_acknowledged_before_it() {
    let mut place = Place::new();
    let log = place.open();
    let mut ends = Vec::new();
    let wal = |place: &Place| PathBuf::from(format!("{}-wal", place.path().display()));
    for n in 0..30 {
        append(&log, n % 3, ready(n.into())).await.unwrap();
        ends.push(usize::try_from(std::fs::metadata(wal(&place)).unwrap().len()).unwrap());
    }
    let events = all(&log, 0).await;
    place.crash();
    let (database, whole) = (std::fs::read(place.path()).unwrap(), std::fs::read(wal(&place)).unwrap());
    drop(log);
    // Cut at the end of every commit, in the middle of the next one, and with a byte of the next one spoiled.
    for (at, end) in ends.iter().enumerate() {
        let next = ends.get(at + 1).copied().unwrap_or(whole.len());
        let mut spoiled = whole[..next].to_vec();
        if let Some(byte) = spoiled.get_mut(end + 30) {
            *byte ^= 0xFF;
        }
        for torn in [whole[..*end].to_vec(), whole[..end.midpoint(next)].to_vec(), spoiled] {
            place.lives += 1;
            std::fs::write(place.path(), &database).unwrap();
            std::fs::write(wal(&place), torn).unwrap();
            let log = place.open();
            assert_eq!(all(&log, 0).await, events[..=at]);
            let next = Appended { position: at as u64 + 2, version: 1 };
            assert_eq!(append(&log, 9, ready(1)).await, Ok(next), "and it goes on from there");
        }
    }
}

#[tokio::test]
async fn a_log_of_the_first_form_is_read() {
    let place = Place::new();
    std::fs::create_dir_all(place.path().parent().unwrap()).unwrap();
    let old = rusqlite::Connection::open(place.path()).unwrap();
    old.execute_batch(schema::MIGRATIONS[0]).unwrap();
    old.execute("INSERT INTO snapshot VALUES (1, 0, ?1)", [b"state"]).unwrap();
    old.pragma_update(None, "application_id", schema::APPLICATION_ID).unwrap();
    old.pragma_update(None, "user_version", 1).unwrap();
    drop(old);
    let log = place.open();
    let snapshot = Snapshot { position: 0, data: b"state".to_vec() };
    assert_eq!((log.snapshot().await, log.past().await), (Ok(Some(snapshot)), Ok(Vec::new())));
    assert_eq!(append(&log, 1, ready(1)).await.unwrap().position, 1);
}

#[tokio::test]
async fn compaction_keeps_what_it_is_told_to_and_says_what_is_gone() {
    let place = Place::new();
    let log = place.open();
    for n in 0..1700 {
        drop(log.append(Append::new(stream(u8::try_from(n % 200).unwrap()), ready(n))));
    }
    append(&log, 0, Event::AgentRemoved {}).await.unwrap();
    for n in 0..500 {
        drop(log.append(Append::new(stream(201), ready(n))));
    }
    let newest = append(&log, 201, ready(0)).await.unwrap().position;
    let snapshot = Snapshot { position: newest - 100, data: b"state".to_vec() };
    let generous = Retention { events: 10_000, ..Retention::default() };
    log.compact(snapshot.clone(), b"past".to_vec(), generous).await.unwrap();
    assert_eq!(all(&log, 0).await.len() as u64, newest);
    let strict = Retention { events: 300, ..Retention::default() };
    log.compact(snapshot.clone(), b"past".to_vec(), strict).await.unwrap();
    let floor = newest - 300;
    while log.read(floor - 1, 1).await.is_ok() {
        tokio::task::yield_now().await;
    }
    drop(log);
    let log = place.open();
    assert_eq!(log.read(0, 10).await, Err(ReadError::Compacted { after: 0, floor }));
    assert!(log.read(0, 10).await.unwrap_err().to_string().contains(&format!("after={floor}")));
    assert_eq!(all(&log, floor).await.len(), 300);
    assert_eq!(log.snapshot().await.unwrap().as_ref(), Some(&snapshot));
    assert_eq!(log.past().await.unwrap(), b"past");
    assert_eq!(append(&log, 0, ready(1)).await.unwrap().version, 1, "the stream that ended is forgotten");
    // Never more than the snapshot tells of, however old.
    let none = Retention { events: 0, age: Duration::ZERO };
    log.compact(snapshot, Vec::new(), none).await.unwrap();
    drop(log);
    let log = place.open();
    assert_eq!(log.read(newest - 100, 1).await.unwrap()[0].position, newest - 99);
}

/// What a log is asked for.
#[derive(Clone, Debug)]
enum Command {
    Append { stream: u8, count: usize, expected: Option<u64> },
    End { stream: u8 },
    Read { after: u64, limit: usize },
    Compact { keep: u64 },
    Close,
    Crash,
}

fn commands() -> impl Strategy<Value = Vec<Command>> {
    let append = (0..4_u8, 1..4_usize, prop::option::of(0..6_u64));
    let command = prop_oneof![
        6 => append.prop_map(|(stream, count, expected)| Command::Append { stream, count, expected }),
        1 => (0..4_u8).prop_map(|stream| Command::End { stream }),
        3 => (0..40_u64, 0..10_usize).prop_map(|(after, limit)| Command::Read { after, limit }),
        1 => (0..20_u64).prop_map(|keep| Command::Compact { keep }),
        1 => Just(Command::Close),
        2 => Just(Command::Crash),
    ];
    prop::collection::vec(command, 1..40)
}

/// A log as simple as can be.
#[derive(Default)]
struct Model {
    events: Vec<(u64, Stream, u64, Event)>,
    newest: u64,
    floor: u64,
    /// Version, whether it ended, position of the last event.
    streams: BTreeMap<Stream, (u64, bool, u64)>,
}

impl Model {
    fn append(&mut self, append: &Append) -> Result<Appended, AppendError> {
        let stream = append.stream.clone();
        let (mut version, ended, _) = self.streams.get(&stream).copied().unwrap_or_default();
        if ended {
            return Err(AppendError::Ended(stream));
        }
        if let Expected::Version(expected) = append.expected
            && expected != version
        {
            return Err(AppendError::Conflict { stream, expected, actual: version });
        }
        for event in &append.events {
            (version, self.newest) = (version + 1, self.newest + 1);
            self.events.push((self.newest, stream.clone(), version, event.clone()));
        }
        let ends = append.events.last().is_some_and(Event::is_last);
        self.streams.insert(stream, (version, ends, self.newest));
        Ok(Appended { position: self.newest, version })
    }

    fn compact(&mut self, keep: u64) {
        self.floor = self.floor.max(self.newest.saturating_sub(keep));
        self.events.retain(|(position, ..)| *position > self.floor);
        self.streams.retain(|_, (_, ended, last)| !*ended || *last > self.floor);
    }

    fn read(&self, after: u64, limit: usize) -> Result<Vec<(u64, Stream, u64, Event)>, ReadError> {
        if after >= self.newest || limit == 0 {
            return Ok(Vec::new());
        }
        if after < self.floor {
            return Err(ReadError::Compacted { after, floor: self.floor });
        }
        Ok(self.events.iter().filter(|(position, ..)| *position > after).take(limit).cloned().collect())
    }
}

async fn run(commands: Vec<Command>) {
    let (mut place, mut model) = (Place::new(), Model::default());
    let mut log = place.open();
    for command in commands {
        match command {
            Command::Append { stream: n, count, expected } => {
                let events = (0..count).map(|n| ready(n as u64)).collect();
                let expected = expected.map_or(Expected::Any, Expected::Version);
                let append = Append { stream: stream(n), expected, events };
                assert_eq!(log.append(append.clone()).await, model.append(&append));
            }
            Command::End { stream: n } => {
                let append = Append::new(stream(n), Event::AgentRemoved {});
                assert_eq!(log.append(append.clone()).await, model.append(&append));
            }
            Command::Read { after, limit } => {
                let read = log.read(after, limit).await.map(|events| {
                    let plain =
                        |e: &Arc<Recorded>| (e.position, e.stream.clone(), e.version, e.event.clone());
                    events.iter().map(plain).collect()
                });
                assert_eq!(read, model.read(after, limit));
            }
            Command::Compact { keep } => {
                let snapshot = Snapshot { position: model.newest, data: model.newest.to_string().into() };
                let retention = Retention { events: keep, ..Retention::default() };
                log.compact(snapshot.clone(), snapshot.data.clone(), retention).await.unwrap();
                model.compact(keep);
                assert_eq!(log.past().await.as_ref(), Ok(&snapshot.data));
                assert_eq!(log.snapshot().await, Ok(Some(snapshot)));
            }
            Command::Close => {
                drop(log);
                log = place.open();
            }
            Command::Crash => {
                place.crash();
                log = place.open();
            }
        }
        assert_eq!(*log.subscribe().borrow(), model.newest);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn the_log_is_as_its_model_through_closes_and_crashes(commands in commands()) {
        Runtime::new().unwrap().block_on(run(commands));
    }
}
