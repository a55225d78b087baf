//! A WebSocket on one side, a guest on the other: frames pass one by one, checked in both directions.
//!
//! A slow client stops the reading of the guest's frames, and so the guest's program; a program that does not read stops its
//! client. A client that vanished is noticed by its closed socket, or by the next ping. The guest's connection is dropped with it,
//! and guestd then kills the program; where the stream can be taken up again that happens after a time of grace, in which another
//! WebSocket may take its place ([`crate::execs`]). A client that closes in order, rather than vanishes, ends its program at once.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use ark_types::exec::{CLOSE_TAKEN_UP, ExecAck, ExecRequest};
use ark_types::guest::{EncodedFrame, ErrorCode, Frame, GuestError, HEADER_LEN, Kind, MAX_PAYLOAD};
use axum::extract::ws::{CloseFrame, Message, WebSocket, WebSocketUpgrade};
use axum::response::Response;
use bytes::Bytes;
use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{SinkExt as _, StreamExt as _};
use tokio::sync::mpsc;
use tokio::time::{MissedTickBehavior, interval, timeout};

use super::Shared;
use crate::agent::{Handle, Streaming};
use crate::execs::{Session, Taker};
use crate::guest::{Address, Connection, FrameReader, FrameWriter, GuestFailure};
use crate::problems::Refusal;
use crate::traces::pass_on;
use crate::validate::prepare_exec;

/// How long a client may take to say what to run, and to close when all is said.
const PATIENCE: Duration = Duration::from_secs(10);
/// Time between pings: bounds how long a vanished client goes unnoticed while nothing else is sent.
const PING_INTERVAL: Duration = Duration::from_secs(5);

/// Where the program runs.
#[derive(Clone, Debug)]
pub(super) enum Peer {
    /// In an agent.
    Agent(Handle),
    /// On this host, by its own guestd.
    Host(Address),
}

/// How a client's WebSocket came to its end.
enum Left {
    /// It has read everything, or wants no more.
    InOrder,
    /// It vanished.
    Vanished,
    /// It broke the protocol, or asked for what cannot be.
    Refused(GuestError),
}

fn bad_request(message: impl Into<String>) -> GuestError {
    GuestError { code: ErrorCode::BadRequest, message: message.into() }
}

fn refuse(message: impl Into<String>) -> Left {
    Left::Refused(bad_request(message))
}

fn bounded(upgrade: WebSocketUpgrade) -> WebSocketUpgrade {
    upgrade.max_message_size(HEADER_LEN + MAX_PAYLOAD).max_frame_size(HEADER_LEN + MAX_PAYLOAD)
}

/// Upgrades to a WebSocket that runs one program at `peer`, which goes on with the trace `traceparent`.
pub(super) fn accept(
    core: Shared,
    upgrade: WebSocketUpgrade,
    peer: Peer,
    traceparent: Option<String>,
) -> Response {
    bounded(upgrade).on_upgrade(async move |mut socket| {
        let streaming = peer.streaming();
        let left = match begin(&mut socket, &peer, traceparent).await {
            Ok(request) => run(&core, socket, &peer, request, streaming).await,
            Err(left) => {
                drop(streaming);
                match left {
                    Left::Refused(error) => Some((socket, error)),
                    Left::InOrder | Left::Vanished => None,
                }
            }
        };
        if let Some((socket, error)) = left {
            part(socket, &error).await;
        }
    })
}

/// Upgrades to a WebSocket that takes `session` up for a client that has `from` frames.
pub(super) fn take_up(upgrade: WebSocketUpgrade, session: Arc<Session>, from: u64) -> Response {
    bounded(upgrade).on_upgrade(async move |socket| {
        if let Err(Taker { socket, .. }) = session.hand(Taker { socket, from }).await {
            part(socket, &bad_request("the exec ended just now")).await;
        }
    })
}

/// Says `error` and closes. A client that closes in order has read everything; one that does not is cut after a
/// while.
async fn part(mut socket: WebSocket, error: &GuestError) {
    if let Ok(frame) = Frame::json(Kind::Error, error) {
        let _ = socket.send(Message::Binary(frame.encode().into())).await;
    }
    let _ = socket.send(Message::Close(None)).await;
    let _ = timeout(PATIENCE, async { while let Some(Ok(_)) = socket.recv().await {} }).await;
}

/// Tells a client that another one has its program now.
async fn dismiss(mut socket: WebSocket) {
    let why = CloseFrame { code: CLOSE_TAKEN_UP, reason: "another client took the program up".into() };
    let close = async {
        let _ = socket.send(Message::Close(Some(why))).await;
        while let Some(Ok(_)) = socket.recv().await {}
    };
    let _ = timeout(PATIENCE, close).await;
}

impl Peer {
    fn address(&self) -> Result<&Address, GuestError> {
        match self {
            Self::Agent(agent) => agent
                .guest()
                .map_err(|error| GuestError { code: ErrorCode::Internal, message: error.to_string() }),
            Self::Host(address) => Ok(address),
        }
    }

