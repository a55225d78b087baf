//! The REST API over TCP: tokens, problems, OpenAPI. Spoken by hand, so that a client's kindness hides nothing.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use ark_tests::{Running, World, eventually};
use serde_json::Value;

/// An `arkd` on a port of its own.
struct Server {
    world: World,
    daemon: Running,
    address: String,
    token: String,
}

impl Server {
    fn start() -> Self {
        let world = World::new();
        let free = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = free.local_addr().expect("an address").to_string();
        drop(free);
        let mut command = world.command("arkd");
        command.args(["--listen", &address]);
        let daemon = Running::start(command, Duration::from_secs(300));
        let file = world.path().join("state/token");
        eventually("arkd listens", Duration::from_secs(30), || {
            file.exists() && TcpStream::connect(&address).is_ok()
        });
        let token = std::fs::read_to_string(&file).expect("the token").trim().to_owned();
        let mode = std::os::unix::fs::MetadataExt::mode(&std::fs::metadata(&file).expect("metadata"));
        assert_eq!(mode & 0o777, 0o600, "the token is its owner's alone");
        Self { world, daemon, address, token }
    }

    /// Status and body of one request.
    fn call(&self, method: &str, path: &str, token: Option<&str>, body: &str) -> (u16, String, Value) {
        let mut stream = TcpStream::connect(&self.address).expect("arkd listens");
        stream.set_read_timeout(Some(Duration::from_secs(60))).expect("a timeout");
        let auth = token.map(|t| format!("authorization: Bearer {t}\r\n")).unwrap_or_default();
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nhost: ark\r\nconnection: close\r\n{auth}content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        )
        .expect("arkd reads");
        let mut reply = String::new();
        stream.read_to_string(&mut reply).expect("arkd answers");
        let (head, body) = reply.split_once("\r\n\r\n").expect("a head");
        let status = head.split(' ').nth(1).and_then(|s| s.parse().ok()).expect("a status");
        let kind = head
            .lines()
            .find_map(|l| l.to_ascii_lowercase().strip_prefix("content-type:").map(|v| v.trim().to_owned()))
            .unwrap_or_default();
        let first_object = body.find('{').zip(body.rfind('}')).map(|(a, b)| &body[a..=b]);
        (status, kind, first_object.and_then(|t| serde_json::from_str(t).ok()).unwrap_or(Value::Null))
    }

    fn end(self) {
        self.daemon.signal(nix::sys::signal::Signal::SIGTERM);
        let _ = self.daemon.wait().ok();
        self.world.end();
    }
}

#[test]
fn a_wrong_or_missing_token_is_refused() {
    let server = Server::start();
    for token in [None, Some("wrong"), Some("")] {
        let (status, kind, problem) = server.call("GET", "/v1/agents", token, "");
        assert_eq!((status, kind.as_str()), (401, "application/problem+json"));
        assert_eq!(problem["type"], "/problems/unauthorized");
    }
    let (status, _, list) = server.call("GET", "/v1/agents", Some(&server.token), "");
    assert_eq!((status, &list["agents"]), (200, &serde_json::json!([])));
    server.end();
}

#[test]
fn every_error_is_a_problem() {
    let server = Server::start();
    let token = Some(server.token.as_str());
    for (method, path, body, status, kind) in [
        ("GET", "/v1/nothing", "", 404, "/problems/no-route"),
        ("PATCH", "/v1/agents", "", 405, "/problems/method-not-allowed"),
        ("POST", "/v1/agents", "{", 400, "/problems/bad-request"),
        ("POST", "/v1/agents", "{\"image\":\"base\",\"x\":1}", 422, "/problems/invalid-value"),
        ("POST", "/v1/agents", "{\"image\":\"base\",\"vcpus\":0}", 422, "/problems/invalid-value"),
        ("POST", "/v1/agents", "{\"image\":\"nope\"}", 404, "/problems/image-not-found"),
        ("GET", "/v1/agents/nobody", "", 404, "/problems/agent-not-found"),
        ("DELETE", "/v1/agents/nobody", "", 404, "/problems/agent-not-found"),
        ("GET", "/v1/host/exec/stream", "", 404, "/problems/no-route"),
    ] {
        let (got, media, problem) = server.call(method, path, token, body);
        assert_eq!((got, media.as_str()), (status, "application/problem+json"), "{method} {path} {problem}");
        assert_eq!(problem["type"], kind, "{method} {path}");
        assert!(problem["detail"].as_str().is_some_and(|d| d.len() > 10), "{problem}");
    }
    server.end();
}

#[test]
fn an_agent_lives_and_dies_over_rest() {
    let server = Server::start();
    let token = Some(server.token.as_str());
    let (status, _, agent) =
        server.call("POST", "/v1/agents", token, "{\"image\":\"base\",\"name\":\"r1\",\"memory_mib\":128}");
    assert_eq!((status, agent["state"].as_str()), (201, Some("running")), "{agent}");
    let (status, _, reply) = server.call("POST", "/v1/agents/r1/exec", token, "{\"argv\":[\"echo\",\"hi\"]}");
    assert_eq!((status, reply["stdout"].as_str(), reply["exit_code"].as_u64()), (200, Some("hi\n"), Some(0)));
    let (status, _, problem) = server.call("POST", "/v1/agents/r1/exec", token, "{\"argv\":[\"no-such\"]}");
    assert_eq!((status, problem["type"].as_str()), (422, Some("/problems/program-not-found")));
    let (status, _, _) = server.call("DELETE", "/v1/agents/r1", token, "");
    assert_eq!(status, 204);
    let (status, _, _) = server.call("GET", "/v1/agents/r1", token, "");
    assert_eq!(status, 404);
    server.end();
}

#[test]
fn the_served_openapi_document_is_the_one_in_the_tree() {
    let server = Server::start();
    let (status, _, document) = server.call("GET", "/v1/openapi.json", Some(&server.token), "");
    assert_eq!(status, 200);
    let described: Vec<_> =
        document["paths"].as_object().expect("paths").keys().map(String::as_str).collect();
    let frozen: Value =
        serde_json::from_str(include_str!("../../api/types/schema/openapi.json")).expect("JSON");
    let routes: Vec<_> = frozen["paths"].as_object().expect("paths").keys().map(String::as_str).collect();
    assert_eq!(described, routes);
    assert!(routes.contains(&"/v1/agents/{agent}/exec"), "{routes:?}");
    server.end();
}
