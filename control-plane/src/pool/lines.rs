//! The lines of all templates.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use ark_types::agent::AgentName;
use ark_types::pool::{Pool as View, PoolPolicy};
use ark_types::scheduling::Resources;

use super::line::{Line, Rest, first_to_give, most_lacking};
use crate::agent::Standby;

/// How long after its last use a template without a policy has standbys.
const IN_USE: Duration = Duration::from_secs(600);
/// How many templates without a policy have standbys at a time.
const MAX_IN_USE: usize = 2;

/// See the module.
#[derive(Debug)]
pub(super) struct Lines {
    /// Standbys of each template in use that has no policy.
    pub(super) default: usize,
    half_life: Duration,
    lines: BTreeMap<AgentName, Line>,
}

impl Lines {
    pub(super) const fn new(default: usize, half_life: Duration) -> Self {
        Self { default, half_life, lines: BTreeMap::new() }
    }

    /// The line of `template`, a new one where there is none.
    pub(super) fn get(&mut self, template: &AgentName) -> &mut Line {
        let half_life = self.half_life;
        self.lines.entry(template.clone()).or_insert_with(|| Line::new(half_life))
    }

    /// Does something to the line of `template`, if there is one.
    pub(super) fn if_known(&mut self, template: &AgentName, work: impl FnOnce(&mut Line)) {
        if let Some(line) = self.lines.get_mut(template) {
            work(line);
        }
    }

    pub(super) fn set_policy(&mut self, template: &AgentName, policy: Option<PoolPolicy>) {
        if policy.is_some() || self.lines.contains_key(template) {
            let line = self.get(template);
            (line.policy, line.rest) = (policy, Rest::None);
        }
    }

    pub(super) fn has_policy(&self, template: &AgentName) -> bool {
        self.lines.get(template).is_some_and(|line| line.policy.is_some())
    }

    /// Standbys of all templates.
    pub(super) fn count(&self) -> usize {
        self.lines.values().map(|line| line.standbys.len()).sum()
    }

    /// The line of `template` where it is of any use to have one.
    fn in_use(&mut self, template: &AgentName) -> Option<&mut Line> {
        (self.default > 0 || self.has_policy(template)).then(|| self.get(template))
    }

    /// An agent of `template` is asked for.
    pub(super) fn asked(&mut self, template: &AgentName, at: Duration) {
        if let Some(line) = self.in_use(template) {
            line.used = Some(Instant::now());
            line.asked(at);
        }
    }

    /// A living standby of the snapshot in `dir`: of `template`, else of another name of it.
    pub(super) fn take(&mut self, template: &AgentName, dir: &Path) -> Option<Standby> {
        let own = self.lines.get_mut(template).and_then(|line| line.take(dir));
        own.or_else(|| self.lines.values_mut().find_map(|line| line.take(dir)))
    }

    /// Takes out the standbys that are not to stay, as `is_kept` says.
    pub(super) fn keep(&mut self, is_kept: impl Fn(&AgentName, &Standby) -> bool) -> Vec<Standby> {
        let lines = self.lines.iter_mut();
        lines.flat_map(|(template, line)| line.keep(|one| is_kept(template, one))).collect()
    }

    /// Decides how many standbys each template is to have, `at` since the pool began, and takes out those that are dead or too
    /// many; all of them when memory is short.
    pub(super) fn sort_out(&mut self, at: Duration, is_short: bool) -> Vec<Standby> {
        self.decide(at);
        let mut gone = Vec::new();
        for line in self.lines.values_mut() {
            gone.extend(line.keep(|one| !is_short && !one.has_ended()));
            while line.count() > line.wanted {
                gone.extend(line.standbys.pop_back());
            }
        }
        gone
    }

