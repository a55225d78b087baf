//! A binary tree over the hosts: each node knows the most that any host below it has left, and the least load.

use ark_types::scheduling::Resources;

use super::hostset::Candidates;

/// A host, as far as the tree goes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Leaf {
    /// What can still be reserved.
    pub(super) free: Resources,
    /// The largest part of anything that is reserved.
    pub(super) load: u64,
}

/// Where there is no host.
pub(super) const NONE: Leaf = Leaf { free: Resources { agents: 0, memory_mib: 0, vcpus: 0 }, load: u64::MAX };

/// The best host found so far.
type Best = Option<(u64, usize)>;

/// See the module. Node 1 is the root, and the children of node `n` are `2n` and `2n + 1`.
#[derive(Clone, Debug)]
pub(super) struct Tree {
    nodes: Vec<Leaf>,
    /// Number of leaves, a power of two; the leaf of host `h` is node `leaves + h`.
    leaves: usize,
}

impl Tree {
    pub(super) fn new(hosts: &[Leaf]) -> Self {
        let leaves = hosts.len().max(1).next_power_of_two();
        let mut nodes = vec![NONE; 2 * leaves];
        for (node, host) in nodes.iter_mut().skip(leaves).zip(hosts) {
            *node = *host;
        }
        let mut tree = Self { nodes, leaves };
        (1..leaves).rev().for_each(|node| tree.sum_up(node));
        tree
    }

    /// Notes what `host` is now.
    pub(super) fn set(&mut self, host: usize, leaf: Leaf) {
        let mut at = self.leaves + host;
        if let Some(node) = self.nodes.get_mut(at) {
            *node = leaf;
        }
        while at > 1 {
            at /= 2;
            self.sum_up(at);
        }
    }

    fn node(&self, at: usize) -> Leaf {
        self.nodes.get(at).copied().unwrap_or(NONE)
    }

    fn sum_up(&mut self, at: usize) {
        let (left, right) = (self.node(2 * at), self.node(2 * at + 1));
        let free = Resources {
            agents: left.free.agents.max(right.free.agents),
            memory_mib: left.free.memory_mib.max(right.free.memory_mib),
            vcpus: left.free.vcpus.max(right.free.vcpus),
        };
        if let Some(node) = self.nodes.get_mut(at) {
            *node = Leaf { free, load: left.load.min(right.load) };
        }
    }

    /// Whether there is no host.
    pub(super) fn is_empty(&self) -> bool {
        self.node(1).load == NONE.load
    }

    /// The most that any host has left of each.
    pub(super) fn most_free(&self) -> Resources {
        self.node(1).free
    }

    /// The least loaded of the candidates that `needs` fit into; the first of several.
    pub(super) fn least_loaded(&self, needs: Resources, candidates: Candidates<'_>) -> Option<usize> {
        let mut best = None;
        self.descend(1, 0, self.leaves, &needs, &candidates, &mut best);
        best.map(|(_, host)| host)
    }

    /// Looks below node `at`, whose hosts are the `width` from `first`, unless nothing better can be there.
    fn descend(
        &self,
        at: usize,
        first: usize,
        width: usize,
        needs: &Resources,
        candidates: &Candidates<'_>,
        best: &mut Best,
    ) {
        let node = self.node(at);
        let is_hopeless = !needs.is_within(&node.free)
            || best.is_some_and(|best| (node.load, first) >= best)
            || node.load == NONE.load
            || !candidates.any(first..first + width);
        if is_hopeless {
            return;
        }
        if width == 1 {
            *best = Some((node.load, first));
            return;
        }
        let half = width / 2;
        let (left, right) = ((2 * at, first), (2 * at + 1, first + half));
        let is_left_better = self.node(left.0).load <= self.node(right.0).load;
        let order = if is_left_better { [left, right] } else { [right, left] };
        for (at, first) in order {
            self.descend(at, first, half, needs, candidates, best);
        }
    }
}
