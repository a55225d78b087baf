//! Agents that outlive their `arkd`, and what the next one makes of those that do not.

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use ark_types::agent::{Agent, AgentList, AgentState};
use ark_types::exec::ExecReply;
use ark_types::problem::ProblemKind;
use ark_types::receipt::Receipt;
use ark_types::vmm::{ControlReply, ControlRequest, ExitReason, VmState};
use arkd::supervisor::ask;
use hyper::StatusCode;
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::events::life;
use crate::forks::eval;
use crate::harness::{Client, Place, arkd, eventually, runs, signal, started};

async fn agents(client: &Client) -> Vec<(String, AgentState)> {
    let list: AgentList = client.get("/v1/agents").await.json();
    list.agents.into_iter().map(|agent| (agent.name.to_string(), agent.state)).collect()
}

async fn agent(client: &Client, name: &str) -> Agent {
    client.get(&format!("/v1/agents/{name}")).await.json()
}

async fn fork(client: &Client, name: &str) -> Agent {
    let forked: Value = client.post(&format!("/v1/agents/{name}/fork"), &json!({})).await.json();
    serde_json::from_value(forked["agents"][0].clone()).unwrap_or_else(|e| panic!("{e}: {forked}"))
}

async fn shut_down(client: &Client, agents: &str) {
    let reply = client.post("/v1/shutdown", &json!({ "agents": agents })).await;
    assert_eq!(reply.status(), StatusCode::ACCEPTED, "{:?}", reply.body);
}

/// The record that the next `arkd` reads of an agent.
fn record(place: &Place, agent: &Agent) -> PathBuf {
    place.run().agent(&agent.id).0.join("agent.json")
}

/// Changes the record of an agent whose `arkd` is away.
fn rewrite(place: &Place, agent: &Agent, change: impl FnOnce(&mut Value)) {
    let path = record(place, agent);
    let mut known: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    change(&mut known);
    std::fs::write(path, known.to_string()).unwrap();
}

/// Snapshots in the state directory, templates' left out.
fn branch_points(place: &Place) -> usize {
    std::fs::read_dir(place.state().snapshots()).map_or(0, Iterator::count)
}

#[tokio::test]
async fn agents_go_on_with_the_next_arkd_however_the_last_one_ended() {
    let place = Place::new();
    let (first_arkd, mut client) = started(&place, &[]).await;
    // Each ends what it leaves when it is dropped.
    let mut arkds = vec![first_arkd];
    let body = json!({ "name": "a1", "image": "base", "memory_mib": 64, "env": { "COLOUR": "red" } });
    let first: Agent = client.post("/v1/agents", &body).await.json();
    eval(&client, "a1", "x=5").await;
    let machine_id = eval(&client, "a1", "machine_id").await;
    let forked = fork(&client, "a1").await;
    let receipt: Receipt = client.get("/v1/agents/a1-1/receipt").await.json();
    for (round, by) in
        [Signal::SIGKILL, Signal::SIGTERM, Signal::SIGINT, Signal::SIGKILL].into_iter().enumerate()
    {
        assert_eq!(arkds.last_mut().unwrap().end(by), by != Signal::SIGKILL);
        assert!(runs(first.vmm_pid.unwrap()) && runs(forked.vmm_pid.unwrap()));
        let (next, next_client) = started(&place, &[]).await;
        arkds.push(next);
        client = next_client;
        let running = [("a1".to_owned(), AgentState::Running), ("a1-1".to_owned(), AgentState::Running)];
        assert_eq!(agents(&client).await, running, "{by}");
        let back = agent(&client, "a1").await;
        // All but what its guest said, which it has to say anew.
        assert_eq!(Agent { heartbeat: None, ..back }, Agent { heartbeat: None, ..first.clone() });
        assert_eq!(agent(&client, "a1-1").await.origin, forked.origin);
        assert_eq!(eval(&client, "a1", "x").await.as_deref(), Some("5"));
        assert_eq!(eval(&client, "a1-1", "x").await.as_deref(), Some("5"));
        assert_eq!(eval(&client, "a1", "machine_id").await, machine_id);
        let said: ExecReply =
            client.exec("a1", &json!({ "argv": ["sh", "-c", "echo $COLOUR"] })).await.json();
        assert_eq!(said.stdout, "red\n");
        assert_eq!(client.get("/v1/agents/a1-1/receipt").await.json::<Receipt>(), receipt);
        eventually("it is heard again", async || agent(&client, "a1").await.heartbeat.is_some()).await;
        // Whatever else can be asked of an agent can be asked of one that was adopted.
        let next = fork(&client, "a1").await;
        assert_eq!(next.name.as_ref(), "a1-2");
        assert_eq!(eval(&client, "a1-2", "x").await.as_deref(), Some("5"));
        assert_eq!(client.delete("/v1/agents/a1-2").await.status(), StatusCode::NO_CONTENT);
        let name = format!("s{round}");
        let taken = client.post("/v1/agents/a1-1/snapshots", &json!({ "name": name })).await;
        assert_eq!(taken.status(), StatusCode::CREATED, "{:?}", taken.body);
        client.post("/v1/agents", &body).await.problem(ProblemKind::NameTaken);
    }
    shut_down(&client, "end").await;
    assert!(arkds.last_mut().unwrap().wait());
    assert!(!runs(first.vmm_pid.unwrap()) && !runs(forked.vmm_pid.unwrap()));
    assert_eq!(std::fs::read_dir(place.path("run")).unwrap().count(), 0, "an orderly end leaves nothing");
}

