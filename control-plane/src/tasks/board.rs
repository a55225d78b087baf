//! Tasks that have not ended: which is next, and when the others have their time. Nothing here does I/O or looks at a clock.
//!
//! Among those that wait for their turn the highest priority goes first; of equal ones that of the owner with the fewest attempts
//! under way, then of the owner that was served the longest ago, then the oldest.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Duration;

use ark_types::label::Owner;

/// Where a task is in its owner's line: its priority, creation time and id.
type Turn = (Reverse<i32>, u64, String);

/// A task that has not ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Open {
    /// Who it belongs to.
    pub(super) owner: Owner,
    /// Priority.
    pub(super) priority: i32,
    /// Creation time, milliseconds since the Unix epoch.
    pub(super) created_unix_ms: u64,
    /// Number of its last attempt.
    pub(super) attempts: u32,
    /// Attempts that count against those that it may have.
    pub(super) failures: u32,
    /// When it has to have ended, from the board's beginning.
    pub(super) deadline: Option<Duration>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Ready,
    Waiting(Duration),
    Running,
    /// Somebody is at it, and no attempt is under way: it is just being made, or its end recorded.
    Held,
}

/// What an owner has on the board.
#[derive(Clone, Debug, Default)]
struct Share {
    open: usize,
    running: usize,
    /// Number of the turn that it had last.
    served: u64,
    /// None of its tasks is begun before.
    rests: Duration,
    /// What the last of its attempts that came to nothing lacked, until one comes to something.
    obstacle: Option<String>,
    ready: BTreeSet<Turn>,
}

/// See the module. Times are counted from its beginning.
#[derive(Debug, Default)]
pub(super) struct Board {
    open: HashMap<String, (Open, Stage)>,
    owners: BTreeMap<Owner, Share>,
    waiting: BTreeSet<(Duration, String)>,
    deadlines: BTreeSet<(Duration, String)>,
    running: usize,
    turns: u64,
}

impl Board {
    /// Takes in a task that is to be tried at `not_before` at the earliest.
    pub(super) fn insert(&mut self, id: &str, task: Open, not_before: Duration) {
        let counts = (task.attempts, task.failures);
        self.insert_held(id, task);
        self.put_back(id, counts, not_before);
    }

    /// Takes in a task that is held until it is put back.
    pub(super) fn insert_held(&mut self, id: &str, task: Open) {
        if let Some(deadline) = task.deadline {
            self.deadlines.insert((deadline, id.to_owned()));
        }
        self.owners.entry(task.owner.clone()).or_default().open += 1;
        self.open.insert(id.to_owned(), (task, Stage::Held));
    }

    /// Holds the task `id`, of which no attempt is under way: none is begun until it is put back.
    pub(super) fn hold(&mut self, id: &str) {
        self.leave(id);
        if let Some((_, stage)) = self.open.get_mut(id) {
            *stage = Stage::Held;
        }
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.open.len()
    }

    /// How many have an attempt under way.
    pub(super) const fn under_way(&self) -> usize {
        self.running
    }

    /// Whether somebody is at the task `id`, who puts it back or takes it out; none when there is no such task.
    pub(super) fn is_taken(&self, id: &str) -> Option<bool> {
        self.open.get(id).map(|(_, stage)| matches!(stage, Stage::Running | Stage::Held))
    }

    /// Begins an attempt of the task whose turn it is; none when all wait for their time.
    pub(super) fn begin(&mut self, now: Duration) -> Option<(String, Open)> {
        self.promote(now);
        let rank = |share: &Share| {
            if share.rests > now {
                return None;
            }
            let (priority, created, id) = share.ready.first()?.clone();
            Some((priority, share.running, share.served, created, id))
        };
        let (.., id) = self.owners.values().filter_map(rank).min()?;
        let (task, stage) = self.open.get_mut(&id)?;
        let share = self.owners.get_mut(&task.owner)?;
        share.ready.remove(&turn(&id, task));
        self.turns += 1;
        self.running += 1;
        (share.running, share.served, *stage) = (share.running + 1, self.turns, Stage::Running);
        Some((id, task.clone()))
    }

    /// Whoever is at `id` is done with it. The last attempt was number `attempts`, `failures` count by now, and the next one is to
    /// be made at `not_before` at the earliest.
    pub(super) fn put_back(&mut self, id: &str, (attempts, failures): (u32, u32), not_before: Duration) {
        self.leave(id);
        let Some((task, stage)) = self.open.get_mut(id) else { return };
        (task.attempts, task.failures, *stage) = (attempts, failures, Stage::Waiting(not_before));
        self.waiting.insert((not_before, id.to_owned()));
    }

