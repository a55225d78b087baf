//! What events belong to.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::agent::AgentName;
use crate::label::Owner;

/// Longest text of a stream, bytes.
const MAX_STREAM: usize = 300;

/// What an event belongs to: `agent/<id>`, and likewise for everything else that lives.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
#[serde(try_from = "String", into = "String")]
#[schema(value_type = String, pattern = "^[a-z]+/[A-Za-z0-9._-]+$", example = "agent/0123456789abcdef")]
pub struct Stream(String);

/// A text that names no stream.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a stream: write its kind, '/' and its id, such as agent/0123456789abcdef")]
pub struct InvalidStream(String);

impl Stream {
    /// The stream of the agent `id`.
    #[must_use]
    pub fn agent(id: &str) -> Self {
        Self(format!("agent/{id}"))
    }

    /// The stream of `owner`.
    #[must_use]
    pub fn owner(owner: &Owner) -> Self {
        Self(format!("owner/{owner}"))
    }

    /// The stream of the request `id`, one that bore an `Idempotency-Key`.
    #[must_use]
    pub fn request(id: &str) -> Self {
        Self(format!("request/{id}"))
    }

    /// The id of the request that it is the stream of; none when it is that of something else.
    #[must_use]
    pub fn request_id(&self) -> Option<&str> {
        self.0.strip_prefix("request/")
    }

    /// The stream of the snapshot `name`.
    #[must_use]
    pub fn snapshot(name: &AgentName) -> Self {
        Self(format!("snapshot/{name}"))
    }

    /// The name of the snapshot that it is the stream of; none when it is that of something else.
    #[must_use]
    pub fn snapshot_name(&self) -> Option<&str> {
        self.0.strip_prefix("snapshot/")
    }

    /// The owner that it is the stream of; none when it is that of something else.
    #[must_use]
    pub fn owner_name(&self) -> Option<Owner> {
        self.0.strip_prefix("owner/")?.parse().ok()
    }

    /// The stream of the pool of `template`.
    #[must_use]
    pub fn pool(template: &AgentName) -> Self {
        Self(format!("pool/{template}"))
    }

    /// The template whose pool it is the stream of; none when it is that of something else.
    #[must_use]
    pub fn pool_template(&self) -> Option<AgentName> {
        self.0.strip_prefix("pool/")?.parse().ok()
    }

    /// The stream of the service `name`.
    #[must_use]
    pub fn service(name: &AgentName) -> Self {
        Self(format!("service/{name}"))
    }

    /// The service that it is the stream of; none when it is that of something else.
    #[must_use]
    pub fn service_name(&self) -> Option<AgentName> {
        self.0.strip_prefix("service/")?.parse().ok()
    }

    /// The stream of the task `id`.
    #[must_use]
    pub fn task(id: &str) -> Self {
        Self(format!("task/{id}"))
    }

    /// The id of the task that it is the stream of; none when it is that of something else.
    #[must_use]
    pub fn task_id(&self) -> Option<&str> {
        self.0.strip_prefix("task/")
    }

    /// The id of the agent that it is the stream of; none when it is that of something else.
    #[must_use]
    pub fn agent_id(&self) -> Option<&str> {
        self.0.strip_prefix("agent/")
    }
}

impl TryFrom<String> for Stream {
    type Error = InvalidStream;
    fn try_from(text: String) -> Result<Self, InvalidStream> {
        let is_name = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
        let is_valid = text.len() <= MAX_STREAM
            && text.split_once('/').is_some_and(|(kind, name)| {
                !kind.is_empty()
                    && kind.bytes().all(|b| b.is_ascii_lowercase())
                    && !name.is_empty()
                    && name.bytes().all(is_name)
            });
        if is_valid { Ok(Self(text)) } else { Err(InvalidStream(text)) }
    }
}

impl FromStr for Stream {
    type Err = InvalidStream;
    fn from_str(text: &str) -> Result<Self, InvalidStream> {
        text.to_owned().try_into()
    }
}

impl From<Stream> for String {
    fn from(stream: Stream) -> Self {
        stream.0
    }
}

impl AsRef<str> for Stream {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_have_a_kind_and_a_name() {
        assert_eq!(Stream::agent("0a").to_string().parse(), Ok(Stream::agent("0a")));
        assert_eq!(Stream::agent("0a").agent_id(), Some("0a"));
        let template: AgentName = "py".parse().unwrap();
        assert_eq!("pool/py".parse(), Ok(Stream::pool(&template)));
        assert_eq!(Stream::pool(&template).agent_id(), None);
        assert_eq!(Stream::pool(&template).pool_template(), Some(template));
        let owner: Owner = "team-a".parse().unwrap();
        assert_eq!(Stream::owner(&owner).to_string().parse(), Ok(Stream::owner(&owner)));
        assert_eq!(Stream::owner(&owner).owner_name(), Some(owner));
        assert_eq!((Stream::agent("0a").owner_name(), Stream::agent("0a").pool_template()), (None, None));
        let service: AgentName = "web".parse().unwrap();
        assert_eq!(Stream::service(&service).service_name(), Some(service));
        assert_eq!(Stream::agent("0a").service_name(), None);
        assert_eq!(Stream::agent("0a").owner_name(), None);
        assert_eq!((Stream::task("0a").task_id(), Stream::agent("0a").task_id()), (Some("0a"), None));
        for text in ["", "agent", "agent/", "/x", "Agent/x", "a/b/c", "agent/x y", "agent/\u{e9}"] {
            assert_eq!(text.parse::<Stream>(), Err(InvalidStream(text.to_owned())));
        }
        assert!(format!("agent/{}", "x".repeat(MAX_STREAM)).parse::<Stream>().is_err());
    }
}
