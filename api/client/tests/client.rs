//! The client against a small server that answers as `arkd` would.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use ark_client::{Client, Endpoint, Error, ExecEvent};
use ark_types::exec::{ExecEnd, ExecRequest, ExitStatus, TtySize};
use ark_types::guest::{ErrorCode, Frame, GuestError, Kind, SignalRequest, Started};
use ark_types::problem::{Problem, ProblemKind};
use axum::Router;
use axum::body::Body;
use axum::extract::ws::{Message, WebSocket, WebSocketUpgrade};
use axum::extract::{Path, Request};
use axum::http::StatusCode;
use axum::http::header::{AUTHORIZATION, CONTENT_TYPE};
use axum::middleware::{Next, from_fn};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get};

const TOKEN: &str = "sesame";

fn problem(kind: ProblemKind, detail: &str) -> Response {
    let body = serde_json::to_vec(&Problem::new(kind, detail)).unwrap();
    let status = StatusCode::from_u16(kind.status()).unwrap();
    (status, [(CONTENT_TYPE, ark_types::problem::PROBLEM_JSON)], body).into_response()
}

async fn authorize(request: Request, next: Next) -> Response {
    let given = request.headers().get(AUTHORIZATION).and_then(|v| v.to_str().ok());
    if given == Some("Bearer sesame") {
        next.run(request).await
    } else {
        problem(ProblemKind::Unauthorized, "the token is missing or wrong")
    }
}

/// Echoes standard input, answers signals and sizes on standard error, and ends with the input.
async fn echo(mut socket: WebSocket) {
    let send = |kind, bytes: &[u8]| Message::Binary(Frame::raw(kind, bytes).unwrap().encode().into());
    while let Some(Ok(Message::Binary(bytes))) = socket.recv().await {
        let frame = Frame::decode(&bytes).unwrap();
        let reply = match frame.kind {
            Kind::Exec => {
                let request: ExecRequest = frame.parse().unwrap();
                if request.argv == ["missing"] {
                    let error =
                        GuestError { code: ErrorCode::ProgramNotFound, message: "no such program".into() };
                    Message::Binary(Frame::json(Kind::Error, &error).unwrap().encode().into())
                } else {
                    Message::Binary(Frame::json(Kind::Started, &Started { pid: 7 }).unwrap().encode().into())
                }
            }
            Kind::Stdin => send(Kind::Stdout, &frame.payload),
            Kind::Signal => send(Kind::Stderr, &[frame.parse::<SignalRequest>().unwrap().signal]),
            Kind::Resize => {
                send(Kind::Stderr, &[u8::try_from(frame.parse::<TtySize>().unwrap().cols).unwrap()])
            }
            _ => {
                let end = ExecEnd { status: ExitStatus::Exited { code: 3 }, duration_us: 1 };
                Message::Binary(Frame::json(Kind::Exited, &end).unwrap().encode().into())
            }
        };
        socket.send(reply).await.unwrap();
    }
}

fn routes() -> Router {
    let file = get(|| async { ([("x-ark-mode", "755")], vec![7u8; 300_000]) }).put(|body: Body| async move {
        match axum::body::to_bytes(body, 1 << 20).await {
            Ok(bytes) if bytes.len() == 200_000 => StatusCode::NO_CONTENT.into_response(),
            Ok(bytes) => problem(ProblemKind::FileError, &format!("{} bytes", bytes.len())),
            Err(e) => problem(ProblemKind::BadRequest, &e.to_string()),
        }
    });
    Router::new()
        .route("/v1/images", get(|| async { r#"{"images":[]}"# }))
        .route("/v1/images/{image}", get(|| async { problem(ProblemKind::ImageNotFound, "no image x") }))
        .route("/v1/agents", get(|| async { "<html>I am a printer</html>" }))
        .route(
            "/v1/agents/{agent}",
            delete(|Path(name): Path<String>, request: Request| async move {
                match (name.as_str(), request.uri().query()) {
                    ("a b", Some("grace_ms=1500")) => StatusCode::NO_CONTENT.into_response(),
                    _ => problem(ProblemKind::AgentNotFound, &name),
                }
            }),
        )
        .route("/v1/agents/{agent}/files", file)
        .route(
            "/v1/agents/{agent}/logs",
            get(|request: Request| async move { request.uri().query().unwrap_or_default().to_owned() }),
        )
        .route(
            "/v1/agents/{agent}/exec/stream",
            get(|upgrade: WebSocketUpgrade| async { upgrade.on_upgrade(echo) }),
        )
}

async fn over_tcp() -> Endpoint {
    let listener = tokio::net::TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], 0))).await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    tokio::spawn(async move { axum::serve(listener, routes().layer(from_fn(authorize))).await });
    Endpoint::Tcp { address, token: TOKEN.to_owned() }
}

