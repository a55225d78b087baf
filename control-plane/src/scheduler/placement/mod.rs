//! Which host an agent goes to, decided without looking at agents.
//!
//! A host is eligible when what is asked for fits into what it has left. Of those the best is the one, in this order, with
//!
//! 1. the fewest agents of the request's anti-affinity group (none at all when that is strict),
//! 2. the request's template warm,
//! 3. the least load: the largest part of anything that is reserved there,
//! 4. the lowest number.
//!
//! | kept | for |
//! |---|---|
//! | a tree: per range of hosts the most that is free and the least load | finding the least loaded one that fits by descending |
//! | per group, the hosts by how many of it they have | passing over hosts by whole ranges |
//! | per template, such a tree of the hosts that have it warm | the same as the first |
//!
//! So a decision costs about the depth of the tree, whatever the number of agents. Nothing here waits, and no agent is ever
//! put out for another: priorities are the queue's matter.

mod hostset;
#[cfg(test)]
mod tests;
mod tree;

use std::collections::{BTreeMap, BTreeSet, HashMap};

use ark_types::agent::AgentName;
use ark_types::scheduling::{Resources, Spread};

use hostset::{Candidates, HostSet};
use tree::{Leaf, NONE, Tree};

/// Parts of a whole host that loads are counted in.
const WHOLE: u64 = 1_000_000;

/// A host: its number in the order that they were given.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HostId(pub usize);

/// What an agent needs of a host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// What is reserved for it.
    pub needs: Resources,
    /// Group whose agents are kept apart, and how strictly.
    pub apart: Option<(AgentName, Spread)>,
    /// Template that is better found warm.
    pub template: Option<AgentName>,
}

/// One thing that hosts have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resource {
    /// Agents.
    Agents,
    /// Memory.
    Memory,
    /// Virtual processors.
    Vcpus,
}

/// How far what is asked for is from what there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lack {
    /// Of what.
    pub resource: Resource,
    /// How much is asked for.
    pub asked: u64,
    /// The most that any host has left.
    pub free: u64,
    /// The most that any host may give in all.
    pub limit: u64,
}

impl Lack {
    /// The first thing of which more is `asked` for than is `free`.
    #[must_use]
    pub fn first(asked: Resources, free: Resources, limit: Resources) -> Option<Self> {
        [
            (Resource::Memory, asked.memory_mib, free.memory_mib, limit.memory_mib),
            (Resource::Vcpus, asked.vcpus, free.vcpus, limit.vcpus),
            (Resource::Agents, asked.agents, free.agents, limit.agents),
        ]
        .into_iter()
        .find(|(_, asked, free, _)| asked > free)
        .map(|(resource, asked, free, limit)| Self { resource, asked, free, limit })
    }
}

/// Why no host takes a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Misfit {
    /// It would not fit into any host, were that empty.
    Never(Lack),
    /// It fits into none now.
    Full(Lack),
    /// Every host lacks something else.
    Scattered,
    /// Every host with room has an agent of its group already.
    Apart(AgentName),
}

#[derive(Clone, Debug)]
struct Host {
    limit: Resources,
    used: Resources,
    /// Templates that it has warm.
    warm: BTreeSet<AgentName>,
}

/// Hosts of an anti-affinity group.
#[derive(Clone, Debug)]
struct Group {
    /// Those that have any of it.
    members: HostSet,
    /// Those that have exactly so many of it; none is empty.
    by_count: BTreeMap<u32, HostSet>,
    counts: HashMap<usize, u32>,
}

/// Hosts, and what is reserved on them.
#[derive(Clone, Debug)]
pub struct Hosts {
    hosts: Vec<Host>,
    largest: Resources,
    tree: Tree,
    groups: HashMap<AgentName, Group>,
    /// The hosts that have a template warm; none of them is empty.
    warm: HashMap<AgentName, Tree>,
}

/// The host that is best for `request`; nothing is reserved.
///
/// # Errors
/// [`Misfit`].
pub fn place(hosts: &Hosts, request: &Request) -> Result<HostId, Misfit> {
    let group = request.apart.as_ref().and_then(|(group, _)| hosts.groups.get(group));
    let is_strict = request.apart.as_ref().is_some_and(|(_, spread)| *spread == Spread::Hard);
    let first = Candidates::without(group.map(|group| &group.members));
    let more = group.filter(|_| !is_strict).into_iter().flat_map(|group| group.by_count.values());
    let warm = request.template.as_ref().and_then(|template| hosts.warm.get(template));
    std::iter::once(first)
        .chain(more.map(Candidates::within))
        .find_map(|level| {
            let warm = warm.and_then(|warm| warm.least_loaded(request.needs, level));
            warm.or_else(|| hosts.tree.least_loaded(request.needs, level))
        })
        .map(HostId)
        .ok_or_else(|| hosts.misfit(request))
}

impl Hosts {
    /// Hosts of which so much may be reserved each, with nothing reserved.
    #[must_use]
    pub fn new(limits: &[Resources]) -> Self {
        let empty =
            |limit: &Resources| Host { limit: *limit, used: Resources::default(), warm: BTreeSet::new() };
        let hosts: Vec<Host> = limits.iter().map(empty).collect();
        let leaves: Vec<Leaf> = hosts.iter().map(Host::leaf).collect();
        let largest = limits.iter().fold(Resources::default(), |most, limit| Resources {
            agents: most.agents.max(limit.agents),
            memory_mib: most.memory_mib.max(limit.memory_mib),
            vcpus: most.vcpus.max(limit.vcpus),
        });
        Self { hosts, largest, tree: Tree::new(&leaves), groups: HashMap::new(), warm: HashMap::new() }
    }

