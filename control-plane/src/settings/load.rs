//! Where settings come from, and what is wrong with them: a file, a line, a column and a sentence.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use ark_types::plain::plain;
use serde::Deserialize as _;
use toml::{Table, Value};

use super::{AbsolutePath, Settings};
use crate::args::Args;

/// Variables that are short for others: they were there first.
const SHORT: [(&str, &str, &str); 3] =
    [("ARK_POOL", "pool", "prepared"), ("ARK_STANDBY", "pool", "standby"), ("RUST_LOG", "log", "level")];

/// Why there are no settings.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    /// The file cannot be read.
    #[error(
        "the configuration {path} cannot be read: {}; correct --config or ARK_CONFIG, or the file's mode",
        plain(source)
    )]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Something in the file.
    #[error("{path}, line {line}, column {column}: {why}; `arkd --print-default-config` explains every key")]
    File {
        /// The file.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
        /// Column, from 1.
        column: usize,
        /// What is wrong.
        why: String,
    },
    /// A variable.
    #[error("the environment variable {name} cannot be used: {why}; correct it or unset it")]
    Variable {
        /// The variable.
        name: String,
        /// What is wrong.
        why: String,
    },
    /// Values that are in order one by one, and not together.
    #[error(
        "[inference] replicas_min is {min} and replicas_max {max}, but no model can have so few at most and so many at least: lower the one, or raise the other"
    )]
    Replicas {
        /// `replicas_min`.
        min: u64,
        /// `replicas_max`.
        max: u64,
    },
    /// A flag.
    #[error("{flag} cannot be used: {why}")]
    Flag {
        /// The flag.
        flag: &'static str,
        /// What is wrong.
        why: String,
    },
}

/// Where the file is looked for when none is named.
#[must_use]
pub fn default_path(is_root: bool) -> PathBuf {
    let from_env = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    if is_root {
        return PathBuf::from("/etc/ark/arkd.toml");
    }
    let home = || from_env("HOME").unwrap_or_else(|| PathBuf::from("/")).join(".config");
    from_env("XDG_CONFIG_HOME").unwrap_or_else(home).join("ark/arkd.toml")
}

/// The settings that the file, `environment` and `args` amount to. A file that is not named need not be there.
///
/// # Errors
/// [`SettingsError`] names the file and line, the variable or the flag.
pub fn load(
    args: &Args,
    environment: impl Iterator<Item = (OsString, OsString)>,
) -> Result<Settings, SettingsError> {
    let table = match &args.config {
        Some(path) => read(path)?,
        None => match read(&default_path(nix::unistd::geteuid().is_root())) {
            Err(SettingsError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                Table::new()
            }
            other => other?,
        },
    };
    let mut settings = with_environment(table, environment)?;
    put_flags(&mut settings, args)?;
    let (min, max) = (settings.inference.replicas_min.get(), settings.inference.replicas_max.get());
    if min > max {
        return Err(SettingsError::Replicas { min, max });
    }
    Ok(settings)
}

/// The file at `path`, checked.
fn read(path: &Path) -> Result<Table, SettingsError> {
    let text =
        fs::read_to_string(path).map_err(|source| SettingsError::Read { path: path.to_owned(), source })?;
    let wrong = |error: toml::de::Error| {
        let (line, column) = place(&text, error.span().map_or(0, |span| span.start));
        let why = error.message().trim().replace('\n', ", ");
        SettingsError::File { path: path.to_owned(), line, column, why }
    };
    toml::from_str::<Settings>(&text).map_err(wrong)?;
    toml::from_str(&text).map_err(wrong)
}

/// Line and column of the byte at `offset`, from 1; columns are characters.
fn place(text: &str, offset: usize) -> (usize, usize) {
    let before = text.get(..offset).unwrap_or(text);
    let line_start = before.rfind('\n').map_or(0, |at| at + 1);
    let column = before.get(line_start..).unwrap_or_default().chars().count() + 1;
    (before.matches('\n').count() + 1, column)
}

/// `table` with every variable that names a key of a section put over it.
fn with_environment(
    mut table: Table,
    environment: impl Iterator<Item = (OsString, OsString)>,
) -> Result<Settings, SettingsError> {
    let sections: Vec<String> =
        Table::try_from(Settings::default()).unwrap_or_default().keys().cloned().collect();
    let mut variables = Vec::new();
    for (name, value) in environment.filter(|(_, value)| !value.is_empty()) {
        let Some(name) = name.to_str() else { continue };
        let short = SHORT.iter().find(|(short, ..)| *short == name);
        let target = match short {
            Some((_, section, key)) => Some(((*section).to_owned(), (*key).to_owned())),
            None => key_of(name, &sections),
        };
        if let Some(target) = target {
            variables.push((short.is_none(), name.to_owned(), target, value));
        }
    }
    // A short name gives way to the whole one.
    variables.sort();
    for (_, name, (section, key), value) in variables {
        let text = value
            .into_string()
            .map_err(|_| SettingsError::Variable { name: name.clone(), why: "it is not UTF-8".to_owned() })?;
        table = put(&table, &section, &key, &text).map_err(|why| SettingsError::Variable { name, why })?;
    }
    // Every step was checked, so that only an empty table is left to be one.
    Settings::deserialize(table).map_err(|error| SettingsError::Variable {
        name: "ARK_*".to_owned(),
        why: error.message().to_owned(),
    })
}

