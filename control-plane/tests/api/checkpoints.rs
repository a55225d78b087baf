//! Agents that are restored from checkpoints of themselves.

use std::path::PathBuf;
use std::time::Duration;

use ark_types::agent::{Agent, AgentState, Origin};
use ark_types::checkpoint::Checkpoint;
use ark_types::event::{Event, EventList};
use ark_types::problem::ProblemKind;
use ark_types::receipt::Receipt;
use ark_types::vmm::SnapshotId;
use hyper::StatusCode;
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::forks::eval;
use crate::harness::{Client, Place, eventually, runs, signal, started};

async fn agent(client: &Client) -> Agent {
    client.get("/v1/agents/a1").await.json()
}

/// An agent called `a1` of `image` that begins anew, and of which a checkpoint is taken every `every_s` (short) seconds.
async fn create(client: &Client, image: &str, every_s: u32, keep: u32) -> Agent {
    let body = json!({
        "name": "a1", "image": image, "memory_mib": 64, "restart": { "when": "on_failure" },
        "checkpoint": { "every_s": every_s, "keep": keep },
    });
    let reply = client.post("/v1/agents", &body).await;
    assert_eq!(reply.status(), StatusCode::CREATED, "{:?}", reply.body);
    reply.json()
}

async fn events(client: &Client, agent: &Agent) -> Vec<Event> {
    let list: EventList =
        client.get(&format!("/v1/events?stream=agent/{}&limit=1000", agent.id)).await.json();
    list.events.into_iter().map(|recorded| recorded.event).collect()
}

/// The newest checkpoint of `a1`, once there are `count` since `after`, or since its creation.
async fn checkpoint(client: &Client, count: usize, after: Option<&Checkpoint>) -> Checkpoint {
    let since = |agent: &Agent| {
        let known = after.and_then(|after| agent.checkpoints.iter().position(|known| known == after));
        agent.checkpoints.len() - known.map_or(0, |known| known + 1)
    };
    eventually("a checkpoint is taken", async || since(&agent(client).await) >= count).await;
    agent(client).await.checkpoints.last().cloned().unwrap()
}

/// What `a1` is once it has been restarted `count` times.
async fn restarted(client: &Client, count: u32) -> Agent {
    eventually("it runs again", async || {
        let now = agent(client).await;
        let restarts = now.continuity.as_ref().map_or(0, |continuity| continuity.restarts);
        now.state == AgentState::Running && restarts >= count
    })
    .await;
    agent(client).await
}

/// The checkpoint that an agent began anew from; none when it began as what it was made of.
fn begun_from(agent: &Agent) -> Option<SnapshotId> {
    match agent.continuity.as_ref().unwrap().restored_from {
        Origin::Checkpoint { snapshot, .. } => Some(snapshot),
        _ => None,
    }
}

/// Directories of the checkpoints of `agent`.
fn on_disk(place: &Place, agent: &Agent) -> Vec<PathBuf> {
    let dirs = std::fs::read_dir(place.state().checkpoints().join(&agent.id)).into_iter().flatten();
    dirs.map(|dir| dir.unwrap().path()).collect()
}

/// The directory of `checkpoint`.
fn dir(place: &Place, agent: &Agent, checkpoint: &Checkpoint) -> PathBuf {
    let is_it = |dir: &PathBuf| {
        let manifest: Value =
            serde_json::from_slice(&std::fs::read(dir.join("manifest.json")).unwrap()).unwrap();
        manifest["manifest"]["id"] == checkpoint.snapshot.to_string()
    };
    on_disk(place, agent).into_iter().find(is_it).unwrap()
}

async fn nothing_is_left(place: &Place) {
    assert_eq!(place.agent_dirs(), 0);
    let left = || std::fs::read_dir(place.state().checkpoints()).unwrap().count();
    eventually("its checkpoints are gone", async || left() == 0).await;
}

