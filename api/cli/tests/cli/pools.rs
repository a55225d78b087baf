//! `ark pool`, against a server that answers as `arkd` would.

use std::sync::{Arc, Mutex};

use crate::host::{Host, agent, problem};
use ark_types::problem::ProblemKind;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::{Method, StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use axum::{Json, Router};
use serde_json::{Value, json};

/// `METHOD target body` of every request but those for health, in order.
type Asked = Arc<Mutex<Vec<String>>>;

fn pool(policy: &Value) -> Value {
    json!({
        "template": "py", "policy": policy, "standbys": 1, "wanted": 2, "reserved": { "agents": 1, "memory_mib": 32, "vcpus": 1 },
        "hits": 3, "misses": 1, "demand_per_s": 0.25, "make_ms": 120, "wait": { "agents": 4, "p50_ms": 9, "p99_ms": 130 },
    })
}

async fn answer(State(asked): State<Asked>, method: Method, uri: Uri, body: Bytes) -> Response {
    let text = String::from_utf8(body.to_vec()).unwrap();
    asked.lock().unwrap().push(format!("{method} {uri} {text}").trim_end().to_owned());
    let policy = json!({ "min": 2, "max": 20, "target_wait_ms": 50 });
    match (method.as_str(), uri.path()) {
        ("GET", "/v1/agents") => Json(json!({ "agents": [agent("a1")] })).into_response(),
        (_, "/v1/pools/none") => problem(ProblemKind::TemplateNotFound, "there is no template \"none\""),
        ("PUT", "/v1/pools/py") => Json(pool(&serde_json::from_str(&text).unwrap())).into_response(),
        ("GET", "/v1/pools/py") => Json(pool(&policy)).into_response(),
        ("GET", "/v1/pools") => Json(json!({ "pools": [pool(&policy)] })).into_response(),
        ("DELETE", "/v1/pools/py") => StatusCode::NO_CONTENT.into_response(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn pools_are_set_shown_listed_and_removed() {
    let asked = Asked::default();
    let host = Host::start(Router::new().fallback(answer).with_state(asked.clone()));
    let last = || asked.lock().unwrap().pop().unwrap();

    let set = ["pool", "set", "py", "--min", "2", "--max", "20", "--target-wait", "50ms"];
    let (code, table, errors) = host.run(&set, "");
    assert_eq!((code, errors.as_str()), (0, ""));
    assert_eq!(last(), r#"PUT /v1/pools/py {"min":2,"max":20,"target_wait_ms":50}"#);
    assert_eq!(
        table,
        "TEMPLATE  READY   MIN  MAX  TARGET WAIT  HITS  MISSES  DEMAND  WAIT P50  WAIT P99\n\
         py        1 of 2  2    20   50 ms        3     1       0.25/s  9 ms      130 ms\n"
    );
    assert_eq!(host.run(&["pool", "ls"], ""), (0, table, String::new()));
    assert_eq!(last(), "GET /v1/pools");
    let (code, shown, _) = host.run(&["pool", "show", "py", "--json"], "");
    let shown: Value = serde_json::from_str(&shown).unwrap();
    assert_eq!((code, &shown["policy"]["max"], last().as_str()), (0, &json!(20), "GET /v1/pools/py"));
    let (code, card, _) = host.run(&["pool", "show", "py"], "");
    assert!(code == 0 && card.contains("claims       3 found one ready, 1 did not\n"), "{card}");

    assert_eq!(host.run(&["pool", "rm", "py"], ""), (0, "py\n".into(), String::new()));
    assert_eq!(last(), "DELETE /v1/pools/py");
    let (code, removed, errors) = host.run(&["pool", "rm", "none", "py"], "");
    assert_eq!((code, removed.as_str()), (125, "py\n"), "each is tried");
    assert!(errors.contains("there is no template"), "{errors}");
    let (code, _, errors) = host.run(&["pool", "set", "none", "--max", "1"], "");
    assert_eq!((code, errors.as_str()), (125, "ark: there is no template \"none\"\n"));
}