    fn streaming(&self) -> Option<Streaming> {
        match self {
            Self::Agent(agent) => agent.streaming(),
            Self::Host(_) => None,
        }
    }

    fn env(&self) -> BTreeMap<String, String> {
        match self {
            Self::Agent(agent) => agent.env().clone(),
            Self::Host(_) => BTreeMap::new(),
        }
    }

    /// What `failure` means to the client.
    async fn account_for(&self, failure: GuestFailure) -> GuestError {
        match (failure, self) {
            (GuestFailure::Said(error), _) => error,
            (failure, Self::Agent(agent)) => {
                let message = agent.explain(failure).await.to_string();
                GuestError { code: ErrorCode::Internal, message }
            }
            (failure, Self::Host(_)) => {
                GuestError { code: ErrorCode::Internal, message: failure.to_string() }
            }
        }
    }
}

/// The client's first frame: what to run.
async fn begin(
    socket: &mut WebSocket,
    peer: &Peer,
    traceparent: Option<String>,
) -> Result<ExecRequest, Left> {
    let first = timeout(PATIENCE, next_message(socket)).await;
    let first =
        first.map_err(|_| refuse(format!("no Exec frame came within {} s", PATIENCE.as_secs())))??;
    let mut request = exec_request(&first)?;
    if request.resumable && matches!(peer, Peer::Host(_)) {
        return Err(refuse("resumable is for programs in agents: leave it out here"));
    }
    pass_on(&mut request, traceparent);
    Ok(request)
}

fn exec_request(frame: &EncodedFrame) -> Result<ExecRequest, Left> {
    if frame.kind() != Kind::Exec {
        return Err(refuse(format!("the first frame is {:?}, not Exec", frame.kind())));
    }
    let request: ExecRequest = frame.parse().map_err(|e| refuse(e.to_string()))?;
    if request.stdin.is_some() {
        return Err(refuse("stdin belongs into Stdin frames, not into the Exec frame of a stream"));
    }
    Ok(request)
}

/// From the client's `Exec` to the end of its program, or of its time. A client that is still to be told something is returned:
/// by then the program is gone.
async fn run(
    core: &Shared,
    socket: WebSocket,
    peer: &Peer,
    mut request: ExecRequest,
    streaming: Option<Streaming>,
) -> Option<(WebSocket, GuestError)> {
    let (mut opened, plain);
    let resumable = std::mem::take(&mut request.resumable);
    let (session, takers) = match peer {
        Peer::Agent(agent) if resumable => match core.execs.open(agent, core.config.timing.exec_grace) {
            Ok(new) => {
                opened = new;
                (&*opened.session, Some(&mut opened.takers))
            }
            Err(Refusal(problem)) => {
                return Some((socket, GuestError { code: ErrorCode::Exhausted, message: problem.detail }));
            }
        },
        _ => {
            plain = Session::plain();
            (&plain, None)
        }
    };
    let connection = match connect(peer, request).await {
        Ok(connection) => connection,
        Err(error) => return Some((socket, error)),
    };
    tokio::select! {
        left = clients(core, session, socket, takers) => left,
        never = carry_out(connection, session, peer, streaming) => match never {},
    }
}

async fn connect(peer: &Peer, request: ExecRequest) -> Result<Connection, GuestError> {
    let (exec, _) = prepare_exec(request, &peer.env()).map_err(|refusal| bad_request(refusal.0.detail))?;
    match Connection::open(peer.address()?, &exec.encode()).await {
        Ok(connection) => Ok(connection),
        Err(failure) => Err(peer.account_for(failure).await),
    }
}

/// The guest's side: until the program ended, and then no more. Dropping it ends the program.
async fn carry_out(
    connection: Connection,
    session: &Session,
    peer: &Peer,
    streaming: Option<Streaming>,
) -> Infallible {
    let Connection { mut reader, mut writer } = connection;
    let ended = tokio::select! {
        ended = listen(&mut reader, session) => ended,
        never = feed(&mut writer, session) => match never {},
    };
    drop((reader, writer));
    if let Err(failure) = ended {
        session.fail(&peer.account_for(failure).await);
    }
    // What is still to be told needs no agent.
    drop(streaming);
    std::future::pending().await
}

/// What the guest says, until `Exited`.
async fn listen(reader: &mut FrameReader, session: &Session) -> Result<(), GuestFailure> {
    loop {
        session.room().await;
        let frame = reader.next().await?;
        let last = match frame.kind() {
            Kind::Started | Kind::Stdout | Kind::Stderr => false,
            Kind::Exited => true,
            other => return Err(GuestFailure::Unexpected(other)),
        };
        session.say(frame, last);
        if last {
            return Ok(());
        }
    }
}

