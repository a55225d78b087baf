//! What operators set for pools: checked, recorded, and then in force.

use std::sync::Arc;

use ark_types::agent::AgentName;
use ark_types::event::{Event, Stream};
use ark_types::pool::{InvalidPolicy, MAX_POOLS, PoolPolicy};

use crate::core::Core;
use crate::store::{Append, AppendError};
use crate::templates::TemplateError;

/// Why a policy is not in force.
#[derive(Debug, thiserror::Error)]
pub enum PolicyError {
    /// Its bounds.
    #[error(transparent)]
    Invalid(#[from] InvalidPolicy),
    /// As many templates have one as may have.
    #[error("{MAX_POOLS} templates have pools of their own already: remove one with `ark pool rm`")]
    TooMany,
    /// The template.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// It cannot be recorded.
    #[error(transparent)]
    Log(#[from] AppendError),
}

/// Sets `policy` for the template called `template`, which has to be there.
///
/// # Errors
/// [`PolicyError`]; nothing is changed then.
pub async fn set(core: &Arc<Core>, template: &AgentName, policy: PoolPolicy) -> Result<(), PolicyError> {
    policy.check()?;
    core.templates.describe(template.as_ref())?;
    let others = core.ledger.projection().pools().iter().filter(|(name, _)| *name != template).count();
    if others >= MAX_POOLS {
        return Err(PolicyError::TooMany);
    }
    Ok(change(core, template, Some(policy)).await?)
}

/// Lets the template called `template` have what every one in use has. One that has no policy stays as it is.
///
/// # Errors
/// Why that cannot be recorded; nothing is changed then.
pub async fn remove(core: &Arc<Core>, template: &AgentName) -> Result<(), AppendError> {
    change(core, template, None).await
}

/// Records what is set for `template` from now on, and then lets it be so. Whoever asked may leave: what is durable counts.
async fn change(
    core: &Arc<Core>,
    template: &AgentName,
    policy: Option<PoolPolicy>,
) -> Result<(), AppendError> {
    let (core, template) = (Arc::clone(core), template.clone());
    let changing = tokio::spawn(async move {
        if core.ledger.projection().pools().of(&template) == policy {
            return Ok(());
        }
        let event = policy.map_or(Event::PoolRemoved {}, |policy| Event::PoolSet { policy });
        core.log.append(Append::new(Stream::pool(&template), event)).await?;
        core.ledger.caught_up().await;
        // Of those who change it at once, what was recorded last counts. The projection does not move on in between.
        let projection = core.ledger.projection();
        core.pool.set_policy(&template, projection.pools().of(&template));
        Ok(())
    });
    // It is cut off when `arkd` ends.
    changing.await.unwrap_or(Err(AppendError::Closed))
}
