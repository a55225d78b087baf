//! Templates: agents that were booted and warmed once, frozen on disk, and forked from.
//!
//! ```text
//!  by_name, default_for, build ──► inputs (image, kernel, first root file system: digests) ──► digest
//!                                     │ on the shelf under that digest?                          │
//!                                     │ yes ──► Found                                            │
//!                                     └ no ──► one builder per digest, others wait: boot a hidden agent, warm it up,
//!                                              snapshot it into StateDir/templates/<digest>/, end it
//! ```
//!
//! A template whose kernel, image or first root file system changed has another digest now, so its next use builds a new one;
//! the old one goes when no agent needs it.

mod build;
mod error;
mod inputs;
mod shelf;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use ark_types::agent::{AgentName, DEFAULT_MEMORY_MIB, DEFAULT_VCPUS};
use ark_types::image::ImageName;
use ark_types::model::MODEL_PREFIX;
use ark_types::template::{CreateTemplate, DEFAULT_WARM_UP_MS, MAX_WARM_UP_MS, Template};
use sha2::{Digest as _, Sha256};
use tokio::task::JoinHandle;

pub use error::TemplateError;
pub use shelf::Templates;

use crate::core::Core;
use crate::media::Media;
use crate::models;
use crate::pool::policy;
use crate::snapshots::{Hold, SnapshotError};
use inputs::Inputs;

/// What the names of the images' own templates begin with.
const DEFAULT_PREFIX: &str = "default-";
/// Longest name.
const MAX_NAME: usize = 63;

/// A template to fork from.
#[derive(Clone, Debug)]
pub struct Found {
    /// Keeps its snapshot on disk.
    pub hold: Hold,
    /// What it is.
    pub template: Template,
    /// The disks that it was built with, whole and unchanged.
    pub media: Media,
}

/// Builds a template, unless it is there already. When the caller stops waiting, what was begun is undone.
///
/// # Errors
/// [`TemplateError`]; nothing is left then.
pub async fn build(core: &Arc<Core>, request: CreateTemplate) -> Result<Template, TemplateError> {
    let is_reserved = if request.name.as_ref().starts_with(DEFAULT_PREFIX) {
        request != default_request(&request.image)
    } else if request.name.as_ref().starts_with(MODEL_PREFIX) {
        request != models::own_template(core, &request.name).await?
    } else {
        false
    };
    if is_reserved {
        return Err(TemplateError::Reserved { name: request.name });
    }
    if request.warm.is_some() && request.model.is_some() {
        return Err(TemplateError::WarmAndModel);
    }
    if request.timeout_ms == 0 || request.timeout_ms > MAX_WARM_UP_MS {
        return Err(TemplateError::Timeout { asked_ms: request.timeout_ms });
    }
    Ok(obtain(core, &request).await?.template)
}

/// The template called `name`; one that what it was built of has left behind is built again first.
///
/// # Errors
/// [`TemplateError`].
pub async fn by_name(core: &Arc<Core>, name: &AgentName) -> Result<Found, TemplateError> {
    let request = core.templates.request(name)?;
    detached(core, request).await
}

/// The template that `image` has by itself: default size, no warm-up. Built on first use, and to the end even when the caller
/// stops waiting.
///
/// # Errors
/// [`TemplateError`].
pub async fn default_for(core: &Arc<Core>, image: &ImageName) -> Result<Found, TemplateError> {
    detached(core, default_request(image)).await
}

/// As [`by_name`], for who does not wait: a template that has to be built first is begun.
///
/// # Errors
/// [`TemplateError`]; [`TemplateError::Building`] of one that is not there yet.
pub async fn by_name_now(core: &Arc<Core>, name: &AgentName) -> Result<Found, TemplateError> {
    let request = core.templates.request(name)?;
    match at_hand(core, &request).await? {
        Some(found) => Ok(found),
        None => {
            drop(begin(core, request));
            Err(TemplateError::Building(name.to_string()))
        }
    }
}

/// As [`default_for`], for who does not wait: none when it has to be built first.
///
/// # Errors
/// [`TemplateError`].
pub async fn default_now(core: &Arc<Core>, image: &ImageName) -> Result<Option<Found>, TemplateError> {
    at_hand(core, &default_request(image)).await
}

/// Begins to build the template that `image` has by itself, unless it is there.
pub fn begin_default(core: &Arc<Core>, image: &ImageName) {
    drop(begin(core, default_request(image)));
}

