//! Programs with a WebSocket: what stands between a program's guest and its client, and how a broken WebSocket is taken up again.
//!
//! ```text
//!  guest ──listen──► said (Replay) ──► client        one at a time, or none for the time of grace
//!    ▲                                    │
//!    └────feed────── input (queue) ◄──────┘
//! ```
//! A session that can be taken up again keeps what the client has not acknowledged, [`WINDOW`] and one frame at most, and lets
//! the program wait beyond that, whether a client is there or not. Input is counted as the guest takes it: what waited when
//! the connection broke is forgotten, and the client sends it again. Any other session keeps nothing that was sent.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ark_types::exec::{ExecAck, ExecSession};
use ark_types::guest::{EncodedFrame, Frame, GuestError, Kind};
use ark_types::problem::ProblemKind;
use ark_types::replay::{ACK_EVERY, Replay, Unsent, WINDOW, cost};
use axum::extract::ws::WebSocket;
use bytes::Bytes;
use tokio::sync::{Notify, mpsc};

use crate::agent::Handle;
use crate::problems::Refusal;

/// Sessions that can be taken up again, at most.
pub const MAX_SESSIONS: usize = 1024;
/// What of a program's output waits for the client of a session that cannot be taken up again, besides one frame.
const PLAIN_WINDOW: usize = 64 << 10;

/// The sessions that can be taken up again, by id.
#[derive(Debug, Default)]
pub struct Execs(Mutex<HashMap<String, Arc<Session>>>);

/// A client that takes a session up.
pub(crate) struct Taker {
    /// Its connection.
    pub(crate) socket: WebSocket,
    /// Frames of the program that it has.
    pub(crate) from: u64,
}

impl Execs {
    /// Opens a session of a program in `agent`.
    ///
    /// # Errors
    /// A [`Refusal`] when there are [`MAX_SESSIONS`].
    pub(crate) fn open(&self, agent: &Handle, grace: Duration) -> Result<Opened<'_>, Refusal> {
        let id = format!("{:032x}", rand::random::<u128>());
        let (sender, takers) = mpsc::channel(1);
        let way_back = WayBack {
            id: id.clone(),
            agent: agent.id().to_owned(),
            name: agent.name().to_string(),
            grace,
            sender,
        };
        let session = Arc::new(Session::new(Some(way_back)));
        let mut all = self.lock();
        if all.len() >= MAX_SESSIONS {
            let detail = format!(
                "{MAX_SESSIONS} programs with a resumable stream run already: end one of them, or leave resumable out"
            );
            return Err(Refusal::new(ProblemKind::HostUnable, detail));
        }
        all.insert(id, Arc::clone(&session));
        Ok(Opened { execs: self, session, takers })
    }

    /// The session `exec` of a program in `agent` (its id or name), for a client that has `from` frames of it.
    ///
    /// # Errors
    /// [`ProblemKind::ExecNotFound`], [`ProblemKind::ExecOutputGone`], and [`ProblemKind::InvalidValue`] for what was not said yet.
    pub(crate) fn find(&self, agent: &str, exec: &str, from: u64) -> Result<Arc<Session>, Refusal> {
        let session = self.lock().get(exec).filter(|session| session.is_of(agent)).cloned();
        let Some(session) = session else {
            let detail = format!(
                "the agent {agent} has no exec of this id that can be taken up: it ended, its client was away too long, or arkd was started anew"
            );
            return Err(Refusal::new(ProblemKind::ExecNotFound, detail));
        };
        session.lock().check(from)?;
        Ok(session)
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Arc<Session>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A session that can be found while this lives.
pub(crate) struct Opened<'a> {
    execs: &'a Execs,
    /// The session.
    pub(crate) session: Arc<Session>,
    /// Clients that take it up.
    pub(crate) takers: mpsc::Receiver<Taker>,
}

impl Drop for Opened<'_> {
    fn drop(&mut self) {
        if let Some(way_back) = &self.session.way_back {
            self.execs.lock().remove(&way_back.id);
        }
    }
}

