//! A client of the storm: what it asks for, and how it takes agents to work with.

use std::io::ErrorKind;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use rand::rngs::StdRng;
use rand::seq::IndexedRandom as _;
use serde_json::Value;

use crate::Stage;
use crate::http::{Connection, Header, Reply};
use crate::model::{Known, Life, Model};

/// How a request ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Said {
    /// It was done.
    Yes(Value),
    /// It was refused with this status and problem.
    No(u16, Value),
    /// Nobody knows: `arkd` is gone.
    Lost,
}

/// One client.
pub struct Client<'a> {
    /// Where.
    pub stage: &'a Stage<'a>,
    /// What is known.
    pub model: &'a Mutex<Model>,
    /// What it does next.
    pub dice: StdRng,
    /// Which one it is, for the journal.
    pub number: usize,
    /// Connections of which nothing is read.
    pub held: Vec<Connection>,
    /// Whether its `arkd` is gone.
    pub is_lost: bool,
    connection: Option<Connection>,
    began: Instant,
}

impl<'a> Client<'a> {
    /// Client `number`, which has not connected yet.
    #[must_use]
    pub fn new(stage: &'a Stage<'a>, model: &'a Mutex<Model>, number: usize, dice: StdRng) -> Self {
        let (held, connection, began) = (Vec::new(), None, Instant::now());
        Self { stage, model, dice, number, held, is_lost: false, connection, began }
    }

    /// What is known.
    pub fn known(&self) -> MutexGuard<'a, Model> {
        self.model.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Opens a connection of its own; none when `arkd` is gone.
    pub fn connect(&mut self) -> Option<Connection> {
        let opened = Connection::open(&self.stage.run.api_socket(), self.stage.patience).ok();
        self.is_lost |= opened.is_none();
        opened
    }

    /// One request.
    ///
    /// # Panics
    /// When there is no answer in time: no request may hang. When `arkd` says that it failed.
    pub fn call(&mut self, method: &str, path: &str, body: &Value) -> Said {
        self.call_with(method, path, None, body).0
    }

    /// The same with a header; what it was told beside, where there was a reply.
    ///
    /// # Panics
    /// As [`Self::call`].
    pub fn call_with(
        &mut self,
        method: &str,
        path: &str,
        header: Header<'_>,
        body: &Value,
    ) -> (Said, Option<Reply>) {
        let began = self.began.elapsed().as_millis();
        let (said, reply) = self.ask(method, path, header, body);
        let now = self.began.elapsed().as_millis();
        let brief = match &said {
            Said::Yes(value) => brief(value),
            Said::No(status, problem) => format!("{status} {}", problem["detail"]),
            Said::Lost => "lost".to_owned(),
        };
        // Looks at everything would hide what led there.
        if method != "GET" {
            let line = format!("client {} {began}..{now} ms {method} {path} {body}: {brief}", self.number);
            self.known().note(line);
        }
        assert!(!matches!(said, Said::No(500, _)), "arkd failed: {method} {path} {body}: {said:?}");
        (said, reply)
    }

    fn ask(&mut self, method: &str, path: &str, header: Header<'_>, body: &Value) -> (Said, Option<Reply>) {
        let Some(mut connection) = self.connection.take().or_else(|| self.connect()) else {
            return (Said::Lost, None);
        };
        let body = if body.is_null() { String::new() } else { body.to_string() };
        match connection.call_with(method, path, header, &body) {
            Ok(reply) => {
                self.connection = Some(connection);
                let json = reply.json();
                let is_done = (200..300).contains(&reply.status);
                (if is_done { Said::Yes(json) } else { Said::No(reply.status, json) }, Some(reply))
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                panic!("no answer within {:?}: {method} {path} {body}", self.stage.patience)
            }
            Err(_) => {
                self.is_lost = true;
                (Said::Lost, None)
            }
        }
    }

    /// Takes one of the agents that fit, which is nobody else's until it is given back.
    pub fn take(&mut self, fits: impl Fn(&Known) -> bool) -> Option<Known> {
        let mut model = self.known();
        let free = model.agents.values().filter(|known| !known.is_taken && fits(known));
        let ids: Vec<String> = free.map(|known| known.told.id.clone()).collect();
        let known = model.agents.get_mut(ids.choose(&mut self.dice)?)?;
        known.is_taken = true;
        Some(known.clone())
    }

    /// Changes what is known of it, and keeps it.
    pub fn change(&self, taken: &Known, change: impl FnOnce(&mut Known)) {
        if let Some(known) = self.known().agents.get_mut(&taken.told.id) {
            change(known);
        }
    }

    /// Gives it back, changed.
    pub fn give(&self, taken: &Known, change: impl FnOnce(&mut Known)) {
        if let Some(known) = self.known().agents.get_mut(&taken.told.id) {
            known.is_taken = false;
            change(known);
        }
    }

    /// Bears a refusal that has a reason: what is certainly as it is known to be is not refused.
    ///
    /// # Panics
    /// When there is no reason.
    pub fn bear(&self, known: &Known, lives: &[Life], said: &Said) {
        let Said::No(_, problem) = said else { return };
        let is_certain = lives.iter().any(|life| known.is_certain(*life));
        if is_certain {
            self.bear_if_ending(&known.told.id, problem);
        }
    }

    /// Bears the refusal of something that concerns `what` and that can be had of an `arkd` that was not asked to end.
    ///
    /// # Panics
    /// When it was not.
    pub fn bear_if_ending(&self, what: &str, problem: &Value) {
        let model = self.known();
        assert!(model.is_ending, "{what} was refused without a reason: {problem}{}", model.story_of(&[what]));
    }
}

/// What the journal keeps of a reply.
fn brief(value: &Value) -> String {
    match (&value["id"], &value["agents"]) {
        (Value::String(id), _) => {
            format!("{id} {} {} pid {}", value["name"], value["state"], value["vmm_pid"])
        }
        (_, Value::Array(agents)) if agents.len() < 4 => {
            agents.iter().map(brief).collect::<Vec<_>>().join(", ")
        }
        _ => {
            let mut text = value.to_string();
            text.truncate(text.char_indices().nth(200).map_or(text.len(), |(at, _)| at));
            text
        }
    }
}
