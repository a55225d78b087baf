//! How a model is served, and what that takes.
//!
//! ```text
//! memory of the VM = weights + cache + compute + fixed   (ark_gguf::memory, for 8 sessions and steps of 256 tokens)
//!                  + 96 MiB                              (the guest's kernel, its first root file system and ark-guestd)
//!                    rounded up to 32 MiB
//! processors       = the host's, at most 4
//! ```

use ark_gguf::{CacheType, Memory, Serving};
use ark_types::model::{DEFAULT_CONTEXT, MAX_CONTEXT, ModelName};
use ark_types::service::ServiceCommand;

use super::ModelError;
use crate::host;
use crate::scheduler::SchedulerConfig;

/// Sessions that a server decodes at the same time.
const SESSIONS: u32 = 8;
/// Most tokens of one step.
const BATCH: u32 = 256;
/// Processors of a VM that serves a model, at most: more wait for memory.
const MAX_VCPUS: u32 = 4;
/// Shortest context, tokens.
const LEAST_CONTEXT: u64 = 32;
/// What a guest takes beside its server, bytes.
const GUEST: u64 = 96 << 20;
/// Memory is given in pieces of so many MiB.
const PIECE_MIB: u64 = 32;
/// The guest's second disk.
const DISK: &str = "/dev/vdb";

/// How a model is served, and what that takes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Size {
    pub(super) context: u64,
    pub(super) memory: Memory,
    pub(super) memory_mib: u64,
    pub(super) vcpus: u32,
}

impl Size {
    /// Of `model`, served with `context` tokens, or as many as it was trained for and is usual.
    ///
    /// # Errors
    /// [`ModelError::Context`].
    pub(super) fn of(
        name: &ModelName,
        model: &ark_gguf::Model,
        context: Option<u64>,
    ) -> Result<Self, ModelError> {
        let most = model.context.min(MAX_CONTEXT);
        let least = LEAST_CONTEXT.min(most);
        let context = context.unwrap_or_else(|| most.min(DEFAULT_CONTEXT));
        if !(least..=most).contains(&context) {
            return Err(ModelError::Context { name: name.clone(), asked: context, least, most });
        }
        let serving =
            Serving { context, sessions: SESSIONS.into(), batch: BATCH.into(), cache: CacheType::F16 };
        let memory = ark_gguf::memory(model, &serving);
        let mib = memory.total().saturating_add(GUEST).div_ceil(1 << 20);
        let memory_mib = mib.next_multiple_of(PIECE_MIB);
        Ok(Self { context, memory, memory_mib, vcpus: host::cpus().min(MAX_VCPUS) })
    }

    /// Refuses a model that this host could never give enough memory.
    ///
    /// # Errors
    /// [`ModelError::TooLarge`]; [`ModelError::File`] where the host's memory cannot be told.
    pub(super) fn check_fits(&self, name: &ModelName, scheduler: &SchedulerConfig) -> Result<(), ModelError> {
        let host = host::Memory::read()
            .map_err(|source| ModelError::File { path: "/proc/meminfo".into(), source })?;
        let limit = scheduler.limit(host.total_mib, host::cpus()).memory_mib;
        self.check_within(name, host.total_mib.min(limit))
    }

    fn check_within(&self, name: &ModelName, most_mib: u64) -> Result<(), ModelError> {
        if self.memory_mib <= most_mib {
            return Ok(());
        }
        let Memory { weights, cache, compute, fixed } = self.memory;
        let mib = |bytes: u64| bytes.div_ceil(1 << 20);
        let parts = format!(
            "weights {}, cache {} for {SESSIONS} sessions of {} tokens, buffers {}, the rest {}",
            mib(weights),
            mib(cache),
            self.context,
            mib(compute),
            mib(fixed.saturating_add(GUEST))
        );
        Err(ModelError::TooLarge { name: name.clone(), asked_mib: self.memory_mib, parts, most_mib })
    }
}

/// What runs in a VM that serves the model `name`.
pub(super) fn command(name: &ModelName, context: u64) -> ServiceCommand {
    let argv = [
        "ark-inference".to_owned(),
        "--model".to_owned(),
        format!("{name}={DISK}"),
        "--vsock".to_owned(),
        format!("--context={context}"),
        format!("--sessions={SESSIONS}"),
        format!("--batch={BATCH}"),
    ];
    ServiceCommand { argv: argv.into(), cwd: None, user: None }
}

#[cfg(test)]
mod tests {
    use ark_gguf::synthetic::Synthetic;

    use super::*;

    fn model() -> ark_gguf::Model {
        let bytes = Synthetic::default().to_bytes();
        let header = ark_gguf::Header::read(bytes.as_slice(), bytes.len() as u64).unwrap();
        ark_gguf::Model::try_from(&header).unwrap()
    }

    #[test]
    fn memory_grows_with_the_context_and_is_refused_with_its_parts() {
        let (name, model) = ("m".parse().unwrap(), model());
        let usual = Size::of(&name, &model, None).unwrap();
        assert_eq!((usual.context, usual.memory_mib % PIECE_MIB), (2048, 0));
        let short = Size::of(&name, &model, Some(64)).unwrap();
        assert!(short.memory.total() < usual.memory.total() && short.memory_mib <= usual.memory_mib);
        usual.check_within(&name, usual.memory_mib).unwrap();
        let error = usual.check_within(&name, usual.memory_mib - 1).unwrap_err().to_string();
        let numbers = format!("takes {} MiB of memory (weights 1, cache", usual.memory_mib);
        assert!(error.contains(&numbers) && error.contains("8 sessions of 2048 tokens"), "{error}");
    }

    #[test]
    fn a_context_is_within_what_the_model_was_trained_for() {
        let (name, model) = ("m".parse().unwrap(), model());
        for asked in [0, 31, 2049, u64::MAX] {
            let error = Size::of(&name, &model, Some(asked)).unwrap_err();
            assert!(error.to_string().contains("from 32 to 2048"), "{error}");
        }
        let huge = ark_gguf::Model { layers: u64::MAX, ..model };
        assert!(Size::of(&name, &huge, None).unwrap().check_within(&name, 1 << 30).is_err());
    }
}