/// How a session is taken up again.
#[derive(Debug)]
struct WayBack {
    id: String,
    /// Id of its agent.
    agent: String,
    /// Name of its agent.
    name: String,
    grace: Duration,
    sender: mpsc::Sender<Taker>,
}

/// What stands between a guest and a client.
#[derive(Debug)]
pub(crate) struct Session {
    way_back: Option<WayBack>,
    inner: Mutex<Inner>,
    /// There is something for the client. Each of these has one who waits.
    news: Notify,
    /// There is room for what the program says.
    room: Notify,
    /// There is input for the guest.
    fed: Notify,
    /// The guest took all the input there was.
    drained: Notify,
}

#[derive(Debug)]
struct Inner {
    said: Replay,
    /// Number of the frame that goes to the client next.
    next: u64,
    /// Nothing more will be said.
    is_over: bool,
    /// The client has not been told what session this is.
    greets: bool,
    /// From the client, for the guest.
    input: VecDeque<Bytes>,
    input_cost: usize,
    /// Frames that the guest took, or is taking.
    taken: u64,
    /// What those of them cost that the client was not told of.
    untold: usize,
}

impl Inner {
    fn check(&self, from: u64) -> Result<(), Refusal> {
        let (first, end) = (self.said.first(), self.said.end());
        if from < first {
            let lost = first - from;
            let detail = format!(
                "{lost} frames of the output, from number {from} on, were acknowledged before and are no longer kept: the first that can be had is from={first}"
            );
            return Err(Refusal::new(ProblemKind::ExecOutputGone, detail));
        }
        if from > end {
            let detail =
                format!("from is {from}, but there have been only {end} frames: say how many arrived");
            return Err(Refusal::new(ProblemKind::InvalidValue, detail));
        }
        Ok(())
    }
}

impl Session {
    /// A session that ends with its client's connection.
    pub(crate) fn plain() -> Self {
        Self::new(None)
    }

