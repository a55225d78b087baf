//! Options about room for agents, and `ark quota`.

use std::time::Duration;

use ark_types::label::Owner;
use clap::Args;

use crate::parse;

/// How a new agent gets its room.
#[derive(Clone, Debug, Args)]
pub(crate) struct RoomArgs {
    /// Owner of the agent: quotas and fairness go by owners [default: default]
    #[arg(long, env = "ARK_OWNER", value_name = "OWNER")]
    pub(crate) owner: Option<Owner>,
    /// Among requests that wait for room the highest goes first: -100 to 100
    #[arg(long, default_value_t = 0, allow_negative_numbers = true, value_parser = clap::value_parser!(i32).range(-100..=100), value_name = "N")]
    pub(crate) priority: i32,
    /// How long to wait for room: seconds, or with a unit (500ms, 2m); 0 does not wait [default: 30s]
    #[arg(long, value_parser = parse::patience, value_name = "TIME")]
    pub(crate) queue_timeout: Option<Duration>,
}

/// `ark quota`.
#[derive(Debug, Args)]
#[command(after_help = "\
Without an owner, every one that has a quota, agents or requests is listed; without a bound, what the owner has is shown.
Bounds that are given take the place of all that were there: what is not given is not bounded.
Agents that an owner has beyond its quota go on.")]
pub(crate) struct QuotaArgs {
    /// Owner
    pub(crate) owner: Option<Owner>,
    /// Most agents that it may have
    #[arg(long, requires = "owner", value_name = "N")]
    pub(crate) agents: Option<u64>,
    /// Most memory that may be reserved for them, MiB (or with a unit: 4G)
    #[arg(long, short, requires = "owner", value_parser = parse::memory_mib, value_name = "MIB")]
    pub(crate) memory: Option<u64>,
    /// Most virtual processors that they may have together
    #[arg(long, requires = "owner", value_name = "N")]
    pub(crate) vcpus: Option<u64>,
    /// Let it have everything
    #[arg(long, requires = "owner", conflicts_with_all = ["agents", "memory", "vcpus"])]
    pub(crate) clear: bool,
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use crate::args::{Cli, Verb};

    use super::*;

    fn verb(line: &[&str]) -> Result<Verb, String> {
        Cli::try_parse_from([&["ark"], line].concat()).map(|cli| cli.verb).map_err(|e| e.to_string())
    }

    #[test]
    fn room_is_asked_for_by_priority_owner_and_patience() {
        let line = ["create", "--priority", "-5", "--owner", "team", "--queue-timeout", "2m"];
        let Ok(Verb::Create(args)) = verb(&line) else { panic!("it creates") };
        let RoomArgs { owner, priority, queue_timeout } = args.agent.room;
        let owner = owner.map(String::from);
        assert_eq!((owner.as_deref(), priority), (Some("team"), -5));
        assert_eq!(queue_timeout, Some(Duration::from_secs(120)));
        let Ok(Verb::Run(args)) = verb(&["run", "--queue-timeout", "0", "--", "true"]) else {
            panic!("it runs")
        };
        assert_eq!(args.agent.room.queue_timeout, Some(Duration::ZERO));
        assert!(verb(&["create", "--priority", "101"]).unwrap_err().contains("-100..=100"));
        assert!(verb(&["create", "--owner", "Team"]).unwrap_err().contains("use 1 to 63"));
        assert!(verb(&["create", "--queue-timeout", "11m"]).unwrap_err().contains("at most 10m"));
    }

    #[test]
    fn a_quota_is_listed_shown_set_or_cleared() {
        for line in [
            &["quota"][..],
            &["quota", "team"],
            &["quota", "team", "--agents", "3", "--memory", "4G", "--vcpus", "0"],
            &["quota", "team", "--clear"],
            &["queue"],
            &["hosts", "--json"],
        ] {
            assert!(verb(line).is_ok(), "{line:?}: {:?}", verb(line));
        }
        for line in [
            &["quota", "--agents", "3"][..],
            &["quota", "--clear"],
            &["quota", "a", "--clear", "--vcpus", "1"],
        ] {
            assert!(verb(line).is_err(), "{line:?}");
        }
    }
}
