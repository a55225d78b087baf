//! Images: read-only erofs file systems an agent boots from.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::agent::{InvalidName, is_label};

/// Name of an image: an RFC 1123 label in lower case, like [`crate::agent::AgentName`].
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
#[serde(try_from = "String", into = "String")]
#[schema(value_type = String, pattern = "^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$", example = "python")]
pub struct ImageName(String);

impl TryFrom<String> for ImageName {
    type Error = InvalidName;
    fn try_from(text: String) -> Result<Self, InvalidName> {
        if is_label(&text) { Ok(Self(text)) } else { Err(InvalidName(text)) }
    }
}

impl FromStr for ImageName {
    type Err = InvalidName;
    fn from_str(text: &str) -> Result<Self, InvalidName> {
        text.to_owned().try_into()
    }
}

impl From<ImageName> for String {
    fn from(name: ImageName) -> String {
        name.0
    }
}

impl AsRef<str> for ImageName {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ImageName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

/// Manifest beside an image file: `images/<name>.json` describes `images/<name>.erofs`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ImageManifest {
    /// Version of this format: 1.
    pub manifest_version: u32,
    /// Name users type after `--image`.
    pub name: ImageName,
    /// `sha256:` and 64 hexadecimal digits over the whole image file.
    pub digest: String,
    /// Size of the image file, bytes.
    pub size: u64,
    /// One line on what is inside.
    pub description: String,
    /// What it was built from: packages as `name=version`, or source digests.
    pub built_from: Vec<String>,
    /// Build time, seconds since the Unix epoch.
    pub created_unix: u64,
}

/// Reply of `GET /v1/images`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ImageList {
    /// Images, by name.
    pub images: Vec<ImageManifest>,
}
