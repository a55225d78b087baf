//! Options about what becomes of an agent: restarts, checkpoints, health checks.

use std::time::Duration;

use ark_types::checkpoint::CheckpointPolicy;
use ark_types::healing::RestartPolicy;
use ark_types::health_check::{
    DEFAULT_CHECK_FAILURES, DEFAULT_CHECK_INTERVAL_S, DEFAULT_CHECK_TIMEOUT_S, HealthCheck, Probe,
};
use clap::Args;

use crate::failure::Failure;
use crate::parse;

/// What becomes of a new agent.
#[derive(Clone, Debug, Args)]
pub(crate) struct UpkeepArgs {
    /// Begin it anew when it ends by itself: never, on-failure or always; with `:N` at most N times until it ran well. What it
    /// did since its last checkpoint is lost then, or all that it held where it has none
    #[arg(long, value_parser = parse::restart, default_value = "never", hide_default_value = true, value_name = "POLICY")]
    pub(crate) restart: RestartPolicy,
    /// Take a checkpoint of it this often while it runs (60s, 10m), for --restart to restore it from; with `:N` the last N are
    /// kept [default: 2]
    #[arg(long, value_parser = parse::checkpoint, value_name = "TIME[:N]")]
    pub(crate) checkpoint: Option<CheckpointPolicy>,
    #[command(flatten)]
    pub(crate) health: HealthArgs,
}

/// How an agent is checked.
#[derive(Clone, Debug, Args)]
pub(crate) struct HealthArgs {
    /// Check it by this command of its shell: exit code 0 is healthy
    #[arg(long, conflicts_with = "health_tcp", value_name = "COMMAND")]
    health_cmd: Option<String>,
    /// Check it by a connection to this port of its 127.0.0.1
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..), value_name = "PORT")]
    health_tcp: Option<u16>,
    /// Time from one check to the next [default: 30s]
    #[arg(long, value_parser = parse::duration, value_name = "TIME")]
    health_interval: Option<Duration>,
    /// Time that a check has [default: 10s]
    #[arg(long, value_parser = parse::duration, value_name = "TIME")]
    health_timeout: Option<Duration>,
    /// Failures in a row that make it unhealthy; --restart has it begin anew then [default: 3]
    #[arg(long, value_name = "N")]
    health_retries: Option<u32>,
    /// Time after its start in which failures do not count [default: none]
    #[arg(long, value_parser = parse::duration, value_name = "TIME")]
    health_start_period: Option<Duration>,
}

impl HealthArgs {
    /// The health check that is asked for.
    ///
    /// # Errors
    /// Terms without a check.
    pub(crate) fn check(&self) -> Result<Option<HealthCheck>, Failure> {
        let probe = match (&self.health_cmd, self.health_tcp) {
            (Some(command), _) => {
                Probe::Exec { command: vec!["/bin/sh".to_owned(), "-c".to_owned(), command.clone()] }
            }
            (None, Some(port)) => Probe::Tcp { port },
            (None, None) => return self.without_a_check(),
        };
        Ok(Some(HealthCheck {
            probe,
            interval_s: seconds(self.health_interval, DEFAULT_CHECK_INTERVAL_S),
            timeout_s: seconds(self.health_timeout, DEFAULT_CHECK_TIMEOUT_S),
            failures: self.health_retries.unwrap_or(DEFAULT_CHECK_FAILURES),
            start_period_s: seconds(self.health_start_period, 0),
        }))
    }

    fn without_a_check(&self) -> Result<Option<HealthCheck>, Failure> {
        let terms = [self.health_interval, self.health_timeout, self.health_start_period];
        if self.health_retries.is_some() || terms.iter().any(Option::is_some) {
            let why = "there is no check for these --health options: say what it is by --health-cmd or --health-tcp";
            return Err(Failure::Usage(why.to_owned()));
        }
        Ok(None)
    }
}

/// Whole seconds, of which a part counts as one.
fn seconds(span: Option<Duration>, default: u32) -> u32 {
    span.map_or(default, |span| u32::try_from(span.as_millis().div_ceil(1000)).unwrap_or(u32::MAX))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use crate::args::{Cli, Verb};

    use super::*;

    fn upkeep(line: &[&str]) -> Result<UpkeepArgs, String> {
        match Cli::try_parse_from([&["ark"], line].concat()).map(|cli| cli.verb) {
            Ok(Verb::Create(args)) => Ok(args.agent.upkeep),
            Ok(Verb::Run(args)) => Ok(args.agent.upkeep),
            Ok(Verb::Fork(args)) => Ok(args.upkeep),
            Ok(Verb::Restore(args)) => Ok(args.upkeep),
            Ok(other) => panic!("{other:?}"),
            Err(error) => Err(error.to_string()),
        }
    }

    #[test]
    fn a_health_check_is_a_command_or_a_port_with_its_terms() {
        let line =
            ["create", "--health-cmd", "test -e /ok", "--health-interval", "1.5s", "--health-retries", "2"];
        let Ok(Some(check)) = upkeep(&line).unwrap().health.check() else { panic!("there is one") };
        assert_eq!((check.interval_s, check.timeout_s, check.failures, check.start_period_s), (2, 10, 2, 0));
        assert_eq!(
            check.probe,
            Probe::Exec { command: vec!["/bin/sh".into(), "-c".into(), "test -e /ok".into()] }
        );
        let line = ["fork", "a1", "--health-tcp", "8080", "--health-start-period", "1m"];
        let Ok(Some(check)) = upkeep(&line).unwrap().health.check() else { panic!("there is one") };
        assert_eq!((check.probe, check.start_period_s), (Probe::Tcp { port: 8080 }, 60));
        assert!(upkeep(&["create"]).unwrap().health.check().unwrap().is_none());
        let nothing = upkeep(&["create", "--health-retries", "2"]).unwrap();
        assert!(nothing.health.check().unwrap_err().to_string().contains("--health-cmd or --health-tcp"));
        let both = upkeep(&["create", "--health-cmd", "true", "--health-tcp", "80"]);
        assert!(both.unwrap_err().contains("cannot be used with"));
        assert!(upkeep(&["create", "--health-tcp", "0"]).is_err());
    }

    #[test]
    fn every_verb_that_makes_an_agent_says_what_becomes_of_it() {
        for line in [&["create"][..], &["run", "true"], &["fork", "a1"], &["restore", "s1"]] {
            let (verb, rest) = line.split_first().unwrap();
            let line = [&[*verb, "--restart", "always", "--checkpoint", "60s:3"], rest].concat();
            let upkeep = upkeep(&line).unwrap();
            assert_eq!(upkeep.restart, RestartPolicy::Always { max_restarts: None });
            assert_eq!(upkeep.checkpoint, Some(CheckpointPolicy { every_s: 60, keep: 3 }));
        }
    }
}