    /// The attempt of `id` that is under way came to nothing: it has its place again, and nothing of its owner is begun before
    /// `until`.
    pub(super) fn rest(&mut self, id: &str, until: Duration, why: String) {
        let Some((task, _)) = self.open.get(id) else { return };
        let (counts, owner) = ((task.attempts, task.failures), task.owner.clone());
        self.put_back(id, counts, Duration::ZERO);
        if let Some(share) = self.owners.get_mut(&owner) {
            (share.rests, share.obstacle) = (until, Some(why));
        }
    }

    /// What the tasks of `owner` lack to be begun; none when it is only their turn.
    pub(super) fn obstacle(&self, owner: &Owner) -> Option<String> {
        self.owners.get(owner)?.obstacle.clone()
    }

    /// Takes a task out, wherever it is.
    pub(super) fn remove(&mut self, id: &str) -> Option<Open> {
        self.leave(id);
        let (task, _) = self.open.remove(id)?;
        if let Some(deadline) = task.deadline {
            self.deadlines.remove(&(deadline, id.to_owned()));
        }
        if let Some(share) = self.owners.get_mut(&task.owner) {
            share.open -= 1;
            if share.open == 0 {
                self.owners.remove(&task.owner);
            }
        }
        Some(task)
    }

    /// Tasks whose deadline is over; each is named once.
    pub(super) fn overdue(&mut self, now: Duration) -> Vec<String> {
        let later = self.deadlines.split_off(&(now + Duration::from_nanos(1), String::new()));
        std::mem::replace(&mut self.deadlines, later).into_iter().map(|(_, id)| id).collect()
    }

    /// When there is something to do again after `now`, unless something happens before.
    pub(super) fn next_time(&mut self, now: Duration) -> Option<Duration> {
        self.promote(now);
        let rests = |share: &Share| (!share.ready.is_empty() && share.rests > now).then_some(share.rests);
        let times = self.waiting.first().into_iter().chain(self.deadlines.first()).map(|(time, _)| *time);
        times.chain(self.owners.values().filter_map(rests)).min()
    }

    /// Those whose time has come stand in line.
    fn promote(&mut self, now: Duration) {
        while let Some((until, id)) = self.waiting.pop_first() {
            if until > now {
                self.waiting.insert((until, id));
                return;
            }
            let Some((task, stage)) = self.open.get_mut(&id) else { continue };
            *stage = Stage::Ready;
            self.owners.entry(task.owner.clone()).or_default().ready.insert(turn(&id, task));
        }
    }

    /// Takes `id` from where it stands.
    fn leave(&mut self, id: &str) {
        let Some((task, stage)) = self.open.get(id) else { return };
        let Some(share) = self.owners.get_mut(&task.owner) else { return };
        match stage {
            Stage::Ready => drop(share.ready.remove(&turn(id, task))),
            Stage::Waiting(until) => drop(self.waiting.remove(&(*until, id.to_owned()))),
            Stage::Running => {
                (share.running, self.running) = (share.running - 1, self.running - 1);
                share.obstacle = None;
            }
            Stage::Held => {}
        }
    }
}

