//! Whether an agent can be had at all: everything that is checked before anything is made.

use std::time::Duration;

use ark_types::agent::{AgentName, CreateAgent, DEFAULT_MEMORY_MIB, DEFAULT_VCPUS, MIN_MEMORY_MIB};
use ark_types::plain::plain;
use ark_types::problem::ProblemKind;
use ark_types::scheduling::{DEFAULT_QUEUE_TIMEOUT, MAX_QUEUE_TIMEOUT, PRIORITIES, Resources};
use ark_types::vmm::{ConfigError, check_size};

use crate::core::Core;
use crate::host::{Memory, millis};
use crate::images::{Image, ImageError};
use crate::problems::Refusal;
use crate::scheduler::{Ask, Grant};
use crate::upkeep;
use crate::validate::{check_allow, check_env};

/// Why an agent is refused.
#[derive(Debug, thiserror::Error)]
pub enum AdmissionError {
    /// Too few or too many processors, too little or too much memory.
    #[error(transparent)]
    Size(#[from] ConfigError),
    /// This host cannot run guests.
    #[error(
        "this host cannot run microVMs: {0}; `ark doctor` says more, `ark machine start` emulates a host that can"
    )]
    NoKvm(String),
    /// Not enough memory right now.
    #[error(
        "{asked} MiB of memory are asked for and this host has {available} MiB left: end an agent or ask for less"
    )]
    NoMemory {
        /// MiB asked for.
        asked: u64,
        /// MiB left.
        available: u64,
    },
    /// How much there is cannot be told.
    #[error("this host's memory cannot be told: {}", plain(.0))]
    Meminfo(#[source] std::io::Error),
    /// The image.
    #[error(transparent)]
    Image(#[from] ImageError),
}

impl From<AdmissionError> for Refusal {
    fn from(error: AdmissionError) -> Self {
        match error {
            AdmissionError::Size(error) => error.into(),
            AdmissionError::Image(error) => error.into(),
            AdmissionError::NoKvm(_) | AdmissionError::NoMemory { .. } | AdmissionError::Meminfo(_) => {
                Self::new(ProblemKind::HostUnable, error.to_string())
            }
        }
    }
}

/// Checks `request` against this host, proves its image, and says what its agent is made of.
///
/// # Errors
/// A [`Refusal`] that names the value or what the host lacks.
pub async fn admit(core: &Core, request: &CreateAgent) -> Result<Source, Refusal> {
    core.ledger.ready()?;
    check_env(&request.env)?;
    check_allow(&request.allow)?;
    check_wishes(request)?;
    let given = |what| {
        let detail = format!("{what} cannot be chosen for a fork: processors and memory are the template's");
        Err(Refusal::new(ProblemKind::InvalidValue, detail))
    };
    let vcpus = request.vcpus.unwrap_or(DEFAULT_VCPUS);
    let memory_mib = request.memory_mib.unwrap_or(DEFAULT_MEMORY_MIB);
    let is_default = (vcpus, memory_mib) == (DEFAULT_VCPUS, DEFAULT_MEMORY_MIB);
    match (&request.image, &request.template) {
        (Some(image), None) if is_default && !request.cold => {
            check_host(core).await?;
            Ok(Source::Default(core.images.open(image).await?))
        }
        (Some(image), None) => {
            check_size_here((vcpus, memory_mib))?;
            check_host(core).await?;
            Ok(Source::Image(core.images.open(image).await?))
        }
        (None, Some(_)) if request.vcpus.is_some() => given("vcpus"),
        (None, Some(_)) if request.memory_mib.is_some() => given("memory_mib"),
        (None, Some(_)) if request.cold => {
            let detail =
                "an agent of a template is forked, so it cannot be booted cold: name its image instead";
            Err(Refusal::new(ProblemKind::InvalidValue, detail))
        }
        (None, Some(template)) => {
            check_host(core).await?;
            Ok(Source::Template(template.clone()))
        }
        (Some(_), Some(_)) => {
            let detail =
                "image and template exclude each other: name the one that the agent is to be made of";
            Err(Refusal::new(ProblemKind::InvalidValue, detail))
        }
        (None, None) => {
            let detail = "neither image nor template is named: name the one that the agent is to be made of";
            Err(Refusal::new(ProblemKind::InvalidValue, detail))
        }
    }
}

/// What an agent is made of.
#[derive(Clone, Debug)]
pub enum Source {
    /// The image, booted.
    Image(Image),
    /// The image's own template.
    Default(Image),
    /// The template of that name.
    Template(AgentName),
}

/// Checks that this host can run a guest at all.
///
/// # Errors
/// A [`Refusal`] that says what it lacks.
pub async fn check_host(core: &Core) -> Result<(), Refusal> {
    let probe = core.probe().await;
    if !probe.usable {
        return Err(AdmissionError::NoKvm(probe.reason).into());
    }
    // A fork shares nearly all of its memory at first, so how much it will take cannot be told; where there is nothing left,
    // there is no room for that either.
    let available = enough_memory(core, MIN_MEMORY_MIB).await?.available_mib;
    if available < MIN_MEMORY_MIB {
        return Err(AdmissionError::NoMemory { asked: MIN_MEMORY_MIB, available }.into());
    }
    Ok(())
}

fn check_wishes(request: &CreateAgent) -> Result<(), Refusal> {
    let detail = if !PRIORITIES.contains(&request.priority) {
        let (least, most) = (PRIORITIES.start(), PRIORITIES.end());
        format!("a priority of {} is out of bounds: give one from {least} to {most}", request.priority)
    } else if request.queue_timeout_ms.is_some_and(|ms| ms > millis(MAX_QUEUE_TIMEOUT)) {
        let most = millis(MAX_QUEUE_TIMEOUT);
        format!("queue_timeout_ms is more than {most}: no request waits for room longer than that")
    } else {
        return upkeep::check(&request.into(), request.auto_remove);
    };
    Err(Refusal::new(ProblemKind::InvalidValue, detail))
}

/// The ask that `request` amounts to, for an agent that needs `needs`.
#[must_use]
pub fn ask(request: &CreateAgent, needs: Resources) -> Ask {
    Ask {
        priority: request.priority,
        patience: request.queue_timeout_ms.map_or(DEFAULT_QUEUE_TIMEOUT, Duration::from_millis),
        name: request.name.clone(),
        apart: request.anti_affinity.clone().map(|group| (group, request.spread)),
        ..Ask::new(request.owner.clone(), needs)
    }
}

/// Checks that a guest of `size`, processors and MiB, can be had on a host like this.
///
/// # Errors
/// A [`Refusal`] that names the value.
pub fn check_size_here((vcpus, memory_mib): (u32, u64)) -> Result<(), Refusal> {
    let memory = Memory::read().map_err(AdmissionError::Meminfo)?;
    Ok(check_size(vcpus, memory_mib, memory.total_mib)?)
}

/// Reserves what `ask` says, as soon as there is room, for a guest of `size` that boots; and then checks that the memory is
/// really there: what agents use together may be more than was reserved for them.
///
/// # Errors
/// A [`Refusal`] that names the value or what the host lacks.
pub async fn room_to_boot(core: &Core, ask: Ask, size: (u32, u64)) -> Result<Grant, Refusal> {
    let grant = core.admit(ask).await?;
    let memory = enough_memory(core, size.1).await?;
    check(size.0, size.1, memory)?;
    check_host(core).await?;
    Ok(grant)
}

/// What there is of memory, once `asked` MiB are available or nothing is left that could be given up for them: what stands by
/// takes memory only as long as nobody else needs it.
async fn enough_memory(core: &Core, asked: u64) -> Result<Memory, AdmissionError> {
    loop {
        let memory = Memory::read().map_err(AdmissionError::Meminfo)?;
        if !lacks(memory, asked) || !core.pool.give_one_up().await {
            return Ok(memory);
        }
    }
}

/// Whether `asked` MiB are not available now and could be.
const fn lacks(memory: Memory, asked: u64) -> bool {
    memory.available_mib < asked && asked <= memory.total_mib
}

fn check(vcpus: u32, asked: u64, memory: Memory) -> Result<(), AdmissionError> {
    let available = memory.available_mib;
    check_size(vcpus, asked, memory.total_mib)?;
    if asked > available {
        return Err(AdmissionError::NoMemory { asked, available });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_stands_by_is_given_up_only_for_memory_that_can_be_had() {
        let lacks = |asked| lacks(Memory { total_mib: 1000, available_mib: 100 }, asked);
        assert_eq!([100, 101, 1000, 1001].map(lacks), [false, true, true, false]);
    }

    #[test]
    fn size_is_bounded_by_rules_by_the_host_and_by_what_is_left() {
        let memory = Memory { total_mib: 1000, available_mib: 500 };
        let ask = |vcpus, memory_mib| check(vcpus, memory_mib, memory);
        ask(1, 500).unwrap();
        assert!(matches!(ask(0, 100), Err(AdmissionError::Size(ConfigError::Vcpus(0)))));
        assert!(matches!(ask(1000, 100), Err(AdmissionError::Size(ConfigError::Vcpus(1000)))));
        assert!(matches!(ask(1, 0), Err(AdmissionError::Size(ConfigError::MemoryTooSmall(0)))));
        assert!(matches!(ask(1, 1001), Err(AdmissionError::Size(ConfigError::MemoryTooLarge { .. }))));
        assert!(matches!(ask(1, 501), Err(AdmissionError::NoMemory { asked: 501, available: 500 })));
    }
}
