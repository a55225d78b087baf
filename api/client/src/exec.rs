//! Programs with their streams connected: frames over a WebSocket, one per binary message.
//!
//! ```text
//!  ExecInput ──► Link ──► transmit ──┐
//!                                    ├── WebSocket, or the next one when it broke
//!  ExecOutput ◄── events ◄─ receive ─┘
//! ```
//! One task has the connection. Of a resumable program it keeps the input that `arkd` has not passed on, at most [`WINDOW`] and one
//! frame, and when the connection breaks it takes the program up again: up to [`TRIES`] times, about 6 s, without anything lost or
//! said twice.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ark_types::exec::{CLOSE_TAKEN_UP, ExecAck, ExecEnd, ExecRequest, ExecSession, TtySize};
use ark_types::guest::{
    EncodedFrame, Frame, GuestError, HEADER_LEN, Kind, MAX_PAYLOAD, SignalRequest, Started,
};
use ark_types::plain::plain;
use ark_types::replay::{ACK_EVERY, Replay, WINDOW, cost};
use bytes::Bytes;
use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{SinkExt, StreamExt};
use hyper::header::{AUTHORIZATION, HeaderValue};
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;
use tokio_tungstenite::tungstenite::{self, Message};
use tokio_util::sync::CancellationToken;

use crate::connect::{Endpoint, Stream};
use crate::error::Error;
use crate::rest::refusal;

/// Events that wait for whoever reads them.
const AHEAD: usize = 4;
/// Attempts to take a program up again, and how often that may be of no use in a row.
const TRIES: u32 = 8;
/// Pause before the second attempt; each is twice as long as the one before, up to [`LONGEST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// See [`FIRST_PAUSE`].
const LONGEST_PAUSE: Duration = Duration::from_millis(1600);
/// How long one attempt may take.
const TRY_LIMIT: Duration = Duration::from_secs(10);
/// After how long without a word (`arkd` pings every 5 s) a connection counts as broken.
const SILENCE: Duration = Duration::from_secs(30);
/// How long the end of a stream may take to be told.
const FAREWELL: Duration = Duration::from_secs(2);

type Socket = WebSocketStream<Stream>;

/// What a running program tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ExecEvent {
    /// It runs, with this process id in the guest.
    Started(u32),
    /// Bytes of standard output, or of its terminal.
    Stdout(Bytes),
    /// Bytes of standard error.
    Stderr(Bytes),
    /// It ended; nothing follows.
    Exited(ExecEnd),
}

/// A running program.
pub struct ExecStream {
    /// Towards the program.
    pub input: ExecInput,
    /// From the program.
    pub output: ExecOutput,
}

/// Towards a program.
pub struct ExecInput {
    link: Arc<Link>,
    _half: Arc<Half>,
}

/// From a program. Dropping both halves closes the stream, and the guest then kills the program's process group.
pub struct ExecOutput {
    events: mpsc::Receiver<Result<ExecEvent, Error>>,
    half: Arc<Half>,
    driver: JoinHandle<()>,
}

/// Ends the stream with the last of its halves.
struct Half(CancellationToken);

impl Drop for Half {
    fn drop(&mut self) {
        self.0.cancel();
    }
}

impl ExecStream {
    /// Opens the WebSocket at `target` and asks for `request`.
    pub(crate) async fn open(
        endpoint: &Endpoint,
        target: &str,
        request: &ExecRequest,
    ) -> Result<Self, Error> {
        let mut socket = connect(endpoint, target).await?;
        let exec = Message::Binary(Frame::json(Kind::Exec, request)?.encode().into());
        socket.send(exec).await.map_err(|e| Error::Ended(plain(&e)))?;
        let link = Arc::new(Link::new(request.resumable));
        let (sender, events) = mpsc::channel(AHEAD);
        let half = Arc::new(Half(CancellationToken::new()));
        let driver = Driver {
            endpoint: endpoint.clone(),
            target: target.to_owned(),
            link: Arc::clone(&link),
            session: None,
            events: sender,
            leave: half.0.clone(),
        };
        let driver = tokio::spawn(driver.drive(socket));
        let input = ExecInput { link, _half: Arc::clone(&half) };
        Ok(Self { input, output: ExecOutput { events, half, driver } })
    }
}