/// The clients' input on its way to the guest.
async fn feed(writer: &mut FrameWriter, session: &Session) -> Infallible {
    let mut listens = true;
    loop {
        let frame = session.take().await;
        // A guest that takes no more has ended the program; how is told by the other direction.
        listens = listens && writer.send_encoded(&frame).await.is_ok();
    }
}

/// The clients' side: one after the other, until nobody is to be served any more. One that broke the protocol is returned.
async fn clients(
    core: &Shared,
    session: &Session,
    mut socket: WebSocket,
    mut takers: Option<&mut mpsc::Receiver<Taker>>,
) -> Option<(WebSocket, GuestError)> {
    loop {
        let left = tokio::select! {
            left = talk(session, &mut socket) => left,
            taker = next_taker(session, &mut takers) => {
                tokio::spawn(dismiss(std::mem::replace(&mut socket, taker)));
                continue;
            }
        };
        match (left, session.grace()) {
            (Left::InOrder, _) | (Left::Vanished, None) => return None,
            (Left::Refused(error), _) => return Some((socket, error)),
            (Left::Vanished, Some(grace)) => {
                let taker = timeout(grace, next_taker(session, &mut takers));
                match core.closing.run_until_cancelled(taker).await {
                    Some(Ok(taker)) => socket = taker,
                    Some(Err(_)) | None => return None,
                }
            }
        }
    }
}

/// The next client that takes the session up and can have what it asks for.
async fn next_taker(session: &Session, takers: &mut Option<&mut mpsc::Receiver<Taker>>) -> WebSocket {
    let Some(takers) = takers else { return std::future::pending().await };
    loop {
        // The session has a sender.
        let Some(Taker { socket, from }) = takers.recv().await else { return std::future::pending().await };
        match session.turn_to(from) {
            Ok(()) => return socket,
            Err(Refusal(problem)) => {
                tokio::spawn(async move { part(socket, &bad_request(problem.detail)).await });
            }
        }
    }
}

/// One client, until everything is said or it leaves.
async fn talk(session: &Session, socket: &mut WebSocket) -> Left {
    let (mut sink, mut source) = socket.split();
    let told = tokio::select! {
        told = to_client(session, &mut sink) => told,
        left = from_client(session, &mut source) => return left,
    };
    if told.is_err() || sink.send(Message::Close(None)).await.is_err() {
        return Left::Vanished;
    }
    // Closing in order, it says that it has read everything.
    let closes = async {
        loop {
            match source.next().await {
                Some(Ok(Message::Close(_))) => return Left::InOrder,
                Some(Ok(_)) => {}
                Some(Err(_)) | None => return Left::Vanished,
            }
        }
    };
    timeout(PATIENCE, closes).await.unwrap_or(Left::Vanished)
}

/// What is said on its way to the client, to the last word.
async fn to_client(
    session: &Session,
    sink: &mut SplitSink<&mut WebSocket, Message>,
) -> Result<(), axum::Error> {
    let mut ping = interval(PING_INTERVAL);
    ping.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        // What came together goes out together: one system call for many small frames.
        while let Some(message) = session.next_message() {
            sink.feed(Message::Binary(message)).await?;
        }
        sink.flush().await?;
        if session.is_told() {
            return Ok(());
        }
        tokio::select! {
            biased;
            () = session.news() => {}
            _ = ping.tick() => sink.send(Message::Ping(Bytes::new())).await?,
        }
    }
}

/// The client's frames, until it leaves or breaks the protocol.
async fn from_client(session: &Session, source: &mut SplitStream<&mut WebSocket>) -> Left {
    loop {
        session.may_read().await;
        let frame = match next_message(source).await {
            Ok(frame) => frame,
            Err(left) => return left,
        };
        let kept = match frame.kind() {
            Kind::Stdin | Kind::StdinClose | Kind::Signal | Kind::Resize => {
                if session.give(frame.into_bytes()) {
                    Ok(())
                } else {
                    Err("more input came than may be under way: wait for acknowledgements".to_owned())
                }
            }
            Kind::Ack if session.is_resumable() => match frame.parse::<ExecAck>() {
                Ok(ExecAck { received }) => session.acknowledge(received).map_err(|e| e.to_string()),
                Err(error) => Err(error.to_string()),
            },
            other => Err(format!("a frame of kind {other:?} does not belong here")),
        };
        if let Err(message) = kept {
            return refuse(message);
        }
    }
}

/// The client's next frame.
async fn next_message<S>(source: &mut S) -> Result<EncodedFrame, Left>
where
    S: futures_util::Stream<Item = Result<Message, axum::Error>> + Unpin,
{
    loop {
        match source.next().await {
            Some(Ok(Message::Binary(bytes))) => {
                return EncodedFrame::try_from(bytes).map_err(|e| refuse(e.to_string()));
            }
            Some(Ok(Message::Text(_))) => {
                return Err(refuse("a text message came: frames are binary messages"));
            }
            Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
            Some(Ok(Message::Close(_))) => return Err(Left::InOrder),
            Some(Err(_)) | None => return Err(Left::Vanished),
        }
    }
}
