//! `ark pool`.

use std::time::Duration;

use ark_types::agent::AgentName;
use ark_types::pool::MAX_STANDBYS;
use clap::{Args, Subcommand};

use crate::parse;

/// `ark pool …`.
#[derive(Debug, Subcommand)]
pub(crate) enum PoolAction {
    /// List pools
    Ls,
    /// Say how many forks of a template are to stand ready
    Set(PoolSetArgs),
    /// Show everything about the pool of a template
    Show {
        /// Name of the template
        template: AgentName,
    },
    /// Let templates have the forks ready again that every one in use has
    Rm {
        /// Names of the templates
        #[arg(required = true, value_name = "TEMPLATE")]
        templates: Vec<AgentName>,
    },
}

/// `ark pool set`.
#[derive(Debug, Args)]
#[command(after_help = "\
How many there are follows the demand: their number grows at once when agents are asked for, and falls slowly when it is
calm. Their room is anybody's: an agent that needs it takes it. With the template its pool goes, too.")]
pub(crate) struct PoolSetArgs {
    /// Name of the template
    pub(crate) template: AgentName,
    /// How many there always are to be
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u32).range(0..=i64::from(MAX_STANDBYS)), value_name = "N")]
    pub(crate) min: u32,
    /// Most, whatever the demand: up to 200
    #[arg(long, value_parser = clap::value_parser!(u32).range(0..=i64::from(MAX_STANDBYS)), value_name = "N")]
    pub(crate) max: u32,
    /// How long an agent may wait for its turn to be made: seconds, or with a unit (50ms, 2s); 0 has one ready for each
    #[arg(long, default_value = "0", value_parser = parse::patience, value_name = "TIME")]
    pub(crate) target_wait: Duration,
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
    fn a_pool_is_listed_set_shown_or_removed() {
        let line = ["pool", "set", "py", "--min", "2", "--max", "20", "--target-wait", "50ms"];
        let Ok(Verb::Pool { action: PoolAction::Set(args) }) = verb(&line) else { panic!("it sets") };
        assert_eq!((args.template.as_ref(), args.min, args.max), ("py", 2, 20));
        assert_eq!(args.target_wait, Duration::from_millis(50));
        let Ok(Verb::Pool { action: PoolAction::Set(args) }) = verb(&["pool", "set", "py", "--max", "3"])
        else {
            panic!("it sets")
        };
        assert_eq!((args.min, args.target_wait), (0, Duration::ZERO));
        for line in [&["pool", "ls"][..], &["pool", "show", "py"], &["pool", "rm", "py", "js"]] {
            assert!(verb(line).is_ok(), "{line:?}");
        }
        assert!(verb(&["pool", "set", "py", "--min", "2"]).unwrap_err().contains("--max"));
        assert!(verb(&["pool", "set", "py", "--max", "201"]).unwrap_err().contains("0..=200"));
        assert!(verb(&["pool", "set", "Py", "--max", "1"]).unwrap_err().contains("use 1 to 63"));
        assert!(verb(&["pool", "rm"]).is_err());
    }
}