    /// Reserves on `host` what `request` needs, even beyond its limit. A host that does not exist has nothing.
    pub fn take(&mut self, host: HostId, request: &Request) {
        self.change(host, |used| used.plus(request.needs));
        if let Some((name, _)) = &request.apart {
            let size = self.hosts.len();
            let group = self.groups.entry(name.clone()).or_insert_with(|| Group::new(size));
            group.count(host.0, |count| count + 1);
        }
    }

    /// Gives back what [`Self::take`] reserved.
    pub fn give(&mut self, host: HostId, request: &Request) {
        self.change(host, |used| used.minus(request.needs));
        if let Some((name, _)) = &request.apart
            && let Some(group) = self.groups.get_mut(name)
        {
            group.count(host.0, |count| count.saturating_sub(1));
            if group.counts.is_empty() {
                self.groups.remove(name);
            }
        }
    }

    /// Notes whether `host` has `template` warm.
    pub fn set_warm(&mut self, host: HostId, template: &AgentName, is_warm: bool) {
        let size = self.hosts.len();
        let Some(at) = self.hosts.get_mut(host.0) else { return };
        if is_warm {
            at.warm.insert(template.clone());
            let tree = self.warm.entry(template.clone()).or_insert_with(|| Tree::new(&vec![NONE; size]));
            tree.set(host.0, at.leaf());
        } else if at.warm.remove(template)
            && let Some(tree) = self.warm.get_mut(template)
        {
            tree.set(host.0, NONE);
            if tree.is_empty() {
                self.warm.remove(template);
            }
        }
    }

    /// Templates that `host` has warm, by name.
    #[must_use]
    pub fn warm(&self, host: HostId) -> Vec<AgentName> {
        self.hosts.get(host.0).map(|host| host.warm.iter().cloned().collect()).unwrap_or_default()
    }

    /// What may be reserved on `host` in all.
    #[must_use]
    pub fn limit(&self, host: HostId) -> Resources {
        self.hosts.get(host.0).map(|host| host.limit).unwrap_or_default()
    }

    /// What is reserved on `host`.
    #[must_use]
    pub fn used(&self, host: HostId) -> Resources {
        self.hosts.get(host.0).map(|host| host.used).unwrap_or_default()
    }

    fn change(&mut self, host: HostId, change: impl FnOnce(Resources) -> Resources) {
        if let Some(at) = self.hosts.get_mut(host.0) {
            at.used = change(at.used);
            let leaf = at.leaf();
            self.tree.set(host.0, leaf);
            for template in &at.warm {
                if let Some(tree) = self.warm.get_mut(template) {
                    tree.set(host.0, leaf);
                }
            }
        }
    }

    fn misfit(&self, request: &Request) -> Misfit {
        let (asked, free) = (request.needs, self.tree.most_free());
        if let Some(lack) = Lack::first(asked, self.largest, self.largest) {
            return Misfit::Never(Lack { free: Lack::of(lack.resource, free), ..lack });
        }
        match &request.apart {
            Some((group, Spread::Hard)) if self.tree.least_loaded(asked, Candidates::ALL).is_some() => {
                Misfit::Apart(group.clone())
            }
            _ => Lack::first(asked, free, self.largest).map_or(Misfit::Scattered, Misfit::Full),
        }
    }
}

impl Lack {
    const fn of(resource: Resource, amount: Resources) -> u64 {
        match resource {
            Resource::Agents => amount.agents,
            Resource::Memory => amount.memory_mib,
            Resource::Vcpus => amount.vcpus,
        }
    }
}

impl Host {
    fn leaf(&self) -> Leaf {
        Leaf { free: self.limit.minus(self.used), load: share(self.used, self.limit) }
    }
}

/// The largest part of anything of `limit` that is `used`, in millionths.
#[must_use]
pub fn share(used: Resources, limit: Resources) -> u64 {
    let part = |used: u64, limit: u64| {
        used.saturating_mul(WHOLE).checked_div(limit).unwrap_or(if used == 0 { 0 } else { WHOLE })
    };
    part(used.memory_mib, limit.memory_mib)
        .max(part(used.vcpus, limit.vcpus))
        .max(part(used.agents, limit.agents))
}

impl Group {
    fn new(hosts: usize) -> Self {
        Self { members: HostSet::new(hosts), by_count: BTreeMap::new(), counts: HashMap::new() }
    }

    fn count(&mut self, host: usize, change: impl FnOnce(u32) -> u32) {
        let before = self.counts.remove(&host).unwrap_or(0);
        let after = change(before);
        if let Some(hosts) = self.by_count.get_mut(&before) {
            hosts.remove(host);
            if hosts.is_empty() {
                self.by_count.remove(&before);
            }
        }
        if after == 0 {
            self.members.remove(host);
            return;
        }
        self.counts.insert(host, after);
        self.members.insert(host);
        let empty = || HostSet::like(&self.members);
        self.by_count.entry(after).or_insert_with(empty).insert(host);
    }
}
