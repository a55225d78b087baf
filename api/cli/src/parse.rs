//! Parsers of what users type: times, sizes, variables, places.

use std::path::PathBuf;
use std::time::Duration;

use ark_types::agent::{AgentName, AgentState};
use ark_types::checkpoint::{
    CHECKPOINT_EVERY_S, CHECKPOINTS_KEPT, CheckpointPolicy, DEFAULT_CHECKPOINTS_KEPT,
};
use ark_types::healing::{MAX_RESTARTS, RestartPolicy};
use ark_types::scheduling::MAX_QUEUE_TIMEOUT;
use ark_types::snapshot::MAX_FORKS;
use ark_types::task::TaskState;

use crate::commands::cp::Place;

/// Longest time that is accepted: a year.
const MAX_DURATION: Duration = Duration::from_secs(365 * 86_400);
/// Most memory that is accepted, MiB: 64 TiB, the reach of x86-64's four-level page tables.
const MAX_MEMORY_MIB: u64 = 64 << 20;

/// A time span: `500ms`, `30s`, `1.5m`, `2h`; a bare number is in seconds.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is not a time: write it like 500ms, 30s, 1.5m or 2h");
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let factor = match unit {
        "ms" => 0.001,
        "" | "s" => 1.0,
        "m" => 60.0,
        "h" => 3600.0,
        _ => return Err(wrong()),
    };
    let seconds = number.parse::<f64>().map_err(|_| wrong())? * factor;
    let span = Duration::try_from_secs_f64(seconds).map_err(|_| wrong())?;
    if span.as_millis() == 0 {
        return Err("the time must be at least 1ms".to_owned());
    }
    if span > MAX_DURATION {
        return Err("the time must be at most a year".to_owned());
    }
    Ok(span)
}

/// A limit of an agent's life in whole seconds: as [`duration`], of which a part of a second counts as one.
pub(crate) fn lifetime(text: &str) -> Result<u64, String> {
    duration(text).map(|span| span.as_secs() + u64::from(span.subsec_nanos() > 0))
}

/// `never`, `on-failure`, `always`; the last two with a bound: `on-failure:3`.
pub(crate) fn restart(text: &str) -> Result<RestartPolicy, String> {
    let wrong = || format!("{text:?} is no restart policy: write never, on-failure[:N] or always[:N]");
    let (policy, bound) = match text.split_once(':') {
        Some((policy, bound)) => (policy, Some(bound)),
        None => (text, None),
    };
    let max_restarts = bound.map(|bound| bound.parse::<u32>().map_err(|_| wrong())).transpose()?;
    if max_restarts.is_some_and(|max| !MAX_RESTARTS.contains(&max)) {
        let (least, most) = (MAX_RESTARTS.start(), MAX_RESTARTS.end());
        return Err(format!("{text:?} is out of bounds: {least} to {most} restarts can be asked for"));
    }
    match (policy, max_restarts) {
        ("never", None) => Ok(RestartPolicy::Never),
        ("on-failure", max_restarts) => Ok(RestartPolicy::OnFailure { max_restarts }),
        ("always", max_restarts) => Ok(RestartPolicy::Always { max_restarts }),
        _ => Err(wrong()),
    }
}

/// How often checkpoints are taken, as [`lifetime`], and how many are kept: `60s`, `10m:3`.
pub(crate) fn checkpoint(text: &str) -> Result<CheckpointPolicy, String> {
    let (every, keep) = text.split_once(':').map_or((text, None), |(every, keep)| (every, Some(keep)));
    let seconds = lifetime(every)?;
    let every_s = u32::try_from(seconds).ok().filter(|every| CHECKPOINT_EVERY_S.contains(every));
    let Some(every_s) = every_s else {
        let (least, most) = (CHECKPOINT_EVERY_S.start(), CHECKPOINT_EVERY_S.end() / 3600);
        return Err(format!("checkpoints can be taken every {least}s to every {most}h, not every {every}"));
    };
    let keep = match keep {
        None => DEFAULT_CHECKPOINTS_KEPT,
        Some(keep) => keep.parse().ok().filter(|keep| CHECKPOINTS_KEPT.contains(keep)).ok_or_else(|| {
            let (least, most) = (CHECKPOINTS_KEPT.start(), CHECKPOINTS_KEPT.end());
            format!("{keep:?} is no number of checkpoints to keep: write {least} to {most} behind the `:`")
        })?,
    };
    Ok(CheckpointPolicy { every_s, keep })
}

