//! Values with bounds: one that is out of them does not come to be, and says what would do.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use tracing_subscriber::EnvFilter;

/// A number from `MIN` to `MAX`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "i64", into = "u64")]
pub struct Bounded<const MIN: u64, const MAX: u64>(u64);

/// A number outside its bounds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{number} is out of bounds: choose a number from {min} to {max}")]
pub struct OutOfBounds {
    number: i64,
    min: u64,
    max: u64,
}

impl<const MIN: u64, const MAX: u64> Bounded<MIN, MAX> {
    /// The default `number`, which has to be in bounds: checked when this is compiled in a constant.
    #[must_use]
    pub(super) const fn new(number: u64) -> Self {
        assert!(MIN <= number && number <= MAX);
        Self(number)
    }

    /// The number.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0
    }

    /// The number, as large as this machine can count.
    #[must_use]
    pub fn count(self) -> usize {
        usize::try_from(self.0).unwrap_or(usize::MAX)
    }
}

impl<const MIN: u64, const MAX: u64> TryFrom<i64> for Bounded<MIN, MAX> {
    type Error = OutOfBounds;
    fn try_from(number: i64) -> Result<Self, OutOfBounds> {
        match u64::try_from(number) {
            Ok(fits) if (MIN..=MAX).contains(&fits) => Ok(Self(fits)),
            _ => Err(OutOfBounds { number, min: MIN, max: MAX }),
        }
    }
}

impl<const MIN: u64, const MAX: u64> From<Bounded<MIN, MAX>> for u64 {
    fn from(bounded: Bounded<MIN, MAX>) -> Self {
        bounded.0
    }
}

/// Which messages are logged, in the words of [`EnvFilter`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Level(String);

/// A text that says no level.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{text:?} is no log level ({why}): use error, warn, info, debug, trace or off, or directives such as info,arkd::pool=debug"
)]
pub struct NoLevel {
    text: String,
    why: String,
}

impl Level {
    /// The filter that it stands for.
    #[must_use]
    pub fn filter(&self) -> EnvFilter {
        EnvFilter::new(&self.0)
    }
}

impl Default for Level {
    fn default() -> Self {
        Self("info".to_owned())
    }
}

impl TryFrom<String> for Level {
    type Error = NoLevel;
    fn try_from(text: String) -> Result<Self, NoLevel> {
        let wrong = |why: String| NoLevel { text: text.clone(), why };
        // A single word that is no level is a target to EnvFilter: here it is a slip.
        let is_level = |word: &str| word.parse::<tracing::level_filters::LevelFilter>().is_ok();
        if text.trim().is_empty() {
            return Err(wrong("it is empty".to_owned()));
        }
        if let Some(word) = text.split(',').map(str::trim).find(|part| !part.contains('=') && !is_level(part))
        {
            return Err(wrong(format!("{word:?} is none")));
        }
        EnvFilter::try_new(&text).map_err(|e| wrong(e.to_string()))?;
        Ok(Self(text))
    }
}

impl From<Level> for String {
    fn from(level: Level) -> Self {
        level.0
    }
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A path from the root: `arkd`'s working directory is nobody's business.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "PathBuf", into = "PathBuf")]
pub struct AbsolutePath(PathBuf);

/// A path that depends on the working directory.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the path {0:?} is not absolute: begin it with '/'")]
pub struct NotAbsolute(PathBuf);

impl TryFrom<PathBuf> for AbsolutePath {
    type Error = NotAbsolute;
    fn try_from(path: PathBuf) -> Result<Self, NotAbsolute> {
        if path.is_absolute() { Ok(Self(path)) } else { Err(NotAbsolute(path)) }
    }
}

impl From<AbsolutePath> for PathBuf {
    fn from(path: AbsolutePath) -> Self {
        path.0
    }
}

impl AsRef<std::path::Path> for AbsolutePath {
    fn as_ref(&self) -> &std::path::Path {
        &self.0
    }
}

/// A part of something, from 0.0 to 1.0.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "f64", into = "f64")]
pub struct Ratio(f64);

// It never is NaN.
impl Eq for Ratio {}

/// A number that is no part.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
#[error("{0} is no part of something: choose a number from 0.0, none, to 1.0, all")]
pub struct NoRatio(f64);

impl Ratio {
    /// The number.
    #[must_use]
    pub const fn get(self) -> f64 {
        self.0
    }
}

impl Default for Ratio {
    fn default() -> Self {
        Self(1.0)
    }
}

impl TryFrom<f64> for Ratio {
    type Error = NoRatio;
    fn try_from(number: f64) -> Result<Self, NoRatio> {
        if (0.0..=1.0).contains(&number) { Ok(Self(number)) } else { Err(NoRatio(number)) }
    }
}

impl From<Ratio> for f64 {
    fn from(ratio: Ratio) -> Self {
        ratio.0
    }
}

/// How many times over something is had: a number from `LEAST` hundredths to 10000.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "f64", into = "f64")]
pub struct Factor<const LEAST: u32>(f64);

// It never is NaN.
impl<const LEAST: u32> Eq for Factor<LEAST> {}

/// A text or a number that is no factor.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{text} is no ratio: choose a number from {least} to {MAX_FACTOR}")]
pub struct NoFactor {
    text: String,
    least: f64,
}

/// Largest [`Factor`].
const MAX_FACTOR: f64 = 10_000.0;

impl<const LEAST: u32> Factor<LEAST> {
    const LEAST: f64 = LEAST as f64 / 100.0;

    /// The default `number`, which has to be in bounds: checked when this is compiled in a constant.
    #[must_use]
    pub(crate) const fn new(number: f64) -> Self {
        assert!(Self::LEAST <= number && number <= MAX_FACTOR);
        Self(number)
    }

