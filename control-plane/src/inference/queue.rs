//! Calls that wait for their turn: each model has a line, in which owners take turns by priority as requests for room do.
//!
//! A line is bounded in calls and in bytes. An owner that is alone may fill it; when it is full and somebody else comes, the newest
//! call of the owner with the most makes way.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use ark_types::agent::AgentName;
use ark_types::label::Owner;
use ark_types::problem::ProblemKind;
use ark_types::scheduling::Resources;
use tokio::sync::oneshot;

use super::Caller;
use super::error::Failure;
use crate::core::Core;
use crate::host::millis;
use crate::scheduler::queue::{Fit, Now, Queue, Ticket};

/// Most bytes of all calls that wait for one model.
const MAX_BYTES: usize = 256 << 20;
/// What a call takes.
const ONE: Resources = Resources { agents: 1, memory_mib: 0, vcpus: 0 };

/// A line, as full as it may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Full {
    waiting: usize,
}

impl From<Full> for Failure {
    fn from(Full { waiting }: Full) -> Self {
        let detail = format!(
            "{waiting} calls wait for the model already, and no more may: try again in a moment, or let it have more replicas"
        );
        Self::refused(ProblemKind::QueueFull, detail)
    }
}

/// Who waits for one model, and how many calls are under way in it. Times come from outside.
#[derive(Debug)]
pub(super) struct Line<T> {
    queue: Queue<T>,
    most: usize,
    bytes: usize,
    /// Calls that wait, by owner, with their bytes: the newest last.
    waiting: BTreeMap<Owner, BTreeMap<Ticket, usize>>,
    /// Calls under way, by owner.
    running: BTreeMap<Owner, u64>,
    /// The most calls that waited and were under way at a time since that was last asked.
    peak: u64,
}

impl<T> Line<T> {
    /// An empty line for up to `most` calls.
    pub(super) fn new(most: usize) -> Self {
        let (waiting, running) = (BTreeMap::new(), BTreeMap::new());
        Self { queue: Queue::new(most), most, bytes: 0, waiting, running, peak: 0 }
    }

    /// How many wait.
    pub(super) fn len(&self) -> usize {
        self.waiting.values().map(BTreeMap::len).sum()
    }

    /// How many are under way.
    pub(super) fn running(&self) -> u64 {
        self.running.values().sum()
    }

    /// Puts a call of `bytes` at the end; who makes way for it is returned.
    ///
    /// # Errors
    /// [`Full`].
    pub(super) fn push(
        &mut self,
        at_ms: u64,
        (owner, priority): (Owner, i32),
        bytes: usize,
        what: T,
    ) -> Result<(Ticket, Vec<T>), Full> {
        let mut gone = Vec::new();
        while self.len() >= self.most || self.bytes.saturating_add(bytes) > MAX_BYTES {
            let own = self.waiting.get(&owner).map_or(0, BTreeMap::len);
            let greediest = self.waiting.iter().max_by_key(|(_, calls)| calls.len());
            let newest = greediest
                .filter(|(other, calls)| **other != owner && calls.len() > own + 1)
                .and_then(|(_, calls)| calls.keys().next_back().copied());
            match newest.and_then(|ticket| self.remove(ticket)) {
                Some(what) => gone.push(what),
                None => return Err(Full { waiting: self.len() }),
            }
        }
        let ticket = self
            .queue
            .push(at_ms, (owner.clone(), priority), ONE, what)
            .map_err(|_| Full { waiting: self.len() })?;
        self.bytes += bytes;
        self.waiting.entry(owner).or_default().insert(ticket, bytes);
        self.peak = self.peak.max(self.work());
        Ok((ticket, gone))
    }

    /// How many wait and are under way.
    fn work(&self) -> u64 {
        u64::try_from(self.len()).unwrap_or(u64::MAX).saturating_add(self.running())
    }

    /// The most that was since this was last asked.
    fn take_peak(&mut self) -> u64 {
        let work = self.work();
        std::mem::replace(&mut self.peak, work)
    }

    /// Takes out the next call, of which `room` may be under way; from now on it is.
    pub(super) fn next(&mut self, at_ms: u64, room: u64) -> Option<(Owner, T)> {
        if self.running() >= room {
            return None;
        }
        let running = &self.running;
        let used = |owner: &Owner| ONE.times(running.get(owner).copied().unwrap_or(0));
        let entry = self.queue.next(&Now { at_ms, used: &used, total: ONE.times(room) }, |_| Fit::Now)?;
        self.forget(&entry.owner, entry.ticket);
        *self.running.entry(entry.owner.clone()).or_default() += 1;
        Some((entry.owner, entry.what))
    }

