//! Models: language models in GGUF files, served by VMs that only do that.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::agent::is_label;

/// Longest name of a model, bytes: that of its service has `model-` before it, see [`crate::service::MAX_SERVICE_NAME`].
pub const MAX_MODEL_NAME: usize = 48;
/// Largest model file, bytes: 64 GiB.
pub const MAX_MODEL_BYTES: u64 = 64 << 30;
/// Longest context that a model can be served with, tokens.
pub const MAX_CONTEXT: u64 = 1 << 20;
/// Context that a model is served with where nobody says and it was trained for as much, tokens.
pub const DEFAULT_CONTEXT: u64 = 4096;
/// What the names of the models' own templates and services begin with.
pub const MODEL_PREFIX: &str = "model-";

/// Name of a model: an RFC 1123 label in lower case, like [`crate::image::ImageName`], of at most 48 characters.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
#[serde(try_from = "String", into = "String")]
#[schema(value_type = String, pattern = "^[a-z0-9]([a-z0-9-]{0,46}[a-z0-9])?$", example = "router")]
pub struct ModelName(String);

/// A text that cannot be a model's name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is not a model's name: use 1 to {MAX_MODEL_NAME} of a-z, 0-9 and '-', beginning and ending with a letter or digit"
)]
pub struct InvalidModelName(String);

impl TryFrom<String> for ModelName {
    type Error = InvalidModelName;
    fn try_from(text: String) -> Result<Self, InvalidModelName> {
        if is_label(&text) && text.len() <= MAX_MODEL_NAME {
            Ok(Self(text))
        } else {
            Err(InvalidModelName(text))
        }
    }
}

impl FromStr for ModelName {
    type Err = InvalidModelName;
    fn from_str(text: &str) -> Result<Self, InvalidModelName> {
        text.to_owned().try_into()
    }
}

impl From<ModelName> for String {
    fn from(name: ModelName) -> String {
        name.0
    }
}

impl AsRef<str> for ModelName {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ModelName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

/// A model that is there, in the form that `OpenAI` clients read, with what else is known of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Model {
    /// Its name.
    pub id: ModelName,
    /// `model`.
    pub object: String,
    /// When it was added, seconds since the Unix epoch.
    pub created: u64,
    /// Who brought it: `ark` for one that comes with the release, else `user`.
    pub owned_by: String,
    /// Size of its file, bytes.
    pub bytes: u64,
    /// `sha256:` and 64 hexadecimal digits over its file.
    pub digest: String,
    /// Architecture that its file names, `llama` for example.
    pub architecture: String,
    /// Parameters.
    pub parameters: u64,
    /// Longest prompt and reply together that it is served with, tokens.
    pub context: u64,
    /// Memory of each VM that serves it, MiB.
    pub memory_mib: u64,
    /// Whether it comes with the release, and cannot be removed.
    pub bundled: bool,
    /// Whether it is served.
    pub state: ModelState,
}

/// Whether a model is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ModelState {
    /// No VM serves it: the next call has one made.
    Idle,
    /// A VM that serves it is being made.
    Loading,
    /// A VM serves it.
    Ready,
}

impl fmt::Display for ModelState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Idle => "idle",
            Self::Loading => "loading",
            Self::Ready => "ready",
        })
    }
}

/// Reply of `GET /v1/models`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ModelList {
    /// `list`.
    pub object: String,
    /// Models, by name.
    pub data: Vec<Model>,
}

impl ModelList {
    /// A list of `models`.
    #[must_use]
    pub fn new(models: Vec<Model>) -> Self {
        Self { object: "list".to_owned(), data: models }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::service::MAX_SERVICE_NAME;

    #[test]
    fn a_models_name_makes_the_name_of_a_service() {
        assert!("qwen2-0-5b".parse::<ModelName>().is_ok());
        assert_eq!(MODEL_PREFIX.len() + MAX_MODEL_NAME, MAX_SERVICE_NAME);
        let longest = "a".repeat(MAX_MODEL_NAME);
        assert!(longest.parse::<ModelName>().is_ok());
        for bad in ["", "Qwen", "qwen2.5", "../router", "-a", "a-", &format!("{longest}a")] {
            let error = bad.parse::<ModelName>().unwrap_err().to_string();
            assert!(error.contains("is not a model's name"), "{error}");
        }
    }
}