#[tokio::test]
async fn a_killed_agent_is_as_it_was_at_its_newest_checkpoint_and_says_what_it_lost() {
    let place = Place::new();
    let ark = place.start().await;
    let client = &ark.client;
    let first = create(client, "base", 200, 2).await;
    eval(client, "a1", "x=then").await;
    let machine_id = eval(client, "a1", "machine_id").await;
    let newest = checkpoint(client, 1, None).await;
    assert!(newest.taken_unix_ms >= first.created_unix_ms && newest.pause_us > 0);
    eval(client, "a1", "x=now").await;
    signal(first.vmm_pid.unwrap(), Signal::SIGKILL);

    let second = restarted(client, 1).await;
    assert_eq!((&second.id, &second.name, &second.origin), (&first.id, &first.name, &first.origin));
    assert_eq!(eval(client, "a1", "x").await.as_deref(), Some("then"));
    assert_eq!(eval(client, "a1", "machine_id").await, machine_id);
    assert_eq!(eval(client, "a1", "hostname").await.as_deref(), Some("a1"));
    let receipt: Receipt = client.get("/v1/agents/a1/receipt").await.json();
    assert_eq!(receipt.snapshot, newest.snapshot.to_string());
    let continuity = second.continuity.clone().unwrap();
    assert!(continuity.cause.contains("SIGKILL"), "{continuity:?}");
    let Checkpoint { snapshot, taken_unix_ms, .. } = newest;
    assert_eq!(continuity.restored_from, Origin::Checkpoint { snapshot, taken_unix_ms });
    // It ended after the checkpoint and before it ran again, and what it did in between is what it lost.
    assert!(continuity.lost_ms > 0 && taken_unix_ms + continuity.lost_ms <= continuity.at_unix_ms);
    assert_eq!(second.checkpoints.as_slice(), std::slice::from_ref(&newest));
    let known: Value = client.get("/v1/agents?all=true").await.json();
    assert_eq!(known["agents"][0]["continuity"]["restored_from"]["from"], "checkpoint");

    // The next one is a diff over the one that it lives on.
    let next = checkpoint(client, 1, Some(&newest)).await;
    let kinds: Vec<_> = events(client, &first).await.iter().map(Event::kind).collect();
    let all = [
        "agent.created",
        "agent.ready",
        "agent.checkpointed",
        "agent.ended",
        "agent.restarting",
        "agent.restarted",
        "agent.checkpointed",
    ];
    assert_eq!(kinds, all);
    assert!(next.taken_unix_ms >= continuity.at_unix_ms);
    let listed: Value = client.get("/v1/snapshots").await.json();
    assert_eq!(listed["snapshots"].as_array().unwrap().len(), 0, "they are nobody's but the agent's");
    assert_eq!(client.delete("/v1/agents/a1").await.status(), StatusCode::NO_CONTENT);
    nothing_is_left(&place).await;
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn as_many_are_kept_as_the_policy_says_and_none_is_taken_while_the_agent_is_paused() {
    let place = Place::new();
    let ark = place.start().await;
    let client = &ark.client;
    let first = create(client, "base", 10, 2).await;
    assert_eq!(first.checkpoint.map(|policy| policy.to_string()).as_deref(), Some("10s:2"));
    checkpoint(client, 1, None).await;
    let told = async || {
        let is_one = |event: &&Event| matches!(event, Event::AgentCheckpointed { .. });
        events(client, &first).await.iter().filter(is_one).count()
    };
    eventually("four were taken", async || told().await >= 4).await;
    assert_eq!(client.post("/v1/agents/a1/pause", &json!({})).await.status(), StatusCode::OK);
    let (before, taken) = (agent(client).await.checkpoints, told().await);
    assert_eq!(before.len(), 2);
    eventually("the others are gone", async || on_disk(&place, &first).len() == 2).await;
    tokio::time::sleep(Duration::from_millis(1000)).await;
    assert_eq!((agent(client).await.checkpoints, told().await), (before, taken));
    assert_eq!(client.post("/v1/agents/a1/resume", &json!({})).await.status(), StatusCode::OK);
    eventually("they are taken again", async || told().await > taken).await;

    // What was before the agent was taken back is not gone back to.
    let reply = client.post("/v1/agents/a1/snapshots", &json!({ "name": "s1" })).await;
    assert_eq!(reply.status(), StatusCode::CREATED, "{:?}", reply.body);
    let before = agent(client).await.checkpoints;
    let rewound = client.post("/v1/agents/a1/rewind", &json!({ "snapshot": "s1" })).await;
    assert_eq!(rewound.status(), StatusCode::OK, "{:?}", rewound.body);
    let now = checkpoint(client, 1, None).await;
    assert!(
        !before.contains(&now) && !agent(client).await.checkpoints.iter().any(|one| before.contains(one))
    );
    let metrics = client.get("/metrics").await;
    assert!(String::from_utf8_lossy(&metrics.body).contains("kind=\"checkpoint\""));
    assert_eq!(client.delete("/v1/agents/a1").await.status(), StatusCode::NO_CONTENT);
    nothing_is_left(&place).await;
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn a_checkpoint_that_cannot_be_taken_is_told_once_and_the_agent_goes_on() {
    let place = Place::new();
    let ark = place.start().await;
    let client = &ark.client;
    let first = create(client, "full-disk", 10, 2).await;
    eventually("it is told", async || agent(client).await.checkpoint_failure.is_some()).await;
    // Several are due meanwhile.
    tokio::time::sleep(Duration::from_millis(1000)).await;
    let now = agent(client).await;
    let failure = now.checkpoint_failure.clone().unwrap();
    assert!(failure.contains("no room on disk") && failure.contains("No space left on device"), "{failure}");
    assert_eq!((now.state, now.vmm_pid, now.checkpoints.len()), (AgentState::Running, first.vmm_pid, 0));
    let told: Vec<_> = events(client, &first).await.into_iter().skip(2).collect();
    assert_eq!(told, [Event::AgentCheckpointFailed { reason: failure }]);
    assert!(on_disk(&place, &first).is_empty());
    client.delete("/v1/agents/a1").await;
    nothing_is_left(&place).await;
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn damaged_checkpoints_are_passed_over_with_the_reason_down_to_a_fresh_beginning() {
    let place = Place::new();
    let (mut last, client) = started(&place, &[]).await;
    // With the real program's seconds.
    let first = create(&client, "base", 10, 3).await;
    eval(&client, "a1", "x=1").await;
    let older = checkpoint(&client, 1, None).await;
    eval(&client, "a1", "x=2").await;
    let newer = checkpoint(&client, 1, Some(&older)).await;
    last.end(Signal::SIGKILL);
    signal(first.vmm_pid.unwrap(), Signal::SIGKILL);
    eventually("it is gone", async || !runs(first.vmm_pid.unwrap())).await;
    let damaged = dir(&place, &first, &newer);
    std::fs::write(damaged.join("memory"), "damaged").unwrap();

    let (mut last, client) = started(&place, &[]).await;
    let second = restarted(&client, 1).await;
    assert_eq!(begun_from(&second), Some(older.snapshot));
    assert_eq!(eval(&client, "a1", "x").await.as_deref(), Some("1"));
    assert_eq!(second.checkpoints.as_slice(), std::slice::from_ref(&older));
    let told = events(&client, &first).await;
    let unusable = told.iter().find_map(|event| match event {
        Event::AgentCheckpointUnusable { snapshot, reason } => Some((*snapshot, reason.clone())),
        _ => None,
    });
    let (which, why) = unusable.unwrap();
    assert!(which == newer.snapshot && why.contains("memory is damaged"), "{why}");
    eventually("the damaged one is gone", async || !damaged.exists()).await;

    // The other one has lost its manifest, and half a snapshot was left by an arkd that was killed.
    last.end(Signal::SIGKILL);
    signal(second.vmm_pid.unwrap(), Signal::SIGKILL);
    std::fs::write(dir(&place, &first, &older).join("manifest.json"), "{").unwrap();
    let stray = place.state().checkpoints().join(&first.id).join("stray");
    std::fs::create_dir(&stray).unwrap();
    let strangers = place.state().checkpoints().join("0123456789abcdef");
    std::fs::create_dir_all(strangers.join("x")).unwrap();
    let (mut last, client) = started(&place, &[]).await;
    let third = restarted(&client, 2).await;
    assert_eq!((begun_from(&third), third.checkpoints.len()), (None, 0));
    assert_eq!(eval(&client, "a1", "x").await, None);
    let continuity = third.continuity.clone().unwrap();
    let earlier = second.continuity.clone().unwrap();
    assert!(continuity.lost_ms > earlier.at_unix_ms - first.created_unix_ms - first.boot_ms.unwrap());
    assert!(events(&client, &first).await.iter().any(|event| matches!(
        event,
        Event::AgentCheckpointUnusable { snapshot, reason } if *snapshot == older.snapshot && reason.contains("manifest")
    )));
    eventually("nothing strays", async || on_disk(&place, &first).is_empty() && !strangers.exists()).await;
    assert_eq!(client.delete("/v1/agents/a1").await.status(), StatusCode::NO_CONTENT);
    nothing_is_left(&place).await;
    last.end(Signal::SIGTERM);
}

#[tokio::test]
async fn a_checkpoint_that_the_agent_ends_right_after_is_used_once() {
    let place = Place::new();
    let ark = place.start().await;
    let client = &ark.client;
    let first = create(client, "base", 75, 10).await;
    eval(client, "a1", "x=well").await;
    let sound = checkpoint(client, 1, None).await;
    // From here on it is only well until it is restored.
    eval(client, "a1", "broken=yes").await;
    let broken = checkpoint(client, 1, Some(&sound)).await;
    signal(first.vmm_pid.unwrap(), Signal::SIGKILL);
    eventually("it is well again", async || {
        let now = agent(client).await;
        now.state == AgentState::Running
            && now.continuity.is_some()
            && begun_from(&now) == Some(sound.snapshot)
    })
    .await;
    assert_eq!(eval(client, "a1", "x").await.as_deref(), Some("well"));
    let from = |event: Event| match event {
        Event::AgentRestarted { continuity, .. } => match continuity.restored_from {
            Origin::Checkpoint { snapshot, .. } => Some(snapshot),
            other => panic!("{other:?}"),
        },
        _ => None,
    };
    let used: Vec<_> = events(client, &first).await.into_iter().filter_map(from).collect();
    assert!(used.contains(&broken.snapshot), "{used:?}");
    assert!((1..used.len()).all(|index| !used[index..].contains(&used[index - 1])), "{used:?}");
    client.delete("/v1/agents/a1").await;
    nothing_is_left(&place).await;
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn an_arkd_that_is_killed_amid_a_checkpoint_or_a_restore_leaves_nothing_and_loses_nothing() {
    let place = Place::new();
    let (mut last, client) = started(&place, &[]).await;
    let first = create(&client, "slow-snapshot", 10, 2).await;
    eval(&client, "a1", "x=kept").await;
    // The fake begins to write two seconds after it was asked.
    let socket = place.run().agent(&first.id).control_socket();
    let home = place.state().checkpoints().join(&first.id);
    eventually("a checkpoint is under way", async || home.exists()).await;
    last.end(Signal::SIGKILL);
    assert!(runs(first.vmm_pid.unwrap()) && socket.exists());

    let (mut last, client) = started(&place, &[]).await;
    assert_eq!(agent(&client).await.vmm_pid, first.vmm_pid);
    let taken = checkpoint(&client, 1, None).await;
    assert_eq!(on_disk(&place, &first).len(), 1);
    signal(first.vmm_pid.unwrap(), Signal::SIGKILL);
    let second = restarted(&client, 1).await;
    assert_eq!(begun_from(&second), Some(taken.snapshot));
    assert_eq!(eval(&client, "a1", "x").await.as_deref(), Some("kept"));
    client.delete("/v1/agents/a1").await;

    // Its second renewal takes three seconds: the second restore is what arkd is killed in.
    let first = create(&client, "slow-second-renewal", 10, 2).await;
    eval(&client, "a1", "x=kept").await;
    let taken = checkpoint(&client, 1, None).await;
    signal(first.vmm_pid.unwrap(), Signal::SIGKILL);
    let second = restarted(&client, 1).await;
    let next = checkpoint(&client, 1, Some(&taken)).await;
    signal(second.vmm_pid.unwrap(), Signal::SIGKILL);
    let half = async || {
        let now = agent(&client).await;
        now.vmm_pid.filter(|_| now.state == AgentState::Creating)
    };
    eventually("it is being restored", async || half().await.is_some()).await;
    let half = half().await;
    last.end(Signal::SIGKILL);
    let (mut last, client) = started(&place, &[]).await;
    let third = restarted(&client, 2).await;
    assert!(half.is_none_or(|pid| !runs(pid)));
    assert_eq!(begun_from(&third), Some(next.snapshot));
    assert_eq!(eval(&client, "a1", "x").await.as_deref(), Some("kept"));
    assert_eq!(third.continuity.unwrap().restarts, 2);
    assert_eq!(client.delete("/v1/agents/a1").await.status(), StatusCode::NO_CONTENT);
    nothing_is_left(&place).await;
    last.end(Signal::SIGTERM);
}

#[tokio::test]
async fn what_others_need_of_a_checkpoint_outlasts_the_agent() {
    let place = Place::new();
    let ark = place.start().await;
    let client = &ark.client;
    let first = create(client, "base", 10, 1).await;
    eval(client, "a1", "x=shared").await;
    checkpoint(client, 1, None).await;
    signal(first.vmm_pid.unwrap(), Signal::SIGKILL);
    restarted(client, 1).await;
    // A diff over the checkpoint that the agent lives on.
    let reply = client.post("/v1/agents/a1/snapshots", &json!({ "name": "s1" })).await;
    assert_eq!(reply.status(), StatusCode::CREATED, "{:?}", reply.body);
    let described: Value = reply.json();
    assert_eq!(described["kind"], "diff");
    assert_eq!(client.delete("/v1/agents/a1").await.status(), StatusCode::NO_CONTENT);
    eventually("only what is needed is left", async || on_disk(&place, &first).len() == 1).await;
    let restored = client.post("/v1/snapshots/s1/restore", &json!({ "name": "a2" })).await;
    assert_eq!(restored.status(), StatusCode::CREATED, "{:?}", restored.body);
    client.delete("/v1/agents/a2").await;
    assert_eq!(client.delete("/v1/snapshots/s1").await.status(), StatusCode::NO_CONTENT);
    nothing_is_left(&place).await;
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn a_policy_out_of_bounds_is_refused_with_a_sentence() {
    let place = Place::new();
    let ark = place.start().await;
    for (policy, why) in [
        (json!({ "every_s": 9 }), "every_s of 9 is out of bounds for checkpoints: give 10 to 86400"),
        (json!({ "every_s": 60, "keep": 0 }), "keep of 0 is out of bounds for checkpoints: give 1 to 10"),
        (json!({ "every_s": 60, "keep": 11 }), "keep of 11"),
    ] {
        let body = json!({ "image": "base", "memory_mib": 64, "checkpoint": policy });
        let refused = ark.client.post("/v1/agents", &body).await.problem(ProblemKind::InvalidValue);
        assert!(refused.detail.contains(why), "{refused:?}");
    }
    assert_eq!(place.agent_dirs(), 0);
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn a_checkpoint_that_the_host_cannot_read_does_not_hide_the_older_ones_for_ever() {
    let place = Place::new();
    let ark = place.start().await;
    let client = &ark.client;
    let first = create(client, "base", 200, 2).await;
    eval(client, "a1", "x=older").await;
    let older = checkpoint(client, 1, None).await;
    eval(client, "a1", "x=newer").await;
    let newer = checkpoint(client, 1, Some(&older)).await;
    // What proves it breaks on that, and does not say that it is the checkpoint's fault.
    std::fs::write(dir(&place, &first, &newer).join("memory"), [0xff]).unwrap();
    signal(first.vmm_pid.unwrap(), Signal::SIGKILL);

    let second = restarted(client, 1).await;
    assert_eq!(begun_from(&second), Some(older.snapshot));
    assert_eq!(eval(client, "a1", "x").await.as_deref(), Some("older"));
    let told = events(client, &first).await;
    let unusable: Vec<_> = told
        .iter()
        .filter_map(|event| match event {
            Event::AgentCheckpointUnusable { snapshot, reason } => Some((*snapshot, reason.as_str())),
            _ => None,
        })
        .collect();
    assert!(
        matches!(unusable[..], [(id, why)] if id == newer.snapshot && why.contains("tried 4 times")),
        "{unusable:?}"
    );
    let waits: Vec<_> = told
        .iter()
        .filter_map(|event| match event {
            Event::AgentRestarting { attempt, after_ms, .. } => Some((*attempt, *after_ms)),
            _ => None,
        })
        .collect();
    assert_eq!(waits, [(1, 0), (1, 1000), (1, 2000), (1, 4000)], "it is one restart all the same");
    ark.daemon.shut_down().await;
}
