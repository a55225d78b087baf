//! A model's own template and service: made when somebody first needs them, by one for all who do.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ark_types::agent::AgentName;
use ark_types::healing::RestartPolicy;
use ark_types::label::Owner;
use ark_types::model::{MODEL_PREFIX, Model, ModelList, ModelName, ModelState};
use ark_types::problem::{Problem, ProblemKind};
use ark_types::service::{ServiceSpec, UpdatePolicy};
use ark_types::template::CreateTemplate;
use futures_util::FutureExt as _;
use futures_util::future::{BoxFuture, Shared};

use super::ModelError;
use super::size::{Size, command};
use super::store::PASSING;
use super::upload::sync_parent;
use crate::agent::Handle;
use crate::core::Core;
use crate::problems::Refusal;
use crate::scheduler::SYSTEM;
use crate::services::change::{self, DRAIN_GRACE, Set};
use crate::services::view;
use crate::templates::{self, TemplateError};

/// Image of the VMs that serve models.
const IMAGE: &str = "inference";
/// How long a model may take to be loaded and to give its first token, milliseconds: an emulated host is slow.
const LOAD_MS: u64 = 900_000;

/// What is being done about models.
#[derive(Debug, Default)]
pub(super) struct Flights(Mutex<HashMap<ModelName, Flight>>);

#[derive(Clone, Debug)]
enum Flight {
    /// It is made ready to be served; whoever wants it waits for the same.
    Making(Shared<BoxFuture<'static, Result<(), Problem>>>),
    /// It is removed.
    Leaving,
}

/// The end of a flight, with this guard.
struct Landing(Arc<Core>, ModelName);

impl Drop for Landing {
    fn drop(&mut self) {
        self.0.models.flights.lock().remove(&self.1);
    }
}

impl Flights {
    fn lock(&self) -> MutexGuard<'_, HashMap<ModelName, Flight>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_making(&self, name: &ModelName) -> bool {
        matches!(self.lock().get(name), Some(Flight::Making(_)))
    }
}

fn leaving(name: &ModelName) -> Problem {
    Problem::new(ProblemKind::InUse, format!("the model {name} is being removed: try again when it is gone"))
}

/// Name of the template and of the service of the model `name`.
fn own_name(name: &ModelName) -> Result<AgentName, ModelError> {
    let text = format!("{MODEL_PREFIX}{name}");
    // A model's name is a label, and short enough.
    text.parse().map_err(|_| ModelError::NotFound { name: text, have: Vec::new() })
}

/// The request that the template called `template`, of a model, is built by.
///
/// # Errors
/// [`ModelError`].
pub(crate) async fn own_template(core: &Core, template: &AgentName) -> Result<CreateTemplate, ModelError> {
    let name = template.as_ref().strip_prefix(MODEL_PREFIX).unwrap_or_default();
    let name = core.models.name(name)?;
    let size = size_of(core, &name).await?;
    size.check_fits(&name, core.scheduler.config())?;
    Ok(CreateTemplate {
        name: template.clone(),
        image: IMAGE
            .parse()
            .map_err(|_| ModelError::NotFound { name: IMAGE.to_owned(), have: Vec::new() })?,
        vcpus: size.vcpus,
        memory_mib: size.memory_mib,
        warm: None,
        model: Some(name),
        timeout_ms: LOAD_MS,
    })
}

async fn size_of(core: &Core, name: &ModelName) -> Result<Size, ModelError> {
    let context = core.models.open_file(&core.images, name).await?.context;
    let facts = core.models.facts(name, &core.models.find(name)?)?;
    Size::of(name, &facts, Some(context))
}

/// Has a service serve `model`: its name. What is not there yet is made, and waited for, to the end even when nobody waits any
/// more; its replicas come up after that. One that was scaled to none has a replica again.
///
/// # Errors
/// A [`Refusal`] that says why it cannot be served.
pub(crate) async fn ensure_served(core: &Arc<Core>, model: &ModelName) -> Result<AgentName, Refusal> {
    let service = own_name(model)?;
    if replicas(core, &service)?.is_some_and(|replicas| replicas > 0) {
        return Ok(service);
    }
    let made = {
        let mut flights = core.models.flights.lock();
        match flights.get(model) {
            Some(Flight::Making(made)) => made.clone(),
            Some(Flight::Leaving) => return Err(Refusal(leaving(model))),
            None => {
                let made = begin(core, model, &service);
                flights.insert(model.clone(), Flight::Making(made.clone()));
                made
            }
        }
    };
    made.await.map_err(Refusal)?;
    Ok(service)
}

