//! Models that inference VMs serve.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::agent::{InvalidName, is_label};

/// Name of a model: an RFC 1123 label in lower case, like [`crate::image::ImageName`].
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
#[serde(try_from = "String", into = "String")]
#[schema(value_type = String, pattern = "^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$", example = "router")]
pub struct ModelName(String);

impl TryFrom<String> for ModelName {
    type Error = InvalidName;
    fn try_from(text: String) -> Result<Self, InvalidName> {
        if is_label(&text) { Ok(Self(text)) } else { Err(InvalidName(text)) }
    }
}

impl FromStr for ModelName {
    type Err = InvalidName;
    fn from_str(text: &str) -> Result<Self, InvalidName> {
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