/// Removes the template called `name`, its pool, and the warm agents that were kept of it.
///
/// # Errors
/// [`TemplateError::NotFound`], [`TemplateError::Building`], [`TemplateError::InUse`] or [`TemplateError::Pool`].
pub async fn remove(core: &Arc<Core>, name: &str) -> Result<(), TemplateError> {
    let (core, name) = (Arc::clone(core), name.to_owned());
    // Whoever asked may leave: what of it goes goes together.
    let removing = tokio::spawn(async move { take_away(&core, &name).await });
    removing.await.unwrap_or(Err(TemplateError::Interrupted))
}

async fn take_away(core: &Arc<Core>, name: &str) -> Result<(), TemplateError> {
    let pool: Option<AgentName> = name.parse().ok().filter(|name| core.pool.has_policy(name));
    if pool.is_some() {
        core.ledger.ready().map_err(TemplateError::Pool)?;
    }
    if let Some(dir) = core.templates.take_down(name)? {
        core.pool.forget(&dir).await;
        core.snapshots.gone(&[dir]).await;
    }
    if let Some(pool) = pool {
        policy::remove(core, &pool).await.map_err(TemplateError::Pool)?;
    }
    Ok(())
}

/// What is there and sound, else what is built; a build goes on without the caller.
async fn detached(core: &Arc<Core>, request: CreateTemplate) -> Result<Found, TemplateError> {
    match at_hand(core, &request).await? {
        Some(found) => Ok(found),
        None => begin(core, request).await.unwrap_or(Err(TemplateError::Interrupted)),
    }
}

/// Obtains what `request` describes, to the end even when nobody waits for it.
fn begin(core: &Arc<Core>, request: CreateTemplate) -> JoinHandle<Result<Found, TemplateError>> {
    let core = Arc::clone(core);
    tokio::spawn(async move { obtain(&core, &request).await })
}

/// What is there and sound.
async fn at_hand(core: &Arc<Core>, request: &CreateTemplate) -> Result<Option<Found>, TemplateError> {
    let inputs = Inputs::of(core, request).await?;
    let Some(found) = core.templates.on_shelf(&request.name, &inputs)? else { return Ok(None) };
    match found.hold.prove().await {
        Err(error @ SnapshotError::Unusable { .. }) => {
            tracing::error!(name = %request.name, %error, "a template is damaged; it is built again");
            forget(core, core.templates.discard(found.hold.id())).await;
            Ok(None)
        }
        proved => proved.map(|()| Some(found)).map_err(Into::into),
    }
}

/// What is there, else what is built.
async fn obtain(core: &Arc<Core>, request: &CreateTemplate) -> Result<Found, TemplateError> {
    let inputs = Inputs::of(core, request).await?;
    let (found, mut retired) =
        core.templates.obtain(&request.name, &inputs, build::build(core, request, &inputs)).await?;
    retired.extend(core.templates.sweep(&core.images, |name| core.pool.has_policy(name)));
    forget(core, retired).await;
    core.pool.renewed(&request.name, found.hold.dir()).await;
    Ok(found)
}

async fn forget(core: &Core, retired: Vec<std::path::PathBuf>) {
    for dir in retired {
        core.pool.forget(&dir).await;
    }
}

/// The request that an image's own template is built by.
fn default_request(image: &ImageName) -> CreateTemplate {
    CreateTemplate {
        name: default_name(image),
        image: image.clone(),
        vcpus: DEFAULT_VCPUS,
        memory_mib: DEFAULT_MEMORY_MIB,
        warm: None,
        model: None,
        timeout_ms: DEFAULT_WARM_UP_MS,
    }
}

/// `default-<image>`; of a name that is too long for that, its beginning and what tells it from others.
///
/// # Panics
/// Never: a test over long names shows that they make names.
fn default_name(image: &ImageName) -> AgentName {
    let whole = format!("{DEFAULT_PREFIX}{image}");
    let text = if whole.len() <= MAX_NAME {
        whole
    } else {
        let told_apart: String =
            Sha256::digest(image.as_ref()).iter().take(6).map(|byte| format!("{byte:02x}")).collect();
        let begin = whole.get(..MAX_NAME - 13).unwrap_or(DEFAULT_PREFIX);
        format!("{begin}-{told_apart}")
    };
    text.parse().expect("labels joined by '-' are a label")
}
