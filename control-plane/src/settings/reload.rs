//! What changed between two settings, and which of it a running `arkd` can take over.

use toml::{Table, Value};

use serde::Deserialize as _;

use super::Settings;

/// Keys that a reload takes over; the others need a restart, because sockets, files and tasks were made with them.
pub const RELOADABLE: &[&str] = &[
    "pool.prepared",
    "pool.standby",
    "log.level",
    "log.max_size_mib",
    "log.keep",
    "log.consoles_keep",
    "log.consoles_max_mib",
    "telemetry.agent_series",
    "telemetry.labels",
];

/// A key whose value is another one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// `section.key`.
    pub key: String,
    /// Whether a running `arkd` takes it over.
    pub reloadable: bool,
}

/// What differs between `old` and `new`, by key.
#[must_use]
pub fn changes(old: &Settings, new: &Settings) -> Vec<Change> {
    let (old, new) = (keys(old), keys(new));
    let mut changed: Vec<&String> =
        old.keys().chain(new.keys()).filter(|key| old.get(*key) != new.get(*key)).collect();
    changed.sort();
    changed.dedup();
    let change = |key: &String| Change { key: key.clone(), reloadable: RELOADABLE.contains(&key.as_str()) };
    changed.into_iter().map(change).collect()
}

impl Settings {
    /// These settings with those of `running` where only a restart takes over others.
    #[must_use]
    pub fn with_unreloadable_of(self, running: &Self) -> Self {
        let (new, old) = (keys(&self), keys(running));
        let of = |key: &str| if RELOADABLE.contains(&key) { new.get(key) } else { old.get(key) };
        let mut sections = Table::new();
        for key in new.keys().chain(old.keys()) {
            if let (Some((section, name)), Some(value)) = (key.split_once('.'), of(key))
                && let Value::Table(values) = sections.entry(section).or_insert_with(|| Table::new().into())
            {
                values.insert(name.to_owned(), value.clone());
            }
        }
        // Each value was valid where it comes from.
        Self::deserialize(sections).unwrap_or(self)
    }
}

/// Every value that is set, as `section.key`.
fn keys(settings: &Settings) -> Table {
    // Settings are sections of plain values, which a table always takes.
    let sections = Table::try_from(settings).unwrap_or_default();
    let keys_of = |(section, values): (String, Value)| match values {
        Value::Table(values) => {
            values.into_iter().map(|(key, value)| (format!("{section}.{key}"), value)).collect()
        }
        value => vec![(section, value)],
    };
    sections.into_iter().flat_map(keys_of).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_are_named_and_told_apart() {
        let old = Settings::default();
        assert_eq!(changes(&old, &old), []);
        let new: Settings = toml::from_str(
            "[pool]\nstandby = 7\n[listen]\ntcp = \"127.0.0.1:1\"\n[telemetry.labels]\nzone = \"a\"\n",
        )
        .unwrap();
        let named = |(key, reloadable): (&str, bool)| Change { key: key.to_owned(), reloadable };
        let wanted = [("listen.tcp", false), ("pool.standby", true), ("telemetry.labels", true)].map(named);
        assert_eq!(changes(&old, &new), wanted);
        assert_eq!(changes(&new, &old), wanted, "what is set no more changed, too");
        let left = new.clone().with_unreloadable_of(&old);
        assert_eq!(changes(&left, &new), wanted[..1], "what needs a restart is told at every reload");
        assert_eq!(old.clone().with_unreloadable_of(&new).listen, new.listen);
    }
}
