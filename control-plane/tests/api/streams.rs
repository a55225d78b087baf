//! Programs as WebSockets.

use std::time::Duration;

use ark_types::agent::Agent;
use ark_types::exec::{ExecEnd, ExitStatus};
use ark_types::guest::{ErrorCode, Frame, GuestError, Kind, SignalRequest, Started};
use ark_types::problem::{Problem, ProblemKind};
use futures_util::{SinkExt as _, StreamExt as _};
use hyper::StatusCode;
use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::{self, Message};
use tokio_tungstenite::{WebSocketStream, client_async};

use crate::harness::{Client, Place, Stream, eventually, runs, started};

pub(crate) struct Socket(WebSocketStream<Box<dyn Stream>>);

pub(crate) async fn open(client: &Client, path: &str) -> Result<Socket, tungstenite::Error> {
    let (socket, _) = client_async(format!("ws://ark{path}"), client.connect().await).await?;
    Ok(Socket(socket))
}

impl Socket {
    async fn send(&mut self, frame: Frame) {
        self.0.send(Message::Binary(frame.encode().into())).await.unwrap();
    }

    pub(crate) async fn exec(&mut self, request: Value) {
        self.send(Frame::json(Kind::Exec, &request).unwrap()).await;
    }

    /// The next frame; none when the socket was closed.
    async fn next(&mut self) -> Option<Frame> {
        loop {
            match self.0.next().await?.unwrap() {
                Message::Binary(bytes) => return Some(Frame::decode(&bytes).unwrap()),
                Message::Close(_) => return None,
                _ => {}
            }
        }
    }

    pub(crate) async fn expect(&mut self, kind: Kind) -> Frame {
        let frame = self.next().await.unwrap();
        assert_eq!(frame.kind, kind, "{:?}", String::from_utf8_lossy(&frame.payload));
        frame
    }
}

async fn stream(client: &Client) -> Socket {
    open(client, "/v1/agents/a1/exec/stream").await.unwrap()
}

