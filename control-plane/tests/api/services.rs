//! Services: replicas that are made, replaced, updated and drained, and calls to those that are free.

use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt as _;

use ark_types::agent::Agent;
use ark_types::event::EventList;
use ark_types::problem::ProblemKind;
use ark_types::service::{CallResult, ReplicaState, Service, ServiceList, ServiceReply};
use hyper::header::{LOCATION, RETRY_AFTER};
use hyper::{Method, StatusCode};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::harness::{Client, Place, Reply, eventually, signal, started};

/// A service `web` of `image`, with the fields of `more`.
fn web(image: &str, replicas: u32, more: &Value) -> Value {
    let mut spec = json!({ "name": "web", "replicas": replicas, "image": image, "memory_mib": 64 });
    spec.as_object_mut().unwrap().extend(more.as_object().cloned().unwrap_or_default());
    spec
}

async fn put(client: &Client, spec: &Value) -> Reply {
    client.ask(Method::PUT, "/v1/services/web", spec.to_string()).await
}

async fn service(client: &Client) -> Service {
    let reply = client.get("/v1/services/web").await;
    assert_eq!(reply.status(), StatusCode::OK, "{:?}", reply.body);
    reply.json()
}

/// Waits until `web` is as it is to be; what it is then.
async fn settled(client: &Client) -> Service {
    eventually("the service is as it is to be", async || {
        let now = service(client).await;
        now.conditions.is_empty() && now.replicas.len() == now.spec.replicas as usize
    })
    .await;
    service(client).await
}

fn ids(service: &Service) -> BTreeSet<String> {
    service.replicas.iter().map(|replica| replica.id.clone()).collect()
}

async fn call(client: &Client, exec: &str) -> Reply {
    client.post("/v1/services/web/call", &json!({ "exec": { "argv": ["sh", "-c", exec] } })).await
}

/// The answer of a program, and who gave it.
async fn answered(client: &Client, exec: &str) -> (String, String) {
    let reply = call(client, exec).await;
    assert_eq!(reply.status(), StatusCode::OK, "{:?}", reply.body);
    let ServiceReply { id, result, .. } = reply.json();
    let CallResult::Exec(exec) = result else { panic!("{result:?}") };
    (id, exec.stdout)
}

async fn agents(client: &Client) -> Vec<Agent> {
    let list: ark_types::agent::AgentList = client.get("/v1/agents").await.json();
    list.agents
}

