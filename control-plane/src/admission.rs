//! Whether an agent can be had at all: everything that is checked before anything is made.

use ark_types::agent::CreateAgent;
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

/// Checks `request` against this host, and proves its image.
///
/// # Errors
/// A [`Refusal`] that names the value or what the host lacks.
pub async fn admit(core: &Core, request: &CreateAgent) -> Result<Image, Refusal> {
    check_env(&request.env)?;
    let memory = Memory::read().map_err(AdmissionError::Meminfo)?;
    check(request, memory)?;
    let probe = core.probe().await;
    if !probe.usable {
        return Err(AdmissionError::NoKvm(probe.reason).into());
    }
    Ok(core.images.open(&request.image).await?)
}

fn check(request: &CreateAgent, memory: Memory) -> Result<(), AdmissionError> {
    let (asked, available) = (request.memory_mib, memory.available_mib);
    check_size(request.vcpus, asked, memory.total_mib)?;
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
        let ask = |vcpus, memory_mib| {
            let json = serde_json::json!({ "image": "base", "vcpus": vcpus, "memory_mib": memory_mib });
            check(&serde_json::from_value(json).unwrap(), memory)
        };
        ask(1, 500).unwrap();
        assert!(matches!(ask(0, 100), Err(AdmissionError::Size(ConfigError::Vcpus(0)))));
        assert!(matches!(ask(1000, 100), Err(AdmissionError::Size(ConfigError::Vcpus(1000)))));
        assert!(matches!(ask(1, 0), Err(AdmissionError::Size(ConfigError::MemoryTooSmall(0)))));
        assert!(matches!(ask(1, 1001), Err(AdmissionError::Size(ConfigError::MemoryTooLarge { .. }))));
        assert!(matches!(ask(1, 501), Err(AdmissionError::NoMemory { asked: 501, available: 500 })));
    }
}