#[tokio::test]
async fn an_adopted_agent_is_rewound_paused_resumed_and_deleted_like_any() {
    let place = Place::new();
    let (mut last, client) = started(&place, &[]).await;
    let first = client.create("a1", "base").await;
    eval(&client, "a1", "x=then").await;
    client.post("/v1/agents/a1/snapshots", &json!({ "name": "s1" })).await;
    eval(&client, "a1", "x=now").await;
    last.end(Signal::SIGKILL);

    let (mut last, client) = started(&place, &[]).await;
    let rewound: Agent = client.post("/v1/agents/a1/rewind", &json!({ "snapshot": "s1" })).await.json();
    assert_eq!((&rewound.id, rewound.state), (&first.id, AgentState::Running));
    assert!(!runs(first.vmm_pid.unwrap()));
    last.end(Signal::SIGKILL);

    let (mut last, client) = started(&place, &[]).await;
    assert_eq!(agent(&client, "a1").await.vmm_pid, rewound.vmm_pid);
    assert_eq!(eval(&client, "a1", "x").await.as_deref(), Some("then"));
    for verb in ["pause", "resume", "pause"] {
        let reply = client.post(&format!("/v1/agents/a1/{verb}"), &json!({})).await;
        assert_eq!(reply.status(), StatusCode::OK, "{:?}", reply.body);
    }
    last.end(Signal::SIGKILL);

    let (mut last, client) = started(&place, &[]).await;
    assert_eq!(agents(&client).await, [("a1".to_owned(), AgentState::Paused)]);
    assert!(!runs(rewound.vmm_pid.unwrap()), "its memory is on disk");
    let woken: Agent = client.post("/v1/agents/a1/resume", &json!({})).await.json();
    last.end(Signal::SIGTERM);

    let (_last, client) = started(&place, &[]).await;
    assert_eq!(agent(&client, "a1").await.vmm_pid, woken.vmm_pid);
    assert_eq!(eval(&client, "a1", "x").await.as_deref(), Some("then"));
    assert_eq!(client.delete("/v1/agents/a1").await.status(), StatusCode::NO_CONTENT);
    assert!(!runs(woken.vmm_pid.unwrap()));
    assert_eq!(client.delete("/v1/snapshots/s1").await.status(), StatusCode::NO_CONTENT);
    let left = std::fs::read_dir(place.state().paused()).unwrap().count();
    assert_eq!((place.agent_dirs(), branch_points(&place), left), (0, 0, 0));
}

/// A process that is nobody's VMM.
struct Stranger(Child);

