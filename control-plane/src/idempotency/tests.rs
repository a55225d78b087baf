//! Decisions against a model: whatever is sent in whatever order, a key's request is carried out once as long as its reply is
//! kept, and everyone who sends it is told the same.

use std::collections::HashMap;

use ark_types::event::{Event, Recorded, Stream};
use ark_types::idempotency::{IDEMPOTENCY_KEY, KEPT_S, KeptReply};
use axum::http::HeaderMap;
use proptest::prelude::*;

use super::{Decision, KeyDigest, RequestDigest, Table};
use crate::projection::Projection;

fn key(n: u8) -> KeyDigest {
    let mut headers = HeaderMap::new();
    headers.insert(IDEMPOTENCY_KEY, n.to_string().parse().unwrap());
    KeyDigest::of(&headers).unwrap().unwrap()
}

fn request(n: u8) -> RequestDigest {
    RequestDigest::of("POST", "/v1/agents", &[n])
}

#[derive(Clone, Copy, Debug)]
enum Step {
    /// A request comes with a key.
    Send { key: u8, request: u8 },
    /// What is under way with the key ends.
    End { key: u8, well: bool },
    /// `arkd` ends, and the next one begins.
    Crash,
    /// Time passes.
    Wait { hours: u64 },
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (0..3_u8, 0..2_u8).prop_map(|(key, request)| Step::Send { key, request }),
        4 => (0..3_u8, any::<bool>()).prop_map(|(key, well)| Step::End { key, well }),
        1 => Just(Step::Crash),
        1 => (1..30_u64).prop_map(|hours| Step::Wait { hours }),
    ]
}

/// What `arkd` knows, and what is true of it.
#[derive(Default)]
struct World {
    table: Table<u64>,
    projection: Projection,
    now: u64,
    /// Requests under way: what they ask for and which run of it that is.
    under_way: HashMap<u8, (u8, u64)>,
    /// Replies that clients got: to what, from which run, and when.
    told: HashMap<u8, (u8, u64, u64)>,
    runs: u64,
}

impl World {
    fn record(&mut self, stream: Stream, event: Event) {
        let position = self.projection.position() + 1;
        self.projection.apply(&Recorded { position, at_unix_ms: self.now, stream, version: 1, event });
    }

    fn send(&mut self, n: u8, asked: u8) -> Result<(), TestCaseError> {
        let kept = self.projection.requests().reply(&key(n).to_string(), self.now);
        let run = self.runs;
        let told = self.told.get(&n).filter(|(.., at)| self.now < at + KEPT_S * 1000);
        match self.table.decide(key(n), request(asked), kept, || run) {
            Decision::CarryOut(run) => {
                prop_assert!(told.is_none() && !self.under_way.contains_key(&n));
                self.runs += 1;
                self.under_way.insert(n, (asked, run));
                let (key, request) = (key(n).to_string(), request(asked).to_string());
                let made = Stream::agent(&format!("{run:016x}"));
                self.record(Stream::request(&run.to_string()), Event::RequestMade { key, request, made });
            }
            Decision::Wait(run) => prop_assert_eq!(self.under_way.get(&n), Some(&(asked, run))),
            Decision::Replay(reply) => {
                let (to, run, _) = told.unwrap();
                prop_assert_eq!((*to, run.to_string()), (asked, reply.body));
            }
            Decision::Refuse => {
                let other = told.map(|(to, ..)| to).or(self.under_way.get(&n).map(|(to, _)| to));
                prop_assert_ne!(other, None);
                prop_assert_ne!(other, Some(&asked));
            }
        }
        Ok(())
    }

    fn end(&mut self, n: u8, well: bool) {
        let Some((asked, run)) = self.under_way.remove(&n) else { return };
        let event = if well {
            let reply = KeptReply {
                request: request(asked).to_string(),
                status: 201,
                headers: Default::default(),
                body: run.to_string(),
            };
            self.told.insert(n, (asked, run, self.now));
            Event::RequestAnswered { key: key(n).to_string(), reply }
        } else {
            Event::RequestDropped {}
        };
        self.record(Stream::request(&run.to_string()), event);
        self.table.end(key(n));
    }

    /// The next `arkd` knows what is in the log, drops what was cut off, and nobody was told of that.
    fn crash(&mut self) {
        self.table = Table::default();
        self.under_way.clear();
        self.projection = Projection::restore(&self.projection.still().snapshot().0).unwrap();
        let cut: Vec<Stream> = self.projection.requests().under_way().map(|(s, _)| s.clone()).collect();
        cut.into_iter().for_each(|stream| self.record(stream, Event::RequestDropped {}));
    }
}

proptest! {
    #[test]
    fn a_key_is_carried_out_once_and_always_told_the_same(steps in prop::collection::vec(step(), 1..80)) {
        let mut world = World::default();
        for step in steps {
            match step {
                Step::Send { key, request } => world.send(key, request)?,
                Step::End { key, well } => world.end(key, well),
                Step::Crash => world.crash(),
                Step::Wait { hours } => world.now += hours * 3_600_000,
            }
            let under_way = world.projection.requests().under_way().count();
            prop_assert_eq!(under_way, world.under_way.len());
        }
    }
}
