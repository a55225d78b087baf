//! Bounds of what a client wants to become of an agent: limits, restarts, checkpoints, checks.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

use ark_types::checkpoint::{CHECKPOINT_EVERY_S, CHECKPOINTS_KEPT, CheckpointPolicy};
use ark_types::exec::ExecRequest;
use ark_types::healing::{LIFETIME_S, MAX_RESTARTS};
use ark_types::health_check::{
    CHECK_FAILURES, CHECK_INTERVAL_S, CHECK_START_S, CHECK_TIMEOUT_S, HealthCheck, Probe,
};
use ark_types::problem::ProblemKind;

use crate::agent::Upkeep;
use crate::problems::Refusal;
use crate::validate::prepare_exec;

/// Checks `upkeep`, of an agent that goes with its first program if `is_removed_with_it`.
///
/// # Errors
/// A [`Refusal`] that names the value.
pub fn check(upkeep: &Upkeep, is_removed_with_it: bool) -> Result<(), Refusal> {
    if let Some(how) = &upkeep.health_check {
        check_command(how)?;
    }
    let wrong = wrong_limit(upkeep)
        .or_else(|| upkeep.checkpoint.and_then(wrong_checkpoint))
        .or_else(|| upkeep.health_check.as_ref().and_then(wrong_check));
    let detail = match wrong {
        Some(detail) => detail,
        None if is_removed_with_it && !upkeep.restart.is_never() => {
            "an agent that is removed with its first program cannot be restarted: leave out auto_remove or restart"
                .to_owned()
        }
        None => return Ok(()),
    };
    Err(Refusal::new(ProblemKind::InvalidValue, detail))
}

fn wrong_limit(upkeep: &Upkeep) -> Option<String> {
    let lifetimes = [("ttl_s", upkeep.ttl_s), ("idle_timeout_s", upkeep.idle_timeout_s)];
    let wrong = lifetimes.into_iter().find(|(_, seconds)| seconds.is_some_and(|s| !LIFETIME_S.contains(&s)));
    if let Some((what, seconds)) = wrong {
        let (given, least, most) = (seconds.unwrap_or_default(), LIFETIME_S.start(), LIFETIME_S.end());
        return Some(format!(
            "{what} of {given} is out of bounds: give {least} to {most}, or leave it out for no limit"
        ));
    }
    let max = upkeep.restart.max_restarts().filter(|max| !MAX_RESTARTS.contains(max))?;
    let (least, most) = (MAX_RESTARTS.start(), MAX_RESTARTS.end());
    Some(format!(
        "max_restarts of {max} is out of bounds: give {least} to {most}, or the policy `never` for none at all"
    ))
}

/// The first of `values` that is out of its bounds, as a sentence about `whose`.
fn out_of_bounds(whose: &str, values: &[(&str, u32, RangeInclusive<u32>)]) -> Option<String> {
    let (what, given, bounds) = values.iter().find(|(_, given, bounds)| !bounds.contains(given))?;
    let (least, most) = (bounds.start(), bounds.end());
    Some(format!("{what} of {given} is out of bounds for {whose}: give {least} to {most}"))
}

fn wrong_checkpoint(CheckpointPolicy { every_s, keep }: CheckpointPolicy) -> Option<String> {
    let values = [("every_s", every_s, CHECKPOINT_EVERY_S), ("keep", keep, CHECKPOINTS_KEPT)];
    out_of_bounds("checkpoints", &values)
}

fn wrong_check(how: &HealthCheck) -> Option<String> {
    if how.probe == (Probe::Tcp { port: 0 }) {
        return Some("port 0 takes no connections: give the health check 1 to 65535".to_owned());
    }
    let values = [
        ("interval_s", how.interval_s, CHECK_INTERVAL_S),
        ("timeout_s", how.timeout_s, CHECK_TIMEOUT_S),
        ("failures", how.failures, CHECK_FAILURES),
        ("start_period_s", how.start_period_s, CHECK_START_S),
    ];
    out_of_bounds("a health check", &values)
}

/// The command of `how` as a program that an agent could be asked to run.
fn check_command(how: &HealthCheck) -> Result<(), Refusal> {
    let Probe::Exec { command } = &how.probe else { return Ok(()) };
    let request = ExecRequest { argv: command.clone(), ..ExecRequest::default() };
    prepare_exec(request, &BTreeMap::new()).map(drop).map_err(|Refusal(mut problem)| {
        problem.detail = format!("the command of the health check cannot be run: {}", problem.detail);
        Refusal(problem)
    })
}
