//! Programs as one request.

use std::time::{Duration, Instant};

use ark_types::exec::{ExecReply, ExitStatus, MAX_CAPTURE};
use ark_types::problem::ProblemKind;
use hyper::{Method, StatusCode};
use serde_json::json;

use crate::harness::{Place, eventually};

#[tokio::test]
async fn a_program_runs_with_its_input_and_environment() {
    let place = Place::new();
    let ark = place.start().await;
    let body =
        json!({ "name": "a1", "image": "base", "memory_mib": 64, "env": { "A": "agent", "B": "agent" } });
    ark.client.post("/v1/agents", &body).await;

    let script = "echo $A $B; wc -c >&2; exit 3";
    let body = json!({ "argv": ["sh", "-c", script], "env": { "A": "mine" }, "stdin": "hello" });
    let reply: ExecReply = ark.client.exec("a1", &body).await.json();
    assert_eq!((reply.stdout.as_str(), reply.stderr.trim()), ("mine agent\n", "5"));
    assert_eq!((reply.exit_code, reply.status, reply.truncated), (3, ExitStatus::Exited { code: 3 }, false));
    assert!(reply.duration_us > 0);

    let body = json!({ "argv": ["cat"], "stdin": "AP8=", "encoding": "base64" });
    let reply: ExecReply = ark.client.exec("a1", &body).await.json();
    assert_eq!(reply.stdout, "AP8=");

    let reply: ExecReply = ark.client.exec("a1", &json!({ "argv": ["sh", "-c", "kill -9 $$"] })).await.json();
    assert_eq!((reply.exit_code, reply.status), (137, ExitStatus::Signaled { signal: 9 }));
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn input_larger_than_a_frame_and_output_larger_than_the_limit() {
    let place = Place::new();
    let ark = place.start().await;
    ark.client.create("a1", "base").await;
    let input = "x".repeat(5 << 20);
    let reply: ExecReply = ark.client.exec("a1", &json!({ "argv": ["cat"], "stdin": input })).await.json();
    assert_eq!((reply.stdout.len(), reply.truncated), (MAX_CAPTURE, true));
    // A program that reads nothing does not keep the request from ending.
    let reply: ExecReply = ark.client.exec("a1", &json!({ "argv": ["true"], "stdin": input })).await.json();
    assert_eq!(reply.exit_code, 0);
    let script = "head -c 100000000 /dev/zero";
    let reply: ExecReply = ark.client.exec("a1", &json!({ "argv": ["sh", "-c", script] })).await.json();
    assert_eq!((reply.stdout.len(), reply.truncated), (MAX_CAPTURE, true));
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn what_cannot_run_is_a_problem_of_its_kind() {
    let place = Place::new();
    let ark = place.start().await;
    ark.client.create("a1", "base").await;
    let missing = ark.client.exec("a1", &json!({ "argv": ["/no/such/program"] })).await;
    assert!(missing.problem(ProblemKind::ProgramNotFound).detail.contains("/no/such/program"));
    ark.client.exec("a1", &json!({ "argv": [] })).await.problem(ProblemKind::InvalidValue);
    ark.client.exec("a1", &json!({ "argv": vec!["a"; 5000] })).await.problem(ProblemKind::InvalidValue);
    ark.client.exec("nobody", &json!({ "argv": ["true"] })).await.problem(ProblemKind::AgentNotFound);
    // The fake does not keep the program's time, so arkd has to notice.
    let hung = ark.client.exec("a1", &json!({ "argv": ["sleep", "100"], "timeout_ms": 100 })).await;
    hung.problem(ProblemKind::DeadlinePassed);
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn a_guest_that_dies_or_lies_during_an_exec_is_told_apart() {
    let place = Place::new();
    let ark = place.start().await;
    ark.client.create("dies", "dies-in-exec").await;
    let gone = ark.client.exec("dies", &json!({ "argv": ["true"] })).await;
    let detail = gone.problem(ProblemKind::AgentGone).detail;
    assert!(detail.contains("kernel panicked: out of memory"), "{detail}");
    ark.client.exec("dies", &json!({ "argv": ["true"] })).await.problem(ProblemKind::AgentNotRunning);
    ark.client.create("lies", "lies").await;
    ark.client.exec("lies", &json!({ "argv": ["true"] })).await.problem(ProblemKind::GuestMisbehaved);
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn a_client_that_leaves_takes_its_program_along() {
    let place = Place::new();
    let ark = place.start().await;
    ark.client.create("a1", "base").await;
    let mark = place.path("mark");
    let script = format!("echo $$ > {0}.tmp; mv {0}.tmp {0}; exec sleep 1000", mark.display());
    let body = json!({ "argv": ["sh", "-c", script] }).to_string();
    let request = ark.client.request(Method::POST, "/v1/agents/a1/exec", body);
    let running = tokio::spawn({
        let client = ark.client.clone();
        async move { client.send(request).await }
    });
    eventually("the program runs", async || mark.exists()).await;
    let pid = std::fs::read_to_string(&mark).unwrap().trim().parse().unwrap();
    assert!(crate::harness::runs(pid));
    running.abort();
    eventually("the program is gone", async || !crate::harness::runs(pid)).await;
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn execs_are_quick_and_many_may_run_at_once() {
    let place = Place::new();
    let ark = place.start().await;
    ark.client.create("a1", "base").await;
    let started = Instant::now();
    let runs = (0..50).map(|_| {
        let client = ark.client.clone();
        tokio::spawn(async move { client.exec("a1", &json!({ "argv": ["true"] })).await.status() })
    });
    for run in runs.collect::<Vec<_>>() {
        assert_eq!(run.await.unwrap(), StatusCode::OK);
    }
    assert!(started.elapsed() < Duration::from_secs(20));
    ark.daemon.shut_down().await;
}