fn turn(id: &str, task: &Open) -> Turn {
    (Reverse(task.priority), task.created_unix_ms, id.to_owned())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn open(owner: &str, priority: i32, created_unix_ms: u64) -> Open {
        let owner = owner.parse().unwrap();
        Open { owner, priority, created_unix_ms, attempts: 0, failures: 0, deadline: None }
    }

    fn all(board: &mut Board, now: Duration) -> Vec<String> {
        std::iter::from_fn(|| board.begin(now).map(|(id, _)| id)).collect()
    }

    #[test]
    fn the_highest_goes_first_and_equal_ones_by_turns() {
        let mut board = Board::default();
        for (id, owner, priority) in
            [("a1", "a", 0), ("a2", "a", 0), ("a3", "a", 0), ("b1", "b", 0), ("b2", "b", 5), ("c1", "c", -1)]
        {
            board.insert(id, open(owner, priority, id.as_bytes()[1].into()), Duration::ZERO);
        }
        // b has had a turn when the others' come.
        assert_eq!(all(&mut board, SECOND), ["b2", "a1", "b1", "a2", "a3", "c1"]);
        assert_eq!((board.len(), board.under_way()), (6, 6));
        // Of two that have nothing under way, the one goes first that waited for its turn longer.
        for id in ["a1", "a2", "a3", "b2", "b1", "c1"] {
            board.put_back(id, (1, 0), SECOND);
        }
        assert_eq!(all(&mut board, SECOND).first().map(String::as_str), Some("b2"));
    }

    #[test]
    fn who_waits_is_not_begun_before_its_time() {
        let mut board = Board::default();
        board.insert("1", open("a", 0, 1), 2 * SECOND);
        board.insert("2", Open { deadline: Some(3 * SECOND), ..open("a", 0, 2) }, 9 * SECOND);
        assert_eq!((board.begin(SECOND), board.next_time(SECOND)), (None, Some(2 * SECOND)));
        assert_eq!(board.begin(2 * SECOND).unwrap().0, "1");
        assert_eq!(
            (board.is_taken("1"), board.is_taken("2"), board.is_taken("3")),
            (Some(true), Some(false), None)
        );
        assert_eq!(board.next_time(2 * SECOND), Some(3 * SECOND));
        assert_eq!((board.overdue(2 * SECOND), board.overdue(3 * SECOND)), (vec![], vec!["2".to_owned()]));
        assert_eq!((board.overdue(3 * SECOND), board.next_time(3 * SECOND)), (vec![], Some(9 * SECOND)));
        board.put_back("1", (1, 1), 5 * SECOND);
        let (id, task) = board.begin(9 * SECOND).unwrap();
        assert_eq!((id.as_str(), task.attempts, task.failures), ("1", 1, 1));
    }

    #[test]
    fn who_found_no_room_rests_while_others_go_on() {
        let mut board = Board::default();
        for (id, owner) in [("a1", "a"), ("a2", "a"), ("b1", "b")] {
            board.insert(id, open(owner, 0, id.as_bytes()[1].into()), Duration::ZERO);
        }
        assert_eq!(board.begin(SECOND).unwrap().0, "a1");
        board.rest("a1", 3 * SECOND, "no room".to_owned());
        assert_eq!(board.obstacle(&"a".parse().unwrap()).as_deref(), Some("no room"));
        assert_eq!(all(&mut board, SECOND), ["b1"]);
        assert_eq!(board.next_time(SECOND), Some(3 * SECOND));
        assert_eq!(all(&mut board, 3 * SECOND), ["a1", "a2"], "it kept its place");
        assert_eq!(board.next_time(3 * SECOND), None, "what has no place waits for one");
        board.remove("a1");
        assert_eq!(board.obstacle(&"a".parse().unwrap()), None);
    }

    proptest! {
        /// Whatever is done, nothing is begun twice at a time, forgotten, or begun once it was taken out.
        #[test]
        fn every_task_is_in_one_place(doings in prop::collection::vec((0u8..7, 0u8..12, 0u64..9), 0..150)) {
            let mut board = Board::default();
            let (mut open_ones, mut running, mut held) = (BTreeMap::new(), BTreeSet::new(), BTreeSet::new());
            let mut now = Duration::ZERO;
            for (what, n, more) in doings {
                // The clock only goes on; what is put on the board may have its time now or later.
                let (id, more) = (n.to_string(), Duration::from_secs(more));
                now += more / 3;
                let time = now + more;
                match what {
                    0 if !open_ones.contains_key(&id) => {
                        let task = Open { deadline: n.is_multiple_of(3).then_some(time), ..open(["a", "b"][usize::from(n % 2)], i32::from(n % 3), n.into()) };
                        board.insert(&id, task, time);
                        open_ones.insert(id, time);
                    }
                    1 => if let Some((begun, _)) = board.begin(now) {
                        prop_assert!(open_ones[&begun] <= now);
                        prop_assert!(running.insert(begun));
                    } else {
                        let due =
                            |(id, at): (&String, &Duration)| *at <= now && !running.contains(id) && !held.contains(id);
                        prop_assert!(!open_ones.iter().any(due));
                    },
                    2 if running.remove(&id) || held.remove(&id) => {
                        board.put_back(&id, (1, 1), time);
                        open_ones.insert(id, time);
                    }
                    3 => {
                        prop_assert_eq!(board.remove(&id).is_some(), open_ones.remove(&id).is_some());
                        running.remove(&id);
                        held.remove(&id);
                    }
                    4 if board.is_taken(&id) == Some(false) => {
                        board.hold(&id);
                        held.insert(id);
                    }
                    5 if !open_ones.contains_key(&id) => {
                        board.insert_held(&id, open("b", 0, n.into()));
                        open_ones.insert(id.clone(), time);
                        held.insert(id);
                    }
                    _ => drop(board.overdue(now)),
                }
                prop_assert_eq!((board.len(), board.under_way()), (open_ones.len(), running.len()));
            }
            for id in open_ones.keys() {
                prop_assert_eq!(board.is_taken(id), Some(running.contains(id) || held.contains(id)));
                board.remove(id);
            }
            prop_assert!(board.owners.is_empty() && board.waiting.is_empty() && board.deadlines.is_empty());
        }
    }
}