/// Section and key of the variable `name`: `ARK_LOG_MAX_SIZE_MIB` is `max_size_mib` of `log`.
fn key_of(name: &str, sections: &[String]) -> Option<(String, String)> {
    let name = name.strip_prefix("ARK_")?.to_lowercase();
    sections.iter().find_map(|section| {
        let key = name.strip_prefix(section.as_str())?.strip_prefix('_')?;
        (!key.is_empty()).then(|| (section.clone(), key.to_owned()))
    })
}

/// `table` with `text` at `section.key`: as the TOML value that it is, or else as a string.
fn put(table: &Table, section: &str, key: &str, text: &str) -> Result<Table, String> {
    let with = |value: Value| {
        let mut table = table.clone();
        if let Value::Table(values) = table.entry(section).or_insert_with(|| Value::Table(Table::new())) {
            values.insert(key.to_owned(), value);
        }
        match Settings::deserialize(table.clone()) {
            Ok(_) => Ok(table),
            Err(error) => Err(error.message().trim().replace('\n', ", ")),
        }
    };
    let literal =
        toml::from_str::<Table>(&format!("value = {text}")).ok().and_then(|mut t| t.remove("value"));
    match literal {
        Some(value) if !value.is_str() => with(value).or_else(|why| with(text.into()).map_err(|_| why)),
        _ => with(text.into()),
    }
}