impl Drop for Stranger {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test]
async fn a_process_that_merely_has_the_id_is_not_touched_and_the_agent_has_failed() {
    let place = Place::new();
    let (mut first, client) = started(&place, &[]).await;
    let agents = [client.create("a1", "base").await, client.create("a2", "base").await];
    first.end(Signal::SIGKILL);
    let mut strangers = Vec::new();
    for (agent, of_another_boot) in agents.iter().zip([false, true]) {
        signal(agent.vmm_pid.unwrap(), Signal::SIGKILL);
        let stranger = Stranger(Command::new("sleep").arg("1000").stdin(Stdio::null()).spawn().unwrap());
        // As if the system had given the id away again.
        rewrite(&place, agent, |known| {
            known["process"]["pid"] = stranger.0.id().into();
            if of_another_boot {
                known["process"]["boot_id"] = "another".into();
            }
            std::fs::write(place.run().agent(&agent.id).identity(), known["process"].to_string()).unwrap();
        });
        strangers.push(stranger);
    }

    let (_second, client) = started(&place, &[]).await;
    for (name, words) in [
        ("a1", "while arkd was away and left no record"),
        ("a2", "the host was started anew while arkd was away"),
    ] {
        let agent = agent(&client, name).await;
        assert_eq!((agent.state, agent.vmm_pid), (AgentState::Failed, None));
        assert!(agent.reason.as_ref().unwrap().contains(words), "{agent:?}");
        assert_eq!(agent.exit.unwrap().reason, ExitReason::Killed);
        assert_eq!(client.delete(&format!("/v1/agents/{name}")).await.status(), StatusCode::NO_CONTENT);
    }
    for stranger in &mut strangers {
        assert!(stranger.0.try_wait().unwrap().is_none(), "it still runs");
    }
    assert_eq!(place.agent_dirs(), 0);
}

#[tokio::test]
async fn an_agent_that_ended_while_arkd_was_away_is_known_with_its_end() {
    let place = Place::new();
    let (mut first, client) = started(&place, &[]).await;
    let killed = client.create("killed", "base").await;
    let panicked = client.create("panicked", "dies-in-exec").await;
    let earlier = client.create("earlier", "base").await;
    signal(earlier.vmm_pid.unwrap(), Signal::SIGKILL);
    eventually("it fails", async || agent(&client, "earlier").await.state == AgentState::Failed).await;
    // What its guest still said may be heard after its end.
    let earlier = Agent { heartbeat: None, ..agent(&client, "earlier").await };
    // Its guest panics under a program whose client does not wait for it, after arkd is gone.
    first.end(Signal::SIGKILL);
    signal(killed.vmm_pid.unwrap(), Signal::SIGKILL);
    let mut socket =
        std::os::unix::net::UnixStream::connect(place.run().agent(&panicked.id).vsock()).unwrap();
    let exec =
        ark_types::guest::Frame::json(ark_types::guest::Kind::Exec, &json!({ "argv": ["true"] })).unwrap();
    std::io::Write::write_all(&mut socket, &[b"CONNECT 1025\n", exec.encode().as_slice()].concat()).unwrap();
    eventually("it panics", async || !runs(panicked.vmm_pid.unwrap())).await;

    let (mut second, client) = started(&place, &[]).await;
    let states = agents(&client).await;
    assert_eq!(states.iter().map(|(_, state)| *state).collect::<Vec<_>>(), [AgentState::Failed; 3]);
    let known = agent(&client, "panicked").await;
    assert_eq!(known.exit.unwrap().reason, ExitReason::GuestPanic);
    assert_eq!(known.reason.unwrap(), "the guest's kernel panicked: out of memory");
    let known = agent(&client, "killed").await;
    assert!(known.reason.unwrap().contains("left no record"));
    assert_eq!(agent(&client, "earlier").await, earlier);
    let refused = client.exec("killed", &json!({ "argv": ["true"] })).await;
    refused.problem(ProblemKind::AgentNotRunning);
    assert_eq!(client.get("/v1/agents/killed/logs").await.status(), StatusCode::OK, "its console is there");
    // The name is free, and the ended one is still known by its id.
    let anew = client.create("killed", "base").await;
    second.end(Signal::SIGKILL);

    let (_third, client) = started(&place, &[]).await;
    assert_eq!(agent(&client, "killed").await.id, anew.id);
    assert_eq!(agent(&client, &killed.id).await.state, AgentState::Failed);
    for id in [&killed.id, &panicked.id, &earlier.id, &anew.id] {
        assert_eq!(client.delete(&format!("/v1/agents/{id}")).await.status(), StatusCode::NO_CONTENT);
    }
    assert_eq!(place.agent_dirs(), 0);
}

