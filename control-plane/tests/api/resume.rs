//! Programs whose WebSocket breaks and is taken up again: what arrives, who may, and for how long.

use std::future::poll_fn;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use ark_types::agent::Agent;
use ark_types::exec::{CLOSE_TAKEN_UP, ExecAck, ExecEnd, ExecSession, ExitStatus};
use ark_types::guest::{ErrorCode, Frame, GuestError, Kind, MAX_PAYLOAD, Started};
use ark_types::problem::{Problem, ProblemKind};
use ark_types::replay::{ACK_EVERY, Replay, WINDOW, cost};
use bytes::Bytes;
use futures_util::{SinkExt as _, StreamExt as _};
use hyper::StatusCode;
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use sha2::Digest as _;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_tungstenite::tungstenite::{self, Message};

use crate::harness::{Ark, Client, Place, Stream, end_vmms, eventually, runs, signal, started};
use crate::streams::{Socket, open, open_over, peak_kib, stream};

/// A connection that breaks after so many bytes, each way, in the middle of whatever is on its way.
struct Cut {
    inner: Box<dyn Stream>,
    reads: usize,
    writes: usize,
}

impl AsyncRead for Cut {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        if self.reads == 0 {
            return Poll::Ready(Err(std::io::ErrorKind::ConnectionReset.into()));
        }
        let mut part = vec![0; self.reads.min(buf.remaining())];
        let mut part = ReadBuf::new(&mut part);
        let polled = Pin::new(&mut self.inner).poll_read(cx, &mut part);
        self.reads -= part.filled().len();
        buf.put_slice(part.filled());
        polled
    }
}

impl AsyncWrite for Cut {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        if self.writes == 0 {
            return Poll::Ready(Err(std::io::ErrorKind::ConnectionReset.into()));
        }
        let most = self.writes.min(buf.len());
        let polled = Pin::new(&mut self.inner).poll_write(cx, &buf[..most]);
        if let Poll::Ready(Ok(count)) = polled {
            self.writes -= count;
        }
        polled
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

/// A client that keeps to the protocol, over connections that do not last.
struct Patient {
    /// Input that was not said yet.
    source: std::vec::IntoIter<Frame>,
    input: Replay,
    next: u64,
    received: u64,
    untold: usize,
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    end: Option<ExecEnd>,
    connections: usize,
}

impl Patient {
    fn new(input: Vec<Frame>) -> Self {
        Self {
            source: input.into_iter(),
            input: Replay::new(WINDOW),
            next: 0,
            received: 0,
            untold: 0,
            stdout: Vec::new(),
            stderr: Vec::new(),
            end: None,
            connections: 0,
        }
    }

    /// Runs `argv` in `a1` to its end, over connections that carry `size(n)` bytes each way.
    async fn run(&mut self, client: &Client, argv: &[&str], size: impl Fn(usize) -> usize) {
        // The first one lasts until it is known what to take up.
        let mut socket = stream(client).await;
        socket.exec(json!({ "argv": argv, "resumable": true })).await;
        let session: ExecSession = socket.expect(Kind::Session).await.parse().unwrap();
        assert_eq!((session.received, session.grace_ms), (0, 3000));
        drop(socket);
        let path = format!("/v1/agents/a1/exec/stream/{}", session.id);
        while self.end.is_none() {
            self.connections += 1;
            assert!(self.connections < 5000, "it comes to no end");
            let size = size(self.connections);
            let stream = Cut { inner: client.connect().await, reads: size, writes: size };
            if let Ok(socket) = open_over(Box::new(stream), &format!("{path}?from={}", self.received)).await {
                let _ = self.converse(socket).await;
            }
        }
    }

