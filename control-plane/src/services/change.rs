//! What services are to be: checked, durable, and only then in force.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ark_types::agent::AgentName;
use ark_types::event::{Event, Stream};
use ark_types::service::{MAX_REPLICAS, MAX_SERVICE_NAME, MAX_SERVICES, Service, ServiceSpec};

pub(crate) use super::entry::DRAIN_GRACE;
use super::entry::{Entry, Wanted, request};
use super::{ServiceError, environment, refuse_own_labels, view};
use crate::admission;
use crate::core::Core;
use crate::idempotency;
use crate::problems::Refusal;
use crate::projection::WantedService;
use crate::store::Append;
use crate::validate::prepare_exec;

/// How long a drained replica may take to end beyond what its calls may.
const END_PATIENCE: Duration = Duration::from_secs(60);

/// How a service is set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Set {
    /// There is to be none of that name.
    Create,
    /// It takes the place of one that is there.
    Replace,
}

/// Has a service be as `spec` says from now on; it, and whether it is new.
///
/// # Errors
/// A [`Refusal`] that names the value, or says why it cannot be kept.
pub(crate) async fn set(core: &Arc<Core>, spec: ServiceSpec, how: Set) -> Result<(Service, bool), Refusal> {
    check(core, &spec).await?;
    in_turn(core, async move |core| {
        let before = before(&core, &spec, how)?;
        let (is_new, generation) = (before.is_none(), before.as_ref().map(Wanted::generation));
        let next = next(spec, before.as_ref());
        Ok((keep(&core, next, generation).await?, is_new))
    })
    .await
}

/// Has the service `name` have so many replicas from now on. Those that are too many finish what is under way in them, for as
/// long as `grace`.
///
/// # Errors
/// As [`set`].
pub(crate) async fn scale(
    core: &Arc<Core>,
    name: &str,
    replicas: u32,
    grace: Duration,
) -> Result<Service, Refusal> {
    if replicas > MAX_REPLICAS {
        return Err(ServiceError::replicas(replicas).into());
    }
    let name = name.to_owned();
    in_turn(core, async move |core| {
        let wanted = core.services.with(&name, |_, entry| entry.wanted.clone())?;
        let mut next = wanted.ok_or_else(|| ServiceError::NotFound(name.clone()))?;
        next.service.spec.replicas = replicas;
        let generation = Some(next.generation());
        core.services.with(&name, |_, entry| entry.grace = grace)?;
        keep(&core, next, generation).await
    })
    .await
}

/// Removes the service `name`: its replicas finish what is under way in them, for as long as `grace`, and go. Waits for the
/// last one's end.
///
/// # Errors
/// [`ServiceError::NotFound`], or a [`Refusal`] that says why it cannot be recorded.
pub(crate) async fn remove(core: &Arc<Core>, name: &str, grace: Duration) -> Result<(), Refusal> {
    let text = name.to_owned();
    let service = in_turn(core, async move |core| {
        let (name, generation) = core
            .services
            .with(&text, |name, entry| (name.clone(), entry.generation().unwrap_or_default()))?;
        core.log.append(Append::new(Stream::service(&name), Event::ServiceRemoved {})).await?;
        if let Some(entry) = core.services.lock().get_mut(&name) {
            entry.leave(Instant::now(), grace);
        }
        core.services.wake.notify_one();
        environment::remove(&core.config.state, &name, generation);
        tracing::info!(service = %name, "the service is removed");
        Ok(name)
    })
    .await?;
    let is_gone = |entries: &BTreeMap<AgentName, Entry>| {
        entries.get(&service).is_none_or(|entry| entry.wanted.is_some())
    };
    Ok(core.services.until(grace.saturating_add(END_PATIENCE), is_gone).await?)
}

/// Gives the replica `agent` of the service `name` no new calls, lets it finish what is under way, for as long as `grace`, and
/// removes it. Waits for its end.
///
/// # Errors
/// [`ServiceError`].
pub(crate) async fn drain(
    core: &Arc<Core>,
    name: &str,
    agent: &str,
    grace: Duration,
) -> Result<Service, ServiceError> {
    let found = core.services.with(name, |name, entry| {
        let id = entry.find(name, agent)?.handle.id().to_owned();
        entry.drain(&id, Instant::now(), grace);
        Ok((name.clone(), id))
    })?;
    let (service, id) = found?;
    core.services.wake.notify_one();
    let is_gone = |entries: &BTreeMap<AgentName, Entry>| {
        !entries.get(&service).is_some_and(|entry| entry.replicas.contains_key(&id))
    };
    core.services.until(grace.saturating_add(END_PATIENCE), is_gone).await?;
    view::one(core, service.as_ref())
}

/// Makes one change after another, each to its end: whoever asked may leave, what is durable counts.
async fn in_turn<T, F>(
    core: &Arc<Core>,
    change: impl FnOnce(Arc<Core>) -> F + Send + 'static,
) -> Result<T, Refusal>
where
    T: Send + 'static,
    F: Future<Output = Result<T, Refusal>> + Send,
{
    let core = Arc::clone(core);
    let changing = idempotency::spawn(async move {
        let _turn = core.services.changing.lock().await;
        change(Arc::clone(&core)).await
    });
    changing.await.map_err(|_| ServiceError::Interrupted)?
}