#[tokio::test]
async fn what_nobody_was_told_of_is_ended() {
    let place = Place::new();
    let (mut first, client) = started(&place, &[]).await;
    let told = client.create("told", "base").await;
    let unborn = tokio::spawn({
        let client = client.clone();
        let body = json!({ "name": "unborn", "image": "silent", "memory_mib": 64 });
        async move { client.try_send(client.request(hyper::Method::POST, "/v1/agents", body.to_string())).await }
    });
    eventually("its VMM runs", async || place.agent_dirs() == 2).await;
    let pid = async || agent(&client, "unborn").await.vmm_pid;
    eventually("its VMM runs", async || pid().await.is_some()).await;
    let pid = pid().await.unwrap();
    first.end(Signal::SIGKILL);
    assert!(unborn.await.unwrap().is_err());

    let (_second, client) = started(&place, &[]).await;
    assert_eq!(agents(&client).await, [("told".to_owned(), AgentState::Running)]);
    assert!(runs(told.vmm_pid.unwrap()) && !runs(pid));
    assert_eq!(place.agent_dirs(), 1);
}

#[tokio::test]
async fn an_agent_that_somebody_was_about_to_be_told_of_never_was() {
    let place = Place::new();
    let (mut first, client) = started(&place, &[]).await;
    let ready = client.create("a1", "base").await;
    first.end(Signal::SIGKILL);
    std::fs::remove_file(record(&place, &ready)).unwrap();

    let (_second, client) = started(&place, &[]).await;
    assert!(agents(&client).await.is_empty());
    assert!(!runs(ready.vmm_pid.unwrap()));
    assert_eq!(
        life(&client, &ready.id).await,
        ["agent.created", "agent.ready", "agent.ended", "agent.removed"]
    );
}

#[tokio::test]
async fn an_agent_that_cannot_be_looked_at_or_taken_in_is_left_to_a_later_arkd() {
    let place = Place::new();
    let (mut first, client) = started(&place, &[]).await;
    let left = [client.create("a1", "base").await, client.create("a2", "base").await];
    first.end(Signal::SIGKILL);
    let (unreadable, aside) = (record(&place, &left[0]), place.path("aside"));
    std::fs::rename(&unreadable, &aside).unwrap();
    let mut socket = place.run().agent(&left[1].id).vsock().into_os_string();
    socket.push("_1024");
    std::fs::remove_file(&socket).unwrap();
    for in_the_way in [unreadable.as_os_str(), &socket] {
        std::fs::create_dir(in_the_way).unwrap();
    }

    let (mut second, client) = started(&place, &[]).await;
    eventually("neither is known", async || agents(&client).await.is_empty()).await;
    for agent in &left {
        assert!(runs(agent.vmm_pid.unwrap()));
        assert_eq!(life(&client, &agent.id).await, ["agent.created", "agent.ready"]);
    }
    assert!(second.end(Signal::SIGTERM));
    for in_the_way in [unreadable.as_os_str(), &socket] {
        std::fs::remove_dir(in_the_way).unwrap();
    }
    std::fs::rename(&aside, &unreadable).unwrap();

    let (_third, client) = started(&place, &[]).await;
    for before in &left {
        let back = agent(&client, before.name.as_ref()).await;
        assert_eq!((back.state, back.vmm_pid), (AgentState::Running, before.vmm_pid));
    }
}

#[tokio::test]
async fn what_was_done_and_not_recorded_is_recorded_by_the_next_arkd() {
    let place = Place::new();
    let (mut first, client) = started(&place, &[]).await;
    let rewound = client.create("a1", "base").await;
    let stopping = client.create("a2", "ignores-stop").await;
    let removing = tokio::spawn({
        let client = client.clone();
        let path = "/v1/agents/a2?grace_ms=600000";
        async move { client.try_send(client.request(hyper::Method::DELETE, path, "")).await }
    });
    eventually("it is said to stop", async || life(&client, &stopping.id).await.len() == 3).await;
    first.end(Signal::SIGKILL);
    drop(removing.await.unwrap());
    rewrite(&place, &rewound, |known| known["agent"]["origin"] = json!({ "from": "snapshot", "name": "s1" }));

    let (_second, client) = started(&place, &[]).await;
    for (agent, news) in
        [(&rewound, &["agent.rewound"][..]), (&stopping, &["agent.stopping", "agent.resumed"])]
    {
        let told = [&["agent.created", "agent.ready"], news].concat();
        eventually("it is made up for", async || life(&client, &agent.id).await == told).await;
    }
    assert_eq!(agent(&client, "a2").await.state, AgentState::Running);
    assert_eq!(client.delete("/v1/agents/a2?grace_ms=0").await.status(), StatusCode::NO_CONTENT);
}