    /// Takes out a call that waits no longer.
    pub(super) fn remove(&mut self, ticket: Ticket) -> Option<T> {
        let entry = self.queue.remove(ticket)?;
        self.forget(&entry.owner, ticket);
        Some(entry.what)
    }

    fn forget(&mut self, owner: &Owner, ticket: Ticket) {
        if let Some(calls) = self.waiting.get_mut(owner) {
            self.bytes -= calls.remove(&ticket).unwrap_or(0);
            if calls.is_empty() {
                self.waiting.remove(owner);
            }
        }
    }

    /// A call of `owner` is not under way any more.
    pub(super) fn end(&mut self, owner: &Owner) {
        if let Some(count) = self.running.get_mut(owner) {
            *count -= 1;
            if *count == 0 {
                self.running.remove(owner);
            }
        }
    }
}

/// Whose turn it is, or why it will not come.
type Answer = Result<Turn, Full>;

/// What is asked of one model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Load {
    /// Calls that wait now.
    pub(super) waiting: u64,
    /// The most that waited and were under way at a time since the last look.
    pub(super) peak: u64,
}

/// The lines of all models.
#[derive(Debug)]
pub(super) struct Turns {
    lines: Mutex<BTreeMap<AgentName, Line<oneshot::Sender<Answer>>>>,
    most: usize,
    /// Calls that may be under way in one VM.
    sessions: u64,
    began: Instant,
}

impl Turns {
    /// Lines of up to `most` calls each, for VMs that take `sessions` calls at a time.
    pub(super) fn new(most: usize, sessions: u64) -> Self {
        Self { lines: Mutex::default(), most, sessions, began: Instant::now() }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<AgentName, Line<oneshot::Sender<Answer>>>> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Calls that wait and that are under way, by service.
    pub(super) fn levels(&self) -> Vec<(AgentName, usize, u64)> {
        self.lock().iter().map(|(name, line)| (name.clone(), line.len(), line.running())).collect()
    }

    /// Looks what is asked of each model, by service, since the last look. Lines without a call are forgotten.
    pub(super) fn look(&self) -> BTreeMap<AgentName, Load> {
        let mut lines = self.lock();
        let load = |line: &mut Line<_>| Load {
            waiting: u64::try_from(line.len()).unwrap_or(u64::MAX),
            peak: line.take_peak(),
        };
        let loads = lines.iter_mut().map(|(name, line)| (name.clone(), load(line))).collect();
        lines.retain(|_, line| line.work() > 0);
        loads
    }

    /// Lets go whoever may: there may be more VMs than before.
    pub(super) fn let_go(&self, core: &Arc<Core>) {
        let waiting: Vec<AgentName> =
            self.lock().iter().filter(|(_, line)| line.len() > 0).map(|(name, _)| name.clone()).collect();
        waiting.iter().for_each(|service| self.go_on(core, service));
    }

    /// Waits until a call of `bytes` may go to a VM of `service`.
    ///
    /// # Errors
    /// [`Full`].
    pub(super) async fn wait(
        &self,
        core: &Arc<Core>,
        service: &AgentName,
        caller: &Caller,
        bytes: usize,
    ) -> Result<Turn, Full> {
        let (tell, told) = oneshot::channel();
        let place = (caller.owner.clone(), caller.priority);
        let pushed = {
            let mut lines = self.lock();
            let line = lines.entry(service.clone()).or_insert_with(|| Line::new(self.most));
            line.push(millis(self.began.elapsed()), place, bytes, tell)
        };
        let (ticket, gone) = pushed?;
        let waiting = self.most;
        gone.into_iter().for_each(|other| drop(other.send(Err(Full { waiting }))));
        let _leaves = Leaves { core, service, ticket };
        self.go_on(core, service);
        // The sender is in the line until it has sent.
        told.await.unwrap_or(Err(Full { waiting }))
    }

    /// Lets as many go as may.
    fn go_on(&self, core: &Arc<Core>, service: &AgentName) {
        let replicas = core.services.ready(service.as_ref()).max(1);
        let room = self.sessions.saturating_mul(u64::try_from(replicas).unwrap_or(u64::MAX));
        loop {
            let next = {
                let mut lines = self.lock();
                let Some(line) = lines.get_mut(service) else { return };
                line.next(millis(self.began.elapsed()), room)
            };
            let Some((owner, tell)) = next else { return };
            let turn = Turn { core: Arc::clone(core), service: service.clone(), owner };
            // Who left meanwhile gives the turn back.
            drop(tell.send(Ok(turn)));
        }
    }
}

/// Leaves the line when it goes, unless the turn came.
struct Leaves<'a> {
    core: &'a Arc<Core>,
    service: &'a AgentName,
    ticket: Ticket,
}