    fn new(way_back: Option<WayBack>) -> Self {
        let window = if way_back.is_some() { WINDOW } else { PLAIN_WINDOW };
        let inner = Inner {
            said: Replay::new(window),
            next: 0,
            is_over: false,
            greets: way_back.is_some(),
            input: VecDeque::new(),
            input_cost: 0,
            taken: 0,
            untold: 0,
        };
        let (news, room, fed, drained) = (Notify::new(), Notify::new(), Notify::new(), Notify::new());
        Self { way_back, inner: Mutex::new(inner), news, room, fed, drained }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_of(&self, agent: &str) -> bool {
        self.way_back.as_ref().is_some_and(|way| way.agent == agent || way.name == agent)
    }

    /// How long it is kept without a client; none when it ends with its client's connection.
    pub(crate) fn grace(&self) -> Option<Duration> {
        self.way_back.as_ref().map(|way| way.grace)
    }

    /// Hands it a client; returns the client when it has ended.
    pub(crate) async fn hand(&self, taker: Taker) -> Result<(), Taker> {
        match &self.way_back {
            Some(way) => way.sender.send(taker).await.map_err(|unsent| unsent.0),
            None => Err(taker),
        }
    }

    /// Goes on with a client that has `from` frames. What the one before it sent and the guest did not take is forgotten.
    ///
    /// # Errors
    /// As [`Execs::find`].
    pub(crate) fn turn_to(&self, from: u64) -> Result<(), Refusal> {
        let mut inner = self.lock();
        inner.check(from)?;
        // In bounds, as was just checked.
        let _ = inner.said.acknowledge(from);
        (inner.next, inner.greets, inner.untold) = (from, true, 0);
        inner.input.clear();
        inner.input_cost = 0;
        drop(inner);
        self.room.notify_one();
        self.news.notify_one();
        Ok(())
    }

    /// Waits until the program may say more.
    pub(crate) async fn room(&self) {
        while !self.lock().said.has_room() {
            self.room.notified().await;
        }
    }

    /// The program says `frame`; nothing follows the `last`.
    pub(crate) fn say(&self, frame: EncodedFrame, last: bool) {
        let mut bytes = frame.into_bytes();
        if self.way_back.is_some() {
            // Small frames share the memory of one large read, which none of them is to keep.
            bytes = Bytes::copy_from_slice(&bytes);
        }
        let mut inner = self.lock();
        inner.said.push(bytes);
        inner.is_over |= last;
        drop(inner);
        self.news.notify_one();
    }

    /// The program failed as `error` says; nothing follows.
    pub(crate) fn fail(&self, error: &GuestError) {
        let mut inner = self.lock();
        if let Ok(frame) = Frame::json(Kind::Error, error) {
            inner.said.push(frame.encode().into());
        }
        inner.is_over = true;
        drop(inner);
        self.news.notify_one();
    }

    /// The next message for the client, if there is one.
    pub(crate) fn next_message(&self) -> Option<Bytes> {
        let mut inner = self.lock();
        let received = inner.taken;
        let control = match &self.way_back {
            Some(WayBack { id, grace, .. }) if std::mem::take(&mut inner.greets) => {
                let grace_ms = u64::try_from(grace.as_millis()).unwrap_or(u64::MAX);
                Some(Frame::json(Kind::Session, &ExecSession { id: id.clone(), received, grace_ms }))
            }
            Some(_) if inner.untold >= ACK_EVERY => {
                inner.untold = 0;
                Some(Frame::json(Kind::Ack, &ExecAck { received }))
            }
            _ => None,
        };
        if let Some(Ok(frame)) = control {
            return Some(frame.encode().into());
        }
        let number = inner.next;
        let frame = inner.said.get(number).cloned()?;
        inner.next = number.saturating_add(1);
        if self.way_back.is_none() {
            // It was just there.
            let _ = inner.said.acknowledge(number.saturating_add(1));
            self.room.notify_one();
        }
        Some(frame)
    }

    /// Waits until there may be something for the client.
    pub(crate) async fn news(&self) {
        self.news.notified().await;
    }

    /// Whether the client was sent all there ever will be.
    pub(crate) fn is_told(&self) -> bool {
        let inner = self.lock();
        inner.is_over && inner.next == inner.said.end()
    }

    /// The client has `number` frames.
    ///
    /// # Errors
    /// [`Unsent`].
    pub(crate) fn acknowledge(&self, number: u64) -> Result<(), Unsent> {
        let mut inner = self.lock();
        // What it was not sent it cannot have, even if it is there.
        if number > inner.next {
            return Err(Unsent { number, end: inner.next });
        }
        inner.said.acknowledge(number)?;
        drop(inner);
        self.room.notify_one();
        Ok(())
    }

    /// Whether acknowledgements have a meaning here.
    pub(crate) const fn is_resumable(&self) -> bool {
        self.way_back.is_some()
    }

    /// Waits until more may be read from the client: always where it keeps to a window, so that its acknowledgements are heard
    /// behind input that nobody takes.
    pub(crate) async fn may_read(&self) {
        while self.way_back.is_none() && !self.lock().input.is_empty() {
            self.drained.notified().await;
        }
    }

    /// The client sends `frame` for the guest; false when it has more under way than it may.
    pub(crate) fn give(&self, frame: Bytes) -> bool {
        let mut inner = self.lock();
        if inner.input_cost >= WINDOW {
            return false;
        }
        inner.input_cost = inner.input_cost.saturating_add(cost(frame.len()));
        inner.input.push_back(frame);
        drop(inner);
        self.fed.notify_one();
        true
    }

    /// The next input for the guest. From here on it counts as taken.
    pub(crate) async fn take(&self) -> Bytes {
        loop {
            if let Some(frame) = self.try_take() {
                return frame;
            }
            self.drained.notify_one();
            self.fed.notified().await;
        }
    }

    fn try_take(&self) -> Option<Bytes> {
        let mut inner = self.lock();
        let frame = inner.input.pop_front()?;
        let cost = cost(frame.len());
        inner.input_cost = inner.input_cost.saturating_sub(cost);
        inner.taken = inner.taken.saturating_add(1);
        inner.untold = inner.untold.saturating_add(cost);
        if inner.untold >= ACK_EVERY {
            self.news.notify_one();
        }
        drop(inner);
        Some(frame)
    }
}