    fn decide(&mut self, at: Duration) {
        let by_default = |line: &Line| {
            let used = line.used.filter(|used| used.elapsed() < IN_USE);
            used.filter(|_| line.policy.is_none())
        };
        let mut used: Vec<Instant> = self.lines.values().filter_map(by_default).collect();
        used.sort_unstable_by(|a, b| b.cmp(a));
        // The last ones that were used, and what was used at the same time.
        let oldest = used.get(MAX_IN_USE - 1).or(used.last()).copied();
        let default = u32::try_from(self.default).unwrap_or(u32::MAX);
        for line in self.lines.values_mut() {
            let is_in_use = by_default(line).is_some_and(|used| oldest.is_some_and(|oldest| used >= oldest));
            line.decide(at, if is_in_use { default } else { 0 });
        }
    }

    /// Forgets the lines that have and are to have nothing, once the scheduler knows.
    pub(super) fn forget_unused(&mut self) {
        let is_known = |line: &Line| {
            line.policy.is_some() || line.wanted > 0 || line.told_warm || !line.standbys.is_empty()
        };
        self.lines.retain(|_, line| is_known(line));
    }

    /// The template that is to have the next standby, and whether it has a policy.
    pub(super) fn next(&self) -> Option<(AgentName, bool)> {
        let now = Instant::now();
        let is_ready = |line: &Line| match &line.rest {
            Rest::None => true,
            Rest::NoRoom | Rest::NoMemory => false,
            Rest::Failed { until, .. } => *until <= now,
        };
        let lines = self.lines.iter().filter(|(_, line)| is_ready(line));
        let (template, line) = most_lacking(lines.map(|entry| (entry, entry.1.urgency(), entry.1.lack())))?;
        Some((template.clone(), line.policy.is_some()))
    }

    /// Lets those try again that had no room.
    pub(super) fn look_for_room(&mut self) {
        let resting = self.lines.values_mut().filter(|line| line.rest == Rest::NoRoom);
        resting.for_each(|line| line.rest = Rest::None);
    }

    /// Has those that lack something wait for memory, unless there is `enough` of it.
    pub(super) fn mind_memory(&mut self, enough: bool) {
        let (from, to) = if enough { (Rest::NoMemory, Rest::None) } else { (Rest::None, Rest::NoMemory) };
        let concerned =
            self.lines.values_mut().filter(|line| line.rest == from && (enough || line.lack() > 0));
        concerned.for_each(|line| line.rest = to.clone());
    }

    /// Takes out the standby that can be done without most easily.
    pub(super) fn give_one_up(&mut self) -> Option<Standby> {
        let lines = self.lines.values_mut().map(|line| {
            let (policy, count) = (line.policy, line.count());
            (line, policy, count)
        });
        first_to_give(lines)?.standbys.pop_back()
    }

    /// Takes out as many standbys as have `excess` together.
    pub(super) fn give_up(&mut self, excess: Resources) -> Vec<Standby> {
        let (mut left, mut given) = (excess, Vec::new());
        while left != Resources::default()
            && let Some(standby) = self.give_one_up()
        {
            left = left.minus(standby.needs());
            given.push(standby);
        }
        given
    }

    /// Templates that have standbys and had none when this was last asked, with true, and the other way round.
    pub(super) fn newly_warm_or_cold(&mut self) -> Vec<(AgentName, bool)> {
        let mut changed = Vec::new();
        for (template, line) in &mut self.lines {
            let is_warm = !line.standbys.is_empty();
            if line.told_warm != is_warm {
                line.told_warm = is_warm;
                changed.push((template.clone(), is_warm));
            }
        }
        changed
    }

    /// The pool of `template`, `at` since the pool began.
    pub(super) fn view(&mut self, template: &AgentName, at: Duration) -> View {
        self.decide(at);
        let mut unknown = Line::new(self.half_life);
        self.lines.get_mut(template).unwrap_or(&mut unknown).view(template, at)
    }

    /// Every pool, by template.
    pub(super) fn views(&mut self, at: Duration) -> Vec<View> {
        self.decide(at);
        self.lines.iter_mut().map(|(template, line)| line.view(template, at)).collect()
    }
}
