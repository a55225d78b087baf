//! Agents find services on their own socket, and are connected with replicas.

use std::time::Duration;

use ark_types::agent::Agent;
use ark_types::service::{FoundService, Service};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::UnixStream;

use crate::harness::{Client, Place, eventually, runs, signal, started};

/// A connection that a program of `agent` makes to the host's port 1026.
async fn call(place: &Place, agent: &Agent, line: &[u8]) -> BufReader<UnixStream> {
    let socket = place.run().agent(&agent.id).0.join("v.sock_1026");
    let mut stream = UnixStream::connect(socket).await.unwrap();
    stream.write_all(line).await.unwrap();
    BufReader::new(stream)
}

async fn line(stream: &mut BufReader<UnixStream>) -> String {
    let mut line = String::new();
    let read = tokio::time::timeout(Duration::from_secs(20), stream.read_line(&mut line));
    read.await.unwrap().unwrap();
    line.trim_end().to_owned()
}

/// All that is answered to `text`.
async fn said(place: &Place, agent: &Agent, text: &[u8]) -> String {
    let mut stream = call(place, agent, text).await;
    let mut said = String::new();
    stream.read_to_string(&mut said).await.unwrap();
    said
}

async fn service(client: &Client, name: &str, replicas: u32, more: Value) {
    let mut spec = json!({ "name": name, "replicas": replicas, "image": "base", "memory_mib": 64 });
    spec.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    let reply = client.post("/v1/services", &spec).await;
    assert_eq!(reply.status(), 201, "{:?}", reply.body);
    eventually("its replicas are ready", async || of(client, name).await.ready == replicas).await;
}

async fn of(client: &Client, name: &str) -> Service {
    client.get(&format!("/v1/services/{name}")).await.json()
}

async fn load(client: &Client, name: &str) -> u32 {
    of(client, name).await.replicas.iter().map(|replica| replica.load).sum()
}

