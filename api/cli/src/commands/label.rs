//! `ark label`: labels of an agent that lives.

use ark_types::label::LabelPatch;

use super::agents::explain;
use crate::args::LabelArgs;
use crate::failure::Failure;
use crate::host::Context;

/// Changes labels and writes all that the agent has then.
pub(crate) async fn label(context: &Context, args: &LabelArgs) -> Result<(), Failure> {
    let patch = LabelPatch { labels: args.changes.iter().cloned().collect() };
    let client = context.client().await?;
    match client.label(&args.agent, &patch).await {
        Ok(agent) => context.ui.show(&agent, |agent| {
            agent.labels.iter().map(|(key, value)| format!("{key}={value}\n")).collect()
        }),
        Err(error) => Err(explain(&client, error).await),
    }
}