#[tokio::test]
async fn a_record_that_cannot_be_read_costs_its_own_agent_only() {
    let place = Place::new();
    let (mut first, client) = started(&place, &[]).await;
    let sound = client.create("sound", "base").await;
    let torn = client.create("torn", "base").await;
    let anothers = client.create("anothers", "base").await;
    first.end(Signal::SIGKILL);
    std::fs::write(record(&place, &torn), "{\"agent\":").unwrap();
    std::fs::copy(record(&place, &sound), record(&place, &anothers)).unwrap();

    let (mut second, client) = started(&place, &[]).await;
    let found = [
        ("sound", AgentState::Running),
        // What was acknowledged is not silently gone.
        ("torn", AgentState::Failed),
        ("anothers", AgentState::Failed),
    ];
    assert_eq!(agents(&client).await, found.map(|(name, state)| (name.to_owned(), state)));
    assert!(!runs(torn.vmm_pid.unwrap()) && !runs(anothers.vmm_pid.unwrap()), "nothing unknown runs");
    assert_eq!(agent(&client, "sound").await.vmm_pid, sound.vmm_pid);
    assert_eq!(place.agent_dirs(), 1);
    // An end in order waits for nobody, and leaves what is known as it is.
    assert!(second.end(Signal::SIGTERM));
    let (_third, client) = started(&place, &[]).await;
    assert_eq!(agents(&client).await, found.map(|(name, state)| (name.to_owned(), state)));
}

#[tokio::test]
async fn what_an_adopted_agent_goes_on_from_stays_and_goes_with_it() {
    let place = Place::new();
    let (mut first, client) = started(&place, &[]).await;
    client.create("a1", "base").await;
    eval(&client, "a1", "x=5").await;
    fork(&client, "a1").await;
    let of_template: Agent =
        client.post("/v1/agents", &json!({ "name": "t1", "image": "base" })).await.json();
    assert_eq!(client.delete("/v1/agents/a1").await.status(), StatusCode::NO_CONTENT);
    assert_eq!(branch_points(&place), 1);
    first.end(Signal::SIGKILL);
    // Nobody can name the template any more, as after an update of its kernel.
    for template in std::fs::read_dir(place.state().templates()).unwrap().flatten() {
        std::fs::remove_file(template.path().join("record.json")).unwrap();
    }

    let (mut second, client) = started(&place, &[]).await;
    // The branch point and the template are needed: forks of forks are diffs over them.
    for name in ["a1-1", "t1"] {
        let taken = client
            .post(&format!("/v1/agents/{name}/snapshots"), &json!({ "name": format!("of-{name}") }))
            .await;
        assert_eq!(taken.status(), StatusCode::CREATED, "{:?}", taken.body);
        assert_eq!(fork(&client, name).await.state, AgentState::Running);
        assert_eq!(client.delete(&format!("/v1/agents/{name}-1")).await.status(), StatusCode::NO_CONTENT);
        assert_eq!(client.delete(&format!("/v1/snapshots/of-{name}")).await.status(), StatusCode::NO_CONTENT);
    }
    assert_eq!(agent(&client, "t1").await.vmm_pid, of_template.vmm_pid);
    // An arkd that ends in order leaves them, too, and they go with the agents.
    second.end(Signal::SIGTERM);
    assert_eq!(branch_points(&place), 1);
    let (_third, client) = started(&place, &[]).await;
    assert_eq!(eval(&client, "a1-1", "x").await.as_deref(), Some("5"));
    for name in ["a1-1", "t1"] {
        assert_eq!(client.delete(&format!("/v1/agents/{name}")).await.status(), StatusCode::NO_CONTENT);
    }
    eventually("nothing is left", async || branch_points(&place) == 0).await;
    eventually("nor the template", async || {
        std::fs::read_dir(place.state().templates()).unwrap().count() == 0
    })
    .await;
}

