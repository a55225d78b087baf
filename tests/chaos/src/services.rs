//! Operations on services and on the pool, and what is told of them against the model.

use std::collections::BTreeSet;

use rand::RngExt as _;
use rand::seq::IndexedRandom as _;
use serde_json::{Value, json};

use crate::client::{Client, Said};
use crate::host;
use crate::look::{eventually, list};
use crate::model::Service;

/// Services at a time.
const MOST: usize = 2;
/// Replicas of each at most.
const REPLICAS: u64 = 2;
/// Label of replicas.
pub(crate) const LABEL: &str = "ark.service";
/// The pool whose policy is set: that of the image's own template.
const POOL: &str = "/v1/pools/default-base";

/// Has a service be; where there are enough, one goes instead.
pub(crate) fn create(client: &mut Client<'_>) {
    if client.known().services.len() >= MOST {
        return delete(client);
    }
    let (name, replicas) = (format!("v{}", client.known().number()), client.dice.random_range(0..=REPLICAS));
    let service = Service {
        replicas: BTreeSet::from([replicas]),
        is_certain: false,
        may_be_gone: false,
        is_taken: true,
    };
    client.known().services.insert(name.clone(), service);
    let body = json!({ "name": name, "replicas": replicas, "image": "base" });
    let said = client.call("POST", "/v1/services", &body);
    settle(client, &name, &said, |service| service.is_certain = true);
    if let Said::No(..) = said {
        client.known().services.remove(&name);
    }
}

/// Takes one that is certainly there.
fn take(client: &mut Client<'_>) -> Option<String> {
    let mut model = client.known();
    let is_free = |service: &Service| service.is_certain && !service.may_be_gone && !service.is_taken;
    let names: Vec<String> =
        model.services.iter().filter(|(_, one)| is_free(one)).map(|(name, _)| name.clone()).collect();
    let name = names.choose(&mut client.dice)?.clone();
    model.services.get_mut(&name)?.is_taken = true;
    Some(name)
}

/// Gives it back; `done` is what was acknowledged.
fn settle(client: &Client<'_>, name: &str, said: &Said, done: impl FnOnce(&mut Service)) {
    if let Some(service) = client.known().services.get_mut(name) {
        service.is_taken = false;
        if let Said::Yes(_) = said {
            done(service);
        }
    }
    if let Said::No(_, problem) = said {
        client.bear_if_ending(name, problem);
    }
}

/// Has a service have another number of replicas.
pub(crate) fn scale(client: &mut Client<'_>) {
    let Some(name) = take(client) else { return };
    let replicas = client.dice.random_range(0..=REPLICAS);
    if let Some(service) = client.known().services.get_mut(&name) {
        service.replicas.insert(replicas);
    }
    let said = client.call("PATCH", &format!("/v1/services/{name}"), &json!({ "replicas": replicas }));
    settle(client, &name, &said, |service| service.replicas = BTreeSet::from([replicas]));
}

/// Removes a service.
pub(crate) fn delete(client: &mut Client<'_>) {
    let Some(name) = take(client) else { return };
    if let Some(service) = client.known().services.get_mut(&name) {
        service.may_be_gone = true;
    }
    let said = client.call("DELETE", &format!("/v1/services/{name}?grace_ms=0"), &Value::Null);
    settle(client, &name, &said, |_| {});
    if let Said::Yes(_) = said {
        client.known().services.remove(&name);
    }
}

/// Kills the VMM of a replica: it begins anew, or another takes its place.
pub(crate) fn kill_vmm(client: &mut Client<'_>) {
    let Said::Yes(list) = client.call("GET", &format!("/v1/agents?labels={LABEL}"), &Value::Null) else {
        return;
    };
    let pids: Vec<i64> =
        list["agents"].as_array().into_iter().flatten().filter_map(|one| one["vmm_pid"].as_i64()).collect();
    if let Some(pid) = pids.choose(&mut client.dice).and_then(|pid| i32::try_from(*pid).ok())
        && host::kill_vmm(client.stage, pid)
    {
        client.known().note(format!("client {} killed pid {pid} of a replica", client.number));
    }
}

