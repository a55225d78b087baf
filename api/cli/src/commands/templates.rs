//! `ark template` and `ark templates`.

use ark_types::template::{CreateTemplate, DEFAULT_WARM_UP_MS, Template, TemplateList};

use super::code;
use crate::args::{BuildArgs, TemplateAction};
use crate::failure::{Failure, summed_up};
use crate::host::Context;
use crate::output::{age, printable, size, span, table};
use crate::progress::Spinner;

/// Characters of a warm-up that a table shows.
const WARM_WIDTH: usize = 40;

/// `ark template …`.
pub(crate) async fn perform(context: &Context, action: TemplateAction) -> Result<(), Failure> {
    match action {
        TemplateAction::Build(args) => build(context, args).await,
        TemplateAction::Ls => ls(context).await,
        TemplateAction::Rm { names } => rm(context, &names).await,
    }
}

/// Builds a template and writes its name.
async fn build(context: &Context, args: BuildArgs) -> Result<(), Failure> {
    let request = build_request(args)?;
    let client = context.client_to_boot().await?;
    let spinner = Spinner::new(context.ui, &format!("building the template {}", request.name));
    let built = client.build_template(&request).await;
    drop(spinner);
    context.ui.show(&built?, |template| template.name.to_string())
}

/// The request that options stand for.
fn build_request(args: BuildArgs) -> Result<CreateTemplate, Failure> {
    let warm = match (args.warm, args.warm_file) {
        (Some(code), _) => Some(code::checked(code)?),
        (None, Some(path)) => Some(code::from_file(&path)?),
        (None, None) => None,
    };
    let timeout_ms =
        args.timeout.map_or(DEFAULT_WARM_UP_MS, |t| u64::try_from(t.as_millis()).unwrap_or(u64::MAX));
    Ok(CreateTemplate {
        name: args.name,
        image: args.image,
        vcpus: args.vcpus,
        memory_mib: args.memory,
        warm,
        model: None,
        timeout_ms,
    })
}

/// Lists templates.
pub(crate) async fn ls(context: &Context) -> Result<(), Failure> {
    let list = context.client().await?.templates().await?;
    context.ui.show(&list, template_table)
}

/// Every template is tried; what fails is told for each.
async fn rm(context: &Context, names: &[String]) -> Result<(), Failure> {
    let client = context.client().await?;
    let mut removed = Vec::new();
    let mut failures = Vec::new();
    for name in names {
        match client.delete_template(name).await {
            Ok(()) => removed.push(name),
            Err(error) => failures.push(error.into()),
        }
    }
    context.ui.show_removed(&removed)?;
    summed_up(context.ui, failures, names.len(), "templates were not removed")
}

/// How long ago a template was used; 0 is never.
fn used(unix_ms: u64) -> String {
    if unix_ms == 0 { "never".to_owned() } else { age(unix_ms) }
}

fn template_table(list: &TemplateList) -> String {
    let row = |template: &Template| {
        let warm = match &template.model {
            Some(model) => format!("serves the model {model}"),
            None => printable(template.warm.as_deref().unwrap_or_default().trim()).replace('\n', "; "),
        };
        let mut shown: String = warm.chars().take(WARM_WIDTH).collect();
        if shown.len() < warm.len() {
            shown.push('…');
        }
        [
            template.name.to_string(),
            template.image.to_string(),
            template.vcpus.to_string(),
            size(template.memory_mib << 20),
            size(template.bytes),
            span(template.build_ms),
            age(template.created_unix_ms),
            used(template.used_unix_ms),
            template.agents.to_string(),
            shown,
        ]
    };
    let rows: Vec<_> = list.templates.iter().map(row).collect();
    let headings = ["NAME", "IMAGE", "VCPUS", "MEMORY", "SIZE", "BUILD", "AGE", "USED", "AGENTS", "WARM-UP"];
    table(headings, &rows)
}