#[tokio::test]
async fn an_agent_that_goes_with_its_stream_goes_with_its_arkd() {
    let place = Place::new();
    for by in [Signal::SIGKILL, Signal::SIGTERM] {
        let (mut first, client) = started(&place, &[]).await;
        let body = json!({ "name": "r1", "image": "base", "memory_mib": 64, "auto_remove": true });
        let agent: Agent = client.post("/v1/agents", &body).await.json();
        first.end(by);
        let (_second, client) = started(&place, &[]).await;
        assert!(agents(&client).await.is_empty());
        assert!(!runs(agent.vmm_pid.unwrap()));
        assert_eq!(place.agent_dirs(), 0);
    }
}

#[tokio::test]
async fn a_pause_that_was_cut_off_is_none() {
    for image in ["slow-snapshot", "slow-reclaim"] {
        let place = Place::new();
        let (mut first, client) = started(&place, &[]).await;
        let before = client.create("a1", image).await;
        eval(&client, "a1", "x=5").await;
        let pausing = tokio::spawn({
            let client = client.clone();
            async move { client.try_send(client.request(hyper::Method::POST, "/v1/agents/a1/pause", "{}")).await }
        });
        eventually("it stands still", async || agent(&client, "a1").await.state == AgentState::Paused).await;
        if image == "slow-reclaim" {
            let moved = || std::fs::read_to_string(record(&place, &before)).unwrap().contains("\"paused\"");
            eventually("it is about to be read from disk", async || moved()).await;
        }
        first.end(Signal::SIGKILL);
        assert!(pausing.await.unwrap().is_err());

        let (_second, client) = started(&place, &[]).await;
        let back = agent(&client, "a1").await;
        assert_eq!((back.state, back.vmm_pid), (AgentState::Running, before.vmm_pid));
        assert_eq!(eval(&client, "a1", "x").await.as_deref(), Some("5"));
        // Wherever its memory is read from by now, that is there.
        let said = if image == "slow-reclaim" { "reclaimed" } else { "given up" };
        let log = place.run().agent(&before.id).vmm_log();
        let is_said = async || std::fs::read_to_string(&log).unwrap().contains(said);
        eventually("what was cut off has ended", is_said).await;
        assert_eq!(fork(&client, "a1").await.state, AgentState::Running);
        for name in ["a1-1", "a1"] {
            assert!(client.delete(&format!("/v1/agents/{name}")).await.status().is_success());
        }
        let paused = || std::fs::read_dir(place.state().paused()).unwrap().count();
        eventually("nothing is left", async || {
            (place.agent_dirs(), paused(), branch_points(&place)) == (0, 0, 0)
        })
        .await;
    }
}

#[tokio::test]
async fn a_rewind_that_was_cut_off_is_a_failed_agent() {
    let place = Place::new();
    let (mut first, client) = started(&place, &[]).await;
    let whole = client.create("a1", "base").await;
    first.end(Signal::SIGKILL);
    rewrite(&place, &whole, |known| known["agent"]["state"] = "creating".into());

    let (_second, client) = started(&place, &[]).await;
    let failed = agent(&client, "a1").await;
    assert_eq!(failed.state, AgentState::Failed);
    assert!(failed.reason.unwrap().contains("while the agent was put back"));
    assert!(!runs(whole.vmm_pid.unwrap()), "half an agent");
}

#[tokio::test]
async fn a_vmm_that_is_stopped_is_adopted_and_can_be_deleted() {
    let place = Place::new();
    let (mut first, client) = started(&place, &[]).await;
    let stopped = client.create("a1", "base").await;
    first.end(Signal::SIGKILL);
    signal(stopped.vmm_pid.unwrap(), Signal::SIGSTOP);

    let (_second, client) = started(&place, &[]).await;
    assert_eq!(agent(&client, "a1").await.state, AgentState::Running);
    assert_eq!(client.delete("/v1/agents/a1?grace_ms=100").await.status(), StatusCode::NO_CONTENT);
    assert!(!runs(stopped.vmm_pid.unwrap()));
}

