//! Tasks as the events tell of them, and the ways to find some among thousands.

use std::collections::{BTreeMap, HashMap};
use std::ops::Bound;
use std::sync::Arc;

use ark_types::event::{Event, Recorded};
use ark_types::label::{Owner, Selector};
use ark_types::task::{
    AttemptEnd, MAX_KEPT_ATTEMPTS, MAX_TOLD_ATTEMPTS, Task, TaskAttempt, TaskKey, TaskSpec, TaskState,
};

use super::Place;

/// Which tasks are asked for; the default is all.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TaskFilter {
    /// In this state.
    pub state: Option<TaskState>,
    /// Belonging to this owner.
    pub owner: Option<Owner>,
    /// With these labels.
    pub labels: Selector,
}

impl TaskFilter {
    /// Whether it lets `task` through.
    #[must_use]
    pub fn lets(&self, task: &Task) -> bool {
        self.state.is_none_or(|state| state == task.state)
            && self.owner.as_ref().is_none_or(|owner| *owner == task.spec.owner)
            && self.labels.selects(&task.spec.labels)
    }
}

/// Where `task` is in a list.
#[must_use]
pub fn task_place(task: &TaskSpec) -> Place {
    (task.created_unix_ms, task.id.clone())
}

/// Tasks, those that ended too until they are removed: how many of those are kept is decided by who removes them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tasks {
    /// Oldest first.
    tasks: BTreeMap<Place, Arc<Task>>,
    places: HashMap<String, Place>,
    keys: HashMap<(Owner, TaskKey), String>,
    /// Those that ended, by the time of their end, with the bytes that are kept of their output.
    ended: BTreeMap<Place, u64>,
    ended_bytes: u64,
}

impl FromIterator<Task> for Tasks {
    fn from_iter<T: IntoIterator<Item = Task>>(tasks: T) -> Self {
        let mut all = Self::default();
        tasks.into_iter().for_each(|task| all.insert(task));
        all
    }
}

impl Tasks {
    /// The task `id`.
    #[must_use]
    pub fn get(&self, id: &str) -> Option<&Task> {
        self.tasks.get(self.places.get(id)?).map(AsRef::as_ref)
    }

    /// The task that `owner` calls `key`.
    #[must_use]
    pub fn with_key(&self, owner: &Owner, key: &TaskKey) -> Option<&Task> {
        self.get(self.keys.get(&(owner.clone(), key.clone()))?)
    }

    /// Every task, oldest first.
    pub fn iter(&self) -> impl Iterator<Item = &Task> {
        self.tasks.values().map(AsRef::as_ref)
    }

    /// Every task as it is now, oldest first.
    pub(super) fn all(&self) -> Vec<Arc<Task>> {
        self.tasks.values().cloned().collect()
    }

    /// Tasks after `after` that `filter` lets through, oldest first.
    pub fn select<'a>(
        &'a self,
        filter: &'a TaskFilter,
        after: Option<&Place>,
    ) -> impl Iterator<Item = &'a Task> {
        let start = after.map_or(Bound::Unbounded, Bound::Excluded);
        let tasks = self.tasks.range::<Place, _>((start, Bound::Unbounded)).map(|(_, task)| task.as_ref());
        tasks.filter(|task| filter.lets(task))
    }

    /// Ids of the ended tasks that are too many when `count` of them and `bytes` of output are kept: those that ended first.
    #[must_use]
    pub fn surplus(&self, count: usize, bytes: u64) -> Vec<String> {
        let (mut left, mut left_bytes) = (self.ended.len(), self.ended_bytes);
        let mut surplus = Vec::new();
        for ((_, id), size) in &self.ended {
            if left <= count && left_bytes <= bytes {
                break;
            }
            surplus.push(id.clone());
            left -= 1;
            left_bytes = left_bytes.saturating_sub(*size);
        }
        surplus
    }

    /// Takes in an event, if it is about a task.
    pub(super) fn apply(&mut self, recorded: &Recorded) {
        if let Event::TaskCreated { task } = &recorded.event {
            return self.insert(task.clone().newborn());
        }
        let Some(id) = recorded.stream.task_id() else { return };
        if recorded.event == (Event::TaskRemoved {}) {
            return self.remove(id);
        }
        let Some(task) = self.places.get(id).and_then(|place| self.tasks.get_mut(place)) else { return };
        let task = Arc::make_mut(task);
        // The end is what counts, whoever comes too late.
        if task.state.is_ended() {
            return;
        }
        happen(task, &recorded.event, recorded.at_unix_ms);
        if task.state.is_ended() {
            task.ended_unix_ms = Some(recorded.at_unix_ms);
            let bytes = task.kept_bytes();
            self.ended.insert((recorded.at_unix_ms, id.to_owned()), bytes);
            self.ended_bytes += bytes;
        }
    }

    fn insert(&mut self, task: Task) {
        let place = task_place(&task.spec);
        self.places.insert(task.spec.id.clone(), place.clone());
        if let Some(key) = &task.spec.key {
            self.keys.insert((task.spec.owner.clone(), key.clone()), task.spec.id.clone());
        }
        if let Some(ended) = task.ended_unix_ms {
            let bytes = task.kept_bytes();
            self.ended.insert((ended, task.spec.id.clone()), bytes);
            self.ended_bytes += bytes;
        }
        self.tasks.insert(place, Arc::new(task));
    }

    fn remove(&mut self, id: &str) {
        let Some(task) = self.places.remove(id).and_then(|place| self.tasks.remove(&place)) else { return };
        if let Some(key) = &task.spec.key {
            self.keys.remove(&(task.spec.owner.clone(), key.clone()));
        }
        if let Some(ended) = task.ended_unix_ms {
            let bytes = self.ended.remove(&(ended, id.to_owned())).unwrap_or_default();
            self.ended_bytes = self.ended_bytes.saturating_sub(bytes);
        }
    }
}

