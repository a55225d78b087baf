//! Sets of hosts as bits, and whether a range of hosts has any that are in some sets and not in others.

use std::ops::Range;

/// Hosts per word.
const WORD: usize = u64::BITS as usize;

/// A set of hosts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct HostSet {
    words: Vec<u64>,
}

impl HostSet {
    /// No one of `hosts` hosts.
    pub(super) fn new(hosts: usize) -> Self {
        Self { words: vec![0; hosts.div_ceil(WORD)] }
    }

    /// No one of as many hosts as `other` is of.
    pub(super) fn like(other: &Self) -> Self {
        Self { words: vec![0; other.words.len()] }
    }

    /// Adds a host; one that there is not is none.
    pub(super) fn insert(&mut self, host: usize) {
        if let Some(word) = self.words.get_mut(host / WORD) {
            *word |= 1 << (host % WORD);
        }
    }

    pub(super) fn remove(&mut self, host: usize) {
        if let Some(word) = self.words.get_mut(host / WORD) {
            *word &= !(1 << (host % WORD));
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.words.iter().all(|word| *word == 0)
    }

    fn word(&self, at: usize) -> u64 {
        self.words.get(at).copied().unwrap_or(0)
    }
}

/// The hosts in question: those in `within`, or all, that are not in `without`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Candidates<'a> {
    within: Option<&'a HostSet>,
    without: Option<&'a HostSet>,
}

impl<'a> Candidates<'a> {
    /// Every host.
    pub(super) const ALL: Self = Self { within: None, without: None };

    pub(super) const fn without(set: Option<&'a HostSet>) -> Self {
        Self { within: None, without: set }
    }

    pub(super) const fn within(set: &'a HostSet) -> Self {
        Self { within: Some(set), without: None }
    }

    /// Whether any host of `range` is one. Within one word, or whole words: what ranges of a binary tree are.
    pub(super) fn any(&self, range: Range<usize>) -> bool {
        let mask =
            if range.len() < WORD { ((1 << range.len()) - 1) << (range.start % WORD) } else { u64::MAX };
        (range.start / WORD..range.end.div_ceil(WORD)).any(|at| self.word(at) & mask != 0)
    }

    fn word(&self, at: usize) -> u64 {
        self.within.map_or(u64::MAX, |set| set.word(at)) & !self.without.map_or(0, |set| set.word(at))
    }
}
