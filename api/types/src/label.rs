//! Labels of things, who they belong to, and the selection of things by their labels.

use std::collections::BTreeMap;
use std::collections::btree_map;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::agent::is_label;

/// Most labels of one thing.
pub const MAX_LABELS: usize = 64;
/// Longest name in a key, bytes.
const MAX_KEY_NAME: usize = 63;
/// Longest prefix of a key, bytes.
const MAX_KEY_PREFIX: usize = 253;
/// Longest value, bytes.
const MAX_VALUE: usize = 255;
/// Longest selector, bytes.
const MAX_SELECTOR: usize = 4096;

/// Why labels are refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidLabel {
    /// Too many.
    #[error("{0} labels are too many: at most {MAX_LABELS}")]
    TooMany(usize),
    /// A key.
    #[error(
        "{0:?} is not a label's key: use 1 to 63 of a-z, A-Z, 0-9, '-', '_' and '.', beginning and ending with a letter or digit, after a domain and '/' where one is wanted"
    )]
    Key(String),
    /// A value.
    #[error(
        "{0:?} is not a label's value: use at most 255 of a-z, A-Z, 0-9, '-', '_' and '.', beginning and ending with a letter or digit"
    )]
    Value(String),
}

/// Whether `text` is of letters, digits and `-_.`, with a letter or digit first and last.
fn is_word(text: &str) -> bool {
    let bytes = text.as_bytes();
    bytes.iter().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
        && bytes.first().is_some_and(u8::is_ascii_alphanumeric)
        && bytes.last().is_some_and(u8::is_ascii_alphanumeric)
}

fn check_key(key: &str) -> Result<(), InvalidLabel> {
    let (prefix, name) = key.split_once('/').map_or((None, key), |(prefix, name)| (Some(prefix), name));
    let is_domain = |prefix: &str| prefix.len() <= MAX_KEY_PREFIX && prefix.split('.').all(is_label);
    if prefix.is_none_or(is_domain) && name.len() <= MAX_KEY_NAME && is_word(name) {
        return Ok(());
    }
    Err(InvalidLabel::Key(key.to_owned()))
}

fn check_value(value: &str) -> Result<(), InvalidLabel> {
    if value.is_empty() || (value.len() <= MAX_VALUE && is_word(value)) {
        return Ok(());
    }
    Err(InvalidLabel::Value(value.to_owned()))
}

/// Labels: at most 64 keys with a value each.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(try_from = "BTreeMap<String, String>", into = "BTreeMap<String, String>")]
#[schema(value_type = BTreeMap<String, String>, example = json!({ "app": "shop", "tier": "web" }))]
pub struct Labels(BTreeMap<String, String>);

impl Labels {
    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The value of `key`.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key).map(String::as_str)
    }

    /// These labels as `patch` changes them.
    ///
    /// # Errors
    /// [`InvalidLabel`] when they would be none that a thing may have.
    pub fn patched(&self, patch: &LabelPatch) -> Result<Self, InvalidLabel> {
        let mut labels = self.0.clone();
        for (key, value) in &patch.labels {
            match value {
                Some(value) => drop(labels.insert(key.clone(), value.clone())),
                None => drop(labels.remove(key)),
            }
        }
        labels.try_into()
    }

    /// Keys and values, by key.
    pub fn iter(&self) -> btree_map::Iter<'_, String, String> {
        self.0.iter()
    }
}

impl<'a> IntoIterator for &'a Labels {
    type Item = (&'a String, &'a String);
    type IntoIter = btree_map::Iter<'a, String, String>;
    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

impl TryFrom<BTreeMap<String, String>> for Labels {
    type Error = InvalidLabel;
    fn try_from(labels: BTreeMap<String, String>) -> Result<Self, InvalidLabel> {
        if labels.len() > MAX_LABELS {
            return Err(InvalidLabel::TooMany(labels.len()));
        }
        for (key, value) in &labels {
            check_key(key)?;
            check_value(value)?;
        }
        Ok(Self(labels))
    }
}

impl From<Labels> for BTreeMap<String, String> {
    fn from(labels: Labels) -> Self {
        labels.0
    }
}

/// Body of `PATCH /v1/agents/{agent}`, a JSON merge patch (RFC 7396).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct LabelPatch {
    /// Labels to set, or with `null` to remove; others stay.
    #[schema(example = json!({ "tier": "web", "old": null }))]
    pub labels: BTreeMap<String, Option<String>>,
}