fn put_flags(settings: &mut Settings, args: &Args) -> Result<(), SettingsError> {
    let path = |flag, path: &PathBuf| {
        AbsolutePath::try_from(std::path::absolute(path).unwrap_or_else(|_| path.clone()))
            .map_err(|e| SettingsError::Flag { flag, why: e.to_string() })
    };
    settings.listen.tcp = args.listen.or(settings.listen.tcp);
    if let Some(file) = &args.token_file {
        settings.listen.token_file = Some(path("--token-file", file)?);
    }
    settings.pool.prepared = args.pool.unwrap_or(settings.pool.prepared);
    settings.pool.standby = args.standby.unwrap_or(settings.pool.standby);
    settings.log.format = args.log_format.or(settings.log.format);
    let (scheduler, chosen) = (&mut settings.scheduler, &args.scheduler);
    scheduler.overcommit_memory = chosen.overcommit_memory.unwrap_or(scheduler.overcommit_memory);
    scheduler.overcommit_cpu = chosen.overcommit_cpu.unwrap_or(scheduler.overcommit_cpu);
    scheduler.overcommit_forks = chosen.overcommit_forks.unwrap_or(scheduler.overcommit_forks);
    scheduler.max_agents = chosen.max_agents.unwrap_or(scheduler.max_agents);
    scheduler.queue = chosen.queue.unwrap_or(scheduler.queue);
    if let (None, Some(file)) = (&settings.log.file, &args.fallback_log_file) {
        settings.log.file = Some(path("--fallback-log-file", file)?);
        // Whoever reads a file that nobody configured is a person.
        settings.log.format.get_or_insert(super::LogFormat::Text);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;
    use proptest::prelude::*;

    use super::super::LogFormat;
    use super::*;

    fn load_from(file: &str, variables: &[(&str, &str)], flags: &[&str]) -> Result<Settings, SettingsError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("arkd.toml");
        fs::write(&path, file).unwrap();
        let flags = ["arkd", "--config", path.to_str().unwrap()].into_iter().chain(flags.iter().copied());
        let args = Args::try_parse_from(flags).unwrap();
        load(&args, variables.iter().map(|(name, value)| (OsString::from(name), OsString::from(value))))
    }

    fn why(file: &str, variables: &[(&str, &str)]) -> String {
        load_from(file, variables, &[]).unwrap_err().to_string()
    }

    #[test]
    fn flags_win_over_the_environment_and_that_over_the_file() {
        let file = "[pool]\nprepared = 5\nstandby = 6\n[log]\nlevel = \"warn\"\n";
        let variables = [
            ("ARK_POOL", "1"),
            ("ARK_POOL_STANDBY", "8"),
            ("ARK_STANDBY", "9"),
            ("ARK_LOG_LEVEL", "info,arkd=debug"),
            ("ARK_LISTEN_TCP", "127.0.0.1:1"),
            ("ARK_LOG_FILE", "/x/arkd.log"),
            ("ARK_TELEMETRY_LABELS", "{ zone = \"b\" }"),
            ("ARK_LOG_KEEP", ""),
            ("ARK_RUN", "/run"),
            ("ARK_LISTEN", "0.0.0.0:1"),
            ("ARK_LOGS_KEEP", "none of ours"),
            ("ARK_SCHEDULER_OVERCOMMIT_CPU", "3"),
            ("ARK_SCHEDULER_MAX_AGENTS", "70"),
        ];
        let flags = ["--pool", "3", "--log-format", "text", "--max-agents", "7", "--overcommit-forks", "4"];
        let settings = load_from(file, &variables, &flags).unwrap();
        let scheduler = settings.scheduler;
        assert_eq!((scheduler.overcommit_cpu.get(), scheduler.overcommit_forks.get()), (3.0, 4.0));
        assert_eq!((scheduler.max_agents, scheduler.queue.get()), (7, 256));
        assert_eq!((settings.pool.prepared, settings.pool.standby), (3, 8));
        assert_eq!(settings.log.level.to_string(), "info,arkd=debug");
        assert_eq!(settings.listen.tcp, Some("127.0.0.1:1".parse().unwrap()));
        assert_eq!(settings.log.format, Some(LogFormat::Text));
        assert_eq!(settings.telemetry.labels.len(), 1);
        assert_eq!(load_from("", &[], &[]).unwrap(), Settings::default());
    }

    #[test]
    fn a_fallback_file_gives_way_to_a_chosen_one() {
        let flags = ["--fallback-log-file", "/f/arkd.log"];
        let log = load_from("", &[], &flags).unwrap().log;
        assert_eq!(
            (log.file.unwrap().as_ref(), log.format),
            (Path::new("/f/arkd.log"), Some(LogFormat::Text))
        );
        let log = load_from("[log]\nfile = \"/c/arkd.log\"\n", &[], &flags).unwrap().log;
        assert_eq!((log.file.unwrap().as_ref(), log.format), (Path::new("/c/arkd.log"), None));
    }

    #[test]
    fn what_is_wrong_in_the_file_is_told_with_its_place() {
        for (file, place, words) in [
            (
                "[pool]\nprepered = 1\n",
                "line 2, column 1",
                "unknown field `prepered`, expected `prepared` or",
            ),
            ("\n[pol]\n", "line 2, column 2", "unknown field `pol`"),
            (
                "[log]\n# é\nkeep = 1001\n",
                "line 3, column 8",
                "1001 is out of bounds: choose a number from 0",
            ),
            ("[log]\nlevel = \"loud\"\n", "line 2, column 9", "\"loud\" is no log level"),
            ("[log]\nfile = \"arkd.log\"\n", "line 2, column 8", "not absolute"),
            ("[listen]\ntcp = \"nowhere\"\n", "line 2, column 7", "socket address"),
            ("[pool]\nprepared = -1\n", "line 2, column 12", "-1"),
            (
                "[scheduler]\novercommit_forks = 0.5\n",
                "line 2, column 20",
                "0.5 is no ratio: choose a number from 1",
            ),
            ("[scheduler]\nqueue = 0\n", "line 2, column 9", "nonzero"),
            ("[pool\n", "line 1, column 6", "table"),
        ] {
            let why = why(file, &[]);
            assert!(why.contains(place) && why.contains(words), "{file:?}: {why}");
        }
    }

    #[test]
    fn a_wrong_variable_is_named() {
        for (name, value, words) in [
            ("ARK_POOL_PREPARED", "many", "expected u8"),
            ("ARK_POOL", "300", "300"),
            ("ARK_LOG_KEPT", "1", "unknown field `kept`"),
            ("ARK_LOG_FORMAT", "xml", "unknown variant `xml`"),
            ("RUST_LOG", "loud", "is no log level"),
        ] {
            let why = why("", &[(name, value)]);
            assert!(why.contains(name) && why.contains(words), "{why}");
        }
    }

    #[test]
    fn a_least_that_is_above_the_most_is_refused_wherever_they_are_said() {
        let file = "[inference]\nreplicas_min = 3\nreplicas_max = 5\n";
        let words = why(file, &[("ARK_INFERENCE_REPLICAS_MAX", "2")]);
        assert!(words.contains("replicas_min is 3 and replicas_max 2"), "{words}");
        let both = [("ARK_INFERENCE_REPLICAS_MAX", "2"), ("ARK_INFERENCE_REPLICAS_MIN", "0")];
        let inference = load_from(file, &both, &[]).unwrap().inference;
        assert_eq!((inference.replicas_min.get(), inference.replicas_max.get()), (0, 2));
    }

    #[test]
    fn a_file_that_is_named_has_to_be_there() {
        let args = Args::try_parse_from(["arkd", "--config", "/nonexistent/arkd.toml"]).unwrap();
        let why = load(&args, std::iter::empty()).unwrap_err().to_string();
        assert!(why.contains("/nonexistent/arkd.toml cannot be read"), "{why}");
    }

    proptest! {
        #[test]
        fn no_text_makes_the_loader_panic(text in "(\\[(log|pool)\\]\n)?[a-z_]{0,8} ?=? ?.{0,20}", value: String) {
            let _ = load_from(&text, &[("ARK_LOG_LEVEL", &value.replace('\0', "")), ("ARK_LOG_KEEP", &text.replace('\0', ""))], &[]);
        }
    }
}