/// What `event` makes of a task that has not ended.
fn happen(task: &mut Task, event: &Event, at_unix_ms: u64) {
    match event {
        Event::TaskStarted { attempt, agent } => {
            (task.state, task.reason, task.retry_unix_ms) = (TaskState::Running, None, None);
            let (number, agent) = (*attempt, agent.clone());
            task.attempts.push(TaskAttempt {
                number,
                agent,
                started_unix_ms: at_unix_ms,
                ended_unix_ms: None,
                end: None,
            });
            if task.attempts.len() > MAX_TOLD_ATTEMPTS {
                task.attempts.remove(0);
            }
        }
        Event::TaskAttemptFailed { attempt, end, retry_unix_ms } => {
            end_attempt(task, *attempt, end, at_unix_ms);
            task.failures += u32::from(end.outcome.is_failure());
            task.reason.clone_from(&end.reason);
            task.retry_unix_ms = *retry_unix_ms;
            task.state = if retry_unix_ms.is_some() { TaskState::Waiting } else { TaskState::Queued };
        }
        Event::TaskSucceeded { attempt, end } => {
            end_attempt(task, *attempt, end, at_unix_ms);
            finish(task, TaskState::Succeeded, end.reason.as_ref());
        }
        Event::TaskFailed { reason } => finish(task, TaskState::Failed, Some(reason)),
        Event::TaskTimedOut { reason } => finish(task, TaskState::TimedOut, Some(reason)),
        Event::TaskCancelled {} => finish(task, TaskState::Cancelled, None),
        // Of agents and owners, and what is looked at before.
        _ => {}
    }
}

fn finish(task: &mut Task, state: TaskState, reason: Option<&String>) {
    (task.state, task.reason, task.retry_unix_ms) = (state, reason.cloned(), None);
}

fn end_attempt(task: &mut Task, number: u32, end: &AttemptEnd, at_unix_ms: u64) {
    task.output = end.output.or(task.output);
    if let Some(attempt) = task.attempts.iter_mut().rev().find(|attempt| attempt.number == number) {
        (attempt.ended_unix_ms, attempt.end) = (Some(at_unix_ms), Some(end.clone()));
    }
    let is_old = |attempt: &&mut TaskAttempt| attempt.number.saturating_add(MAX_KEPT_ATTEMPTS) <= number;
    for old in task.attempts.iter_mut().filter(is_old) {
        old.end.iter_mut().for_each(|end| end.output = None);
    }
}

#[cfg(test)]
mod tests {
    use ark_types::event::Stream;
    use ark_types::task::{AttemptOutcome, KeptOutput};
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn spec(id: u8) -> TaskSpec {
        let key = id.is_multiple_of(2).then(|| format!("k{id}"));
        serde_json::from_value(json!({
            "id": format!("{id:016x}"), "key": key, "work": { "kind": "command", "program": "true" },
            "created_unix_ms": u64::from(id / 2),
        }))
        .unwrap()
    }

