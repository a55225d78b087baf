//! The wire formats of services, frozen.

use std::collections::BTreeMap;

use crate::frozen::Frozen;
use ark_types::agent::AgentState;
use ark_types::eval::{EvalReply, EvalRequest};
use ark_types::exec::{ExecReply, ExecRequest, ExitStatus};
use ark_types::healing::{AgentHealth, RestartPolicy};
use ark_types::health_check::{HealthCheck, Probe};
use ark_types::service::{
    CallResult, DrainReplica, FoundService, Replica, ReplicaFailure, ReplicaState, ScaleService, Service,
    ServiceCall, ServiceCommand, ServiceList, ServiceReply, ServiceSpec, UpdatePolicy,
};

fn least() -> ServiceSpec {
    serde_json::from_str(r#"{ "name": "web", "replicas": 1, "image": "base" }"#).unwrap()
}

fn most() -> ServiceSpec {
    ServiceSpec {
        name: "web".parse().unwrap(),
        replicas: 3,
        image: None,
        template: Some("py".parse().unwrap()),
        vcpus: Some(2),
        memory_mib: Some(512),
        env: BTreeMap::from([("LANG".to_owned(), "C.UTF-8".to_owned())]),
        labels: BTreeMap::from([("app".to_owned(), "shop".to_owned())]).try_into().unwrap(),
        owner: "shop".parse().unwrap(),
        allow: vec!["inference".parse().unwrap()],
        port: Some(8080),
        command: Some(ServiceCommand {
            argv: vec!["python3".to_owned(), "-m".to_owned(), "http.server".to_owned()],
            cwd: Some("/srv".to_owned()),
            user: Some("agent".to_owned()),
        }),
        health_check: Some(HealthCheck {
            probe: Probe::Tcp { port: 8080 },
            interval_s: 30,
            timeout_s: 10,
            failures: 3,
            start_period_s: 0,
        }),
        restart: RestartPolicy::OnFailure { max_restarts: Some(3) },
        update: UpdatePolicy { max_unavailable: 1, max_surge: 2 },
    }
}

fn replica(state: ReplicaState) -> Replica {
    Replica {
        agent: "web-00112233".parse().unwrap(),
        id: "0123456789abcdef".to_owned(),
        generation: 2,
        state,
        agent_state: AgentState::Running,
        health: AgentHealth::Healthy,
        reason: (state == ReplicaState::Starting).then(|| "its command is to be started".to_owned()),
        load: 4,
    }
}

#[test]
fn services() {
    let (spec, env) = most().without_values();
    let service = Service {
        spec,
        env,
        generation: 2,
        ready: 2,
        updated: 1,
        replicas: ReplicaState::ALL.map(replica).to_vec(),
        is_stopped: false,
        last_failure: Some(ReplicaFailure {
            agent: "web-44556677".parse().unwrap(),
            id: "fedcba9876543210".to_owned(),
            reason: "its command ended with 1".to_owned(),
            at_unix_ms: 1_700_000_000_000,
        }),
        conditions: vec!["2 of 3 replicas are ready".to_owned()],
    };
    let exec = ExecReply {
        status: ExitStatus::Exited { code: 0 },
        exit_code: 0,
        stdout: "42\n".to_owned(),
        stderr: String::new(),
        truncated: false,
        duration_us: 900,
    };
    let eval = EvalReply {
        stdout: String::new(),
        stderr: String::new(),
        value: Some("42".to_owned()),
        exception: None,
        truncated: false,
        duration_us: 30,
    };
    let reply = |result| ServiceReply {
        agent: "web-00112233".parse().unwrap(),
        id: "0123456789abcdef".to_owned(),
        result,
    };
    let program = ExecRequest { argv: vec!["ls".to_owned()], ..ExecRequest::default() };
    let code = EvalRequest { code: "6*7".to_owned(), ..EvalRequest::default() };
    Frozen::default()
        .with("spec least", &least())
        .with("spec most", &most())
        .with("scale", &ScaleService { replicas: 5 })
        .with("drain", &DrainReplica { agent: "web-00112233".to_owned() })
        .with("list", &ServiceList { services: vec![service] })
        .with("found", &FoundService { name: "web".parse().unwrap(), ready: 2, connectable: true })
        .with("call exec", &ServiceCall::Exec(program))
        .with("call eval", &ServiceCall::Eval(code))
        .with("reply exec", &reply(CallResult::Exec(exec)))
        .with("reply eval", &reply(CallResult::Eval(eval)))
        .check("services");
    assert!(serde_json::from_str::<ServiceSpec>(r#"{"name":"web","replicas":1,"images":"x"}"#).is_err());
}

#[test]
fn only_numbers_make_no_difference_to_a_replica() {
    let other = ServiceSpec { replicas: 9, update: UpdatePolicy::default(), ..most() };
    assert!(most().is_of_one_make(&other));
    assert!(!most().is_of_one_make(&ServiceSpec { vcpus: None, ..most() }));
    assert!(!most().is_of_one_make(&ServiceSpec { command: None, ..most() }));
    assert!(!most().is_of_one_make(&least()));
}