/// Sets how many forks stand ready, or lets that be as it is by itself.
pub(crate) fn set_pool(client: &mut Client<'_>) {
    {
        let mut model = client.known();
        if std::mem::replace(&mut model.pool_is_taken, true) {
            return;
        }
        if model.pool.is_empty() {
            model.pool.push(Value::Null);
        }
    }
    let most = if client.stage.has_pool { 2 } else { 0 };
    let min = client.dice.random_range(0..=most);
    // Each is another one.
    let policy = json!({ "min": min, "max": most, "target_wait_ms": client.known().number() });
    let wanted = if client.dice.random_range(0..3) == 0 { Value::Null } else { policy };
    client.known().pool.push(wanted.clone());
    let said = if wanted.is_null() {
        client.call("DELETE", POOL, &Value::Null)
    } else {
        client.call("PUT", POOL, &wanted)
    };
    let mut model = client.known();
    model.pool_is_taken = false;
    if let Said::Yes(_) = said {
        model.pool = vec![wanted];
    }
    drop(model);
    if let Said::No(_, problem) = &said {
        client.bear_if_ending(POOL, problem);
    }
}

/// Looks at services, once each is as it is to be, and at the pool's policy.
///
/// # Panics
/// When a promise was broken.
pub(crate) fn look(client: &mut Client<'_>) {
    let mut listed = Vec::new();
    eventually(client, "every service is as it is to be", |client| {
        let Said::Yes(told) = client.call("GET", "/v1/services", &Value::Null) else {
            return Err("services are to be listed".to_owned());
        };
        listed = told["services"].as_array().cloned().unwrap_or_default();
        let agents = list(client);
        let of = |name: &Value| agents.iter().filter(|agent| agent["labels"][LABEL] == *name).count() as u64;
        let is_settled = |service: &Value| {
            let replicas = service["replicas"].as_array().map_or(0, Vec::len) as u64;
            service["spec"]["replicas"] == replicas
                && service["ready"] == replicas
                && of(&service["spec"]["name"]) == replicas
        };
        if let Some(service) = listed.iter().find(|service| !is_settled(service)) {
            return Err(service.to_string());
        }
        let is_strange = |agent: &&Value| {
            let label = &agent["labels"][LABEL];
            !label.is_null() && !listed.iter().any(|service| service["spec"]["name"] == *label)
        };
        agents.iter().find(is_strange).map_or(Ok(()), |agent| Err(format!("no service has {agent}")))
    });
    let mut model = client.known();
    let mut seen = BTreeSet::new();
    for told in listed {
        let name = told["spec"]["name"].as_str().unwrap_or_default().to_owned();
        let story = model.story_of(&[&name]);
        let Some(service) = model.services.get_mut(&name) else {
            panic!("a service was removed or never asked for: {told}{story}")
        };
        let replicas = told["spec"]["replicas"].as_u64().unwrap_or_default();
        assert!(service.replicas.contains(&replicas), "{service:?} became {told}{story}");
        let replicas = BTreeSet::from([replicas]);
        *service = Service { replicas, is_certain: true, may_be_gone: false, is_taken: false };
        seen.insert(name);
    }
    let is_lost = |(name, service): &(&String, &Service)| {
        !seen.contains(*name) && service.is_certain && !service.may_be_gone
    };
    if let Some((name, service)) = model.services.iter().find(is_lost) {
        panic!("an acknowledged service is lost: {service:?}{}", model.story_of(&[name]));
    }
    model.services.retain(|name, _| seen.contains(name));
    drop(model);
    look_at_pool(client);
}

fn look_at_pool(client: &mut Client<'_>) {
    let policy = match client.call("GET", POOL, &Value::Null) {
        Said::Yes(told) => told["policy"].clone(),
        other => panic!("{POOL} is to be had: {other:?}"),
    };
    let mut model = client.known();
    let story = model.story_of(&[POOL]);
    let is_possible = model.pool.contains(&policy) || model.pool.is_empty() && policy.is_null();
    assert!(is_possible, "the pool has {policy}, expected one of {:?}{story}", model.pool);
    (model.pool, model.pool_is_taken) = (vec![policy], false);
}

/// Removes every service and the pool's policy.
///
/// # Panics
/// When one cannot be removed.
pub(crate) fn delete_all(client: &mut Client<'_>) {
    let names: Vec<String> = client.known().services.keys().cloned().collect();
    for name in names {
        let said = client.call("DELETE", &format!("/v1/services/{name}?grace_ms=0"), &Value::Null);
        assert!(matches!(said, Said::Yes(_)), "{name} can be deleted: {said:?}");
    }
    let said = client.call("DELETE", POOL, &Value::Null);
    assert!(matches!(said, Said::Yes(_)), "{POOL} can have no policy: {said:?}");
    let mut model = client.known();
    model.services.clear();
    model.pool.clear();
}
