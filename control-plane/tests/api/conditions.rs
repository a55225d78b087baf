//! ETags and conditions, labels that change, and the versions that every reply tells.

use ark_types::agent::{Agent, AgentList, AgentState};
use ark_types::problem::ProblemKind;
use hyper::header::{CONTENT_TYPE, ETAG, HeaderName, HeaderValue, IF_MATCH, IF_NONE_MATCH};
use hyper::{Method, StatusCode};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::harness::{Client, Place, Reply, eventually, started};

async fn send(
    client: &Client,
    method: Method,
    path: &str,
    body: &Value,
    header: (HeaderName, &str),
) -> Reply {
    let mut request = client.request(method, path, body.to_string());
    request.headers_mut().insert(header.0, HeaderValue::from_str(header.1).unwrap());
    client.reply(request).await
}

async fn tag(client: &Client, path: &str) -> String {
    let reply = client.get(path).await;
    assert_eq!(reply.status(), StatusCode::OK, "{path}");
    reply.response.headers()[ETAG].to_str().unwrap().to_owned()
}

async fn label(client: &Client, agent: &str, labels: &Value) -> Reply {
    client.ask(Method::PATCH, &format!("/v1/agents/{agent}"), json!({ "labels": labels }).to_string()).await
}

async fn selected(client: &Client, selector: &str) -> Vec<String> {
    let path = format!("/v1/agents?all=true&labels={selector}");
    let list: AgentList = client.get(&path).await.json();
    list.agents.into_iter().map(|agent| agent.name.to_string()).collect()
}

