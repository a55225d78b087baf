//! `ark service …`.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::time::Duration;

use ark_client::Client;
use ark_types::eval::{EvalRequest, Language};
use ark_types::exec::ExecRequest;
use ark_types::guest::MAX_KEPT_OUTPUT;
use ark_types::label::InvalidLabel;
use ark_types::service::{
    CallResult, Replica, ReplicaFailure, Service, ServiceCall, ServiceCommand, ServiceList, ServiceReply,
    ServiceSpec, UpdatePolicy,
};
use serde::Serialize;

use super::code;
use super::eval::write_reply;
use crate::args::{ServiceAction, ServiceCallArgs, ServiceSpecArgs};
use crate::failure::{Failure, summed_up};
use crate::host::Context;
use crate::output::{printable, table};
use crate::progress::Spinner;

/// Between two looks at a service that is waited for.
const LOOK: Duration = Duration::from_millis(200);
/// Exit code when a service that was waited for cannot be as it is to be.
const STOPPED: u8 = 1;

/// `ark service …`.
pub(crate) async fn perform(context: &Context, action: ServiceAction) -> Result<u8, Failure> {
    match action {
        ServiceAction::Create(args) => {
            let spec = spec(&args)?;
            let client = context.client_to_boot().await?;
            let service = client.create_service(&spec).await?;
            report(context, &client, service, args.wait).await
        }
        ServiceAction::Set(args) => {
            let spec = spec(&args)?;
            let client = context.client_to_boot().await?;
            let service = client.set_service(&spec).await?;
            report(context, &client, service, args.wait).await
        }
        ServiceAction::Call(args) => call(context, args).await,
        ServiceAction::Ls => show(context, &context.client().await?.services().await?, service_table),
        ServiceAction::Show { service } => {
            show(context, &context.client().await?.service(&service).await?, describe)
        }
        ServiceAction::Scale { service, replicas } => {
            show(context, &context.client().await?.scale_service(&service, replicas).await?, one_line)
        }
        ServiceAction::Drain { service, agent, grace } => {
            show(context, &context.client().await?.drain_replica(&service, &agent, grace).await?, one_line)
        }
        ServiceAction::Logs { service, replica } => logs(context, &service, replica).await.map(|()| 0),
        ServiceAction::Rm { services, grace } => rm(context, &services, grace).await.map(|()| 0),
    }
}

fn show<T: Serialize>(context: &Context, what: &T, human: fn(&T) -> String) -> Result<u8, Failure> {
    context.ui.show(what, human).map(|()| 0)
}

/// What the options say.
fn spec(args: &ServiceSpecArgs) -> Result<ServiceSpec, Failure> {
    let labels: BTreeMap<String, String> = args.label.iter().cloned().collect();
    Ok(ServiceSpec {
        name: args.name.clone(),
        replicas: args.replicas,
        image: args.template.is_none().then(|| args.image.clone()),
        template: args.template.clone(),
        vcpus: args.vcpus,
        memory_mib: args.memory,
        env: args.env.iter().cloned().collect(),
        labels: labels.try_into().map_err(|error: InvalidLabel| Failure::Usage(error.to_string()))?,
        owner: args.owner.clone().unwrap_or_default(),
        allow: args.allow.clone(),
        port: args.tcp,
        command: (!args.command.is_empty()).then(|| ServiceCommand {
            argv: args.command.clone(),
            cwd: args.workdir.clone(),
            user: args.user.clone(),
        }),
        health_check: args.health.check()?,
        restart: args.restart,
        update: UpdatePolicy { max_unavailable: args.max_unavailable, max_surge: args.max_surge },
    })
}

/// Shows a service, at once or when it is as it is to be; the exit code.
async fn report(context: &Context, client: &Client, mut service: Service, wait: bool) -> Result<u8, Failure> {
    let spinner =
        wait.then(|| Spinner::new(context.ui, &format!("waiting for the service {}", service.spec.name)));
    while wait && !is_settled(&service) && !service.is_stopped {
        tokio::time::sleep(LOOK).await;
        service = client.service(service.spec.name.as_ref()).await?;
    }
    drop(spinner);
    context.ui.show(&service, if wait { describe } else { one_line })?;
    Ok(if wait && !is_settled(&service) { STOPPED } else { 0 })
}

fn is_settled(service: &Service) -> bool {
    let wanted = service.spec.replicas;
    service.updated == wanted && u32::try_from(service.replicas.len()) == Ok(wanted)
}

/// Every service is tried; what fails is told for each.
async fn rm(context: &Context, services: &[String], grace: Option<Duration>) -> Result<(), Failure> {
    let client = context.client().await?;
    let (mut removed, mut failures) = (Vec::new(), Vec::new());
    for service in services {
        match client.delete_service(service, grace).await {
            Ok(()) => removed.push(service),
            Err(error) => failures.push(error.into()),
        }
    }
    context.ui.show_removed(&removed)?;
    summed_up(context.ui, failures, services.len(), "services were not removed")
}

/// Shows what the command of `replica` wrote last; without one that of each, under its name.
async fn logs(context: &Context, service: &str, replica: Option<String>) -> Result<(), Failure> {
    let client = context.client().await?;
    let named: Vec<String> = match &replica {
        Some(replica) => vec![replica.clone()],
        None => client.service(service).await?.replicas.iter().map(|one| one.agent.to_string()).collect(),
    };
    let mut logs = BTreeMap::new();
    let mut failures = Vec::new();
    for name in named {
        let read = async { client.service_log(service, &name).await?.collect(MAX_KEPT_OUTPUT).await };
        match read.await {
            Ok(log) => drop(logs.insert(name, String::from_utf8_lossy(&log).into_owned())),
            Err(error) => failures.push(error.into()),
        }
    }
    let count = logs.len() + failures.len();
    let human = |logs: &BTreeMap<String, String>| {
        let titled = |(name, log): (&String, &String)| match replica {
            Some(_) => log.clone(),
            None if log.is_empty() || log.ends_with('\n') => format!("==> {name} <==\n{log}"),
            None => format!("==> {name} <==\n{log}\n"),
        };
        logs.iter().map(titled).collect()
    };
    context.ui.show(&logs, human)?;
    summed_up(context.ui, failures, count, "logs cannot be had")
}

