//! Templates: agents that were booted and warmed once, to be forked from.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::agent::{AgentName, DEFAULT_MEMORY_MIB, DEFAULT_VCPUS};
use crate::image::ImageName;
use crate::model::ModelName;

/// How long a warm-up may take when a request names no limit, milliseconds.
pub const DEFAULT_WARM_UP_MS: u64 = 120_000;
/// Longest limit of a warm-up, milliseconds.
pub const MAX_WARM_UP_MS: u64 = 3_600_000;

/// Body of `POST /v1/templates`. Building one that is there already, unchanged, costs nothing; one whose kernel, image,
/// warm-up, processors or memory changed is built again and takes the old one's place.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateTemplate {
    /// Name.
    pub name: AgentName,
    /// Image to boot.
    pub image: ImageName,
    /// Virtual processors, 1 to 32.
    #[serde(default = "vcpus")]
    pub vcpus: u32,
    /// Memory in MiB.
    #[serde(default = "memory_mib")]
    pub memory_mib: u64,
    /// Code for the image's evaluator to run before the template is frozen, for example imports.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub warm: Option<String>,
    /// Model that the template serves: it is the second disk, and loaded before the template is frozen. Instead of `warm`, with
    /// an image that has `ark-inference`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<ModelName>,
    /// Time that the warm-up, or loading the model, has, milliseconds.
    #[serde(default = "warm_up_ms")]
    pub timeout_ms: u64,
}

const fn vcpus() -> u32 {
    DEFAULT_VCPUS
}

const fn memory_mib() -> u64 {
    DEFAULT_MEMORY_MIB
}

const fn warm_up_ms() -> u64 {
    DEFAULT_WARM_UP_MS
}

/// A template that agents can be forked from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Template {
    /// Name; `default-<image>` for the one that an image has by itself.
    pub name: AgentName,
    /// Image that it was booted from.
    pub image: ImageName,
    /// What it was built of: `sha256:` over the digests of kernel, first root file system, image and model, the warm-up, processors and
    /// memory.
    pub digest: String,
    /// Virtual processors.
    pub vcpus: u32,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Its warm-up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub warm: Option<String>,
    /// The model that it serves.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<ModelName>,
    /// Bytes of memory that its snapshot holds.
    pub bytes: u64,
    /// Time that boot, warm-up and snapshot took, milliseconds.
    pub build_ms: u64,
    /// When it was built, milliseconds since the Unix epoch.
    pub created_unix_ms: u64,
    /// When an agent was last forked from it, milliseconds since the Unix epoch.
    pub used_unix_ms: u64,
    /// Living agents that were forked from it.
    pub agents: u32,
}

/// Reply of `GET /v1/templates`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TemplateList {
    /// Templates, by name.
    pub templates: Vec<Template>,
}
