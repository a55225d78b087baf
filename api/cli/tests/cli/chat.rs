//! `ark chat`, and what `ark run` says is allowed, against a server that answers as `arkd` would.

use std::sync::{Arc, Mutex};

use crate::host::{Host, agent, problem};
use ark_types::problem::ProblemKind;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use axum::{Json, Router};
use serde_json::{Value, json};

fn chunk(text: &str) -> String {
    let delta = json!({ "choices": [{ "index": 0, "delta": { "content": text } }] });
    format!("data: {delta}\n\n")
}

/// What a model says to `asked`: it depends on the last message.
fn answer(asked: &Value) -> Response {
    let said = asked["messages"].as_array().unwrap().last().unwrap()["content"].as_str().unwrap();
    let error = json!({ "error": { "message": "the model's VM ended", "type": "server_error", "code": "replica_gone" } });
    let events = match said {
        "refuse" => return problem(ProblemKind::QuotaExceeded, "the budget is used up"),
        _ if asked["stream"] != true => {
            let message = json!({ "role": "assistant", "content": "whole" });
            return Json(json!({ "choices": [{ "index": 0, "message": message }] })).into_response();
        }
        "break off" => format!("{}data: {error}\n\n", chunk("half")),
        "end early" => chunk("half"),
        _ => {
            let role = json!({ "choices": [{ "index": 0, "delta": { "role": "assistant" } }] });
            let usage = json!({ "choices": [], "usage": { "total_tokens": 3 } });
            let text = [chunk("Hel"), ": alive\n\n".to_owned(), chunk("lo \u{1b}[2J")].concat();
            format!("data: {role}\n\n{text}data: {usage}\n\ndata: [DONE]\n\n")
        }
    };
    ([(header::CONTENT_TYPE, "text/event-stream")], events).into_response()
}

fn server() -> (Host, Arc<Mutex<Vec<Value>>>) {
    let asked: Arc<Mutex<Vec<Value>>> = Arc::default();
    let (chats, creations) = (asked.clone(), asked.clone());
    let chat = async move |Json(request): Json<Value>| {
        let reply = answer(&request);
        chats.lock().unwrap().push(request);
        reply
    };
    let create = async move |Json(request): Json<Value>| {
        creations.lock().unwrap().push(request);
        (StatusCode::CREATED, Json(agent("a1")))
    };
    let routes = Router::new().route("/v1/chat/completions", post(chat)).route("/v1/agents", post(create));
    (Host::start(routes), asked)
}

#[test]
fn a_reply_is_written_as_it_comes_or_whole_as_json() {
    let (host, asked) = server();
    let said = host.run(&["chat", "--model", "m", "--system", "s", "-"], "from stdin");
    assert_eq!(said, (0, "Hello \u{1b}[2J\n".to_owned(), String::new()), "a pipe gets what was said");
    let messages = json!([{ "role": "system", "content": "s" }, { "role": "user", "content": "from stdin" }]);
    assert_eq!(asked.lock().unwrap()[0], json!({ "model": "m", "messages": messages, "stream": true }));
    let (code, out, _) = host.run(&["chat", "--json", "hi"], "");
    let whole: Value = serde_json::from_str(&out).unwrap();
    assert_eq!((code, &whole["choices"][0]["message"]["content"]), (0, &json!("whole")));
}

#[test]
fn what_goes_wrong_is_told_in_a_sentence_behind_what_was_said() {
    let (host, _) = server();
    let told = |said: &str| host.run(&["chat", said], "");
    assert_eq!(told("refuse"), (125, String::new(), "ark: the budget is used up\n".to_owned()));
    assert_eq!(told("break off"), (125, "half\n".to_owned(), "ark: the model's VM ended\n".to_owned()));
    let (code, out, error) = told("end early");
    assert_eq!((code, out.as_str()), (125, "half\n"));
    assert!(error.contains("ended early"), "{error}");
    let (code, _, error) = host.run(&["chat", "--json", "refuse"], "");
    let told: Value = serde_json::from_str(&error).unwrap();
    assert_eq!((code, &told["detail"]), (125, &json!("the budget is used up")));
    let (code, _, error) = host.run(&["chat", "--json-schema", "{", "hi"], "");
    assert!(code == 125 && error.contains("--json-schema"), "{error}");
}

#[test]
fn what_an_agent_is_allowed_is_asked_for() {
    let (host, asked) = server();
    let line = ["create", "--allow", "inference=a", "--allow", "inference=b"];
    assert_eq!(host.run(&line, "").0, 0);
    assert_eq!(asked.lock().unwrap()[0]["allow"], json!(["inference=a", "inference=b"]));
    let (code, _, error) = host.run(&["create", "--allow", "network"], "");
    assert!(code == 125 && error.contains("inference=MODEL"), "{error}");
    assert_eq!(asked.lock().unwrap().len(), 1);
}