#[tokio::test]
async fn a_vmm_that_stands_still_and_is_silent_goes_on_once_it_answers() {
    let place = Place::new();
    let (mut first, client) = started(&place, &[]).await;
    let paused = client.create("a1", "base").await;
    first.end(Signal::SIGKILL);
    let control = place.run().agent(&paused.id).control_socket();
    // As a pause that was cut off leaves it, on a host that swaps.
    ask(&control, ControlRequest::Pause).await.unwrap();
    signal(paused.vmm_pid.unwrap(), Signal::SIGSTOP);

    let (_second, client) = started(&place, &[]).await;
    assert_eq!(agent(&client, "a1").await.state, AgentState::Running);
    signal(paused.vmm_pid.unwrap(), Signal::SIGCONT);
    eventually("it goes on", async || {
        let state = ask(&control, ControlRequest::State).await;
        matches!(state, Ok(ControlReply::State { state: VmState::Running }))
    })
    .await;
    assert_eq!(client.delete("/v1/agents/a1").await.status(), StatusCode::NO_CONTENT);
}

#[tokio::test]
async fn a_vmm_that_dies_under_its_second_arkd_is_noticed() {
    let place = Place::new();
    let (mut first, client) = started(&place, &[]).await;
    let adopted = [client.create("a1", "base").await, client.create("a2", "base").await];
    first.end(Signal::SIGKILL);
    let (_second, client) = started(&place, &[]).await;
    signal(adopted[0].vmm_pid.unwrap(), Signal::SIGKILL);
    eventually("it fails", async || agent(&client, "a1").await.state == AgentState::Failed).await;
    assert_eq!(agent(&client, "a1").await.exit.unwrap().reason, ExitReason::Killed);
    // In order it can be ended, too.
    assert_eq!(client.delete("/v1/agents/a2").await.status(), StatusCode::NO_CONTENT);
    assert!(!runs(adopted[1].vmm_pid.unwrap()));
}

#[tokio::test]
async fn a_removal_that_gives_a_long_grace_holds_up_no_end_of_arkd() {
    let place = Place::new();
    let (mut first, client) = started(&place, &[]).await;
    let slow = client.create("a1", "ignores-stop").await;
    let removing = tokio::spawn({
        let client = client.clone();
        let path = "/v1/agents/a1?grace_ms=600000";
        async move { client.try_send(client.request(hyper::Method::DELETE, path, "")).await }
    });
    eventually("it stops", async || agent(&client, "a1").await.state == AgentState::Stopping).await;
    assert!(first.end(Signal::SIGTERM));
    assert!(!runs(slow.vmm_pid.unwrap()), "its removal was begun");
    drop(removing.await.unwrap());
    let (_second, client) = started(&place, &[]).await;
    assert!(agents(&client).await.is_empty());
    assert_eq!(place.agent_dirs(), 0);
}

#[tokio::test]
async fn arkd_ends_on_request_without_its_agents_or_with_them() {
    let place = Place::new();
    let (mut first, client) = started(&place, &[]).await;
    let kept = client.create("a1", "base").await;
    client.post("/v1/shutdown", &json!({ "agents": "eat" })).await.problem(ProblemKind::InvalidValue);
    shut_down(&client, "keep").await;
    assert!(first.wait() && runs(kept.vmm_pid.unwrap()));
    // An arkd that cannot start changes nothing.
    let (there, away) = (place.state().snapshots(), place.path("away"));
    std::fs::rename(&there, &away).unwrap();
    std::fs::write(&there, "").unwrap();
    let output = arkd(&place, &[]).output().unwrap();
    assert!(!output.status.success() && runs(kept.vmm_pid.unwrap()), "{output:?}");
    std::fs::remove_file(&there).unwrap();
    std::fs::rename(&away, &there).unwrap();
    let (mut second, client) = started(&place, &[]).await;
    let reply = client.post("/v1/shutdown", &json!({})).await;
    assert_eq!(reply.status(), StatusCode::ACCEPTED);
    assert!(second.wait() && !runs(kept.vmm_pid.unwrap()));
    assert_eq!(std::fs::read_dir(place.path("run")).unwrap().count(), 0);
}