    fn end(outcome: AttemptOutcome) -> AttemptEnd {
        let output = Some(KeptOutput { stdout_bytes: 2, stderr_bytes: 1, truncated: false });
        AttemptEnd { outcome, reason: Some("why".to_owned()), exit_code: Some(1), output }
    }

    /// What can happen to a task, whether it makes sense or not.
    fn event(id: u8, what: u8, attempt: u32) -> Event {
        let failed =
            |outcome, retry_unix_ms| Event::TaskAttemptFailed { attempt, end: end(outcome), retry_unix_ms };
        match what {
            0 => Event::TaskCreated { task: spec(id) },
            1 | 2 => Event::TaskStarted { attempt, agent: Some("a".to_owned()) },
            3 => failed(AttemptOutcome::Failed, Some(7)),
            4 => failed(AttemptOutcome::CutOff, None),
            5 => Event::TaskSucceeded { attempt, end: end(AttemptOutcome::Succeeded) },
            6 => Event::TaskFailed { reason: "why".to_owned() },
            7 => Event::TaskCancelled {},
            8 => Event::TaskTimedOut { reason: "why".to_owned() },
            _ => Event::TaskRemoved {},
        }
    }

    fn told(events: impl IntoIterator<Item = (u8, Event)>) -> Tasks {
        let mut tasks = Tasks::default();
        for (position, (id, event)) in (1..).zip(events) {
            let stream = Stream::task(&format!("{id:016x}"));
            tasks.apply(&Recorded { position, at_unix_ms: position, stream, version: 1, event });
        }
        tasks
    }

    #[test]
    fn a_task_is_told_attempt_by_attempt() {
        let mut events = vec![(2, event(2, 0, 0))];
        for attempt in 1..=120 {
            events.extend([(2, event(2, 1, attempt)), (2, event(2, 3, attempt))]);
        }
        let tasks = told(events.clone());
        let task = tasks.get("0000000000000002").unwrap();
        assert_eq!((task.state, task.retry_unix_ms, task.failures), (TaskState::Waiting, Some(7), 120));
        assert_eq!((task.attempts.len(), task.attempts[0].number, task.last_attempt()), (100, 21, 120));
        let key = "k2".parse().unwrap();
        assert_eq!(tasks.with_key(&Owner::default(), &key), Some(task));

        events.extend([(2, event(2, 1, 121)), (2, event(2, 5, 121)), (2, event(2, 7, 0))]);
        let tasks = told(events.clone());
        let task = tasks.get("0000000000000002").unwrap();
        assert_eq!((task.state, task.ended_unix_ms, task.failures), (TaskState::Succeeded, Some(243), 120));
        let kept: Vec<u32> = task.outputs().map(|(attempt, _)| attempt).collect();
        assert_eq!(kept, (106..=121).collect::<Vec<_>>(), "the output of the newest 16");
        assert_eq!(tasks.surplus(1, 48), Vec::<String>::new());
        assert_eq!(tasks.surplus(1, 47), ["0000000000000002"]);
        events.push((2, event(2, 9, 0)));
        assert_eq!(told(events), Tasks::default(), "nothing is left of a task that was removed");
    }

    proptest! {
        /// Kept and read again it is the same; what is indexed is what is there; and nothing happens to what has ended.
        #[test]
        fn the_indices_agree_with_the_tasks(
            happenings in prop::collection::vec((0u8..6, 0u8..10, 0u32..4), 0..60),
            keep in 0usize..4,
        ) {
            let mut begun = std::collections::HashSet::new();
            // A stream begins once.
            let happenings = happenings.into_iter().filter(|(id, what, _)| *what != 0 || begun.insert(*id));
            let tasks = told(happenings.map(|(id, what, attempt)| (id, event(id, what, attempt))));
            prop_assert_eq!(&tasks.iter().cloned().collect::<Tasks>(), &tasks);
            let ended = tasks.iter().filter(|task| task.state.is_ended()).count();
            prop_assert_eq!(tasks.surplus(keep, u64::MAX).len(), ended.saturating_sub(keep));
            for task in tasks.iter() {
                prop_assert_eq!(task.state.is_ended(), task.ended_unix_ms.is_some());
                prop_assert_eq!(task.state == TaskState::Waiting, task.retry_unix_ms.is_some());
            }
        }
    }
}