/// Makes the template and the service of `model`, beside whoever asks. It does not land before the caller gives up the lock.
fn begin(
    core: &Arc<Core>,
    model: &ModelName,
    service: &AgentName,
) -> Shared<BoxFuture<'static, Result<(), Problem>>> {
    let (core, model, service) = (Arc::clone(core), model.clone(), service.clone());
    let making = tokio::spawn(async move {
        let _landing = Landing(Arc::clone(&core), model.clone());
        let made = make(&core, &model, &service).await;
        if let Err(Refusal(problem)) = &made {
            tracing::warn!(%model, why = problem.detail, "a model cannot be served");
        }
        made
    });
    let made = async move {
        let interrupted =
            || Problem::new(ProblemKind::HostUnable, "the model's loading was interrupted: try again");
        making.await.map_or_else(|_| Err(interrupted()), |made| made.map_err(|Refusal(problem)| problem))
    };
    made.boxed().shared()
}

async fn make(core: &Arc<Core>, model: &ModelName, service: &AgentName) -> Result<(), Refusal> {
    match replicas(core, service)? {
        None => {}
        Some(0) => {
            change::scale(core, service.as_ref(), first_replicas(core), DRAIN_GRACE).await?;
            return Ok(());
        }
        Some(_) => return Ok(()),
    }
    let request = own_template(core, service).await?;
    templates::build(core, request).await?;
    let context = core.models.open_file(&core.images, model).await?.context;
    let mut spec = own_service(service, model, context);
    spec.replicas = first_replicas(core);
    change::set(core, spec, Set::Create).await?;
    Ok(())
}

/// How many replicas a model has when somebody first needs it.
fn first_replicas(core: &Core) -> u32 {
    core.inference.bounds().0.max(1)
}

/// The service of the model `model`. Its replicas run its command already: that is how its end is noticed.
fn own_service(name: &AgentName, model: &ModelName, context: u64) -> ServiceSpec {
    ServiceSpec {
        name: name.clone(),
        replicas: 1,
        image: None,
        template: Some(name.clone()),
        vcpus: None,
        memory_mib: None,
        env: std::collections::BTreeMap::default(),
        labels: ark_types::label::Labels::default(),
        // A model asks no other.
        allow: Vec::new(),
        owner: system(),
        port: None,
        command: Some(command(model, context)),
        health_check: None,
        restart: RestartPolicy::Always { max_restarts: None },
        update: UpdatePolicy::default(),
    }
}

fn system() -> Owner {
    // It is a name.
    SYSTEM.parse().unwrap_or_default()
}

/// How many replicas the service is to have, if it is there.
///
/// # Errors
/// [`ModelError::ServiceTaken`] where another one has its name.
fn replicas(core: &Core, service: &AgentName) -> Result<Option<u32>, ModelError> {
    let Ok(found) = view::one(core, service.as_ref()) else { return Ok(None) };
    if is_own(&found.spec) {
        return Ok(Some(found.spec.replicas));
    }
    Err(ModelError::ServiceTaken(service.to_string()))
}

/// Whether `spec` is that of a model's own service, which nobody but `arkd` made.
pub(crate) fn is_own(spec: &ServiceSpec) -> bool {
    spec.owner.as_ref() == SYSTEM
        && spec.name.as_ref().starts_with(MODEL_PREFIX)
        && spec.template.as_ref() == Some(&spec.name)
}

/// What is known of the model called `name`.
///
/// # Errors
/// [`ModelError`].
pub(crate) async fn describe(core: &Core, name: &str) -> Result<Model, ModelError> {
    let name = core.models.name(name)?;
    let file = core.models.open_file(&core.images, &name).await?;
    let place = core.models.find(&name)?;
    let facts = core.models.facts(&name, &place)?;
    let size = Size::of(&name, &facts, Some(file.context))?;
    let created = match &place.record {
        Some(record) => record.created_unix,
        None => u64::try_from(place.looks.mtime.0).unwrap_or_default(),
    };
    let bundled = place.record.is_none();
    Ok(Model {
        state: state(core, &name),
        id: name,
        object: "model".to_owned(),
        created,
        owned_by: if bundled { "ark" } else { "user" }.to_owned(),
        bytes: place.looks.size,
        digest: file.digest,
        architecture: facts.architecture.clone(),
        parameters: facts.parameters,
        context: file.context,
        memory_mib: size.memory_mib,
        bundled,
    })
}

