//! `ark model` and `ark models`.

use std::fs::File;

use ark_types::model::{Model, ModelList};
use ark_types::plain::plain;

use crate::args::{ModelAction, ModelAddArgs};
use crate::failure::{Failure, summed_up};
use crate::host::Context;
use crate::output::{age, size, table};
use crate::progress::Spinner;

/// `ark model …`.
pub(crate) async fn perform(context: &Context, action: ModelAction) -> Result<(), Failure> {
    match action {
        ModelAction::Ls => ls(context).await,
        ModelAction::Add(args) => add(context, &args).await,
        ModelAction::Show { model } => {
            let model = context.client().await?.model(model.as_ref()).await?;
            context.ui.show(&model, card)
        }
        ModelAction::Load { model } => {
            let client = context.client_to_boot().await?;
            let spinner = Spinner::new(context.ui, &format!("loading the model {model}"));
            let loaded = client.load_model(model.as_ref()).await;
            drop(spinner);
            context.ui.show(&loaded?, |model| model.id.to_string())
        }
        ModelAction::Rm { models } => {
            let names: Vec<String> = models.into_iter().map(String::from).collect();
            rm(context, &names).await
        }
    }
}

/// Lists models.
pub(crate) async fn ls(context: &Context) -> Result<(), Failure> {
    let list = context.client().await?.models().await?;
    if list.data.is_empty() {
        context.ui.note("there is no model yet: `ark model add FILE --name NAME` adds one");
    }
    context.ui.show(&list, model_table)
}

/// Copies the file to where models are, and writes the model's name.
async fn add(context: &Context, args: &ModelAddArgs) -> Result<(), Failure> {
    let ModelAddArgs { file, name, context: tokens } = args;
    let unreadable =
        |e: std::io::Error| Failure::Usage(format!("cannot read {}: {}", file.display(), plain(&e)));
    // Before anything is started for it.
    let source = File::open(file).map_err(unreadable)?;
    let meta = source.metadata().map_err(unreadable)?;
    if !meta.is_file() {
        return Err(Failure::Usage(format!(
            "{} is no file: name the GGUF file of the model",
            file.display()
        )));
    }
    let client = context.client().await?;
    let spinner = Spinner::new(context.ui, &format!("adding the model {name}, {}", size(meta.len())));
    let source = tokio::fs::File::from_std(source);
    let added = client.add_model(name.as_ref(), *tokens, meta.len(), source).await;
    drop(spinner);
    context.ui.show(&added?, |model| model.id.to_string())
}

/// Every model is tried; what fails is told for each.
async fn rm(context: &Context, names: &[String]) -> Result<(), Failure> {
    let client = context.client().await?;
    let mut removed = Vec::new();
    let mut failures = Vec::new();
    for name in names {
        match client.delete_model(name).await {
            Ok(()) => removed.push(name),
            Err(error) => failures.push(error.into()),
        }
    }
    context.ui.show_removed(&removed)?;
    summed_up(context.ui, failures, names.len(), "models were not removed")
}

/// A large number, in thousands.
fn count(number: u64) -> String {
    const UNITS: [(u64, &str); 3] = [(1_000_000_000, "B"), (1_000_000, "M"), (1_000, "K")];
    match UNITS.into_iter().find(|(unit, _)| number >= *unit) {
        Some((unit, letter)) => {
            let tenths = number / (unit / 10);
            format!("{}.{}{letter}", tenths / 10, tenths % 10)
        }
        None => number.to_string(),
    }
}

/// Who brought it.
fn source(model: &Model) -> &'static str {
    if model.bundled { "bundled" } else { "added" }
}

fn model_table(list: &ModelList) -> String {
    let row = |model: &Model| {
        [
            model.id.to_string(),
            model.architecture.clone(),
            count(model.parameters),
            size(model.bytes),
            model.context.to_string(),
            size(model.memory_mib << 20),
            source(model).to_owned(),
            model.state.to_string(),
        ]
    };
    let rows: Vec<_> = list.data.iter().map(row).collect();
    table(["NAME", "ARCHITECTURE", "PARAMETERS", "SIZE", "CONTEXT", "MEMORY", "SOURCE", "STATE"], &rows)
}

fn card(model: &Model) -> String {
    let rows = [
        ("name", model.id.to_string()),
        ("state", model.state.to_string()),
        ("source", format!("{}, {} ago", source(model), age(model.created.saturating_mul(1000)))),
        ("architecture", model.architecture.clone()),
        ("parameters", model.parameters.to_string()),
        ("size", size(model.bytes)),
        ("digest", model.digest.clone()),
        ("context", format!("{} tokens", model.context)),
        ("memory", format!("{} for each VM that serves it", size(model.memory_mib << 20))),
    ];
    rows.iter().map(|(key, value)| format!("{key:<13}{value}\n")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_told_in_thousands() {
        let cases = [(0, "0"), (999, "999"), (1_000, "1.0K"), (1_649_999, "1.6M"), (494_000_000, "494.0M")];
        for (number, text) in cases {
            assert_eq!(count(number), text);
        }
        assert_eq!(count(7_620_000_000), "7.6B");
    }
}