/// Checks everything about a service that can be checked before a replica is made.
async fn check(core: &Arc<Core>, spec: &ServiceSpec) -> Result<(), Refusal> {
    refuse_own_labels(&spec.labels)?;
    if spec.name.as_ref().len() > MAX_SERVICE_NAME {
        return Err(ServiceError::long_name(&spec.name).into());
    }
    let update = spec.update;
    for count in [spec.replicas, update.max_unavailable, update.max_surge] {
        if count > MAX_REPLICAS {
            return Err(ServiceError::replicas(count).into());
        }
    }
    if update.max_unavailable == 0 && update.max_surge == 0 {
        let why = "an update may neither go below nor above the replicas that are wanted, so it could not begin: have max_unavailable or max_surge be 1 or more";
        return Err(ServiceError::Invalid(why.to_owned()).into());
    }
    if spec.port == Some(0) {
        let why = "port 0 is none: name the one where the replicas' program listens, or leave it out";
        return Err(ServiceError::Invalid(why.to_owned()).into());
    }
    if let Some(template) = &spec.template {
        core.templates.describe(template.as_ref())?;
    }
    if let Some(command) = &spec.command {
        prepare_exec(command.exec(), &spec.env).map_err(|Refusal(mut problem)| {
            problem.detail = format!("the command: {}", problem.detail);
            Refusal(problem)
        })?;
    }
    let request = request(spec, spec.env.clone(), 1).map_err(|e| ServiceError::Invalid(e.to_string()))?;
    admission::admit(core, &request).await?;
    Ok(())
}

/// What is in force of the service that `spec` is of.
fn before(core: &Core, spec: &ServiceSpec, how: Set) -> Result<Option<Wanted>, ServiceError> {
    let entries = core.services.lock();
    match entries.get(&spec.name) {
        Some(Entry { wanted: None, .. }) => Err(ServiceError::Leaving(spec.name.clone())),
        Some(_) if how == Set::Create => Err(ServiceError::Exists(spec.name.clone())),
        Some(Entry { wanted: Some(wanted), .. }) if wanted.service.spec.owner != spec.owner => {
            // Its replicas, and what they know, are its owner's.
            let why = "a service's owner does not change: remove it, and create it anew";
            Err(ServiceError::Invalid(why.to_owned()))
        }
        Some(Entry { wanted, .. }) => Ok(wanted.clone()),
        None if entries.len() >= MAX_SERVICES => Err(ServiceError::TooMany),
        None => Ok(None),
    }
}

/// What comes after `before`: of the same generation as long as replicas are made alike.
fn next(spec: ServiceSpec, before: Option<&Wanted>) -> Wanted {
    let values = spec.env.clone();
    let (spec, env) = spec.without_values();
    // Whose request made it stays known as long as it is there.
    let request = match before {
        None => idempotency::current_id(),
        Some(before) => before.service.request.clone(),
    };
    let generation = match before {
        None => 1,
        Some(before) => {
            let is_alike = before.service.spec.is_of_one_make(&spec) && before.env.as_ref() == Ok(&values);
            before.generation() + u64::from(!is_alike)
        }
    };
    Wanted { service: WantedService { spec, env, generation, request }, env: Ok(values) }
}

/// Brings `next` into force, after the generation `before`.
async fn keep(core: &Arc<Core>, next: Wanted, before: Option<u64>) -> Result<Service, Refusal> {
    let WantedService { spec, env, generation, request } = next.service.clone();
    let (name, state, is_other) = (spec.name.clone(), &core.config.state, before != Some(generation));
    if is_other && let Some(values) = next.env.as_ref().ok().filter(|values| !values.is_empty()) {
        environment::write(state, &name, generation, values).map_err(ServiceError::Environment)?;
    }
    let event = Event::ServiceSet { service: Box::new(spec), env, generation, request };
    let kept = async {
        if before.is_none() {
            idempotency::bind(core, Stream::service(&name)).await?;
        }
        core.log.append(Append::new(Stream::service(&name), event)).await
    };
    if let Err(error) = kept.await {
        if is_other {
            environment::remove(state, &name, generation);
        }
        return Err(error.into());
    }
    tracing::info!(service = %name, generation, replicas = next.service.spec.replicas, "the service is set");
    core.services.set(name.clone(), next);
    if let Some(before) = before.filter(|_| is_other) {
        environment::remove(state, &name, before);
    }
    Ok(view::one(core, name.as_ref())?)
}

#[cfg(test)]
mod tests {
    use ark_types::service::ServiceCommand;

    use super::*;

    fn spec() -> ServiceSpec {
        let spec = r#"{ "name": "web", "replicas": 2, "image": "base", "env": { "KEY": "secret" } }"#;
        serde_json::from_str(spec).unwrap()
    }

    #[test]
    fn only_what_replicas_are_made_of_makes_a_generation() {
        let first = next(spec(), None);
        assert_eq!((first.generation(), first.service.env.as_slice()), (1, ["KEY".to_owned()].as_slice()));
        assert!(first.service.spec.env.is_empty());
        let after = |change: &dyn Fn(&mut ServiceSpec)| {
            let mut spec = spec();
            change(&mut spec);
            next(spec, Some(&first)).generation()
        };
        assert_eq!(after(&|_| {}), 1);
        assert_eq!(after(&|spec| spec.replicas = 5), 1);
        assert_eq!(after(&|spec| spec.update.max_surge = 5), 1);
        assert_eq!(after(&|spec| spec.image = Some("python".parse().unwrap())), 2);
        assert_eq!(after(&|spec| drop(spec.env.insert("KEY".to_owned(), "other".to_owned()))), 2);
        assert_eq!(after(&|spec| spec.memory_mib = Some(128)), 2);
        let command = ServiceCommand { argv: vec!["serve".to_owned()], cwd: None, user: None };
        assert_eq!(after(&|spec| spec.command = Some(command.clone())), 2);
        let lost = Wanted { env: Err("it is gone".to_owned()), ..first };
        assert_eq!(next(spec(), Some(&lost)).generation(), 2, "nobody knows whether it is the same");
    }
}
