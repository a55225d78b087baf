//! Killed VMMs, a killed arkd, a second arkd, a taken port.

use std::io::Read as _;
use std::process::{Command, Output};
use std::time::Duration;

use ark_types::agent::{Agent, AgentList, AgentState};
use ark_types::problem::ProblemKind;
use ark_types::vmm::ExitReason;
use hyper::StatusCode;
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use serde_json::json;

use crate::harness::{Place, arkd, eventually, runs, signal, started};

/// Runs an `arkd` that is expected not to start.
async fn refused(mut command: Command) -> Output {
    let mut child = command.spawn().unwrap();
    for _ in 0..500 {
        if let Some(status) = child.try_wait().unwrap() {
            let mut stderr = Vec::new();
            child.stderr.take().unwrap().read_to_end(&mut stderr).unwrap();
            return Output { status, stdout: Vec::new(), stderr };
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    child.kill().unwrap();
    panic!("it started");
}

#[tokio::test]
async fn a_killed_vmm_is_a_failed_agent_with_the_reason() {
    let place = Place::new();
    let ark = place.start().await;
    let agent = ark.client.create("a1", "base").await;
    signal(agent.vmm_pid.unwrap(), Signal::SIGKILL);
    eventually("it fails", async || {
        ark.client.get("/v1/agents/a1").await.json::<Agent>().state == AgentState::Failed
    })
    .await;
    let agent: Agent = ark.client.get("/v1/agents/a1").await.json();
    assert_eq!(agent.exit.unwrap().reason, ExitReason::Killed);
    assert!(agent.reason.unwrap().contains("signal 9 (SIGKILL)"));
    let problem =
        ark.client.exec("a1", &json!({ "argv": ["true"] })).await.problem(ProblemKind::AgentNotRunning);
    assert!(problem.detail.contains("SIGKILL"), "{}", problem.detail);
    assert_eq!(ark.client.delete("/v1/agents/a1").await.status(), StatusCode::NO_CONTENT);
    assert_eq!(place.agent_dirs(), 0);
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn a_vmm_that_was_stopped_is_still_deleted() {
    let place = Place::new();
    let ark = place.start().await;
    let agent = ark.client.create("a1", "base").await;
    signal(agent.vmm_pid.unwrap(), Signal::SIGSTOP);
    assert_eq!(ark.client.delete("/v1/agents/a1?grace_ms=100").await.status(), StatusCode::NO_CONTENT);
    assert!(!runs(agent.vmm_pid.unwrap()));
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn what_a_killed_arkd_left_is_cleaned_up_by_the_next() {
    let place = Place::new();
    let (mut first, client) = started(&place, &[]).await;
    let agents = [client.create("a1", "base").await, client.create("a2", "base").await];
    first.0.kill().unwrap();
    first.0.wait().unwrap();
    assert!(agents.iter().all(|agent| runs(agent.vmm_pid.unwrap())), "VMMs outlive a killed arkd");
    assert_eq!(place.agent_dirs(), 2);

    let (mut second, client) = started(&place, &[]).await;
    assert!(agents.iter().all(|agent| !runs(agent.vmm_pid.unwrap())), "no orphan");
    assert_eq!(place.agent_dirs(), 0);
    // They are told as what they are, until they are deleted; their names are free.
    let left = client.get("/v1/agents").await.json::<AgentList>().agents;
    assert!(left.len() == 2 && left.iter().all(|agent| agent.state == AgentState::Failed), "{left:?}");
    client.create("a1", "base").await;

    signal(second.0.id(), Signal::SIGTERM);
    assert!(second.0.wait().unwrap().success());
    assert_eq!(std::fs::read_dir(place.path("run")).unwrap().count(), 0, "an orderly end leaves nothing");
}

#[tokio::test]
async fn vmms_do_not_share_arkds_process_group() {
    let place = Place::new();
    let (mut arkd, client) = started(&place, &[]).await;
    let agent = client.create("a1", "base").await;
    let group = |pid: u32| nix::unistd::getpgid(Some(Pid::from_raw(i32::try_from(pid).unwrap()))).unwrap();
    assert_ne!(group(agent.vmm_pid.unwrap()), group(arkd.0.id()));
    signal(arkd.0.id(), Signal::SIGINT);
    assert!(arkd.0.wait().unwrap().success());
    assert!(!runs(agent.vmm_pid.unwrap()));
}

#[tokio::test]
async fn a_second_arkd_says_so_and_the_first_goes_on() {
    let place = Place::new();
    let ark = place.start().await;
    let output = refused(arkd(&place, &[])).await;
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8(output.stderr).unwrap();
    let pid = std::process::id();
    assert!(said.contains(&format!("another arkd (pid {pid}) already serves")), "{said}");
    assert_eq!(ark.client.get("/v1/health").await.status(), StatusCode::OK);
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn a_taken_port_is_a_sentence_and_leaves_nothing() {
    let place = Place::new();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let output = refused(arkd(&place, &["--listen", &address])).await;
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.starts_with(&format!("arkd: {address} cannot be listened on")), "{said}");
    assert_eq!(std::fs::read_dir(place.path("run")).unwrap().count(), 0);
    assert!(!place.path("state").exists());
}

#[tokio::test]
async fn a_directory_that_cannot_be_written_is_the_hosts_inability() {
    let place = Place::new();
    let ark = place.start().await;
    // A file where the directory of agents should be: for root too, nothing can be made below it.
    std::fs::write(place.run().agents(), "").unwrap();
    let reply = ark.client.post("/v1/agents", &json!({ "image": "base", "memory_mib": 64 })).await;
    assert!(reply.problem(ProblemKind::HostUnable).detail.contains("cannot be made"));
    assert!(ark.client.get("/v1/agents").await.json::<AgentList>().agents.is_empty());
    ark.daemon.shut_down().await;
}