#[tokio::test]
async fn replicas_come_and_go_as_many_as_are_wanted() {
    let place = Place::new();
    let ark = place.start().await;
    let client = &ark.client;
    let more = json!({ "labels": { "app": "shop" }, "owner": "team", "env": { "COLOUR": "red" } });
    let reply = client.post("/v1/services", &web("base", 2, &more)).await;
    assert_eq!(reply.status(), StatusCode::CREATED, "{:?}", reply.body);
    assert_eq!(reply.response.headers()[LOCATION], "/v1/services/web");
    client.post("/v1/services", &web("base", 2, &more)).await.problem(ProblemKind::NameTaken);

    let two = settled(client).await;
    assert_eq!((two.ready, two.updated, two.generation), (2, 2, 1));
    assert_eq!((two.env.as_slice(), two.spec.env.len()), (["COLOUR".to_owned()].as_slice(), 0));
    let list: Value =
        client.get("/v1/agents?labels=ark.service=web,ark.generation=1,app=shop&owner=team").await.json();
    assert_eq!(list["agents"].as_array().unwrap().len(), 2);
    assert!(agents(client).await.iter().all(|agent| agent.name.as_ref().starts_with("web-")));
    assert_eq!(answered(client, "echo $COLOUR").await.1, "red\n");

    let scaled = client.ask(Method::PATCH, "/v1/services/web", r#"{"replicas":4}"#).await;
    assert_eq!(scaled.json::<Service>().spec.replicas, 4);
    let four = settled(client).await;
    assert!(ids(&four).is_superset(&ids(&two)), "those that ran go on");
    client.ask(Method::PATCH, "/v1/services/web", r#"{"replicas":1}"#).await;
    let one = settled(client).await;
    assert!(ids(&four).is_superset(&ids(&one)));
    assert_eq!((agents(client).await.len(), place.agent_dirs()), (1, 1));
    assert_eq!(one.generation, 1);

    let list: ServiceList = client.get("/v1/services").await.json();
    assert_eq!(list.services, [one]);
    assert_eq!(client.delete("/v1/services/web").await.status(), StatusCode::NO_CONTENT);
    assert_eq!((agents(client).await.len(), place.agent_dirs()), (0, 0));
    assert_eq!(std::fs::read_dir(place.state().services()).unwrap().count(), 0);
    client.get("/v1/services/web").await.problem(ProblemKind::ServiceNotFound);
    let told: EventList = client.get("/v1/events?stream=service/web").await.json();
    let told: Vec<_> = told.events.iter().map(|recorded| recorded.event.kind()).collect();
    assert_eq!(told, ["service.set", "service.set", "service.set", "service.removed"]);
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn a_replica_that_ends_is_replaced_or_begins_anew() {
    let place = Place::new();
    let ark = place.start().await;
    let client = &ark.client;
    client.post("/v1/services", &web("base", 2, &json!({ "restart": { "when": "never" } }))).await;
    let before = settled(client).await;
    let victim = &before.replicas[0];
    let agent: Agent = client.get(&format!("/v1/agents/{}", victim.id)).await.json();
    signal(agent.vmm_pid.unwrap(), Signal::SIGKILL);
    eventually("another takes its place", async || {
        let now = service(client).await;
        now.ready == 2 && !ids(&now).contains(&victim.id)
    })
    .await;
    // Somebody ends one.
    let next = settled(client).await;
    assert!(ids(&next).contains(&before.replicas[1].id));
    client.delete(&format!("/v1/agents/{}", next.replicas[0].id)).await;
    let last = settled(client).await;
    assert!(!ids(&last).contains(&next.replicas[0].id));

    // A policy has the same agent begin anew.
    put(client, &web("base", 1, &json!({ "update": { "max_unavailable": 1 } }))).await;
    eventually("the next generation is there", async || {
        let now = service(client).await;
        now.updated == 1 && now.replicas.len() == 1
    })
    .await;
    let before = settled(client).await;
    let agent: Agent = client.get(&format!("/v1/agents/{}", before.replicas[0].id)).await.json();
    signal(agent.vmm_pid.unwrap(), Signal::SIGKILL);
    eventually("it begins anew", async || {
        let agent: Agent = client.get(&format!("/v1/agents/{}", agent.id)).await.json();
        agent.continuity.is_some_and(|continuity| continuity.restarts == 1)
    })
    .await;
    assert_eq!(ids(&settled(client).await), ids(&before));
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn calls_go_to_the_replica_with_the_fewest_and_only_to_those_that_are_ready() {
    let place = Place::new();
    let ark = place.start().await;
    let client = &ark.client;
    client.post("/v1/services", &web("base", 3, &json!({ "restart": { "when": "never" } }))).await;
    let three = settled(client).await;
    // At once: each has one.
    let calls = (0..3).map(|_| answered(client, "sleep 1; echo done"));
    let by: BTreeSet<_> = futures_util::future::join_all(calls).await.into_iter().map(|(id, _)| id).collect();
    assert_eq!(by, ids(&three));
    // One after the other: they take turns.
    let mut by = BTreeSet::new();
    for _ in 0..3 {
        by.insert(answered(client, "true").await.0);
    }
    assert_eq!(by, ids(&three));
    let evaluated = client.post("/v1/services/web/call", &json!({ "eval": { "code": "hostname" } })).await;
    let ServiceReply { agent, result, .. } = evaluated.json();
    let CallResult::Eval(eval) = result else { panic!("{result:?}") };
    assert_eq!(eval.value.as_deref(), Some(agent.as_ref()));

    let (still, silent) = (&three.replicas[0].id, &three.replicas[1].id);
    assert_eq!(client.post(&format!("/v1/agents/{still}/pause"), &json!({})).await.status(), StatusCode::OK);
    let agent: Agent = client.get(&format!("/v1/agents/{silent}")).await.json();
    signal(agent.vmm_pid.unwrap(), Signal::SIGSTOP);
    eventually("two are unready", async || service(client).await.ready == 1).await;
    for _ in 0..4 {
        assert_eq!(answered(client, "true").await.0, three.replicas[2].id);
    }
    signal(agent.vmm_pid.unwrap(), Signal::SIGCONT);
    let text = String::from_utf8(client.get("/metrics").await.body.to_vec()).unwrap();
    assert!(text.contains(r#"ark_service_calls_total{service="web",outcome="ok"} 11"#), "{text}");
    assert!(text.contains(r#"ark_service_replicas{service="web",state="unready"}"#), "{text}");
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn a_call_waits_for_a_replica_and_then_says_what_is_the_matter() {
    let place = Place::new();
    let ark = place.start().await;
    let client = &ark.client;
    client
        .post("/v1/services/web/call", &json!({ "exec": { "argv": ["true"] } }))
        .await
        .problem(ProblemKind::ServiceNotFound);
    client.post("/v1/services", &web("base", 0, &json!({}))).await;
    let reply =
        client.post("/v1/services/web/call?wait_ms=100", &json!({ "exec": { "argv": ["true"] } })).await;
    let problem = reply.problem(ProblemKind::ServiceUnready);
    assert!(problem.detail.contains("it is to have none"), "{problem:?}");
    assert_eq!(reply.response.headers()[RETRY_AFTER], "1");

    // A replica takes longer to come up than a call to be asked for: it is waited for.
    let call = json!({ "exec": { "argv": ["echo", "here"] } });
    let waiting = client.post("/v1/services/web/call?wait_ms=600000", &call);
    let scaling = client.ask(Method::PATCH, "/v1/services/web", r#"{"replicas":1}"#);
    let (answer, _) = tokio::join!(waiting, scaling);
    let ServiceReply { result: CallResult::Exec(said), .. } = answer.json() else { panic!("a program ran") };
    assert_eq!(said.stdout, "here\n");

    // A program that is not there is the caller's mistake, and told as that.
    let reply = client.post("/v1/services/web/call", &json!({ "exec": { "argv": ["/no/such"] } })).await;
    let problem = reply.problem(ProblemKind::ProgramNotFound);
    assert!(problem.detail.starts_with("the replica web-"), "{problem:?}");
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn an_update_never_has_fewer_serve_than_may_be_missing() {
    let place = Place::new();
    let ark = place.start().await;
    let client = &ark.client;
    client.post("/v1/services", &web("base", 3, &json!({ "env": { "V": "1" } }))).await;
    let before = settled(client).await;
    let reply = put(client, &web("base", 3, &json!({ "env": { "V": "2" } }))).await;
    assert_eq!((reply.status(), reply.json::<Service>().generation), (StatusCode::OK, 2));
    let (mut fewest, mut most) = (u32::MAX, 0);
    eventually("the new generation is there", async || {
        let now = service(client).await;
        fewest = fewest.min(now.ready);
        most = most.max(now.replicas.len());
        // Calls go on all the while.
        let said = answered(client, "echo $V").await.1;
        assert!(["1\n", "2\n"].contains(&said.as_str()));
        now.conditions.is_empty() && now.updated == 3 && now.replicas.len() == 3
    })
    .await;
    assert!(fewest >= 3 && most <= 4, "{fewest} {most}");
    let after = settled(client).await;
    assert!(ids(&before).is_disjoint(&ids(&after)));
    assert_eq!(answered(client, "echo $V").await.1, "2\n");
    // The same once more is no change.
    let reply = put(client, &web("base", 3, &json!({ "env": { "V": "2" } }))).await;
    assert_eq!(reply.json::<Service>().generation, 2);
    assert_eq!(ids(&settled(client).await), ids(&after));
    let files: Vec<_> = std::fs::read_dir(place.state().services()).unwrap().map(|e| e.unwrap()).collect();
    assert_eq!(files.len(), 1);
    assert_eq!(files[0].metadata().unwrap().permissions().mode() & 0o777, 0o600);
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn an_update_that_fails_stops_and_the_replicas_before_it_stay() {
    let place = Place::new();
    let ark = place.start().await;
    let client = &ark.client;
    client.post("/v1/services", &web("base", 2, &json!({}))).await;
    let before = settled(client).await;
    put(client, &web("panics", 2, &json!({ "update": { "max_unavailable": 1, "max_surge": 1 } }))).await;
    eventually("it stops", async || {
        let now = service(client).await;
        assert!(now.ready >= 2, "{now:?}");
        now.conditions.iter().any(|why| why.contains("is stopped after 3 failures") && why.contains("panic"))
    })
    .await;
    let stopped = service(client).await;
    assert_eq!((stopped.ready, stopped.updated, stopped.generation), (2, 0, 2));
    assert_eq!((stopped.is_stopped, ids(&stopped)), (true, ids(&before)));
    answered(client, "true").await;
    // Mended, it goes on.
    put(client, &web("base", 2, &json!({ "env": { "V": "3" } }))).await;
    let mended = settled(client).await;
    assert_eq!((mended.updated, mended.generation), (2, 3));
    assert!(ids(&mended).is_disjoint(&ids(&before)));
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn a_drained_replica_finishes_its_calls_and_takes_no_new_ones() {
    let place = Place::new();
    let ark = place.start().await;
    let client = &ark.client;
    client.post("/v1/services", &web("base", 2, &json!({}))).await;
    let two = settled(client).await;
    let gate = place.path("gate");
    let until_told = format!("until test -e {}; do sleep 0.05; done; echo one", gate.display());
    let (first, second) = tokio::join!(answered(client, &until_told), async {
        eventually("it is called", async || service(client).await.replicas.iter().any(|r| r.load == 1)).await;
        let busy = service(client).await.replicas.into_iter().find(|replica| replica.load == 1).unwrap();
        let drain = json!({ "agent": busy.agent });
        let drained = client.post("/v1/services/web/drain", &drain);
        let calls = async {
            eventually("it drains", async || {
                service(client).await.replicas.iter().any(|r| r.state == ReplicaState::Draining)
            })
            .await;
            for _ in 0..3 {
                assert_ne!(answered(client, "true").await.0, busy.id);
            }
            std::fs::write(&gate, "").unwrap();
        };
        let (drained, ()) = tokio::join!(drained, calls);
        assert_eq!(drained.status(), StatusCode::OK, "{:?}", drained.body);
        assert!(!ids(&drained.json()).contains(&busy.id));
        busy.id
    });
    assert_eq!(first, (second.clone(), "one\n".to_owned()), "what was under way was finished");
    let after = settled(client).await;
    assert!(!ids(&after).contains(&second) && ids(&after).intersection(&ids(&two)).count() == 1);

    // What takes longer than it may is cut off, with the reason.
    let (cut, _) = tokio::join!(call(client, "sleep 100"), async {
        eventually("it is called", async || service(client).await.replicas.iter().any(|r| r.load == 1)).await;
        client.delete("/v1/services/web?grace_ms=300").await
    });
    cut.problem(ProblemKind::AgentGone);
    assert_eq!(place.agent_dirs(), 0);
    client
        .post("/v1/services/web/drain", &json!({ "agent": "x" }))
        .await
        .problem(ProblemKind::ServiceNotFound);
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn the_next_arkd_goes_on_with_services_and_their_replicas() {
    let place = Place::new();
    let (mut last, client) = started(&place, &[]).await;
    let more = json!({ "env": { "KEY": "a-secret-value" } });
    assert_eq!(client.post("/v1/services", &web("base", 2, &more)).await.status(), StatusCode::CREATED);
    let before = settled(&client).await;
    let gone = web("base", 1, &json!({ "name": "gone" }));
    client.post("/v1/services", &gone).await;
    last.end(Signal::SIGKILL);

    let (mut last, client) = started(&place, &[]).await;
    let after = settled(&client).await;
    assert_eq!((ids(&after), &after.spec, after.generation), (ids(&before), &before.spec, 1));
    // What is made now has the same environment.
    client.ask(Method::PATCH, "/v1/services/web", r#"{"replicas":3}"#).await;
    let three = settled(&client).await;
    for _ in 0..3 {
        assert_eq!(answered(&client, "echo $KEY").await.1, "a-secret-value\n");
    }
    let events = std::fs::read(place.state().events()).unwrap();
    let wal = std::fs::read(place.state().events().with_extension("db-wal")).unwrap_or_default();
    for log in [events, wal] {
        assert!(!log.windows(14).any(|window| window == b"a-secret-value"), "a secret is in the log");
    }
    // Killed in the middle of a removal, the next one ends that.
    let removing = client.ask(Method::DELETE, "/v1/services/web?grace_ms=60000", "");
    let slow = tokio::spawn({
        let client = client.clone();
        async move {
            client
                .try_send(client.request(
                    Method::POST,
                    "/v1/services/web/call",
                    r#"{"exec":{"argv":["sleep","100"]}}"#,
                ))
                .await
                .is_ok()
        }
    });
    eventually("it is called", async || service(&client).await.replicas.iter().any(|r| r.load == 1)).await;
    let removing = tokio::time::timeout(std::time::Duration::from_millis(700), removing).await;
    assert!(removing.is_err(), "a call is under way");
    last.end(Signal::SIGKILL);
    let _ = slow.await;
    let (mut last, client) = started(&place, &[]).await;
    eventually("nothing of it is left", async || {
        let agents = agents(&client).await;
        agents.len() == 1 && three.replicas.iter().all(|replica| agents[0].id != replica.id)
    })
    .await;
    client.get("/v1/services/web").await.problem(ProblemKind::ServiceNotFound);
    assert_eq!(client.delete("/v1/services/gone").await.status(), StatusCode::NO_CONTENT);
    assert_eq!(place.agent_dirs(), 0);
    last.end(Signal::SIGTERM);
}

#[tokio::test]
async fn what_makes_no_sense_is_refused_with_a_sentence() {
    let place = Place::new();
    let ark = place.start().await;
    let client = &ark.client;
    let refused = async |spec: Value| {
        client.post("/v1/services", &spec).await.problem(ProblemKind::InvalidValue).detail
    };
    assert!(
        refused(web("base", 201, &json!({})))
            .await
            .contains("201 replicas are out of bounds: choose 0 to 200")
    );
    let still = json!({ "update": { "max_unavailable": 0, "max_surge": 0 } });
    let unknown = json!({ "name": "web", "replicas": 1, "template": "nope" });
    client.post("/v1/services", &unknown).await.problem(ProblemKind::TemplateNotFound);
    assert!(refused(web("base", 1, &still)).await.contains("could not begin"));
    assert!(refused(web("base", 1, &json!({ "name": "x".repeat(55) }))).await.contains("at most 54"));
    let own = json!({ "labels": { "ark.service": "other" } });
    assert!(refused(web("base", 1, &own)).await.contains("leave it out"));
    assert!(refused(web("base", 1, &json!({ "env": { "A=B": "" } }))).await.contains("A=B"));
    client.post("/v1/services", &web("nothing", 1, &json!({}))).await.problem(ProblemKind::ImageNotFound);
    let other = client.ask(Method::PUT, "/v1/services/other", web("base", 1, &json!({})).to_string()).await;
    assert!(other.problem(ProblemKind::InvalidValue).detail.contains("name one"));
    let agent = json!({ "image": "base", "memory_mib": 64, "labels": { "ark.service": "web" } });
    client.post("/v1/agents", &agent).await.problem(ProblemKind::InvalidValue);
    assert_eq!(place.agent_dirs(), 0);
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn whoever_waits_is_told_when_arkd_ends() {
    let place = Place::new();
    let (mut last, client) = started(&place, &[]).await;
    client.post("/v1/services", &web("base", 1, &json!({}))).await;
    settled(&client).await;
    // A replica that is busy for longer than any test, and somebody who waits for its end.
    let call = r#"{"exec":{"argv":["sleep","1000"]}}"#;
    let busy = client.request(Method::POST, "/v1/services/web/call", call);
    let caller = client.clone();
    let busy = tokio::spawn(async move { caller.try_send(busy).await.is_ok() });
    eventually("it is called", async || service(&client).await.replicas.iter().any(|r| r.load == 1)).await;
    let drain = json!({ "agent": service(&client).await.replicas[0].agent });
    let drained = client.post("/v1/services/web/drain?grace_ms=600000", &drain);
    let ending = async {
        eventually("it drains", async || {
            service(&client).await.replicas.iter().any(|r| r.state == ReplicaState::Draining)
        })
        .await;
        signal(last.child.id(), Signal::SIGTERM);
    };
    let (drained, ()) = tokio::join!(drained, ending);
    let told = drained.problem(ProblemKind::HostUnable).detail;
    assert!(told.contains("arkd ends"), "{told}");
    assert!(last.wait());
    let _ = busy.await;
}
