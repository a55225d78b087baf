//! Keys and requests, each as a digest: neither is kept as it came.

use std::fmt;

use ark_types::idempotency::{IDEMPOTENCY_KEY, MAX_KEY};
use axum::http::HeaderMap;
use sha2::{Digest as _, Sha256};

/// A header that is no key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidKey {
    /// There are several.
    #[error("there is more than one {IDEMPOTENCY_KEY} header: send one")]
    Several,
    /// It has characters that a key may not have, or too few or too many.
    #[error(
        "the {IDEMPOTENCY_KEY} header is no key: send 1 to {MAX_KEY} printable ASCII characters, such as a random UUID"
    )]
    Text,
}

macro_rules! digest {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub struct $name([u8; 32]);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
            }
        }
    };
}

digest! {
    /// A key.
    KeyDigest
}

digest! {
    /// What is asked for.
    RequestDigest
}

impl KeyDigest {
    /// The key in `headers`, if there is one. The draft has it in quotes; many clients send it without, which is the same key.
    ///
    /// # Errors
    /// [`InvalidKey`].
    pub fn of(headers: &HeaderMap) -> Result<Option<Self>, InvalidKey> {
        let mut values = headers.get_all(IDEMPOTENCY_KEY).iter();
        let Some(value) = values.next() else { return Ok(None) };
        if values.next().is_some() {
            return Err(InvalidKey::Several);
        }
        let text = value.to_str().map_err(|_| InvalidKey::Text)?.trim();
        let key = text.strip_prefix('"').and_then(|text| text.strip_suffix('"')).unwrap_or(text);
        let is_printable = key.bytes().all(|byte| matches!(byte, b' '..=b'~'));
        if key.is_empty() || key.len() > MAX_KEY || !is_printable {
            return Err(InvalidKey::Text);
        }
        Ok(Some(Self(Sha256::digest(key).into())))
    }
}

impl RequestDigest {
    /// Of the request for `target`, path and query, with `body`.
    #[must_use]
    pub fn of(method: &str, target: &str, body: &[u8]) -> Self {
        // Neither of the first two has a zero byte in it.
        let hash =
            Sha256::new().chain_update(method).chain_update([0]).chain_update(target).chain_update([0]);
        Self(hash.chain_update(body).finalize().into())
    }
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;

    fn key(values: &[&[u8]]) -> Result<Option<KeyDigest>, InvalidKey> {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(IDEMPOTENCY_KEY, HeaderValue::from_bytes(value).unwrap());
        }
        KeyDigest::of(&headers)
    }

    #[test]
    fn quotes_make_no_difference_and_what_is_no_key_is_refused() {
        assert_eq!(key(&[]), Ok(None));
        assert!(key(&[b"a"]).unwrap().is_some());
        assert_eq!(key(&[b"a"]), key(&[b" \"a\" "]));
        assert_ne!(key(&[b"a"]), key(&[b"b"]));
        assert!(key(&["x".repeat(MAX_KEY).as_bytes()]).is_ok());
        for bad in [&b""[..], b"\"\"", b"a\tb", b"\xe9", "x".repeat(MAX_KEY + 1).as_bytes()] {
            assert_eq!(key(&[bad]), Err(InvalidKey::Text), "{bad:?}");
        }
        assert_eq!(key(&[b"a", b"a"]), Err(InvalidKey::Several));
    }

    #[test]
    fn requests_differ_by_method_target_and_body() {
        let of = RequestDigest::of;
        let all =
            [of("POST", "/a", b""), of("PUT", "/a", b""), of("POST", "/ab", b""), of("POST", "/a", b"b")];
        for (at, one) in all.iter().enumerate() {
            assert!(all.iter().skip(at + 1).all(|other| other != one));
        }
        assert_eq!(of("POST", "/a", b"").to_string().len(), 64);
    }
}