async fn connect(endpoint: &Endpoint, target: &str) -> Result<Socket, Error> {
    let stream = endpoint.connect().await.map_err(|e| Error::connect(endpoint, e))?;
    let mut handshake = format!("ws://{}{target}", endpoint.authority())
        .into_client_request()
        .map_err(|e| Error::Request(e.to_string()))?;
    if let Some(authorization) = endpoint.authorization() {
        let value = HeaderValue::from_str(&authorization).map_err(|e| Error::Request(e.to_string()))?;
        handshake.headers_mut().insert(AUTHORIZATION, value);
    }
    let whole = Some(HEADER_LEN + MAX_PAYLOAD);
    let config = WebSocketConfig::default().max_message_size(whole).max_frame_size(whole);
    let (socket, _) = tokio_tungstenite::client_async_with_config(handshake, stream, Some(config))
        .await
        .map_err(|e| match e {
            tungstenite::Error::Http(answer) => {
                let status = answer.status().as_u16();
                refusal(endpoint, status, answer.body().as_deref().unwrap_or_default())
            }
            other => Error::broken(endpoint, &other),
        })?;
    Ok(socket)
}

impl ExecInput {
    /// Sends bytes to the program's standard input, or types them at its terminal.
    ///
    /// # Errors
    /// [`Error::Ended`] when the stream is closed.
    pub async fn stdin(&mut self, bytes: &[u8]) -> Result<(), Error> {
        for chunk in bytes.chunks(MAX_PAYLOAD) {
            self.send(&Frame::raw(Kind::Stdin, chunk)?).await?;
        }
        Ok(())
    }

    /// Ends the program's standard input.
    ///
    /// # Errors
    /// [`Error::Ended`] when the stream is closed.
    pub async fn close_stdin(&mut self) -> Result<(), Error> {
        self.send(&Frame::empty(Kind::StdinClose)).await
    }

    /// Sends a signal (1 to 64) to the program's process group.
    ///
    /// # Errors
    /// [`Error::Ended`] when the stream is closed.
    pub async fn signal(&mut self, signal: u8) -> Result<(), Error> {
        self.send(&Frame::json(Kind::Signal, &SignalRequest { signal })?).await
    }

    /// Tells the program's terminal its new size.
    ///
    /// # Errors
    /// [`Error::Ended`] when the stream is closed.
    pub async fn resize(&mut self, size: TtySize) -> Result<(), Error> {
        self.send(&Frame::json(Kind::Resize, &size)?).await
    }

    async fn send(&mut self, frame: &Frame) -> Result<(), Error> {
        self.link.push(frame.encode().into()).await
    }
}

impl ExecOutput {
    /// What the program says next. Cancel-safe. After [`ExecEvent::Exited`] or an error there is nothing more to ask.
    ///
    /// # Errors
    /// [`Error::Guest`] when the program could not be started, [`Error::Ended`] when the stream ends without
    /// [`ExecEvent::Exited`], [`Error::Frame`] when it makes no sense.
    pub async fn next(&mut self) -> Result<ExecEvent, Error> {
        self.events.recv().await.unwrap_or_else(|| Err(Error::Ended(CLOSED.to_owned())))
    }

    /// Ends the stream, and the program if it runs, without waiting for whatever it says. What drops the stream does the same
    /// unless the process ends right then: a resumable program would then be kept for its time of grace.
    pub async fn leave(mut self) {
        self.half.0.cancel();
        self.events.close();
        let _ = timeout(FAREWELL, &mut self.driver).await;
    }
}

/// Said of a connection that ended without a reason.
const CLOSED: &str = "the connection was closed";

/// What goes to the program, and what of it may have to be sent again.
struct Link {
    state: Mutex<State>,
    /// There is something to send.
    more: Notify,
    /// There is room for input.
    room: Notify,
}

struct State {
    /// Input that is not acknowledged; of a program that is not resumable, input that is not sent.
    input: Replay,
    /// Number of the input that is sent next.
    next: u64,
    is_resumable: bool,
    /// The connection knows from where on input is to be sent.
    is_ready: bool,
    /// Frames that came.
    received: u64,
    /// What those of them cost that were not acknowledged.
    untold: usize,
    is_over: bool,
}