/// How long to wait for room: as [`duration`], or 0 for not at all.
pub(crate) fn patience(text: &str) -> Result<Duration, String> {
    let span = if text == "0" { Duration::ZERO } else { duration(text)? };
    if span > MAX_QUEUE_TIMEOUT {
        return Err(format!(
            "nothing waits for room longer than that: give at most {}m",
            MAX_QUEUE_TIMEOUT.as_secs() / 60
        ));
    }
    Ok(span)
}

/// Memory in MiB: a bare number is in MiB; `M`, `MiB`, `G`, `GiB` are understood.
pub(crate) fn memory_mib(text: &str) -> Result<u64, String> {
    let wrong = || format!("{text:?} is not a size: write MiB (256), or a unit (256M, 2G)");
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let factor = match unit.to_ascii_lowercase().as_str() {
        "" | "m" | "mb" | "mib" => 1,
        "g" | "gb" | "gib" => 1024,
        _ => return Err(wrong()),
    };
    let number: u64 = number.parse().map_err(|_| wrong())?;
    match number.checked_mul(factor) {
        Some(mib) if mib <= MAX_MEMORY_MIB => Ok(mib),
        _ => Err(format!("{text} is more memory than any machine has")),
    }
}

/// How many forks: 1 to [`MAX_FORKS`].
pub(crate) fn forks(text: &str) -> Result<u32, String> {
    text.parse::<u32>()
        .ok()
        .filter(|count| (1..=MAX_FORKS).contains(count))
        .ok_or_else(|| format!("{text:?} forks cannot be had at once: ask for 1 to {MAX_FORKS}"))
}

/// `KEY=VALUE`, or `KEY` for the value it has here.
pub(crate) fn environment(text: &str) -> Result<(String, String), String> {
    let (key, value) = match text.split_once('=') {
        Some((key, value)) => (key, value.to_owned()),
        None => {
            let value =
                std::env::var(text).map_err(|_| format!("{text} has no value here: write {text}=VALUE"))?;
            (text, value)
        }
    };
    if key.is_empty() {
        return Err(format!("{text:?} has no name before the `=`"));
    }
    Ok((key.to_owned(), value))
}

/// A state of an agent, as `ark ps` shows it.
pub(crate) fn state(text: &str) -> Result<AgentState, String> {
    let states = [
        AgentState::Creating,
        AgentState::Running,
        AgentState::Paused,
        AgentState::Stopping,
        AgentState::Stopped,
        AgentState::Failed,
    ];
    states.into_iter().find(|state| state.to_string() == text).ok_or_else(|| {
        let names = states.map(|state| state.to_string()).join(", ");
        format!("{text:?} is no state of an agent: write one of {names}")
    })
}

/// A state of a task, as `ark task ls` shows it.
pub(crate) fn task_state(text: &str) -> Result<TaskState, String> {
    TaskState::ALL.into_iter().find(|state| state.word() == text).ok_or_else(|| {
        let names = TaskState::ALL.map(TaskState::word).join(", ");
        format!("{text:?} is no state of a task: write one of {names}")
    })
}

/// `KEY=VALUE`, both of which `arkd` and the request check.
pub(crate) fn label(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err(format!("{text:?} is not a label: write KEY=VALUE")),
    }
}

/// A change of a label: `KEY=VALUE` sets it, `KEY-` removes it.
pub(crate) fn label_change(text: &str) -> Result<(String, Option<String>), String> {
    match (label(text), text.strip_suffix('-')) {
        (Ok((key, value)), _) => Ok((key, Some(value))),
        (Err(_), Some(key)) if !key.is_empty() => Ok((key.to_owned(), None)),
        (Err(_), _) => {
            Err(format!("{text:?} changes no label: write KEY=VALUE to set it, or KEY- to remove it"))
        }
    }
}