#[tokio::test]
async fn a_thing_has_a_tag_that_changes_with_it() {
    let place = Place::new();
    let ark = place.start().await;
    let client = &ark.client;
    let agent = client.create("a1", "base").await;
    for (path, body) in [
        ("/v1/agents/a1/snapshots", json!({ "name": "s1" })),
        ("/v1/templates", json!({ "name": "t1", "image": "base" })),
    ] {
        assert_eq!(client.post(path, &body).await.status(), StatusCode::CREATED);
    }
    for path in
        ["/v1/agents/a1", "/v1/snapshots/s1", "/v1/templates/t1", "/v1/owners/default", "/v1/images/base"]
    {
        let first = tag(client, path).await;
        assert_eq!(tag(client, path).await, first);
        for known in [first.as_str(), &format!("\"x\", W/{first}"), "*"] {
            let reply = send(client, Method::GET, path, &json!({}), (IF_NONE_MATCH, known)).await;
            assert_eq!((reply.status(), reply.body.len()), (StatusCode::NOT_MODIFIED, 0), "{path}");
            assert_eq!(reply.response.headers()[ETAG], first.as_str());
        }
        let reply = send(client, Method::GET, path, &json!({}), (IF_NONE_MATCH, "\"x\"")).await;
        assert_eq!(reply.status(), StatusCode::OK);
    }
    // Its guest beats, and that is no change.
    let beats = async || client.get("/v1/agents/a1").await.json::<Agent>().heartbeat;
    let (before, beat) = (tag(client, "/v1/agents/a1").await, beats().await);
    eventually("its heart beats", async || beats().await != beat).await;
    assert_eq!(tag(client, &format!("/v1/agents/{}", agent.id)).await, before);
    client.post("/v1/agents/a1/pause", &json!({})).await;
    assert_ne!(tag(client, "/v1/agents/a1").await, before);
    // Lists, and what is not there, have none.
    for path in ["/v1/agents", "/v1/agents/nobody"] {
        assert!(!client.get(path).await.response.headers().contains_key(ETAG));
    }
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn a_change_is_made_only_to_what_was_seen() {
    let place = Place::new();
    let ark = place.start().await;
    let client = &ark.client;
    client.create("a1", "base").await;
    let seen = tag(client, "/v1/agents/a1").await;
    let pause = |tag: String| async move {
        send(client, Method::POST, "/v1/agents/a1/pause", &json!({}), (IF_MATCH, &tag)).await
    };
    pause("\"stale\"".to_owned()).await.problem(ProblemKind::PreconditionFailed);
    pause(format!("W/{seen}")).await.problem(ProblemKind::PreconditionFailed);
    assert_eq!(pause(format!("\"stale\", {seen}")).await.json::<Agent>().state, AgentState::Paused);
    for (method, path) in [
        (Method::POST, "/v1/agents/a1/resume"),
        (Method::DELETE, "/v1/agents/a1"),
        (Method::PATCH, "/v1/agents/a1"),
    ] {
        let body = json!({ "labels": {} });
        let refused = send(client, method, path, &body, (IF_MATCH, &seen)).await;
        let problem = refused.problem(ProblemKind::PreconditionFailed);
        assert!(problem.detail.contains("look at it again"), "{problem:?}");
    }
    let any = send(client, Method::DELETE, "/v1/agents/a1", &json!({}), (IF_MATCH, "*")).await;
    assert_eq!(any.status(), StatusCode::NO_CONTENT);
    let no_method = send(client, Method::PUT, "/v1/agents/a1", &json!({}), (IF_MATCH, "\"x\"")).await;
    no_method.problem(ProblemKind::MethodNotAllowed);
    let nobody = send(client, Method::DELETE, "/v1/agents/nobody", &json!({}), (IF_MATCH, "\"x\"")).await;
    nobody.problem(ProblemKind::AgentNotFound);

    let quota = async |agents: u64, tag: &str| {
        let body = json!({ "agents": agents });
        send(client, Method::PUT, "/v1/owners/team-a", &body, (IF_MATCH, tag)).await
    };
    let free = tag(client, "/v1/owners/team-a").await;
    // Of many who saw the same, one is the first.
    let asked = futures_util::future::join_all((1..=8).map(|n| quota(n, &free))).await;
    let done: Vec<&Reply> = asked.iter().filter(|reply| reply.status() == StatusCode::OK).collect();
    assert_eq!(done.len(), 1);
    assert_eq!(done[0].response.headers()[ETAG], tag(client, "/v1/owners/team-a").await.as_str());
    quota(9, &free).await.problem(ProblemKind::PreconditionFailed);
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn labels_change_for_good() {
    let place = Place::new();
    let (mut arkd, client) = started(&place, &[]).await;
    let agent = client.create("a1", "base").await;
    client.create("a2", "base").await;
    let reply = label(&client, "a1", &json!({ "app": "shop", "tier": "web" })).await;
    assert_eq!(reply.status(), StatusCode::OK, "{:?}", reply.body);
    let reply = label(&client, &agent.id, &json!({ "tier": null, "env": "test" })).await;
    let labels = json!({ "app": "shop", "env": "test" });
    assert_eq!(reply.json::<Value>()["labels"], labels);
    assert_eq!(selected(&client, "app%3Dshop").await, ["a1"]);
    assert!(selected(&client, "tier").await.is_empty());
    // The same once more changes nothing, so nothing is recorded.
    label(&client, "a1", &json!({ "env": "test" })).await;
    let told = client.get(&format!("/v1/events?stream=agent/{}&type=agent.labelled", agent.id)).await;
    assert_eq!(told.json::<Value>()["events"].as_array().unwrap().len(), 2);
    for bad in [json!({ "_": "x" }), json!({ "app": "a b" })] {
        label(&client, "a1", &bad).await.problem(ProblemKind::InvalidValue);
    }
    label(&client, "nobody", &json!({})).await.problem(ProblemKind::AgentNotFound);
    let mut request = client.request(Method::PATCH, "/v1/agents/a1", r#"{"labels":{"x":"y"}}"#);
    request.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/merge-patch+json"));
    assert_eq!(client.reply(request).await.status(), StatusCode::OK);
    label(&client, "a1", &json!({ "x": null })).await;
    client.post("/v1/agents/a2/pause", &json!({})).await;
    label(&client, "a2", &json!({ "app": "shop" })).await;
    // Many at once take nothing from each other.
    let many = (0..8).map(|n| {
        let client = client.clone();
        async move { label(&client, "a1", &json!({ format!("n{n}"): "x" })).await.status() }
    });
    assert!(futures_util::future::join_all(many).await.into_iter().all(|status| status == StatusCode::OK));
    for n in 0..8 {
        label(&client, "a1", &json!({ format!("n{n}"): null })).await;
    }

    arkd.end(Signal::SIGKILL);
    let (_arkd, client) = started(&place, &[]).await;
    assert_eq!(client.get("/v1/agents/a1").await.json::<Value>()["labels"], labels);
    assert_eq!(selected(&client, "app%3Dshop").await, ["a1", "a2"]);
    // A fork has those that its parent has by then.
    client.post("/v1/agents/a1/fork", &json!({ "count": 1 })).await;
    assert_eq!(client.get("/v1/agents/a1-1").await.json::<Value>()["labels"], labels);
}

#[tokio::test]
async fn every_reply_tells_who_gave_it() {
    let place = Place::new();
    let mut config = place.config();
    config.listen = Some("127.0.0.1:0".parse().unwrap());
    let ark = place.start_with(config).await;
    let stranger = Client::Tcp(ark.daemon.tcp_address().unwrap(), None);
    for reply in [
        ark.client.get("/v1/health").await,
        ark.client.get("/v1/nothing").await,
        ark.client.get("/metrics").await,
        stranger.get("/v1/health").await,
    ] {
        assert_eq!(reply.response.headers()["ark-version"], env!("CARGO_PKG_VERSION"));
        assert_eq!(reply.response.headers()["ark-api-version"], "v1");
    }
    let wanted = HeaderName::from_static("ark-api-version");
    let ask = async |version: &str| {
        send(&ark.client, Method::GET, "/v1/health", &json!({}), (wanted.clone(), version)).await
    };
    assert_eq!(ask("v1").await.status(), StatusCode::OK);
    let problem = ask("v2").await.problem(ProblemKind::BadRequest);
    assert!(problem.detail.contains("serves v1"), "{problem:?}");
    ark.daemon.shut_down().await;
}