impl Link {
    fn new(is_resumable: bool) -> Self {
        let state = State {
            input: Replay::new(WINDOW),
            next: 0,
            is_resumable,
            is_ready: true,
            received: 0,
            untold: 0,
            is_over: false,
        };
        Self { state: Mutex::new(state), more: Notify::new(), room: Notify::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn push(&self, frame: Bytes) -> Result<(), Error> {
        loop {
            {
                let mut state = self.lock();
                if state.is_over {
                    return Err(Error::Ended(CLOSED.to_owned()));
                }
                if state.input.has_room() {
                    state.input.push(frame);
                    break;
                }
            }
            self.room.notified().await;
        }
        self.more.notify_one();
        Ok(())
    }

    /// What is sent next, if there is anything.
    fn next_message(&self) -> Option<Message> {
        let mut state = self.lock();
        if !state.is_ready {
            return None;
        }
        if state.is_resumable && state.untold >= ACK_EVERY {
            state.untold = 0;
            let ack = Frame::json(Kind::Ack, &ExecAck { received: state.received }).ok()?;
            return Some(Message::Binary(ack.encode().into()));
        }
        let number = state.next;
        let frame = state.input.get(number).cloned()?;
        state.next = number.saturating_add(1);
        if !state.is_resumable {
            // It was just there.
            let _ = state.input.acknowledge(number.saturating_add(1));
            self.room.notify_one();
        }
        Some(Message::Binary(frame))
    }

    /// A frame that counts came.
    fn count(&self, len: usize) {
        let mut state = self.lock();
        state.received = state.received.saturating_add(1);
        state.untold = state.untold.saturating_add(cost(len));
        if state.is_resumable && state.untold >= ACK_EVERY {
            self.more.notify_one();
        }
    }

    /// `arkd` has `received` frames of the input. A connection that `begins` in the place of a broken one gets the others next; the
    /// first one has them on their way already.
    fn acknowledged(&self, received: u64, begins: bool) -> Result<(), Error> {
        let mut state = self.lock();
        state.input.acknowledge(received).map_err(|e| Error::Ended(format!("arkd made no sense: {e}")))?;
        if begins && !state.is_ready {
            (state.next, state.is_ready) = (received.max(state.input.first()), true);
            self.more.notify_one();
        }
        self.room.notify_one();
        Ok(())
    }

    /// What came and what was acknowledged so far; nothing is sent until the next connection begins.
    fn interrupt(&self) -> (u64, u64) {
        let mut state = self.lock();
        (state.is_ready, state.untold) = (false, 0);
        (state.received, state.input.first())
    }

    fn end(&self) {
        self.lock().is_over = true;
        self.room.notify_one();
    }
}

/// How a connection came to its end.
enum Outcome {
    /// Everything was said.
    Exited(ExecEnd),
    /// Nobody wants to hear more.
    Left,
    /// It is no use going on.
    Failed(Error),
    /// The connection is gone, the program may not be.
    Broken(String),
}

/// The task that has the connection.
struct Driver {
    endpoint: Endpoint,
    target: String,
    link: Arc<Link>,
    /// How the program is taken up again.
    session: Option<ExecSession>,
    events: mpsc::Sender<Result<ExecEvent, Error>>,
    /// Cancelled when nobody wants to hear more.
    leave: CancellationToken,
}

impl Driver {
    async fn drive(mut self, mut socket: Socket) {
        let (mut progress, mut in_vain) = ((0, 0), 0);
        let last = loop {
            let why = match self.converse(&mut socket).await {
                Outcome::Exited(end) => {
                    let _ = timeout(FAREWELL, socket.send(Message::Close(None))).await;
                    break Some(Ok(ExecEvent::Exited(end)));
                }
                Outcome::Left => {
                    let _ = timeout(FAREWELL, self.take_leave(&mut socket)).await;
                    break None;
                }
                Outcome::Failed(error) => break Some(Err(error)),
                Outcome::Broken(why) => why,
            };
            let now = self.link.interrupt();
            in_vain = if now == progress { in_vain + 1 } else { 0 };
            progress = now;
            match self.take_up(now.0).await {
                Some(again) if in_vain < TRIES => socket = again,
                _ => break Some(Err(Error::Ended(why))),
            }
        };
        self.link.end();
        if let Some(last) = last {
            let _ = self.events.send(last).await;
        }
    }

    async fn converse(&mut self, socket: &mut Socket) -> Outcome {
        let (mut sink, mut source) = socket.split();
        let (link, leave) = (Arc::clone(&self.link), self.leave.clone());
        tokio::select! {
            outcome = self.receive(&mut source) => outcome,
            Err(error) = transmit(&link, &mut sink) => Outcome::Broken(plain(&error)),
            () = leave.cancelled() => Outcome::Left,
        }
    }

    /// Sends what was to be sent and closes in order.
    async fn take_leave(&self, socket: &mut Socket) -> Result<(), tungstenite::Error> {
        while let Some(message) = self.link.next_message() {
            socket.feed(message).await?;
        }
        socket.send(Message::Close(None)).await?;
        while let Some(Ok(_)) = socket.next().await {}
        Ok(())
    }

    async fn receive(&mut self, source: &mut SplitStream<&mut Socket>) -> Outcome {
        let events = self.events.clone();
        loop {
            // Nothing is read that nobody has room for; who is gone needs none.
            let permit = events.reserve().await.ok();
            let message = match &self.session {
                None => source.next().await,
                Some(_) => match timeout(SILENCE, source.next()).await {
                    Ok(message) => message,
                    Err(_) => return Outcome::Broken(format!("nothing came for {} s", SILENCE.as_secs())),
                },
            };
            let bytes = match message {
                None => return Outcome::Broken(CLOSED.to_owned()),
                Some(Err(e)) => return Outcome::Broken(plain(&e)),
                Some(Ok(Message::Binary(bytes))) => bytes,
                Some(Ok(Message::Close(why))) => return closed(why),
                // Pings are answered by the library; text is not part of the protocol.
                Some(Ok(Message::Ping(_) | Message::Pong(_) | Message::Text(_) | Message::Frame(_))) => {
                    continue;
                }
            };
            let len = bytes.len();
            let event = match EncodedFrame::try_from(bytes).map_err(Error::from).and_then(|f| self.sort(f)) {
                Ok(event) => event,
                Err(error) => return Outcome::Failed(error),
            };
            match event {
                None => continue,
                Some(ExecEvent::Exited(end)) => return Outcome::Exited(end),
                Some(event) => drop(permit.map(|permit| permit.send(Ok(event)))),
            }
            self.link.count(len);
        }
    }

    /// The event that a frame tells, if it is not one between `arkd` and this task.
    fn sort(&mut self, frame: EncodedFrame) -> Result<Option<ExecEvent>, Error> {
        match frame.kind() {
            Kind::Session => {
                let session: ExecSession = frame.parse()?;
                self.link.acknowledged(session.received, true)?;
                self.session = Some(session);
                Ok(None)
            }
            Kind::Ack => {
                self.link.acknowledged(frame.parse::<ExecAck>()?.received, false)?;
                Ok(None)
            }
            _ => event(frame).map(Some),
        }
    }

    /// A new connection to a program of which `from` frames came, unless it cannot be had or is not wanted any more.
    async fn take_up(&self, from: u64) -> Option<Socket> {
        let session = self.session.as_ref()?;
        let target = format!("{}/{}?from={from}", self.target, session.id);
        let mut pause = FIRST_PAUSE;
        for _ in 0..TRIES {
            let attempt = timeout(TRY_LIMIT, connect(&self.endpoint, &target));
            match self.leave.run_until_cancelled(attempt).await? {
                Ok(Ok(socket)) => return Some(socket),
                // It was understood, and refused for good.
                Ok(Err(Error::Problem(_))) => return None,
                Ok(Err(_)) | Err(_) => {}
            }
            self.leave.run_until_cancelled(sleep(pause)).await?;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
        None
    }
}

/// Sends what there is to send, for as long as the connection lasts.
async fn transmit(link: &Link, sink: &mut SplitSink<&mut Socket, Message>) -> Result<(), tungstenite::Error> {
    loop {
        while let Some(message) = link.next_message() {
            sink.feed(message).await?;
        }
        sink.flush().await?;
        link.more.notified().await;
    }
}

/// What a connection that was closed in order means.
fn closed(why: Option<tungstenite::protocol::CloseFrame>) -> Outcome {
    let taken = why.as_ref().is_some_and(|why| u16::from(why.code) == CLOSE_TAKEN_UP);
    let why = why.map(|why| why.reason.to_string()).filter(|why| !why.is_empty());
    let why = why.unwrap_or_else(|| CLOSED.to_owned());
    Outcome::Failed(if taken { Error::TakenUp } else { Error::Ended(why) })
}

fn event(frame: EncodedFrame) -> Result<ExecEvent, Error> {
    match frame.kind() {
        Kind::Started => Ok(ExecEvent::Started(frame.parse::<Started>()?.pid)),
        Kind::Stdout => Ok(ExecEvent::Stdout(frame.into_payload())),
        Kind::Stderr => Ok(ExecEvent::Stderr(frame.into_payload())),
        Kind::Exited => Ok(ExecEvent::Exited(frame.parse()?)),
        Kind::Error => Err(Error::Guest(frame.parse::<GuestError>()?)),
        other => Err(Error::Ended(format!("a {other:?} frame has no place here"))),
    }
}