impl Drop for Leaves<'_> {
    fn drop(&mut self) {
        let waited =
            self.core.inference.turns.lock().get_mut(self.service).and_then(|line| line.remove(self.ticket));
        drop(waited);
    }
}

/// A call that may go to a VM, while this lives.
#[derive(Debug)]
pub(super) struct Turn {
    core: Arc<Core>,
    service: AgentName,
    owner: Owner,
}

impl Drop for Turn {
    fn drop(&mut self) {
        let turns = &self.core.inference.turns;
        if let Some(line) = turns.lock().get_mut(&self.service) {
            line.end(&self.owner);
        }
        turns.go_on(&self.core, &self.service);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owner(name: &str) -> (Owner, i32) {
        (name.parse().unwrap(), 0)
    }

    /// Takes and ends calls until there is none, one at a time.
    fn drain(line: &mut Line<String>) -> Vec<String> {
        let mut order = Vec::new();
        while let Some((owner, what)) = line.next(0, 1) {
            line.end(&owner);
            order.push(what);
        }
        order
    }

    #[test]
    fn owners_take_turns_in_what_is_under_way() {
        let mut line = Line::new(100);
        for i in 0..4 {
            line.push(0, owner("greedy"), 1, format!("g{i}")).unwrap();
        }
        line.push(0, owner("modest"), 1, "m0".to_owned()).unwrap();
        line.push(0, owner("modest"), 1, "m1".to_owned()).unwrap();
        let two: Vec<_> = std::iter::from_fn(|| line.next(0, 4)).map(|(_, what)| what).collect();
        assert_eq!(two.len(), 4);
        assert_eq!(two.iter().filter(|what| what.starts_with('m')).count(), 2, "{two:?}");
        assert_eq!((line.len(), line.running()), (2, 4));
        assert!(line.next(0, 4).is_none(), "as many as may are under way");
    }

    #[test]
    fn the_most_there_was_is_told_once() {
        let mut line = Line::new(10);
        for i in 0..3 {
            line.push(0, owner("a"), 1, format!("{i}")).unwrap();
        }
        let (_, first) = (line.next(0, 1).unwrap(), line.take_peak());
        assert_eq!(first, 3);
        line.end(&owner("a").0);
        assert_eq!(drain(&mut line), ["1", "2"]);
        assert_eq!((line.take_peak(), line.take_peak()), (3, 0), "what there was at the last look counts");
        // One that came and went meanwhile is not missed.
        line.push(0, owner("a"), 1, "brief".to_owned()).unwrap();
        assert_eq!((drain(&mut line).len(), line.take_peak()), (1, 1));
    }

    #[test]
    fn the_more_urgent_goes_first() {
        let mut line = Line::new(10);
        line.push(0, owner("a"), 1, "later".to_owned()).unwrap();
        line.push(0, ("a".parse().unwrap(), 10), 1, "urgent".to_owned()).unwrap();
        assert_eq!(drain(&mut line), ["urgent", "later"]);
    }

    #[test]
    fn an_owner_alone_may_fill_it_and_makes_way_for_others() {
        let mut line = Line::new(4);
        for i in 0..4 {
            line.push(0, owner("greedy"), 1, format!("g{i}")).unwrap();
        }
        assert_eq!(line.push(0, owner("greedy"), 1, "g4".into()).unwrap_err(), Full { waiting: 4 });
        let (_, gone) = line.push(0, owner("modest"), 1, "m0".to_owned()).unwrap();
        assert_eq!(gone, ["g3"]);
        let (_, gone) = line.push(0, owner("modest"), 1, "m1".to_owned()).unwrap();
        assert_eq!(gone, ["g2"]);
        assert_eq!(line.push(0, owner("modest"), 1, "m2".into()).unwrap_err(), Full { waiting: 4 });
        assert_eq!(line.len(), 4);
    }

    #[test]
    fn it_is_bounded_in_bytes_and_who_leaves_gives_them_back() {
        let mut line = Line::new(100);
        let (ticket, _) = line.push(0, owner("a"), MAX_BYTES, "whole".to_owned()).unwrap();
        assert!(line.push(0, owner("a"), 1, "more".into()).is_err());
        assert!(line.push(0, owner("b"), 1, "more".into()).is_err(), "one call alone does not make way");
        assert_eq!(line.remove(ticket).as_deref(), Some("whole"));
        assert!(line.remove(ticket).is_none());
        assert!(line.push(0, owner("a"), MAX_BYTES, "more".into()).is_ok());
    }
}