    /// Goes on until the end or the connection's, both ways at once: who writes all it has before it reads may never come to that.
    async fn converse(&mut self, mut socket: Socket) -> Option<()> {
        let session: ExecSession = frame(socket.0.next().await?.ok()?)?.parse().unwrap();
        self.input.acknowledge(session.received).unwrap();
        (self.next, self.untold) = (session.received, 0);
        let (mut sink, mut source) = socket.0.split();
        let mut is_unsent = false;
        loop {
            let said = self.say();
            tokio::select! {
                biased;
                message = source.next() => {
                    if let Some(frame) = frame(message?.ok()?) && self.hear(&frame) {
                        let _ = sink.close().await;
                        return Some(());
                    }
                }
                ready = poll_fn(|cx| match &said {
                    Some(_) => sink.poll_ready_unpin(cx),
                    None => sink.poll_flush_unpin(cx),
                }), if said.is_some() || is_unsent => {
                    ready.ok()?;
                    is_unsent = said.is_some();
                    if let Some(said) = said {
                        sink.start_send_unpin(Message::Binary(said)).ok()?;
                        self.said();
                    }
                }
            }
        }
    }

    /// What is to be sent next, if there is anything.
    fn say(&mut self) -> Option<Bytes> {
        if self.untold >= ACK_EVERY {
            let ack = Frame::json(Kind::Ack, &ExecAck { received: self.received }).unwrap();
            return Some(ack.encode().into());
        }
        while self.input.has_room()
            && let Some(frame) = self.source.next()
        {
            self.input.push(frame.encode().into());
        }
        self.input.get(self.next).cloned()
    }

    /// What [`Self::say`] said is on its way.
    fn said(&mut self) {
        if self.untold >= ACK_EVERY {
            self.untold = 0;
        } else {
            self.next += 1;
        }
    }