fn state(core: &Core, name: &ModelName) -> ModelState {
    let service = own_name(name).ok().and_then(|service| view::one(core, service.as_ref()).ok());
    match service {
        Some(service) if service.ready > 0 => ModelState::Ready,
        Some(service) if service.spec.replicas > 0 => ModelState::Loading,
        None if core.models.flights.is_making(name) => ModelState::Loading,
        Some(_) | None => ModelState::Idle,
    }
}

/// Every model that can be served, by name.
///
/// # Errors
/// [`ModelError::File`] when a directory cannot be read.
pub(crate) async fn list(core: &Core) -> Result<ModelList, ModelError> {
    let mut models = Vec::new();
    for name in core.models.names()? {
        match describe(core, name.as_ref()).await {
            Ok(model) => models.push(model),
            Err(error) => tracing::warn!(%error, "a model is left out of the list"),
        }
    }
    Ok(ModelList::new(models))
}

/// Removes the model called `name`, with its service and its template.
///
/// # Errors
/// A [`Refusal`]; the model is there still, but it may be served no more.
pub(crate) async fn remove(core: &Arc<Core>, name: &str) -> Result<(), Refusal> {
    let name = core.models.name(name)?;
    if core.models.is_bundled(&name) {
        return Err(ModelError::Bundled(name).into());
    }
    let core = Arc::clone(core);
    // Whoever asked may leave: what of it goes goes together.
    let removing = tokio::spawn(async move {
        let _landing = leave(&core, &name).await?;
        take_away(&core, &name).await
    });
    removing.await.unwrap_or_else(|e| Err(Refusal::new(ProblemKind::Internal, e.to_string())))
}

/// Waits until the model is not made ready any more, and has nobody begin that.
async fn leave(core: &Arc<Core>, name: &ModelName) -> Result<Landing, Refusal> {
    loop {
        let made = {
            let mut flights = core.models.flights.lock();
            match flights.get(name) {
                Some(Flight::Making(made)) => made.clone(),
                Some(Flight::Leaving) => return Err(Refusal(leaving(name))),
                None => {
                    flights.insert(name.clone(), Flight::Leaving);
                    return Ok(Landing(Arc::clone(core), name.clone()));
                }
            }
        };
        // However it ended.
        let _ = made.await;
    }
}

async fn take_away(core: &Arc<Core>, name: &ModelName) -> Result<(), Refusal> {
    let (own, dir) = (own_name(name)?, core.models.dir_of(name));
    if !dir.exists() {
        core.models.find(name).map_err(Refusal::from)?;
    }
    if replicas(core, &own).is_ok_and(|replicas| replicas.is_some()) {
        change::remove(core, own.as_ref(), DRAIN_GRACE).await?;
    }
    let is_of_it =
        |agent: &Handle| agent.base().and_then(|hold| hold.model()).is_some_and(|(of, _)| of == *name);
    let agents = core.registry.all().iter().filter(|agent| is_of_it(agent)).count();
    if agents > 0 {
        return Err(ModelError::InUse { name: name.clone(), agents }.into());
    }
    match templates::remove(core, own.as_ref()).await {
        Ok(()) | Err(TemplateError::NotFound(_)) => {}
        Err(error) => return Err(error.into()),
    }
    let gone = core.models.dir.join(format!("{PASSING}{:016x}", rand::random::<u64>()));
    let failed = |source| ModelError::File { path: dir.clone(), source };
    std::fs::rename(&dir, &gone).and_then(|()| sync_parent(&dir)).map_err(failed)?;
    tracing::info!(model = %name, "the model is removed");
    let removed = tokio::task::spawn_blocking(move || std::fs::remove_dir_all(gone)).await;
    if let Ok(Err(error)) = removed {
        tracing::warn!(model = %name, %error, "what is left of a model cannot be removed; the next arkd tries again");
    }
    Ok(())
}
