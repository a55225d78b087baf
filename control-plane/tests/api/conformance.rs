//! What `arkd` answers, against what its OpenAPI document says, by a fuzzer that reads the document.

use std::path::Path;
use std::time::Duration;

use serde_json::json;
use tokio::process::Command;

use crate::harness::Place;

/// Names the fuzzer's program; `make api-fuzz` sets it.
const PROGRAM: &str = "ARK_SCHEMATHESIS";
/// What the fuzzer is told.
const FILES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/api-fuzz");
/// When the fuzzer hangs; it takes a minute.
const LIMIT: Duration = Duration::from_secs(900);

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs schemathesis and a minute: `make api-fuzz` runs it"]
async fn every_reply_is_what_the_document_says() {
    let program = std::env::var_os(PROGRAM).expect("ARK_SCHEMATHESIS names schemathesis");
    let place = Place::new();
    // A copy: what the fuzzer keeps from one run for the next goes with the place.
    let dir = place.path("fuzz");
    std::fs::create_dir(&dir).unwrap();
    for file in ["schemathesis.toml", "hooks.py"] {
        std::fs::copy(Path::new(FILES).join(file), dir.join(file)).unwrap();
    }
    let mut config = place.config();
    config.listen = Some("127.0.0.1:0".parse().unwrap());
    let ark = place.start_with(config).await;
    // What the fuzzer's dictionaries name.
    ark.client.create("a1", "base").await;
    for (path, body) in [
        ("/v1/agents/a1/snapshots", json!({ "name": "s1" })),
        ("/v1/templates", json!({ "name": "t1", "image": "base" })),
    ] {
        assert_eq!(ark.client.post(path, &body).await.status(), 201);
    }
    let model = ark_gguf::synthetic::Synthetic::default().to_bytes();
    assert_eq!(ark.client.ask(hyper::Method::PUT, "/v1/models/m1", model).await.status(), 201);
    let document = dir.join("openapi.json");
    std::fs::write(document, ark.client.get("/v1/openapi.json").await.body).unwrap();
    let mut fuzzer = Command::new(program)
        .args(["run", "openapi.json", "--url", &format!("http://{}", ark.daemon.tcp_address().unwrap())])
        .env("ARK_TOKEN", std::fs::read_to_string(place.path("state/token")).unwrap())
        .current_dir(dir)
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let status = tokio::time::timeout(LIMIT, fuzzer.wait()).await.expect("it ends").unwrap();
    assert!(status.success(), "schemathesis found what it printed above");
    // What it made goes like anything.
    ark.daemon.shut_down().await;
    assert_eq!(place.agent_dirs(), 0);
}
