//! Who is next among those that wait for room. Nothing here waits or knows hosts: time, what owners use and whether something
//! fits come from outside.
//!
//! Requests of one owner and priority are a *flow*, served in the order that they came. The next flow is found in two steps:
//!
//! 1. Of the priorities, the highest. One that was passed over gains a point per [`POINT_MS`], so that the lowest is served at
//!    least once per [`POINT_MS`] times all priorities there are.
//! 2. Within it, the owner that uses the smallest share of all hosts. One that was passed over counts as using
//!    [`SHARE_PER_MS`] less for every millisecond since it was last served, so that an owner with all of the hosts is served
//!    at least every 100 s among others that have nothing.
//!
//! What is passed over is a priority or an owner, not a request: a backlog that one owner piled up long ago gives it no
//! advantage. The order of all that wait, and so everybody's position, is what this choice leads to when it is made again
//! and again and nothing else happens.
//!
//! One that does not fit yet lets others behind it go first, [`MAX_PASSED`] times. Then all wait for it.

#[cfg(test)]
mod tests;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, VecDeque};

use ark_types::label::Owner;
use ark_types::scheduling::Resources;

use super::placement::share;

/// How long a priority is passed over until it counts one point more.
pub const POINT_MS: u64 = 500;
/// How much less of all hosts, in millionths, an owner counts as using for every millisecond that it was passed over.
pub const SHARE_PER_MS: u64 = 10;
/// How often others go before one that does not fit yet.
pub const MAX_PASSED: u32 = 8;

/// A request in the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket(u64);

/// What waits.
#[derive(Clone, Debug)]
pub struct Entry<T> {
    /// Which one.
    pub ticket: Ticket,
    /// Since when, on the queue's clock.
    pub since_ms: u64,
    /// Who asks.
    pub owner: Owner,
    /// Priority.
    pub priority: i32,
    /// What is asked for.
    pub needs: Resources,
    /// The rest.
    pub what: T,
    passed: u32,
}

/// Whether what waits can go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fit {
    /// Now.
    Now,
    /// Not until there is more room.
    NotYet,
    /// Room alone does not help it, so nobody waits for it.
    Aside,
}

/// As many wait as may.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0} requests wait already")]
pub struct Full(pub usize);

/// What the order depends on.
#[derive(Clone, Copy)]
pub struct Now<'a> {
    /// The queue's clock, milliseconds; it never goes back.
    pub at_ms: u64,
    /// What each owner has.
    pub used: &'a dyn Fn(&Owner) -> Resources,
    /// What all hosts have.
    pub total: Resources,
}

#[derive(Clone, Debug)]
struct Flow<T> {
    entries: VecDeque<Entry<T>>,
    /// When one of it was last taken.
    served_ms: u64,
}

/// Highest priority first.
type FlowKey = (Reverse<i32>, Owner);

/// See the module.
#[derive(Clone, Debug)]
pub struct Queue<T> {
    capacity: usize,
    len: usize,
    next_ticket: u64,
    /// None is empty.
    flows: BTreeMap<FlowKey, Flow<T>>,
    /// When each priority that waits was last served.
    served_ms: BTreeMap<Reverse<i32>, u64>,
}

impl<T> Queue<T> {
    /// An empty queue for up to `capacity` requests.
    #[must_use]
    pub const fn new(capacity: usize) -> Self {
        Self { capacity, len: 0, next_ticket: 0, flows: BTreeMap::new(), served_ms: BTreeMap::new() }
    }

    /// Puts a request at the end of its flow.
    ///
    /// # Errors
    /// [`Full`].
    pub fn push(
        &mut self,
        at_ms: u64,
        (owner, priority): (Owner, i32),
        needs: Resources,
        what: T,
    ) -> Result<Ticket, Full> {
        if self.len >= self.capacity {
            return Err(Full(self.len));
        }
        let ticket = Ticket(self.next_ticket);
        self.next_ticket += 1;
        self.len += 1;
        let key = (Reverse(priority), owner.clone());
        // What has just come was not passed over yet.
        self.served_ms.entry(key.0).or_insert(at_ms);
        let flow = self.flows.entry(key).or_insert(Flow { entries: VecDeque::new(), served_ms: at_ms });
        flow.entries.push_back(Entry { ticket, since_ms: at_ms, owner, priority, needs, what, passed: 0 });
        Ok(ticket)
    }

    /// A request that waits.
    #[must_use]
    pub fn get(&self, ticket: Ticket) -> Option<&Entry<T>> {
        self.flows.values().flat_map(|flow| &flow.entries).find(|entry| entry.ticket == ticket)
    }

    /// Takes a request out that waits no longer.
    pub fn remove(&mut self, ticket: Ticket) -> Option<Entry<T>> {
        let (key, at) = self.flows.iter().find_map(|(key, flow)| {
            let at = flow.entries.iter().position(|entry| entry.ticket == ticket)?;
            Some((key.clone(), at))
        })?;
        self.take_out(&key, at)
    }