    /// The number.
    #[must_use]
    pub const fn get(self) -> f64 {
        self.0
    }
}

impl<const LEAST: u32> TryFrom<f64> for Factor<LEAST> {
    type Error = NoFactor;
    fn try_from(number: f64) -> Result<Self, NoFactor> {
        if (Self::LEAST..=MAX_FACTOR).contains(&number) {
            Ok(Self(number))
        } else {
            Err(NoFactor { text: number.to_string(), least: Self::LEAST })
        }
    }
}

impl<const LEAST: u32> FromStr for Factor<LEAST> {
    type Err = NoFactor;
    fn from_str(text: &str) -> Result<Self, NoFactor> {
        let wrong = |_| NoFactor { text: format!("{text:?}"), least: Self::LEAST };
        Self::try_from(text.parse::<f64>().map_err(wrong)?)
    }
}

impl<const LEAST: u32> From<Factor<LEAST>> for f64 {
    fn from(factor: Factor<LEAST>) -> Self {
        factor.0
    }
}

/// Address of a collector: `http://host:port`, with a path before `/v1/traces` where it has one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Endpoint(String);

/// A text that is no such address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is no address of a collector: write it as http://host:4318; for https put a collector beside arkd that passes traces on"
)]
pub struct NoEndpoint(String);

impl Endpoint {
    /// Where traces are received.
    #[must_use]
    pub fn traces(&self) -> String {
        format!("{}/v1/traces", self.0.trim_end_matches('/'))
    }
}

impl TryFrom<String> for Endpoint {
    type Error = NoEndpoint;
    fn try_from(text: String) -> Result<Self, NoEndpoint> {
        let is_address = text.parse::<axum::http::Uri>().is_ok_and(|uri| {
            uri.scheme_str() == Some("http")
                && uri.host().is_some_and(|host| !host.is_empty())
                && uri.query().is_none()
        });
        if is_address { Ok(Self(text)) } else { Err(NoEndpoint(text)) }
    }
}

impl From<Endpoint> for String {
    fn from(endpoint: Endpoint) -> Self {
        endpoint.0
    }
}

/// Name of a metric's label, as Prometheus has them; none of those that `arkd` itself gives.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct LabelName(String);

/// Labels that `arkd`'s own series bear.
pub(crate) const OWN_LABELS: &[&str] = &[
    "agent", "counter", "device", "id", "kind", "le", "method", "model", "origin", "outcome", "owner",
    "phase", "reason", "result", "route", "service", "state", "status", "template", "tool", "version",
];

/// A text that cannot name a label.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} cannot name a label: use letters, digits and '_', no digit first, no \"__\" first, and none of arkd's own ({own})", own = OWN_LABELS.join(", "))]
pub struct NoLabelName(String);

impl TryFrom<String> for LabelName {
    type Error = NoLabelName;
    fn try_from(text: String) -> Result<Self, NoLabelName> {
        let inner = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
        let is_name = text.bytes().all(inner)
            && text.bytes().next().is_some_and(|b| !b.is_ascii_digit())
            && !text.starts_with("__")
            && !OWN_LABELS.contains(&text.as_str());
        if is_name { Ok(Self(text)) } else { Err(NoLabelName(text)) }
    }
}

impl From<LabelName> for String {
    fn from(name: LabelName) -> Self {
        name.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_paths_levels_and_labels_keep_their_bounds() {
        assert_eq!(Bounded::<1, 9>::try_from(9).unwrap().get(), 9);
        for number in [0, 10, -1] {
            let why = Bounded::<1, 9>::try_from(number).unwrap_err().to_string();
            assert_eq!(why, format!("{number} is out of bounds: choose a number from 1 to 9"));
        }
        assert!(AbsolutePath::try_from(PathBuf::from("/var/log/x")).is_ok());
        assert!(AbsolutePath::try_from(PathBuf::from("x")).is_err());
        for level in ["info", "WARN", "info,arkd::pool=debug", "off"] {
            assert!(Level::try_from(level.to_owned()).is_ok(), "{level}");
        }
        for level in ["", "loud", "info,loud", "arkd=loud"] {
            assert!(Level::try_from(level.to_owned()).is_err(), "{level}");
        }
        for (text, traces) in [
            ("http://127.0.0.1:4318", "http://127.0.0.1:4318/v1/traces"),
            ("http://otel/ark/", "http://otel/ark/v1/traces"),
        ] {
            assert_eq!(Endpoint::try_from(text.to_owned()).unwrap().traces(), traces);
        }
        for text in ["", "127.0.0.1:4318", "https://otel:4318", "http://", "http://otel?x"] {
            assert!(Endpoint::try_from(text.to_owned()).is_err(), "{text}");
        }
        assert!(Ratio::try_from(0.25).is_ok());
        for number in [-0.1, 1.1, f64::NAN] {
            assert!(Ratio::try_from(number).is_err(), "{number}");
        }
        for text in ["0.01", "8", "10000"] {
            assert!(text.parse::<Factor<1>>().is_ok(), "{text}");
        }
        for wrong in ["0", "-1", "NaN", "inf", "10001", "x", ""] {
            let why = wrong.parse::<Factor<1>>().unwrap_err().to_string();
            assert!(why.contains("is no ratio: choose a number from 0.01 to 10000"), "{wrong}: {why}");
        }
        assert!(Factor::<100>::try_from(0.5).is_err());
        for name in ["host", "_zone2"] {
            assert!(LabelName::try_from(name.to_owned()).is_ok(), "{name}");
        }
        for name in ["", "2x", "__x", "a-b", "agent"] {
            assert!(LabelName::try_from(name.to_owned()).is_err(), "{name}");
        }
    }
}