/// A place for `ark cp`: `-`, `agent:/path`, or a path on this machine.
pub(crate) fn place(text: &str) -> Result<Place, String> {
    if text == "-" {
        return Ok(Place::Standard);
    }
    if text.is_empty() {
        return Err("a path is empty".to_owned());
    }
    match text.split_once(':') {
        // A slash before the colon makes it a path of this machine: ./a:b
        Some((agent, path)) if !agent.contains('/') => {
            // Ids are labels too.
            agent.parse::<AgentName>().map_err(|e| format!("{e}; for a local file write ./{text}"))?;
            if !path.starts_with('/') {
                return Err(format!("paths in an agent are absolute: write {agent}:/{path}"));
            }
            Ok(Place::Agent { agent: agent.to_owned(), path: path.to_owned() })
        }
        _ => Ok(Place::Local(PathBuf::from(text))),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn times_have_units() {
        for (text, millis) in [
            ("500ms", 500),
            ("30s", 30_000),
            ("30", 30_000),
            ("1.5m", 90_000),
            ("2h", 7_200_000),
            ("0.25s", 250),
        ] {
            assert_eq!(duration(text).unwrap(), Duration::from_millis(millis), "{text}");
        }
        for text in ["", "s", "-1s", "1d", "1 s", "0", "0.0001s", "1e9", "..s", "9999999h", "inf", "nan"] {
            assert!(duration(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_restart_policy_may_be_bounded() {
        for text in ["never", "on-failure", "always", "on-failure:3", "always:10000"] {
            assert_eq!(restart(text).unwrap().to_string(), text);
        }
        for text in ["", "never:1", "on_failure", "always:", "always:x", "always:-1"] {
            assert!(restart(text).unwrap_err().contains("on-failure[:N]"), "{text}");
        }
        assert!(restart("always:0").unwrap_err().contains("1 to 10000"));
        assert_eq!((lifetime("1h"), lifetime("1.5s"), lifetime("1ms")), (Ok(3600), Ok(2), Ok(1)));
    }

    #[test]
    fn checkpoints_have_a_time_and_a_number() {
        let policy = |every_s, keep| Ok(CheckpointPolicy { every_s, keep });
        assert_eq!(checkpoint("60s"), policy(60, 2));
        assert_eq!(checkpoint("10m:3"), policy(600, 3));
        for (text, why) in [
            ("5s", "every 10s to every 24h, not every 5s"),
            ("25h", "not every 25h"),
            ("60s:0", "1 to 10"),
            ("60s:", "1 to 10"),
            ("60s:11", "1 to 10"),
            ("often", "is not a time"),
        ] {
            let error = checkpoint(text).unwrap_err();
            assert!(error.contains(why), "{text}: {error}");
        }
    }

    #[test]
    fn memory_is_in_mib_unless_it_says_otherwise() {
        for (text, mib) in [("256", 256), ("256M", 256), ("2g", 2048), ("1GiB", 1024), ("0", 0)] {
            assert_eq!(memory_mib(text).unwrap(), mib, "{text}");
        }
        for text in ["", "G", "-1", "1.5G", "1T", "99999999999999999999", "99999999G", "18014398509481985G"] {
            assert!(memory_mib(text).is_err(), "{text}");
        }
    }

    #[test]
    fn variables_have_a_name() {
        assert_eq!(environment("A=b=c").unwrap(), ("A".to_owned(), "b=c".to_owned()));
        assert_eq!(environment("A=").unwrap(), ("A".to_owned(), String::new()));
        assert!(environment("=x").is_err());
        assert_eq!(environment("PATH").unwrap().1, std::env::var("PATH").unwrap());
        assert!(environment("ARK_SURELY_NOT_SET").unwrap_err().contains("ARK_SURELY_NOT_SET=VALUE"));
    }

    #[test]
    fn places_are_told_apart() {
        let agent = |agent: &str, path: &str| Place::Agent { agent: agent.to_owned(), path: path.to_owned() };
        assert_eq!(place("a1:/tmp/").unwrap(), agent("a1", "/tmp/"));
        assert_eq!(place("a1:/a:b").unwrap(), agent("a1", "/a:b"));
        assert_eq!(place("./a:b").unwrap(), Place::Local("./a:b".into()));
        assert_eq!(place("/tmp/x:1").unwrap(), Place::Local("/tmp/x:1".into()));
        assert_eq!(place("file").unwrap(), Place::Local("file".into()));
        assert_eq!(place("-").unwrap(), Place::Standard);
        assert!(place("a1:tmp").unwrap_err().contains("a1:/tmp"));
        assert!(place("A1:/tmp").unwrap_err().contains("./A1:/tmp"));
        assert!(place("").is_err());
    }

    proptest! {
        #[test]
        fn no_text_makes_a_parser_panic(text in "\\PC{0,24}") {
            let _ = (duration(&text), memory_mib(&text), environment(&text), place(&text), forks(&text), checkpoint(&text));
        }

        #[test]
        fn whole_seconds_survive(seconds in 1u64..31_000_000) {
            prop_assert_eq!(duration(&format!("{seconds}s")).unwrap(), Duration::from_secs(seconds));
        }
    }
}
