//! A WebSocket on one side, a guest on the other: frames pass one by one, checked in both directions.
//!
//! Nothing is queued here. A slow client stops the reading of the guest's frames, and so the guest's program; a program
//! that does not read stops the reading of the client's. A client that vanished is noticed by its closed socket, or by the
//! next ping, and the guest's connection is dropped with it: guestd then kills the program.

use std::collections::BTreeMap;
use std::time::Duration;

use ark_types::exec::ExecRequest;
use ark_types::guest::{EncodedFrame, ErrorCode, Frame, GuestError, HEADER_LEN, Kind, MAX_PAYLOAD};
use axum::extract::ws::{Message, WebSocket, WebSocketUpgrade};
use axum::response::Response;
use bytes::Bytes;
use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{SinkExt as _, StreamExt as _};
use tokio::time::{MissedTickBehavior, interval, timeout};

use crate::agent::Handle;
use crate::guest::{Address, Connection, FrameReader, FrameWriter, GuestFailure};
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

/// Why a stream ended without `Exited`.
enum Broken {
    /// Nobody is left to tell.
    ClientLeft,
    /// The client broke the protocol, or asked for what cannot be.
    Client(GuestError),
    /// The guest's side failed.
    Guest(GuestFailure),
}

impl From<GuestFailure> for Broken {
    fn from(failure: GuestFailure) -> Self {
        Self::Guest(failure)
    }
}

fn refuse(message: impl Into<String>) -> Broken {
    Broken::Client(GuestError { code: ErrorCode::BadRequest, message: message.into() })
}

/// Upgrades to a WebSocket that runs one program at `peer`, which goes on with the trace `traceparent`.
pub(super) fn accept(upgrade: WebSocketUpgrade, peer: Peer, traceparent: Option<String>) -> Response {
    upgrade
        .max_message_size(HEADER_LEN + MAX_PAYLOAD)
        .max_frame_size(HEADER_LEN + MAX_PAYLOAD)
        .on_upgrade(move |socket| serve(socket, peer, traceparent))
}

async fn serve(mut socket: WebSocket, peer: Peer, traceparent: Option<String>) {
    let streaming = match &peer {
        Peer::Agent(agent) => agent.streaming(),
        Peer::Host(_) => None,
    };
    let error = match relay(&mut socket, &peer, traceparent).await {
        Ok(()) => None,
        Err(Broken::ClientLeft) => return,
        Err(Broken::Client(error)) => Some(error),
        Err(Broken::Guest(failure)) => Some(peer.account_for(failure).await),
    };
    drop(streaming);
    if let Some(frame) = error.and_then(|error| Frame::json(Kind::Error, &error).ok()) {
        let _ = socket.send(Message::Binary(frame.encode().into())).await;
    }
    // A client that closes in order has read everything; one that does not is cut after a while.
    let _ = socket.send(Message::Close(None)).await;
    let _ = timeout(PATIENCE, async { while let Some(Ok(_)) = socket.recv().await {} }).await;
}

impl Peer {
    fn address(&self) -> Result<&Address, Broken> {
        match self {
            Self::Agent(agent) => agent.guest().map_err(|error| {
                Broken::Client(GuestError { code: ErrorCode::Internal, message: error.to_string() })
            }),
            Self::Host(address) => Ok(address),
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

/// From the client's `Exec` to the guest's `Exited`.
async fn relay(socket: &mut WebSocket, peer: &Peer, traceparent: Option<String>) -> Result<(), Broken> {
    let first = timeout(PATIENCE, next_message(socket)).await;
    let first =
        first.map_err(|_| refuse(format!("no Exec frame came within {} s", PATIENCE.as_secs())))??;
    let mut request = exec_request(&first)?;
    pass_on(&mut request, traceparent);
    let (exec, _) = prepare_exec(request, &peer.env()).map_err(|refusal| refuse(refusal.0.detail))?;
    let Connection { mut reader, mut writer } = Connection::open(peer.address()?, &exec.encode()).await?;
    let (mut sink, mut source) = socket.split();
    tokio::select! {
        ended = to_client(&mut reader, &mut sink) => ended,
        left = to_guest(&mut source, &mut writer) => Err(left),
    }
}

fn exec_request(frame: &EncodedFrame) -> Result<ExecRequest, Broken> {
    if frame.kind() != Kind::Exec {
        return Err(refuse(format!("the first frame is {:?}, not Exec", frame.kind())));
    }
    let request: ExecRequest = frame.parse().map_err(|e| refuse(e.to_string()))?;
    if request.stdin.is_some() {
        return Err(refuse("stdin belongs into Stdin frames, not into the Exec frame of a stream"));
    }
    Ok(request)
}

/// The guest's frames on their way to the client, until `Exited`.
async fn to_client(
    reader: &mut FrameReader,
    sink: &mut SplitSink<&mut WebSocket, Message>,
) -> Result<(), Broken> {
    let mut ping = interval(PING_INTERVAL);
    ping.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let frame = tokio::select! {
            biased;
            frame = reader.next() => frame,
            _ = ping.tick() => {
                sink.send(Message::Ping(Bytes::new())).await.map_err(|_| Broken::ClientLeft)?;
                continue;
            }
        };
        // Frames that came together go out together: one system call for many small ones.
        let mut next = Some(frame?);
        while let Some(frame) = next {
            let last = match frame.kind() {
                Kind::Started | Kind::Stdout | Kind::Stderr => false,
                Kind::Exited => true,
                other => return Err(GuestFailure::Unexpected(other).into()),
            };
            sink.feed(Message::Binary(frame.into_bytes())).await.map_err(|_| Broken::ClientLeft)?;
            if last {
                return sink.flush().await.map_err(|_| Broken::ClientLeft);
            }
            next = reader.buffered()?;
        }
        sink.flush().await.map_err(|_| Broken::ClientLeft)?;
    }
}

/// The client's frames on their way to the guest, until the client leaves or breaks the protocol.
async fn to_guest(source: &mut SplitStream<&mut WebSocket>, writer: &mut FrameWriter) -> Broken {
    let mut listens = true;
    loop {
        let frame = match next_message(source).await {
            Ok(frame) => frame,
            Err(broken) => return broken,
        };
        match frame.kind() {
            Kind::Stdin | Kind::StdinClose | Kind::Signal | Kind::Resize => {}
            other => return refuse(format!("a frame of kind {other:?} does not belong here")),
        }
        // A guest that takes no more has ended the program; how is told by the other direction.
        listens = listens && writer.send_encoded(&frame.into_bytes()).await.is_ok();
    }
}

/// The client's next frame.
async fn next_message<S>(source: &mut S) -> Result<EncodedFrame, Broken>
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
            Some(Ok(Message::Close(_)) | Err(_)) | None => return Err(Broken::ClientLeft),
        }
    }
}