#[tokio::test]
async fn input_output_signals_and_the_end_pass_frame_by_frame() {
    let place = Place::new();
    let ark = place.start().await;
    ark.client.create("a1", "base").await;
    let mut socket = stream(&ark.client).await;
    socket.exec(json!({ "argv": ["sh", "-c", "read a; echo got $a; echo err >&2; sleep 1000"] })).await;
    socket.expect(Kind::Started).await;
    socket.send(Frame::raw(Kind::Stdin, b"word\n".to_vec()).unwrap()).await;
    let mut outputs = [socket.next().await.unwrap(), socket.next().await.unwrap()];
    outputs.sort_by_key(|frame| frame.kind as u8);
    assert_eq!(outputs[0], Frame::raw(Kind::Stdout, b"got word\n".to_vec()).unwrap());
    assert_eq!(outputs[1], Frame::raw(Kind::Stderr, b"err\n".to_vec()).unwrap());
    socket.send(Frame::empty(Kind::StdinClose)).await;
    // The shell dies by the signal; its child holds the output open, so the whole group gets it in a real guest.
    socket.send(Frame::json(Kind::Signal, &SignalRequest { signal: 15 }).unwrap()).await;
    drop(socket);

    let mut socket = stream(&ark.client).await;
    socket.exec(json!({ "argv": ["sh", "-c", "kill -15 $$"] })).await;
    socket.expect(Kind::Started).await;
    let end: ExecEnd = socket.expect(Kind::Exited).await.parse().unwrap();
    assert_eq!(end.status, ExitStatus::Signaled { signal: 15 });
    assert!(socket.next().await.is_none());
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn a_slow_client_holds_the_program_back_and_arkd_stays_small() {
    let place = Place::new();
    // A process of its own: its memory is not that of the tests beside this one.
    let (arkd, client) = started(&place, &[]).await;
    client.create("a1", "base").await;
    let mut socket = stream(&client).await;
    let total = 300_000_000;
    socket.exec(json!({ "argv": ["head", "-c", total.to_string(), "/dev/zero"] })).await;
    socket.expect(Kind::Started).await;
    let before = peak_kib(arkd.child.id());
    tokio::time::sleep(Duration::from_millis(500)).await;
    let mut received = 0;
    loop {
        let frame = socket.next().await.unwrap();
        match frame.kind {
            Kind::Stdout => received += frame.payload.len(),
            Kind::Exited => break,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(received, total);
    let grown = peak_kib(arkd.child.id()) - before;
    assert!(grown < 32 << 10, "{grown} KiB more for 300 MB of output");
}

/// Most memory the process ever had resident.
pub(crate) fn peak_kib(pid: u32) -> usize {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

#[tokio::test]
async fn errors_come_as_frames_once_the_socket_is_open() {
    let place = Place::new();
    let ark = place.start().await;
    ark.client.create("a1", "base").await;
    for (first, code, says) in [
        (Frame::json(Kind::Exec, &json!({ "argv": ["/no/such"] })), ErrorCode::ProgramNotFound, "/no/such"),
        (Frame::json(Kind::Exec, &json!({ "argv": [] })), ErrorCode::BadRequest, "argv is empty"),
        (
            Frame::json(Kind::Exec, &json!({ "argv": ["a"], "stdin": "x" })),
            ErrorCode::BadRequest,
            "Stdin frames",
        ),
        (Frame::json(Kind::Exec, &json!({})), ErrorCode::BadRequest, "argv"),
        (Ok(Frame::empty(Kind::PowerOff)), ErrorCode::BadRequest, "PowerOff"),
    ] {
        let mut socket = stream(&ark.client).await;
        socket.send(first.unwrap()).await;
        let error: GuestError = socket.expect(Kind::Error).await.parse().unwrap();
        assert_eq!(error.code, code);
        assert!(error.message.contains(says), "{error}");
        assert!(socket.next().await.is_none());
    }
    // In the middle of a program: what does not belong there ends the stream, and the program.
    let mut socket = stream(&ark.client).await;
    socket.exec(json!({ "argv": ["sleep", "1000"] })).await;
    let started: Started = socket.expect(Kind::Started).await.parse().unwrap();
    socket.send(Frame::empty(Kind::PowerOff)).await;
    let error: GuestError = socket.expect(Kind::Error).await.parse().unwrap();
    assert_eq!(error.code, ErrorCode::BadRequest);
    eventually("the program is gone", async || !runs(started.pid)).await;
    let mut socket = stream(&ark.client).await;
    socket.0.send(Message::Text("ls".into())).await.unwrap();
    assert!(socket.expect(Kind::Error).await.parse::<GuestError>().unwrap().message.contains("text message"));
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn an_agent_that_is_not_there_is_a_problem_before_the_upgrade() {
    let place = Place::new();
    let ark = place.start().await;
    ark.client.create("a1", "powers-off").await;
    eventually("it ends", async || ark.client.get("/v1/agents/a1").await.json::<Agent>().exit.is_some())
        .await;
    for (agent, kind) in [("a1", ProblemKind::AgentNotRunning), ("a2", ProblemKind::AgentNotFound)] {
        let Err(tungstenite::Error::Http(response)) =
            open(&ark.client, &format!("/v1/agents/{agent}/exec/stream")).await.map(|_| ())
        else {
            panic!("no HTTP reply")
        };
        let problem: Problem = serde_json::from_slice(response.body().as_ref().unwrap()).unwrap();
        assert_eq!(problem.kind, kind);
    }
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn a_client_that_vanishes_takes_its_program_along() {
    let place = Place::new();
    let ark = place.start().await;
    ark.client.create("a1", "base").await;
    let mut socket = stream(&ark.client).await;
    socket.exec(json!({ "argv": ["sleep", "1000"] })).await;
    let started: Started = socket.expect(Kind::Started).await.parse().unwrap();
    assert!(runs(started.pid));
    drop(socket);
    eventually("the program is gone", async || !runs(started.pid)).await;
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn a_guest_that_dies_is_told_with_its_reason() {
    let place = Place::new();
    let ark = place.start().await;
    let agent = ark.client.create("a1", "base").await;
    let mut socket = stream(&ark.client).await;
    socket.exec(json!({ "argv": ["sleep", "5"] })).await;
    socket.expect(Kind::Started).await;
    let pid = nix::unistd::Pid::from_raw(i32::try_from(agent.vmm_pid.unwrap()).unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
    let error: GuestError = socket.expect(Kind::Error).await.parse().unwrap();
    assert!(error.message.contains("signal 9 (SIGKILL)"), "{error}");
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn the_hosts_own_guestd_is_reached_without_a_handshake() {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let place = Place::new();
    let shell = place.path("shell.sock");
    let guestd = tokio::net::UnixListener::bind(&shell).unwrap();
    let served = tokio::spawn(async move {
        let (mut stream, _) = guestd.accept().await.unwrap();
        let mut bytes = vec![0; 4096];
        let n = stream.read(&mut bytes).await.unwrap();
        let end = ExecEnd { status: ExitStatus::Exited { code: 5 }, duration_us: 1 };
        for frame in [Frame::json(Kind::Started, &Started { pid: 1 }), Frame::json(Kind::Exited, &end)] {
            stream.write_all(&frame.unwrap().encode()).await.unwrap();
        }
        Frame::decode(&bytes[..n]).unwrap().kind
    });
    let mut config = place.config();
    config.host_shell = Some(shell);
    let ark = place.start_with(config).await;
    let mut socket = open(&ark.client, "/v1/host/exec/stream").await.unwrap();
    socket.exec(json!({ "argv": ["sh"] })).await;
    socket.expect(Kind::Started).await;
    assert_eq!(socket.expect(Kind::Exited).await.parse::<ExecEnd>().unwrap().status.shell_code(), 5);
    assert_eq!(served.await.unwrap(), Kind::Exec);
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn an_agent_with_auto_remove_goes_with_its_first_stream_or_for_lack_of_one() {
    let place = Place::new();
    let ark = place.start().await;
    let body = |image: &str| json!({ "name": "a1", "image": image, "memory_mib": 64, "auto_remove": true });
    let gone = async || ark.client.get("/v1/agents/a1").await.status() == StatusCode::NOT_FOUND;

    ark.client.post("/v1/agents", &body("base")).await;
    let mut socket = stream(&ark.client).await;
    socket.exec(json!({ "argv": ["sh", "-c", "read go; echo done"] })).await;
    socket.expect(Kind::Started).await;
    // Another one comes and goes.
    let mut other = stream(&ark.client).await;
    other.exec(json!({ "argv": ["true"] })).await;
    other.expect(Kind::Started).await;
    other.expect(Kind::Exited).await;
    assert!(other.next().await.is_none());
    socket.send(Frame::raw(Kind::Stdin, b"go\n".to_vec()).unwrap()).await;
    socket.expect(Kind::Stdout).await;
    socket.expect(Kind::Exited).await;
    eventually("it goes with its stream", gone).await;

    ark.client.post("/v1/agents", &body("base")).await;
    eventually("it goes for lack of one", gone).await;
    ark.client.post("/v1/agents", &body("powers-off")).await;
    eventually("it goes when it ended", gone).await;

    // The time to begin one counts from when it goes on again.
    let post = async |path: &str, body: Value| ark.client.post(&format!("/v1/agents/a1/{path}"), &body).await;
    ark.client.post("/v1/agents", &body("base")).await;
    assert_eq!(post("pause", json!({})).await.status(), StatusCode::OK);
    tokio::time::sleep(std::time::Duration::from_secs(1)).await;
    assert_eq!(post("resume", json!({})).await.status(), StatusCode::OK);
    // A rewind ends its stream, and so it.
    assert_eq!(post("snapshots", json!({ "name": "s1" })).await.status(), StatusCode::CREATED);
    let mut socket = stream(&ark.client).await;
    socket.exec(json!({ "argv": ["sleep", "1000"] })).await;
    socket.expect(Kind::Started).await;
    post("rewind", json!({ "snapshot": "s1" })).await;
    eventually("it goes with its stream", gone).await;
    assert_eq!(place.agent_dirs(), 0);
    ark.daemon.shut_down().await;
}