    /// Whether `frame` is the last one.
    fn hear(&mut self, frame: &Frame) -> bool {
        match frame.kind {
            Kind::Ack => {
                self.input.acknowledge(frame.parse::<ExecAck>().unwrap().received).unwrap();
                return false;
            }
            Kind::Started => {}
            Kind::Stdout => self.stdout.extend_from_slice(&frame.payload),
            Kind::Stderr => self.stderr.extend_from_slice(&frame.payload),
            Kind::Exited => {
                self.end = Some(frame.parse().unwrap());
                return true;
            }
            other => panic!("{other:?}: {:?}", String::from_utf8_lossy(&frame.payload)),
        }
        self.received += 1;
        self.untold += cost(frame.encode().len());
        false
    }
}

fn frame(message: Message) -> Option<Frame> {
    match message {
        Message::Binary(bytes) => Some(Frame::decode(&bytes).unwrap()),
        _ => None,
    }
}

fn sha(bytes: &[u8]) -> String {
    sha2::Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Bytes that do not repeat.
fn noise(len: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[3]
    };
    (0..len).map(|_| next()).collect()
}

/// `bytes` as input, in frames of many sizes, and its end.
fn input(bytes: &[u8]) -> Vec<Frame> {
    let (mut rest, mut frames) = (bytes, Vec::new());
    for size in [1, 70_000, 17, MAX_PAYLOAD, 4096, 130_000].into_iter().cycle() {
        let (frame, after) = rest.split_at(size.min(rest.len()));
        frames.push(Frame::raw(Kind::Stdin, frame.to_vec()).unwrap());
        rest = after;
        if rest.is_empty() {
            break;
        }
    }
    frames.push(Frame::empty(Kind::StdinClose));
    frames
}

async fn with_agent() -> (Place, Ark) {
    let place = Place::new();
    let ark = place.start().await;
    ark.client.create("a1", "base").await;
    (place, ark)
}

#[tokio::test]
async fn large_output_arrives_once_over_connections_that_break_in_its_middle() {
    let (_place, ark) = with_agent().await;
    let script = "seq 1 500000; seq 500000 -1 1 >&2; exit 9";
    let mut patient = Patient::new(vec![Frame::empty(Kind::StdinClose)]);
    patient.run(&ark.client, &["sh", "-c", script], |n| 150_000 + n * 7919 % 300_000).await;
    let lines = |range: &mut dyn Iterator<Item = u32>| {
        range.map(|n| format!("{n}\n")).collect::<String>().into_bytes()
    };
    assert_eq!(sha(&patient.stdout), sha(&lines(&mut (1..=500_000))));
    assert_eq!(sha(&patient.stderr), sha(&lines(&mut (1..=500_000).rev())));
    assert_eq!(patient.end.unwrap().status, ExitStatus::Exited { code: 9 });
    assert!(patient.connections > 10, "{}", patient.connections);
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn large_input_arrives_once_over_connections_that_break_in_its_middle() {
    let (_place, ark) = with_agent().await;
    let bytes = noise(4 << 20);
    let mut patient = Patient::new(input(&bytes));
    patient.run(&ark.client, &["sha256sum"], |n| 100_000 + n * 104_729 % 450_000).await;
    assert_eq!(String::from_utf8_lossy(&patient.stdout), format!("{}  -\n", sha(&bytes)));
    assert!(patient.connections > 8, "{}", patient.connections);

    // Both ways at once: what comes back is what went in.
    let mut patient = Patient::new(input(&bytes));
    patient.run(&ark.client, &["cat"], |n| 150_000 + n * 104_729 % 450_000).await;
    assert_eq!(sha(&patient.stdout), sha(&bytes));
    assert_eq!(patient.end.unwrap().status, ExitStatus::Exited { code: 0 });
    ark.daemon.shut_down().await;
}

async fn begin(client: &Client, argv: &[&str]) -> (Socket, ExecSession, u32) {
    let mut socket = stream(client).await;
    socket.exec(json!({ "argv": argv, "resumable": true })).await;
    let session = socket.expect(Kind::Session).await.parse().unwrap();
    let started: Started = socket.expect(Kind::Started).await.parse().unwrap();
    (socket, session, started.pid)
}

fn again(session: &ExecSession, from: u64) -> String {
    format!("/v1/agents/a1/exec/stream/{}?from={from}", session.id)
}

async fn refused(client: &Client, path: &str) -> Problem {
    match open(client, path).await.map(|_| ()) {
        Err(tungstenite::Error::Http(reply)) => {
            serde_json::from_slice(reply.body().as_ref().unwrap()).unwrap()
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_client_that_does_not_come_back_loses_its_program_after_the_time_of_grace() {
    let (_place, ark) = with_agent().await;
    let (socket, session, pid) = begin(&ark.client, &["sleep", "1000"]).await;
    let left = std::time::Instant::now();
    drop(socket);
    eventually("the program is gone", async || !runs(pid)).await;
    assert!(left.elapsed() >= Duration::from_secs(2), "it had no time of grace");
    eventually("its session is gone", async || {
        matches!(
            open(&ark.client, &again(&session, 0)).await,
            Err(tungstenite::Error::Http(reply)) if reply.status() == StatusCode::NOT_FOUND
        )
    })
    .await;
    assert_eq!(refused(&ark.client, &again(&session, 0)).await.kind, ProblemKind::ExecNotFound);
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn who_closes_in_order_ends_the_program_at_once_and_nobody_waits_for_the_end_of_arkd() {
    let place = Place::new();
    let mut config = place.config();
    config.timing.exec_grace = Duration::from_secs(80_000);
    let ark = place.start_with(config).await;
    ark.client.create("a1", "base").await;
    let (mut socket, session, pid) = begin(&ark.client, &["sleep", "1000"]).await;
    socket.0.close(None).await.unwrap();
    eventually("the program is gone", async || !runs(pid)).await;
    drop(socket);
    eventually("its session is gone", async || open(&ark.client, &again(&session, 0)).await.is_err()).await;
    // One that waits for its client when arkd ends.
    let (socket, _, pid) = begin(&ark.client, &["sleep", "1000"]).await;
    drop(socket);
    ark.daemon.leave().await;
    eventually("the program is gone", async || !runs(pid)).await;
    end_vmms(&place.run());
}

#[tokio::test]
async fn the_end_waits_for_its_client_even_if_the_agent_does_not() {
    let place = Place::new();
    let ark = place.start().await;
    let body = json!({ "name": "a1", "image": "base", "memory_mib": 64, "auto_remove": true });
    let agent: Agent = ark.client.post("/v1/agents", &body).await.json();
    let (socket, session, pid) = begin(&ark.client, &["sh", "-c", "read a; echo got $a; exit 7"]).await;
    drop(socket);
    // The agent does not go with the connection.
    let mut socket = open(&ark.client, &again(&session, 1)).await.unwrap();
    assert_eq!(socket.expect(Kind::Session).await.parse::<ExecSession>().unwrap().received, 0);
    assert!(runs(pid));
    socket.send(Frame::raw(Kind::Stdin, b"word\n".to_vec()).unwrap()).await;
    socket.expect(Kind::Stdout).await;
    // It breaks before the end is told.
    drop(socket);
    eventually("the agent is gone", async || {
        ark.client.get("/v1/agents/a1").await.status() == StatusCode::NOT_FOUND
    })
    .await;
    let path = format!("/v1/agents/{}/exec/stream/{}?from=1", agent.id, session.id);
    let mut socket = open(&ark.client, &path).await.unwrap();
    assert_eq!(socket.expect(Kind::Session).await.parse::<ExecSession>().unwrap().received, 1);
    assert_eq!(socket.expect(Kind::Stdout).await.payload, b"got word\n");
    let end: ExecEnd = socket.expect(Kind::Exited).await.parse().unwrap();
    assert_eq!(end.status, ExitStatus::Exited { code: 7 });
    assert!(socket.next().await.is_none());
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn the_newer_client_takes_over_and_the_older_is_told() {
    let (_place, ark) = with_agent().await;
    let (mut older, session, _) = begin(&ark.client, &["cat"]).await;
    older.send(Frame::raw(Kind::Stdin, b"one".to_vec()).unwrap()).await;
    older.expect(Kind::Stdout).await;
    let mut newer = open(&ark.client, &again(&session, 1)).await.unwrap();
    assert_eq!(newer.expect(Kind::Session).await.parse::<ExecSession>().unwrap().received, 1);
    assert_eq!(newer.expect(Kind::Stdout).await.payload, b"one", "sent again: nobody acknowledged it");
    loop {
        match older.0.next().await.unwrap().unwrap() {
            Message::Close(Some(why)) => {
                assert_eq!(u16::from(why.code), CLOSE_TAKEN_UP);
                assert_eq!(why.reason.as_str(), "another client took the program up");
                break;
            }
            Message::Ping(_) => {}
            other => panic!("{other:?}"),
        }
    }
    newer.send(Frame::raw(Kind::Stdin, b"two".to_vec()).unwrap()).await;
    newer.send(Frame::empty(Kind::StdinClose)).await;
    assert_eq!(newer.expect(Kind::Stdout).await.payload, b"two");
    newer.expect(Kind::Exited).await;
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn what_cannot_be_taken_up_is_a_problem_that_says_why() {
    let (_place, ark) = with_agent().await;
    ark.client.create("a2", "base").await;
    let (mut socket, session, _) = begin(&ark.client, &["cat"]).await;
    let unknown = refused(&ark.client, "/v1/agents/a1/exec/stream/0123?from=0").await;
    assert_eq!(unknown.kind, ProblemKind::ExecNotFound);
    let elsewhere = again(&session, 0).replace("/a1/", "/a2/");
    assert_eq!(refused(&ark.client, &elsewhere).await.kind, ProblemKind::ExecNotFound);
    let ahead = refused(&ark.client, &again(&session, 9)).await;
    assert_eq!(ahead.kind, ProblemKind::InvalidValue);
    assert!(ahead.detail.contains("only 1 frames"), "{ahead}");
    ark.client.get(&again(&session, 0)).await.problem(ProblemKind::BadRequest);

    socket.send(Frame::json(Kind::Ack, &ExecAck { received: 1 }).unwrap()).await;
    socket.send(Frame::raw(Kind::Stdin, b"x".to_vec()).unwrap()).await;
    socket.expect(Kind::Stdout).await;
    let gone = refused(&ark.client, &again(&session, 0)).await;
    assert_eq!((gone.kind, gone.status), (ProblemKind::ExecOutputGone, 410));
    assert!(
        gone.detail.contains("1 frames of the output, from number 0 on") && gone.detail.ends_with("from=1"),
        "{gone}"
    );

    // None of that was of harm to the one who has it.
    socket.send(Frame::empty(Kind::StdinClose)).await;
    socket.expect(Kind::Exited).await;
    let whole = ark.client.exec("a1", &json!({ "argv": ["true"], "resumable": true })).await;
    assert!(whole.problem(ProblemKind::InvalidValue).detail.contains("resumable"));
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn who_breaks_the_protocol_is_told_and_loses_the_program() {
    let (_place, ark) = with_agent().await;
    let flood = Message::Binary(Frame::raw(Kind::Stdin, vec![7; MAX_PAYLOAD]).unwrap().encode().into());
    let ack =
        |received| Message::Binary(Frame::json(Kind::Ack, &ExecAck { received }).unwrap().encode().into());
    for (messages, says) in [
        // More than the window, to a program that reads nothing, and what the pipes on the way hold.
        (vec![flood; 40], "wait for acknowledgements"),
        (vec![ack(5)], "5 frames are acknowledged, and only 1 were sent"),
        (vec![Message::Binary(Frame::empty(Kind::Session).encode().into())], "does not belong here"),
        (vec![Message::Binary(Frame::raw(Kind::Ack, b"{}".to_vec()).unwrap().encode().into())], "received"),
    ] {
        let (mut socket, _, pid) = begin(&ark.client, &["sleep", "1000"]).await;
        for message in messages {
            // Once it is refused nobody listens.
            let _ = socket.0.send(message).await;
        }
        let said = loop {
            let frame = socket.next().await.unwrap();
            if frame.kind != Kind::Ack {
                break frame;
            }
        };
        assert_eq!(said.kind, Kind::Error);
        let error: GuestError = said.parse().unwrap();
        assert_eq!(error.code, ErrorCode::BadRequest);
        assert!(error.message.contains(says), "{error}");
        if says.starts_with("wait") {
            // The fake guest is stuck where it writes to the program; a real one is not.
            signal(pid, Signal::SIGKILL);
        }
        eventually("the program is gone", async || !runs(pid)).await;
    }
    // An Ack has no meaning where nothing is kept.
    let mut socket = stream(&ark.client).await;
    socket.exec(json!({ "argv": ["sleep", "1000"] })).await;
    socket.expect(Kind::Started).await;
    socket.0.send(ack(0)).await.unwrap();
    assert!(socket.expect(Kind::Error).await.parse::<GuestError>().unwrap().message.contains("Ack"));
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn a_program_waits_for_a_client_that_is_slow_or_away_and_arkd_stays_small() {
    let place = Place::new();
    // A process of its own: its memory is not that of the tests beside this one.
    let (arkd, client) = started(&place, &[]).await;
    client.create("a1", "base").await;
    let total: usize = 100_000_000;
    let request: Value = json!({ "argv": ["head", "-c", total.to_string(), "/dev/zero"], "resumable": true });
    let mut socket = stream(&client).await;
    socket.exec(request).await;
    let session: ExecSession = socket.expect(Kind::Session).await.parse().unwrap();
    let before = peak_kib(arkd.child.id());
    // Nobody acknowledges: what comes without that is the window and a frame, each counted with its overhead.
    let (mut came, mut received) = (0, 0);
    while came < WINDOW / 2 {
        let frame = socket.next().await.unwrap();
        came += if frame.kind == Kind::Stdout { frame.payload.len() } else { 0 };
        received += 1;
    }
    let more = tokio::time::timeout(Duration::from_secs(2), async {
        loop {
            let frame = socket.next().await.unwrap();
            assert_eq!(frame.kind, Kind::Stdout);
            came += frame.payload.len();
            received += 1;
        }
    });
    assert!(more.await.is_err(), "{came} bytes came unacknowledged");
    assert!(came <= WINDOW + MAX_PAYLOAD, "{came}");
    drop(socket);
    let mut socket = open(&client, &again(&session, received)).await.unwrap();
    socket.expect(Kind::Session).await;
    loop {
        let frame = socket.next().await.unwrap();
        match frame.kind {
            Kind::Stdout => came += frame.payload.len(),
            Kind::Exited => break,
            other => panic!("{other:?}"),
        }
        received += 1;
        socket.send(Frame::json(Kind::Ack, &ExecAck { received }).unwrap()).await;
    }
    assert_eq!(came, total);
    let grown = peak_kib(arkd.child.id()) - before;
    assert!(grown < 32 << 10, "{grown} KiB more");
}