/// Has a replica do something, and shows what came of it.
async fn call(context: &Context, args: ServiceCallArgs) -> Result<u8, Failure> {
    let timeout_ms = args.timeout.map(|time| u64::try_from(time.as_millis()).unwrap_or(u64::MAX));
    let call = match &args.eval {
        Some(text) => {
            let code = code::from_argument(text)?;
            ServiceCall::Eval(EvalRequest { code, language: Language::default(), timeout_ms })
        }
        None => ServiceCall::Exec(ExecRequest { argv: args.command, timeout_ms, ..ExecRequest::default() }),
    };
    let reply = context.client().await?.call_service(&args.service, &call, args.wait).await?;
    if context.ui.json {
        context.ui.show(&reply, |_| String::new())?;
    } else {
        write(&reply).map_err(Failure::Output)?;
    }
    Ok(match reply.result {
        CallResult::Exec(exec) => exec.exit_code,
        CallResult::Eval(eval) => u8::from(eval.exception.is_some()),
    })
}

/// Writes what a replica wrote.
fn write(reply: &ServiceReply) -> io::Result<()> {
    match &reply.result {
        CallResult::Eval(eval) => write_reply(eval),
        CallResult::Exec(exec) => {
            let mut stdout = io::stdout().lock();
            stdout.write_all(exec.stdout.as_bytes())?;
            stdout.flush()?;
            // Nobody reads our standard error: that is no reason to fail.
            let _ = io::stderr().lock().write_all(exec.stderr.as_bytes());
            Ok(())
        }
    }
}

/// What it is made of.
fn source(spec: &ServiceSpec) -> String {
    match (&spec.template, &spec.image) {
        (Some(template), _) => format!("template {template}"),
        (None, Some(image)) => image.to_string(),
        (None, None) => String::new(),
    }
}

fn one_line(service: &Service) -> String {
    let Service { spec, ready, generation, .. } = service;
    format!("{}: {ready} of {} replicas are ready, generation {generation}", spec.name, spec.replicas)
}

fn row(service: &Service) -> [String; 7] {
    let Service { spec, ready, updated, generation, .. } = service;
    [
        spec.name.to_string(),
        format!("{ready} of {}", spec.replicas),
        updated.to_string(),
        generation.to_string(),
        source(spec),
        spec.owner.to_string(),
        printable(&service.conditions.join("; ")).replace('\n', " "),
    ]
}

fn service_table(list: &ServiceList) -> String {
    let rows: Vec<_> = list.services.iter().map(row).collect();
    table(["NAME", "READY", "UPDATED", "GENERATION", "OF", "OWNER", "CONDITIONS"], &rows)
}

/// The service, its replicas, and what is the matter with it.
fn describe(service: &Service) -> String {
    let replica = |replica: &Replica| {
        [
            replica.agent.to_string(),
            replica.id.clone(),
            replica.generation.to_string(),
            replica.state.to_string(),
            replica.load.to_string(),
        ]
    };
    let rows: Vec<_> = service.replicas.iter().map(replica).collect();
    let conditions: Vec<String> =
        service.conditions.iter().map(|why| format!("- {}\n", printable(why).replace('\n', " "))).collect();
    let failure = service.last_failure.as_ref().map(|failure| {
        let ReplicaFailure { agent, reason, .. } = failure;
        format!("last failure: {agent}: {}\n", printable(reason).replace('\n', " "))
    });
    let line = one_line(service);
    format!(
        "{line}\n{}{}{}",
        table(["REPLICA", "ID", "GENERATION", "STATE", "CALLS"], &rows),
        conditions.concat(),
        failure.unwrap_or_default(),
    )
}

#[cfg(test)]
mod tests {
    use serde_json::{from_value, json};

    use super::*;

    #[test]
    fn a_service_is_shown_with_what_is_the_matter() {
        let service = json!({
            "spec": { "name": "web", "replicas": 3, "template": "py", "owner": "shop" },
            "generation": 2, "ready": 2, "updated": 1, "is_stopped": false,
            "replicas": [{
                "agent": "web-00112233", "id": "0011223344556677", "generation": 2, "state": "ready", "agent_state": "running",
                "load": 4,
            }],
            "conditions": ["2 of 3 replicas are ready\u{1b}[2J"],
            "last_failure": {
                "agent": "web-44556677", "id": "fedcba9876543210", "at_unix_ms": 1,
                "reason": "its command ended with 1; it wrote last: a\nb\u{1b}[2J",
            },
        });
        let service: Service = from_value(service).unwrap();
        assert_eq!(
            service_table(&ServiceList { services: vec![service.clone()] }),
            "NAME  READY   UPDATED  GENERATION  OF           OWNER  CONDITIONS\n\
             web   2 of 3  1        2           template py  shop   2 of 3 replicas are ready\\u{1b}[2J\n"
        );
        assert_eq!(
            describe(&service),
            "web: 2 of 3 replicas are ready, generation 2\n\
             REPLICA       ID                GENERATION  STATE  CALLS\n\
             web-00112233  0011223344556677  2           ready  4\n\
             - 2 of 3 replicas are ready\\u{1b}[2J\n\
             last failure: web-44556677: its command ended with 1; it wrote last: a b\\u{1b}[2J\n"
        );
    }
}
