//! What `arkd` acknowledged, and what it may or may not have done when it was killed.
//!
//! Of everything that can be in doubt the model keeps the possible values, the acknowledged one first. A look at `arkd` that finds one
//! of them settles the doubt; one that finds something else is a promise that was broken.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

/// What clients left in an agent; none when they left nothing.
pub type Content = Option<u64>;

/// Where an agent is in its life, as far as a client can tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Life {
    /// It takes commands.
    Running,
    /// It stands still.
    Paused,
    /// It has ended.
    Ended,
}

/// What is told of an agent for all its life.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Told {
    /// Identifier.
    pub id: String,
    /// Name.
    pub name: String,
    /// Owner.
    pub owner: Value,
    /// When it was created.
    pub created: Value,
}

impl Told {
    /// What is told of `agent`.
    #[must_use]
    pub fn of(agent: &Value) -> Self {
        let text = |key: &str| agent[key].as_str().unwrap_or_default().to_owned();
        Self {
            id: text("id"),
            name: text("name"),
            owner: agent["owner"].clone(),
            created: agent["created_unix_ms"].clone(),
        }
    }
}

/// An agent that somebody was told of.
#[derive(Clone, Debug)]
pub struct Known {
    /// What stays.
    pub told: Told,
    /// Whether it begins anew when its VMM ends.
    pub restarts_itself: bool,
    /// Restarts that were seen.
    pub restarts: u64,
    /// Where it may be in its life.
    pub life: BTreeSet<Life>,
    /// What it may hold.
    pub content: BTreeSet<Content>,
    /// What it may go back to when its VMM ends: checkpoints are taken of it, and this is what it held in the life that it leads.
    pub past: Option<BTreeSet<Content>>,
    /// Labels that it may have, the acknowledged ones first.
    pub labels: Vec<Value>,
    /// Whether its removal was asked for and not acknowledged.
    pub may_be_gone: bool,
    /// Whether its VMM was killed since it was last looked at.
    pub was_killed: bool,
    /// Whether its VMM may have ended since, because something that ends it was cut off.
    pub may_have_ended: bool,
    /// Whether somebody works with it.
    pub is_taken: bool,
}

impl Known {
    /// One that runs and holds `content`.
    #[must_use]
    pub fn running(agent: &Value, content: BTreeSet<Content>) -> Self {
        Self {
            told: Told::of(agent),
            restarts_itself: agent["restart"]["when"].as_str().is_some_and(|when| when != "never"),
            restarts: restarts(agent),
            life: BTreeSet::from([Life::Running]),
            past: (!agent["checkpoint"].is_null()).then(|| content.clone()),
            content,
            labels: vec![agent["labels"].clone()],
            may_be_gone: false,
            was_killed: false,
            may_have_ended: false,
            is_taken: false,
        }
    }

    /// Something that ends its VMM was asked for and may have been cut off.
    pub fn doubt_vmm(&mut self) {
        self.may_have_ended = true;
        self.life.insert(Life::Ended);
        self.may_begin_anew();
    }

    /// Its VMM was killed: it has ended, or begins anew without what it held.
    pub fn lose_vmm(&mut self) {
        self.was_killed = true;
        self.life = BTreeSet::from([Life::Ended]);
        self.may_begin_anew();
    }

    fn may_begin_anew(&mut self) {
        if self.restarts_itself {
            self.life.insert(Life::Running);
            self.content.insert(None);
            self.content.extend(self.past.iter().flatten());
        }
    }

    /// It holds one of `content`, from now on.
    pub fn hold(&mut self, content: impl IntoIterator<Item = Content>) {
        self.content.extend(content);
        if let Some(past) = &mut self.past {
            past.extend(&self.content);
        }
    }

    /// It was put back to a state in which it held one of `content`: what was before is given up.
    pub fn go_back(&mut self, content: &BTreeSet<Content>) {
        self.content.clone_from(content);
        if let Some(past) = &mut self.past {
            past.clone_from(content);
        }
    }

    /// Whether all is known: a refusal needs a reason then.
    #[must_use]
    pub fn is_certain(&self, life: Life) -> bool {
        !self.may_be_gone && !self.was_killed && !self.may_have_ended && self.life == BTreeSet::from([life])
    }
}

