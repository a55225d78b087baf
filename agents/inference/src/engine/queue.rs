//! Sessions that wait for a slot: owners take turns, and no owner can fill the queue.

use std::collections::{BTreeMap, VecDeque};

/// A bounded queue in which each owner has a line of its own, served in turns.
#[derive(Debug)]
pub struct FairQueue<T> {
    lines: BTreeMap<String, VecDeque<T>>,
    /// Owners with somebody waiting, the next to be served first.
    turns: VecDeque<String>,
    len: usize,
    limit: usize,
}

/// No room for another.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{waiting} calls {of} wait already, at most {limit} may; try again later")]
pub struct Full {
    /// How many wait.
    pub waiting: usize,
    /// Whose they are: the owner's own, or everybody's.
    pub of: &'static str,
    /// How many may.
    pub limit: usize,
}

impl<T> FairQueue<T> {
    /// A queue for at most `limit`, of each owner at most half of that.
    #[must_use]
    pub fn new(limit: usize) -> Self {
        Self { lines: BTreeMap::new(), turns: VecDeque::new(), len: 0, limit }
    }

    /// How many wait.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nobody waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Puts `item` at the end of its owner's line.
    ///
    /// # Errors
    /// The queue or the owner's half of it is full.
    pub fn push(&mut self, owner: &str, item: T) -> Result<(), Full> {
        let own = self.lines.get(owner).map_or(0, VecDeque::len);
        let own_limit = self.limit.div_ceil(2);
        if self.len >= self.limit {
            return Err(Full { waiting: self.len, of: "of all owners", limit: self.limit });
        }
        if own >= own_limit {
            return Err(Full { waiting: own, of: "of this owner", limit: own_limit });
        }
        if own == 0 {
            self.turns.push_back(owner.to_owned());
        }
        self.lines.entry(owner.to_owned()).or_default().push_back(item);
        self.len += 1;
        Ok(())
    }

    /// Takes the first of the owner whose turn it is.
    pub fn pop(&mut self) -> Option<T> {
        let owner = self.turns.pop_front()?;
        let line = self.lines.get_mut(&owner)?;
        let item = line.pop_front()?;
        self.len -= 1;
        if line.is_empty() {
            self.lines.remove(&owner);
        } else {
            self.turns.push_back(owner);
        }
        Some(item)
    }

    /// Takes out all for which `gone` holds, in no order of meaning.
    pub fn take_if(&mut self, mut gone: impl FnMut(&T) -> bool) -> Vec<T> {
        let mut taken = Vec::new();
        for line in self.lines.values_mut() {
            let (left, stay): (VecDeque<_>, VecDeque<_>) =
                std::mem::take(line).into_iter().partition(&mut gone);
            *line = stay;
            taken.extend(left);
        }
        self.lines.retain(|_, line| !line.is_empty());
        self.turns.retain(|owner| self.lines.contains_key(owner));
        self.len -= taken.len();
        taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn owners_take_turns_however_many_each_has() {
        let mut queue = FairQueue::new(100);
        for i in 0..5 {
            queue.push("greedy", format!("g{i}")).expect("room");
        }
        queue.push("modest", "m0".to_owned()).expect("room");
        queue.push("other", "o0".to_owned()).expect("room");
        queue.push("modest", "m1".to_owned()).expect("room");
        let order: Vec<_> = std::iter::from_fn(|| queue.pop()).collect();
        assert_eq!(order, ["g0", "m0", "o0", "g1", "m1", "g2", "g3", "g4"]);
        assert!(queue.is_empty());
    }

    #[test]
    fn no_owner_fills_it_and_it_is_bounded() {
        let mut queue = FairQueue::new(4);
        assert!(queue.push("a", 1).is_ok() && queue.push("a", 2).is_ok());
        assert_eq!(queue.push("a", 3), Err(Full { waiting: 2, of: "of this owner", limit: 2 }));
        assert!(queue.push("b", 4).is_ok() && queue.push("c", 5).is_ok());
        assert_eq!(queue.push("d", 6), Err(Full { waiting: 4, of: "of all owners", limit: 4 }));
        assert_eq!(queue.len(), 4);
    }

    #[test]
    fn who_left_is_taken_out_and_loses_the_turn() {
        let mut queue = FairQueue::new(10);
        for (owner, item) in [("a", 1), ("b", 2), ("a", 3)] {
            queue.push(owner, item).expect("room");
        }
        assert_eq!(queue.take_if(|i| *i == 2), [2]);
        assert_eq!(queue.len(), 2);
        queue.push("b", 4).expect("room");
        assert_eq!(std::iter::from_fn(|| queue.pop()).collect::<Vec<_>>(), [1, 4, 3]);
    }
}