fn over_unix(dir: &tempfile::TempDir) -> Endpoint {
    let path: PathBuf = dir.path().join("arkd.sock");
    let listener = tokio::net::UnixListener::bind(&path).unwrap();
    tokio::spawn(async move { axum::serve(listener, routes()).await });
    Endpoint::Unix(path)
}

#[tokio::test]
async fn a_program_streams_over_both_kinds_of_connection() {
    let dir = tempfile::tempdir().unwrap();
    for endpoint in [over_tcp().await, over_unix(&dir)] {
        let client = Client::new(endpoint);
        let request = ExecRequest { argv: vec!["cat".into()], ..ExecRequest::default() };
        let mut program = client.exec_stream("a1", &request).await.unwrap();
        assert_eq!(program.output.next().await.unwrap(), ExecEvent::Started(7));
        program.input.stdin(b"hello").await.unwrap();
        assert_eq!(program.output.next().await.unwrap(), ExecEvent::Stdout("hello".into()));
        program.input.signal(15).await.unwrap();
        assert_eq!(program.output.next().await.unwrap(), ExecEvent::Stderr(vec![15].into()));
        program.input.resize(TtySize { rows: 24, cols: 80 }).await.unwrap();
        assert_eq!(program.output.next().await.unwrap(), ExecEvent::Stderr(vec![80].into()));
        program.input.close_stdin().await.unwrap();
        let end = ExecEnd { status: ExitStatus::Exited { code: 3 }, duration_us: 1 };
        assert_eq!(program.output.next().await.unwrap(), ExecEvent::Exited(end));

        let request = ExecRequest { argv: vec!["missing".into()], ..ExecRequest::default() };
        let mut program = client.exec_stream("a1", &request).await.unwrap();
        assert!(
            matches!(program.output.next().await, Err(Error::Guest(e)) if e.code == ErrorCode::ProgramNotFound)
        );
    }
}

#[tokio::test]
async fn files_stream_both_ways_and_a_short_source_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let client = Client::new(over_unix(&dir));
    let file = client.read_file("a1", "/bin/x").await.unwrap();
    assert_eq!((file.size, file.mode), (Some(300_000), 0o755));
    assert_eq!(file.content.collect(1 << 20).await.unwrap(), vec![7; 300_000]);
    let file = client.read_file("a1", "/bin/x").await.unwrap();
    assert!(matches!(file.content.collect(1000).await, Err(Error::Broken { .. })), "the bound holds");

    let content: &[u8] = &[1; 200_000];
    client.write_file("a1", "/tmp/x", 0o600, Some(200_000), content).await.unwrap();
    client.write_file("a1", "/tmp/x", 0o600, None, content).await.unwrap();
    let short = client.write_file("a1", "/tmp/x", 0o600, Some(200_001), content);
    assert!(tokio::time::timeout(Duration::from_secs(5), short).await.unwrap().is_err());
}

#[tokio::test]
async fn answers_become_values_or_sentences() {
    let endpoint = over_tcp().await;
    let client = Client::new(endpoint.clone());
    assert!(client.images().await.unwrap().images.is_empty());
    client.delete("a b", Some(Duration::from_millis(1500))).await.unwrap();
    let error = client.image("x").await.unwrap_err();
    assert_eq!(error.problem().map(|p| p.kind), Some(ProblemKind::ImageNotFound));
    assert_eq!(error.to_string(), "no image x");
    let logs = client.logs("a1", Some(5)).await.unwrap();
    assert_eq!(logs.collect(100).await.unwrap(), b"tail=5");
    let foreign = client.agents().await.unwrap_err();
    assert!(matches!(foreign, Error::Answer { status: 200, .. }), "{foreign}");
    let refused = client.exec_stream("no/such", &ExecRequest::default()).await;
    assert!(refused.is_ok(), "a slash in a name stays inside its segment");

    let Endpoint::Tcp { address, .. } = endpoint else { unreachable!("it is TCP") };
    let stranger = Client::new(Endpoint::Tcp { address, token: "guess".to_owned() });
    for error in [
        stranger.images().await.unwrap_err(),
        stranger.exec_stream("a1", &ExecRequest::default()).await.err().unwrap(),
    ] {
        assert_eq!(error.problem().map(|p| p.kind), Some(ProblemKind::Unauthorized), "{error}");
    }
}

#[tokio::test]
async fn nobody_there_is_said_with_the_next_step() {
    let dir = tempfile::tempdir().unwrap();
    let missing = Client::new(Endpoint::Unix(dir.path().join("none.sock")));
    assert!(missing.health().await.unwrap_err().to_string().contains("ark doctor"));
    let listener = tokio::net::TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], 0))).await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    drop(listener);
    let refused = Client::new(Endpoint::Tcp { address: address.clone(), token: String::new() });
    let error = refused.health().await.unwrap_err().to_string();
    assert!(error.contains("nothing listens there") && error.contains(&address), "{error}");
}