/// Who something belongs to: 1 to 63 characters of `a-z`, `0-9` and `-`; `default` when nobody is named.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
#[serde(try_from = "String", into = "String")]
#[schema(value_type = String, pattern = "^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$", example = "default")]
pub struct Owner(String);

/// A text that cannot be an owner's name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is not an owner's name: use 1 to 63 of a-z, 0-9 and '-', beginning and ending with a letter or digit"
)]
pub struct InvalidOwner(String);

impl Default for Owner {
    fn default() -> Self {
        Self("default".to_owned())
    }
}

impl Owner {
    /// Whether nobody was named.
    #[must_use]
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

impl TryFrom<String> for Owner {
    type Error = InvalidOwner;
    fn try_from(text: String) -> Result<Self, InvalidOwner> {
        if is_label(&text) { Ok(Self(text)) } else { Err(InvalidOwner(text)) }
    }
}

impl FromStr for Owner {
    type Err = InvalidOwner;
    fn from_str(text: &str) -> Result<Self, InvalidOwner> {
        text.to_owned().try_into()
    }
}

impl From<Owner> for String {
    fn from(owner: Owner) -> Self {
        owner.0
    }
}

impl AsRef<str> for Owner {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

/// One condition of a [`Selector`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Requirement {
    /// `key=value`, `key in (a,b)`: the key has one of these values.
    In(String, Vec<String>),
    /// `key!=value`, `key notin (a,b)`: the key has none of these values, or is not there.
    NotIn(String, Vec<String>),
    /// `key`: the key is there.
    Exists(String),
    /// `!key`: the key is not there.
    Absent(String),
}

impl Requirement {
    /// Whether `labels` meet it.
    #[must_use]
    pub fn is_met_by(&self, labels: &Labels) -> bool {
        let one_of = |key: &str, values: &[String]| {
            labels.get(key).is_some_and(|value| values.iter().any(|wanted| wanted == value))
        };
        match self {
            Self::In(key, values) => one_of(key, values),
            Self::NotIn(key, values) => !one_of(key, values),
            Self::Exists(key) => labels.get(key).is_some(),
            Self::Absent(key) => labels.get(key).is_none(),
        }
    }
}

impl fmt::Display for Requirement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::In(key, values) => match values.as_slice() {
                [value] => write!(f, "{key}={value}"),
                _ => write!(f, "{key} in ({})", values.join(",")),
            },
            Self::NotIn(key, values) => match values.as_slice() {
                [value] => write!(f, "{key}!={value}"),
                _ => write!(f, "{key} notin ({})", values.join(",")),
            },
            Self::Exists(key) => f.write_str(key),
            Self::Absent(key) => write!(f, "!{key}"),
        }
    }
}

/// Conditions on labels that must all be met, in the syntax of Kubernetes: `app=x,tier!=db,env in (a,b),key,!key`. The empty
/// text selects everything.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selector(Vec<Requirement>);

/// Why a selector is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidSelector {
    /// It is too long.
    #[error("a selector of {0} bytes is too long: at most {MAX_SELECTOR}")]
    TooLong(usize),
    /// A key or value.
    #[error("the selector cannot be used: {0}")]
    Label(#[from] InvalidLabel),
    /// Something is wrong with its form.
    #[error(
        "the selector cannot be understood at {at:?}: write conditions such as app=x,tier!=db,env in (a,b),env notin (a,b),key,!key"
    )]
    Form {
        /// What is left from there on.
        at: String,
    },
}

impl Selector {
    /// The conditions.
    #[must_use]
    pub fn requirements(&self) -> &[Requirement] {
        &self.0
    }

    /// Whether `labels` meet every condition.
    #[must_use]
    pub fn selects(&self, labels: &Labels) -> bool {
        self.0.iter().all(|requirement| requirement.is_met_by(labels))
    }
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, requirement) in self.0.iter().enumerate() {
            let comma = if at == 0 { "" } else { "," };
            write!(f, "{comma}{requirement}")?;
        }
        Ok(())
    }
}

