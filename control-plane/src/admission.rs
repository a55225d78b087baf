//! Whether an agent can be had at all: everything that is checked before anything is made.

use ark_types::agent::{AgentName, CreateAgent, DEFAULT_MEMORY_MIB, DEFAULT_VCPUS, MIN_MEMORY_MIB};
use ark_types::plain::plain;
use ark_types::problem::ProblemKind;
use ark_types::vmm::{ConfigError, check_size};

use crate::core::Core;
use crate::host::Memory;
use crate::images::{Image, ImageError};
use crate::problems::Refusal;
use crate::validate::check_env;

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
            admit_size(core, vcpus, memory_mib).await?;
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
    let available = Memory::read().map_err(AdmissionError::Meminfo)?.available_mib;
    if available < MIN_MEMORY_MIB {
        return Err(AdmissionError::NoMemory { asked: MIN_MEMORY_MIB, available }.into());
    }
    Ok(())
}

/// Checks that this host can boot a guest of that size now.
///
/// # Errors
/// A [`Refusal`] that names the value or what the host lacks.
pub async fn admit_size(core: &Core, vcpus: u32, memory_mib: u64) -> Result<(), Refusal> {
    let memory = Memory::read().map_err(AdmissionError::Meminfo)?;
    check(vcpus, memory_mib, memory)?;
    check_host(core).await
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