    fn take_out(&mut self, key: &FlowKey, at: usize) -> Option<Entry<T>> {
        let flow = self.flows.get_mut(key)?;
        let entry = flow.entries.remove(at)?;
        self.len -= 1;
        if flow.entries.is_empty() {
            self.flows.remove(key);
            if !self.flows.keys().any(|(priority, _)| *priority == key.0) {
                self.served_ms.remove(&key.0);
            }
        }
        Some(entry)
    }

    /// All that wait, the next one first.
    pub fn order<'a>(&'a self, now: &'a Now<'a>) -> impl Iterator<Item = &'a Entry<T>> {
        Order::of(self, now)
    }

    /// Takes out the first that fits and that nobody has to be waited for.
    pub fn next(&mut self, now: &Now<'_>, mut fit: impl FnMut(&Entry<T>) -> Fit) -> Option<Entry<T>> {
        let mut passed = BTreeSet::new();
        let mut found = None;
        for entry in Order::of(self, now) {
            match fit(entry) {
                Fit::Now => {
                    found = Some((entry.ticket, (Reverse(entry.priority), entry.owner.clone())));
                    break;
                }
                Fit::NotYet if entry.passed >= MAX_PASSED => break,
                Fit::NotYet => {
                    passed.insert(entry.ticket);
                }
                Fit::Aside => {}
            }
        }
        let (ticket, key) = found?;
        if !passed.is_empty() {
            for entry in self.flows.values_mut().flat_map(|flow| &mut flow.entries) {
                entry.passed += u32::from(passed.contains(&entry.ticket));
            }
        }
        self.served_ms.insert(key.0, now.at_ms);
        let flow = self.flows.get_mut(&key)?;
        flow.served_ms = now.at_ms;
        let at = flow.entries.iter().position(|entry| entry.ticket == ticket)?;
        self.take_out(&key, at)
    }
}

/// A flow as far as it is left.
struct Rest<'a, T> {
    owner: &'a Owner,
    entries: std::collections::vec_deque::Iter<'a, Entry<T>>,
    first: &'a Entry<T>,
    served_ms: u64,
}

/// The order of all that wait: the choice of the module, made again and again.
struct Order<'a, T> {
    now: &'a Now<'a>,
    /// Per priority: its flows, and when it was last served.
    priorities: BTreeMap<Reverse<i32>, (Vec<Rest<'a, T>>, u64)>,
    used: BTreeMap<&'a Owner, Resources>,
}

impl<'a, T> Order<'a, T> {
    fn of(queue: &'a Queue<T>, now: &'a Now<'a>) -> Self {
        let mut order = Self { now, priorities: BTreeMap::new(), used: BTreeMap::new() };
        for ((priority, owner), flow) in &queue.flows {
            let mut entries = flow.entries.iter();
            let Some(first) = entries.next() else { continue };
            let served_ms = queue.served_ms.get(priority).copied().unwrap_or(first.since_ms);
            let (flows, _) = order.priorities.entry(*priority).or_insert((Vec::new(), served_ms));
            flows.push(Rest { owner, entries, first, served_ms: flow.served_ms });
            order.used.entry(owner).or_insert_with(|| (now.used)(owner));
        }
        order
    }

    fn age(&self, served_ms: u64) -> u64 {
        self.now.at_ms.saturating_sub(served_ms)
    }

    /// A priority with the points that it gained. Whole points only: requests that come a moment apart have the same.
    fn points(&self, priority: i32, served_ms: u64) -> i64 {
        i64::from(priority).saturating_add_unsigned(self.age(served_ms) / POINT_MS)
    }

    /// How much an owner counts as using, in millionths.
    fn counts(&self, rest: &Rest<'a, T>) -> i64 {
        let used = self.used.get(rest.owner).copied().unwrap_or_default();
        let share = i64::try_from(share(used, self.now.total)).unwrap_or(i64::MAX);
        share.saturating_sub_unsigned(self.age(rest.served_ms).saturating_mul(SHARE_PER_MS))
    }
}

impl<'a, T> Iterator for Order<'a, T> {
    type Item = &'a Entry<T>;

    fn next(&mut self) -> Option<&'a Entry<T>> {
        let (priority, _) = self
            .priorities
            .iter()
            .map(|(priority, (_, served_ms))| (*priority, self.points(priority.0, *served_ms)))
            // Keys are in falling order, so of several the highest priority wins.
            .min_by_key(|(priority, points)| (Reverse(*points), *priority))?;
        let (flows, _) = self.priorities.get(&priority)?;
        let (at, _) =
            flows.iter().enumerate().min_by_key(|(_, rest)| (self.counts(rest), rest.first.ticket))?;
        let (flows, served_ms) = self.priorities.get_mut(&priority)?;
        *served_ms = self.now.at_ms;
        let rest = flows.get_mut(at)?;
        let entry = rest.first;
        rest.served_ms = self.now.at_ms;
        let used = self.used.entry(rest.owner).or_default();
        *used = used.plus(entry.needs);
        match rest.entries.next() {
            Some(first) => rest.first = first,
            None => {
                flows.swap_remove(at);
                if flows.is_empty() {
                    self.priorities.remove(&priority);
                }
            }
        }
        Some(entry)
    }
}
