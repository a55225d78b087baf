//! What an agent may use of the platform: nothing but what its creator allows.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use utoipa::openapi::schema::{ObjectBuilder, Type};
use utoipa::openapi::{RefOr, Schema};
use utoipa::{PartialSchema, ToSchema};

use crate::model::ModelName;

/// Most permissions of one agent.
pub const MAX_PERMISSIONS: usize = 64;

/// A permission: `inference` for every model, `inference=<model>` for one.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Permission {
    /// To have models say something: all of them, or the one that is named.
    Inference(Option<ModelName>),
}

impl ToSchema for Permission {}

impl PartialSchema for Permission {
    fn schema() -> RefOr<Schema> {
        ObjectBuilder::new()
            .schema_type(Type::String)
            .description(Some("A permission: `inference` for every model, `inference=<model>` for one."))
            .pattern(Some("^inference(=[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)?$"))
            .examples(["inference=router"])
            .into()
    }
}

/// A text that is no permission.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} cannot be allowed: there is `inference`, and `inference=MODEL` for one model alone")]
pub struct InvalidPermission(String);

impl FromStr for Permission {
    type Err = InvalidPermission;
    fn from_str(text: &str) -> Result<Self, InvalidPermission> {
        let invalid = || InvalidPermission(text.chars().take(100).collect());
        let (what, model) = text.split_once('=').map_or((text, None), |(what, model)| (what, Some(model)));
        match what {
            "inference" => Ok(Self::Inference(model.map(str::parse).transpose().map_err(|_| invalid())?)),
            _ => Err(invalid()),
        }
    }
}

impl TryFrom<String> for Permission {
    type Error = InvalidPermission;
    fn try_from(text: String) -> Result<Self, InvalidPermission> {
        text.parse()
    }
}

impl From<Permission> for String {
    fn from(permission: Permission) -> Self {
        permission.to_string()
    }
}

impl fmt::Display for Permission {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Inference(None) => f.write_str("inference"),
            Self::Inference(Some(model)) => write!(f, "inference={model}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_permission_is_read_as_it_is_written() {
        for text in ["inference", "inference=router", "inference=qwen-2"] {
            assert_eq!(text.parse::<Permission>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn what_is_no_permission_is_refused_with_what_there_is() {
        for text in
            ["", "all", "inference=", "inference=A", "inference=a=b", "Inference", " inference", "network"]
        {
            let why = text.parse::<Permission>().unwrap_err().to_string();
            assert!(why.contains("inference=MODEL"), "{why}");
        }
        assert!("x".repeat(1 << 20).parse::<Permission>().unwrap_err().to_string().len() < 300);
    }
}