impl FromStr for Selector {
    type Err = InvalidSelector;
    fn from_str(text: &str) -> Result<Self, InvalidSelector> {
        if text.len() > MAX_SELECTOR {
            return Err(InvalidSelector::TooLong(text.len()));
        }
        let mut rest = Rest(text.trim());
        let mut requirements = Vec::new();
        if rest.0.is_empty() {
            return Ok(Self(requirements));
        }
        loop {
            requirements.push(rest.requirement()?);
            if rest.0.is_empty() {
                return Ok(Self(requirements));
            }
            if !rest.eat(",") {
                return Err(rest.wrong());
            }
        }
    }
}

/// What of a selector is still to be read; no blanks at its beginning.
struct Rest<'a>(&'a str);

impl<'a> Rest<'a> {
    fn wrong(&self) -> InvalidSelector {
        InvalidSelector::Form { at: self.0.to_owned() }
    }

    fn eat(&mut self, token: &str) -> bool {
        let Some(rest) = self.0.strip_prefix(token) else { return false };
        self.0 = rest.trim_start();
        true
    }

    /// The longest run of what keys and values are made of, and then some: what is no key is refused as one, by name.
    fn word(&mut self) -> &'a str {
        let ends = |c: char| c.is_whitespace() || matches!(c, ',' | '=' | '!' | '(' | ')');
        let (word, rest) = self.0.split_at(self.0.find(ends).unwrap_or(self.0.len()));
        self.0 = rest.trim_start();
        word
    }

    fn key(&mut self) -> Result<String, InvalidSelector> {
        let before = self.wrong();
        let key = self.word();
        if key.is_empty() {
            return Err(before);
        }
        check_key(key)?;
        Ok(key.to_owned())
    }

    fn value(&mut self) -> Result<String, InvalidSelector> {
        let value = self.word();
        check_value(value)?;
        Ok(value.to_owned())
    }

    fn requirement(&mut self) -> Result<Requirement, InvalidSelector> {
        if self.eat("!") {
            return Ok(Requirement::Absent(self.key()?));
        }
        let key = self.key()?;
        if self.0.is_empty() || self.0.starts_with(',') {
            return Ok(Requirement::Exists(key));
        }
        if self.eat("!=") {
            return Ok(Requirement::NotIn(key, vec![self.value()?]));
        }
        if self.eat("==") || self.eat("=") {
            return Ok(Requirement::In(key, vec![self.value()?]));
        }
        let before = self.wrong();
        match self.word() {
            "in" => Ok(Requirement::In(key, self.values()?)),
            "notin" => Ok(Requirement::NotIn(key, self.values()?)),
            _ => Err(before),
        }
    }

    fn values(&mut self) -> Result<Vec<String>, InvalidSelector> {
        if !self.eat("(") {
            return Err(self.wrong());
        }
        let mut values = Vec::new();
        loop {
            values.push(self.value()?);
            if self.eat(")") {
                return Ok(values);
            }
            if !self.eat(",") {
                return Err(self.wrong());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn labels(pairs: &[(&str, &str)]) -> Labels {
        let pairs = pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
        pairs.collect::<BTreeMap<_, _>>().try_into().unwrap()
    }

    #[test]
    fn selectors_select_as_kubernetes_says() {
        let shop = labels(&[("app", "shop"), ("tier", "web"), ("ark.dev/env", "a"), ("empty", "")]);
        for (text, selects) in [
            ("", true),
            ("app=shop", true),
            (" app == shop , tier != db ", true),
            ("app=shop,tier=db", false),
            ("ark.dev/env in (a,b)", true),
            ("ark.dev/env in(a, b)", true),
            ("ark.dev/env notin (a,b)", false),
            ("other notin (a,b)", true),
            ("other!=x", true),
            ("app,!other", true),
            ("!app", false),
            ("! other", true),
            ("other", false),
            ("empty=", true),
            ("app=", false),
            ("in in (in)", false),
        ] {
            assert_eq!(text.parse::<Selector>().unwrap().selects(&shop), selects, "{text}");
        }
    }

    #[test]
    fn a_bad_selector_is_told_where_it_is_bad() {
        for (text, said) in [
            (",", "\",\""),
            ("app=x,", "\"\""),
            ("app x", "\"x\""),
            ("app in a", "\"a\""),
            ("app in (a", "\"\""),
            ("app in (a b)", "\"b)\""),
            ("app=x y", "\"y\""),
            ("app=x=y", "\"=y\""),
            ("-app", "\"-app\" is not a label's key"),
            ("Bad_Prefix/app", "\"Bad_Prefix/app\" is not a label's key"),
            ("app=x+y", "\"x+y\" is not a label's value"),
            ("!", "\"\""),
        ] {
            let error = text.parse::<Selector>().unwrap_err().to_string();
            assert!(error.contains(said), "{text}: {error}");
        }
        assert_eq!(
            "x".repeat(MAX_SELECTOR + 1).parse::<Selector>(),
            Err(InvalidSelector::TooLong(MAX_SELECTOR + 1))
        );
    }

    #[test]
    fn labels_have_bounds() {
        let one = |key: &str, value: &str| {
            Labels::try_from(BTreeMap::from([(key.to_owned(), value.to_owned())])).map(|_| ())
        };
        let (longest, longer) = ("k".repeat(63), "k".repeat(64));
        for key in ["a", "A.b_c-d", "a.b-c/D", &longest] {
            assert_eq!(one(key, "v"), Ok(()));
        }
        for key in ["", "a/", "/a", "a/b/c", "a b", ".a", "a-", &longer, "\u{e9}"] {
            assert_eq!(one(key, "v"), Err(InvalidLabel::Key(key.to_owned())));
        }
        for value in ["", "V.1_2-3", &"v".repeat(255)] {
            assert_eq!(one("a", value), Ok(()));
        }
        for value in ["a b", "-a", "a\n", &"v".repeat(256)] {
            assert_eq!(one("a", value), Err(InvalidLabel::Value(value.to_owned())));
        }
        let many = (0..=MAX_LABELS).map(|n| (format!("k{n}"), String::new())).collect::<BTreeMap<_, _>>();
        assert_eq!(Labels::try_from(many), Err(InvalidLabel::TooMany(MAX_LABELS + 1)));
        assert_eq!(
            serde_json::from_str::<Owner>("\"UPPER\"").unwrap_err().to_string().find("\"UPPER\""),
            Some(0)
        );
    }

    fn word() -> impl Strategy<Value = String> {
        "[a-z0-9]([A-Za-z0-9._-]{0,8}[a-z0-9])?"
    }

    fn requirement() -> impl Strategy<Value = Requirement> {
        let key = ("([a-z]{1,4}\\.[a-z]{1,4}/)?", word()).prop_map(|(prefix, name)| prefix + &name);
        let values = prop::collection::vec(prop_oneof![Just(String::new()), word()], 1..4);
        (key, values, 0..4).prop_map(|(key, values, kind)| match kind {
            0 => Requirement::In(key, values),
            1 => Requirement::NotIn(key, values),
            2 => Requirement::Exists(key),
            _ => Requirement::Absent(key),
        })
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_back(requirements in prop::collection::vec(requirement(), 0..6)) {
            let selector = Selector(requirements);
            prop_assert_eq!(selector.to_string().parse::<Selector>().unwrap(), selector);
        }

        #[test]
        fn any_text_is_read_or_refused(text in "[a-z=!(), \\PC]{0,40}") {
            if let Ok(selector) = text.parse::<Selector>() {
                prop_assert_eq!(selector.to_string().parse::<Selector>().unwrap(), selector);
            }
        }

        #[test]
        fn opposites_select_the_opposite(key in word(), values in prop::collection::vec(word(), 1..4), has: bool, value in word()) {
            let some = if has { labels(&[(&key, &value)]) } else { Labels::default() };
            let of = |requirement: Requirement| requirement.is_met_by(&some);
            prop_assert_ne!(of(Requirement::In(key.clone(), values.clone())), of(Requirement::NotIn(key.clone(), values)));
            prop_assert_ne!(of(Requirement::Exists(key.clone())), of(Requirement::Absent(key)));
        }
    }
}