#[tokio::test]
async fn an_agent_is_connected_with_a_replica_by_name() {
    let place = Place::new();
    let ark = place.start().await;
    let client = &ark.client;
    service(client, "echo", 2, json!({ "port": 7 })).await;
    let caller = client.create("caller", "base").await;

    // What comes with the line is the program's.
    let mut one = call(&place, &caller, b"CONNECT echo\nearly ").await;
    let first = line(&mut one).await;
    assert!(first.starts_with("OK echo-"), "{first}");
    assert_eq!(line(&mut one).await, first[3..], "it is the replica that was named");
    let mut other = call(&place, &caller, b"CONNECT echo\n").await;
    assert_ne!(line(&mut other).await, first, "the one with fewer streams is picked");
    assert_eq!(load(client, "echo").await, 2);
    let replica = &of(client, "echo").await.replicas[0];
    assert_eq!(replica.load, 1);

    // The end of one direction is passed on, and the answer goes on.
    one.get_mut().write_all(b"and late").await.unwrap();
    one.get_mut().shutdown().await.unwrap();
    let mut rest = String::new();
    one.read_to_string(&mut rest).await.unwrap();
    assert_eq!(rest, "EARLY AND LATEbye\n");
    drop((one, other));
    eventually("the streams are over", async || load(client, "echo").await == 0).await;

    let many: Vec<u8> = (0..3_000_000u32).map(|n| b'a' + u8::try_from(n % 26).unwrap()).collect();
    let mut stream = call(&place, &caller, b"CONNECT echo\n").await;
    let name = line(&mut stream).await;
    assert_eq!(line(&mut stream).await, name[3..]);
    let (mut reader, mut writer) = tokio::io::split(stream);
    let sending = async {
        writer.write_all(&many).await.unwrap();
        writer.shutdown().await.unwrap();
    };
    let mut back = Vec::new();
    let ((), read) = tokio::join!(sending, reader.read_to_end(&mut back));
    read.unwrap();
    assert_eq!(back.len(), many.len() + 4);
    assert!(back.iter().zip(&many).all(|(got, sent)| *got == sent.to_ascii_uppercase()));
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn an_agent_finds_what_is_its_owners_and_is_told_what_is_wrong() {
    let place = Place::new();
    let ark = place.start().await;
    let client = &ark.client;
    service(client, "echo", 1, json!({ "port": 7 })).await;
    service(client, "mute", 1, json!({})).await;
    service(client, "deaf", 1, json!({ "port": 9 })).await;
    service(client, "none", 0, json!({ "port": 7 })).await;
    service(client, "theirs", 1, json!({ "port": 7, "owner": "others" })).await;
    let caller = client.create("caller", "base").await;
    let list = said(&place, &caller, b"LIST\n").await;
    let found: Vec<FoundService> = list.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let found: Vec<_> = found.iter().map(|f| (f.name.as_ref(), f.ready, f.connectable)).collect();
    assert_eq!(found, [("deaf", 1, true), ("echo", 1, true), ("mute", 1, false), ("none", 0, true)]);

    let long = [b"CONNECT ".as_slice(), &[b'x'; 500]].concat();
    for (text, why) in [
        (b"CONNECT theirs\n".as_slice(), "ERR there is no service \"theirs\""),
        (b"CONNECT nothing\n", "ERR there is no service \"nothing\""),
        (b"CONNECT mute\n", "ERR the service mute takes no connections"),
        (b"CONNECT deaf\n", "ERR the replica deaf-"),
        (b"GET / HTTP/1.1\r\n\r\n", "ERR the line cannot be understood"),
        (b"\xff\xfe\n", "ERR the line cannot be understood"),
        (&long, "ERR no line of at most 128 bytes"),
    ] {
        let told = said(&place, &caller, text).await;
        assert!(told.starts_with(why) && told.lines().count() == 1, "{told}");
    }
    // One that says nothing keeps nobody else from being heard.
    let _silent = call(&place, &caller, b"CONN").await;
    assert!(said(&place, &caller, b"LIST\n").await.contains("echo"));
    // It waits for a replica, as any call.
    let mut waiting = call(&place, &caller, b"CONNECT none\n").await;
    client.ask(hyper::Method::PATCH, "/v1/services/none", r#"{"replicas":1}"#).await;
    assert!(line(&mut waiting).await.starts_with("OK none-"));
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn streams_end_with_either_agent_and_hold_a_drain_up_no_longer_than_its_grace() {
    let place = Place::new();
    let (mut last, client) = started(&place, &[]).await;
    service(&client, "echo", 1, json!({ "port": 7, "restart": { "when": "never" } })).await;
    let caller = client.create("caller", "base").await;
    let mut stream = call(&place, &caller, b"CONNECT echo\n").await;
    assert!(line(&mut stream).await.starts_with("OK echo-"));
    let replica: Agent = {
        let id = of(&client, "echo").await.replicas[0].id.clone();
        client.get(&format!("/v1/agents/{id}")).await.json()
    };
    signal(replica.vmm_pid.unwrap(), Signal::SIGKILL);
    let mut rest = Vec::new();
    // Broken or ended.
    let _ = tokio::time::timeout(Duration::from_secs(20), stream.read_to_end(&mut rest)).await.unwrap();
    eventually("another replica is ready", async || {
        let now = of(&client, "echo").await;
        now.ready == 1 && now.replicas[0].id != replica.id
    })
    .await;

    let mut stream = call(&place, &caller, b"CONNECT echo\n").await;
    assert!(line(&mut stream).await.starts_with("OK echo-"));
    signal(caller.vmm_pid.unwrap(), Signal::SIGKILL);
    eventually("its VMM is gone", async || !runs(caller.vmm_pid.unwrap())).await;
    eventually("the replica is free", async || load(&client, "echo").await == 0).await;

    // The next arkd listens for the agents that it adopts.
    let next = client.create("next", "base").await;
    last.end(Signal::SIGKILL);
    let (mut last, client) = started(&place, &[]).await;
    eventually("the replica is ready", async || of(&client, "echo").await.ready == 1).await;
    let mut stream = call(&place, &next, b"CONNECT echo\n").await;
    assert!(line(&mut stream).await.starts_with("OK echo-"));
    let drain = json!({ "agent": of(&client, "echo").await.replicas[0].agent });
    let drained = client.post("/v1/services/echo/drain?grace_ms=500", &drain).await;
    assert_eq!(drained.status(), 200, "{:?}", drained.body);
    let _ = tokio::time::timeout(Duration::from_secs(20), stream.read_to_end(&mut rest)).await.unwrap();
    last.end(Signal::SIGTERM);
}
