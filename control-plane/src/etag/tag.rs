//! Tags and conditions over them. Nothing here does I/O.

use std::collections::BTreeMap;
use std::fmt;
use std::fmt::Write as _;

use axum::http::{HeaderMap, HeaderName, HeaderValue};
use serde_json::Value;
use sha2::{Digest as _, Sha256};

/// Members of a thing's representation that are measured, at this moment: they are no part of what its tag stands for.
pub const MEASURED: [&str; 9] =
    ["conditions", "demand_per_s", "heartbeat", "hits", "make_ms", "misses", "reserved", "wait", "waiting"];
/// Member of each replica of a service that is measured, too.
const MEASURED_OF_REPLICAS: &str = "load";
/// Bytes of the digest that a tag shows.
const SHOWN: usize = 16;

/// The tag of a representation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ETag(String);

impl ETag {
    /// Of a representation as JSON; none when it is no object.
    #[must_use]
    pub fn of(json: &[u8]) -> Option<Self> {
        let mut thing: BTreeMap<String, Value> = serde_json::from_slice(json).ok()?;
        thing.retain(|member, _| !MEASURED.contains(&member.as_str()));
        let replicas = thing.get_mut("replicas").and_then(Value::as_array_mut);
        for replica in replicas.into_iter().flatten().filter_map(Value::as_object_mut) {
            replica.remove(MEASURED_OF_REPLICAS);
        }
        // Members are in order, so that equal things have equal texts.
        let text = serde_json::to_vec(&thing).ok()?;
        let mut tag = String::from("\"");
        for byte in Sha256::digest(text).iter().take(SHOWN) {
            // Writing to a String cannot fail.
            let _ = write!(tag, "{byte:02x}");
        }
        tag.push('"');
        Some(Self(tag))
    }

    /// As the value of a header.
    #[must_use]
    pub fn to_header(&self) -> HeaderValue {
        HeaderValue::from_str(&self.0).unwrap_or_else(|_| HeaderValue::from_static("\"\""))
    }
}

impl fmt::Display for ETag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What `If-Match` or `If-None-Match` lists (RFC 9110, section 13.1).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Condition {
    /// `*`: whatever there is.
    Any,
    /// These tags, in their quotes; weak ones with their `W/`.
    Tags(Vec<String>),
}

impl Condition {
    /// What the header `name` lists, if it is there. What is no tag is kept and matches nothing.
    #[must_use]
    pub fn of(headers: &HeaderMap, name: &HeaderName) -> Option<Self> {
        let mut tags = Vec::new();
        let mut values = headers.get_all(name).iter().peekable();
        values.peek()?;
        for value in values {
            let listed = String::from_utf8_lossy(value.as_bytes()).into_owned();
            tags.extend(listed.split(',').map(|tag| tag.trim().to_owned()));
        }
        Some(if tags == ["*"] { Self::Any } else { Self::Tags(tags) })
    }

    /// Whether a thing with `tag` is among them, compared strongly: a weak one is not.
    #[must_use]
    pub fn matches(&self, tag: &ETag) -> bool {
        match self {
            Self::Any => true,
            Self::Tags(tags) => tags.contains(&tag.0),
        }
    }

    /// Whether a thing with `tag` is among them, compared weakly: `W/` makes no difference.
    #[must_use]
    pub fn matches_weakly(&self, tag: &ETag) -> bool {
        match self {
            Self::Any => true,
            Self::Tags(tags) => {
                tags.iter().any(|listed| listed.strip_prefix("W/").unwrap_or(listed) == tag.0)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use axum::http::header::IF_MATCH;
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn tag(thing: &Value) -> ETag {
        ETag::of(thing.to_string().as_bytes()).unwrap()
    }

    fn condition(values: &[&str]) -> Option<Condition> {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(IF_MATCH, value.parse().unwrap());
        }
        Condition::of(&headers, &IF_MATCH)
    }

    #[test]
    fn what_is_measured_and_the_order_of_members_change_no_tag() {
        let thing = tag(&json!({ "id": "a", "labels": {} }));
        assert_eq!(
            thing,
            tag(&json!({ "id": "a", "labels": {}, "heartbeat": { "count": 7 }, "reserved": 1 }))
        );
        assert_eq!(Some(thing.clone()), ETag::of(b"{ \"labels\": {}, \"id\": \"a\" }"));
        assert_ne!(thing, tag(&json!({ "id": "a", "labels": { "heartbeat": "x" } })));
        assert_eq!(ETag::of(b"[]"), None);
        assert_eq!(ETag::of(b""), None);
    }

    #[test]
    fn conditions_are_lists_or_a_star() {
        let (one, other) = (tag(&json!({ "n": 1 })), tag(&json!({ "n": 2 })));
        assert_eq!(condition(&[]), None);
        assert_eq!(condition(&["*"]), Some(Condition::Any));
        let both = condition(&[&format!("{other} , {one}")]).unwrap();
        assert!(both.matches(&one) && both.matches(&other));
        let lines = condition(&[&other.to_string(), &one.to_string()]).unwrap();
        assert!(lines.matches(&one));
        let weak = condition(&[&format!("W/{one}")]).unwrap();
        assert!(!weak.matches(&one) && weak.matches_weakly(&one) && !weak.matches_weakly(&other));
        assert!(!condition(&["nonsense,,*"]).unwrap().matches(&one));
    }

    proptest! {
        #[test]
        fn a_tag_changes_with_any_member(a in any::<(u64, String)>(), b in any::<(u64, String)>()) {
            let thing = |(n, text): &(u64, String)| tag(&json!({ "n": n, "text": text }));
            prop_assert_eq!(thing(&a) == thing(&b), a == b);
        }
    }
}