/// How often `agent` began anew.
#[must_use]
pub fn restarts(agent: &Value) -> u64 {
    agent["continuity"]["restarts"].as_u64().unwrap_or_default()
}

/// A snapshot that somebody was told of, or may find.
#[derive(Clone, Debug)]
pub struct Point {
    /// Id of the agent that it is of.
    pub agent: String,
    /// What it may hold.
    pub content: BTreeSet<Content>,
    /// Whether it was acknowledged.
    pub is_certain: bool,
    /// Whether its removal was asked for.
    pub may_be_gone: bool,
    /// Whether somebody works with it.
    pub is_taken: bool,
}

/// An agent that may have come to be.
#[derive(Clone, Debug)]
pub enum Pending {
    /// Asked for by this name.
    Named {
        /// What it would hold.
        content: BTreeSet<Content>,
    },
    /// A fork of this agent.
    ForkOf {
        /// The agent's id.
        id: String,
        /// What it would hold.
        content: BTreeSet<Content>,
    },
}

/// A task that was asked for.
#[derive(Clone, Debug)]
pub struct Task {
    /// What was sent.
    pub body: Value,
    /// Its id; none as long as nobody was told of it.
    pub id: Option<String>,
    /// How it has to end; none where somebody may have cancelled it.
    pub end: Option<&'static str>,
    /// How somebody was told that it ended.
    pub ended: Option<String>,
    /// Whether its removal was asked for and not acknowledged.
    pub may_be_gone: bool,
    /// Whether somebody works with it.
    pub is_taken: bool,
}

/// A service that was asked for.
#[derive(Clone, Debug)]
pub struct Service {
    /// Replicas that it may be to have.
    pub replicas: BTreeSet<u64>,
    /// Whether it was acknowledged.
    pub is_certain: bool,
    /// Whether its removal was asked for.
    pub may_be_gone: bool,
    /// Whether somebody works with it.
    pub is_taken: bool,
}

/// A request for an agent that was sent with a key.
#[derive(Clone, Debug)]
pub struct Keyed {
    /// The key.
    pub key: String,
    /// The agent's name.
    pub name: String,
    /// What was sent.
    pub body: Value,
    /// What came back; none as long as nothing did.
    pub reply: Option<Vec<u8>>,
}

/// Everything that clients know.
#[derive(Debug, Default)]
pub struct Model {
    /// Agents, by id.
    pub agents: BTreeMap<String, Known>,
    /// Ids of agents whose removal was acknowledged or seen.
    pub removed: BTreeSet<String>,
    /// Agents that may have come to be, by name or by a number of their own.
    pub pending: BTreeMap<String, Pending>,
    /// Names that were refused: nobody has them.
    pub refused: BTreeSet<String>,
    /// Snapshots, by name.
    pub points: BTreeMap<String, Point>,
    /// How many agents owners may have, by name: possible values.
    pub quotas: BTreeMap<String, Vec<Option<u64>>>,
    /// Templates that are there or may be, by name: whether that is certain.
    pub templates: BTreeMap<String, bool>,
    /// Tasks, by name.
    pub tasks: BTreeMap<String, Task>,
    /// Services, by name.
    pub services: BTreeMap<String, Service>,
    /// Policies that the pool may have, the acknowledged one first; null for none.
    pub pool: Vec<Value>,
    /// Whether somebody sets it.
    pub pool_is_taken: bool,
    /// Requests that were sent with a key, oldest first.
    pub keyed: Vec<Keyed>,
    /// Whether `arkd` was asked to end, so that it may refuse anything.
    pub is_ending: bool,
    /// What happened, newest last.
    pub journal: Vec<String>,
    counter: u64,
}

impl Model {
    /// A number that was not used before.
    pub fn number(&mut self) -> u64 {
        self.counter += 1;
        self.counter
    }

    /// Notes what happened.
    pub fn note(&mut self, line: String) {
        self.journal.push(line);
    }

    /// The newest lines that mention `what`.
    #[must_use]
    pub fn story_of(&self, what: &[&str]) -> String {
        let about = |line: &&String| what.iter().any(|w| !w.is_empty() && line.contains(w));
        let mut lines: Vec<&String> = self.journal.iter().filter(about).rev().take(30).collect();
        lines.reverse();
        lines.into_iter().map(|line| format!("\n  {line}")).collect()
    }
}
