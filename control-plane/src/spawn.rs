//! An agent that is asked for: admitted, then forked from a template or booted. Everything that makes agents on request goes
//! through here.

use std::sync::Arc;

use ark_types::agent::{Agent, CreateAgent, DEFAULT_MEMORY_MIB, DEFAULT_VCPUS, Origin};
use tracing::Instrument as _;

use crate::admission::{self, Source, admit};
use crate::agent::{self, Birth};
use crate::core::Core;
use crate::images::Image;
use crate::problems::Refusal;
use crate::scheduler::Ask;
use crate::telemetry::Source as Made;
use crate::templates::{self, Found, TemplateError};
use crate::traces::step;

/// Makes the agent that `request` asks for; it is ready when this returns. Dropping it takes the request back.
///
/// # Errors
/// [`Refusal`]; nothing is left of the agent then.
pub(crate) async fn spawn(core: &Arc<Core>, request: CreateAgent) -> Result<Agent, Refusal> {
    let source = if request.template.is_some() { Made::Template } else { Made::Boot };
    let mut attempt = core.telemetry.attempt(source);
    let made = make(core, request).await;
    if let Ok(agent) = &made {
        attempt.source = Made::from(&agent.origin);
    }
    attempt.end(&made);
    made
}

/// The agent that is asked for, forked or booted.
async fn make(core: &Arc<Core>, request: CreateAgent) -> Result<Agent, Refusal> {
    // Now or not at all: what has to be built first is not there now.
    let waits = request.queue_timeout_ms != Some(0);
    Ok(match admit(core, &request).instrument(step("admission")).await? {
        Source::Image(image) => boot(core, request, image).await?,
        Source::Template(name) if !waits => {
            let found = templates::by_name_now(core, &name).await?;
            fork_of(core, request, found).await?
        }
        Source::Default(image) if !waits => match templates::default_now(core, &image.manifest.name).await {
            Ok(Some(found)) => fork_of(core, request, found).await?,
            Ok(None) | Err(_) => {
                let name = image.manifest.name.clone();
                let agent = boot(core, request, image).await?;
                // Only then, so that it takes nobody the room.
                templates::begin_default(core, &name);
                agent
            }
        },
        Source::Template(name) => {
            let found = templates::by_name(core, &name).await?;
            fork_of(core, request, found).await?
        }
        Source::Default(image) => match templates::default_for(core, &image.manifest.name).await {
            Ok(found) => fork_of(core, request, found).await?,
            // For want of room there is no boot either.
            Err(TemplateError::Agent(refusal)) if refusal.0.kind.retry_after_s().is_some() => {
                return Err(refusal);
            }
            // An agent that can be had by a boot is not refused for want of a template.
            Err(error) => {
                tracing::warn!(image = %image.manifest.name, %error, "the image's template cannot be built; the agent is booted");
                boot(core, request, image).await?
            }
        },
    })
}

async fn boot(core: &Arc<Core>, request: CreateAgent, image: Image) -> Result<Agent, Refusal> {
    let size = (request.vcpus.unwrap_or(DEFAULT_VCPUS), request.memory_mib.unwrap_or(DEFAULT_MEMORY_MIB));
    let ask = admission::ask(&request, core.scheduler.config().booted(size));
    let grant = admission::room_to_boot(core, ask, size).await?;
    let _busy = core.pool.busy();
    Ok(agent::create(core, request, image.into(), grant).await??)
}

async fn fork_of(core: &Arc<Core>, request: CreateAgent, found: Found) -> Result<Agent, Refusal> {
    let Found { hold, template, .. } = found;
    let size = (hold.manifest().vcpus, hold.manifest().memory_mib);
    let ask = admission::ask(&request, core.scheduler.config().forked(size));
    let grant = core.admit(Ask { template: Some(template.name.clone()), ..ask }).await?;
    let _busy = core.pool.busy();
    core.templates.used(&hold);
    core.pool.asked(&template.name);
    let origin = Origin::Template { name: template.name.clone() };
    agent::from_template(core, &template.name, Birth { hold, origin, wishes: request.into(), grant }).await
}
