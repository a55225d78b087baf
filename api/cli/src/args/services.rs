//! `ark service …`.

use std::time::Duration;

use ark_types::agent::AgentName;
use ark_types::healing::RestartPolicy;
use ark_types::image::ImageName;
use ark_types::label::Owner;
use ark_types::permission::Permission;
use clap::{Args, Subcommand};

use super::HealthArgs;
use crate::parse;

/// `ark service …`.
#[derive(Debug, Subcommand)]
pub(crate) enum ServiceAction {
    /// Make a service
    Create(ServiceSpecArgs),
    /// Have a service be so from now on, whatever it was before; what is changed of its replicas is rolled out
    #[command(visible_alias = "update")]
    Set(ServiceSpecArgs),
    /// List services
    Ls,
    /// Show a service and its replicas
    Show {
        /// Name
        service: String,
    },
    /// Have a service have more replicas, or fewer
    Scale {
        /// Name
        service: String,
        /// Replicas, 0 to 200
        replicas: u32,
    },
    /// Show what the command of a replica wrote last, or of each of them
    Logs {
        /// Name of the service
        service: String,
        /// Name or id of the replica, or of the last one whose command ended
        replica: Option<String>,
    },
    /// Have a replica run a program or code: the one with the fewest calls
    Call(ServiceCallArgs),
    /// Remove a replica when its calls are finished; another takes its place
    Drain {
        /// Name of the service
        service: String,
        /// Name or id of the replica
        agent: String,
        /// How long its calls may take [default: 30s]
        #[arg(long, value_parser = parse::patience, value_name = "TIME")]
        grace: Option<Duration>,
    },
    /// Remove services when their calls are finished
    Rm {
        /// Names
        #[arg(required = true, value_name = "NAME")]
        services: Vec<String>,
        /// How long their calls may take [default: 30s]
        #[arg(long, value_parser = parse::patience, value_name = "TIME")]
        grace: Option<Duration>,
    },
}

/// What a service is to be.
#[derive(Clone, Debug, Args)]
pub(crate) struct ServiceSpecArgs {
    /// Name of the service
    pub(crate) name: AgentName,
    /// Agents that are to serve, 0 to 200
    #[arg(long, short = 'n', default_value_t = 1, value_name = "N")]
    pub(crate) replicas: u32,
    /// Image to make them of
    #[arg(long, default_value = "base")]
    pub(crate) image: ImageName,
    /// Template to fork them from, instead of an image
    #[arg(long, conflicts_with = "image")]
    pub(crate) template: Option<AgentName>,
    /// Virtual processors of each, 1 to 32 [default: 1, or the template's]
    #[arg(long, value_name = "N")]
    pub(crate) vcpus: Option<u32>,
    /// Memory of each, MiB (or with a unit: 512M, 2G) [default: 256, or the template's]
    #[arg(long, short, value_parser = parse::memory_mib, value_name = "MIB")]
    pub(crate) memory: Option<u64>,
    /// Environment variable of each; without a value, this shell's
    #[arg(long, short, value_parser = parse::environment, value_name = "KEY[=VALUE]")]
    pub(crate) env: Vec<(String, String)>,
    /// Label of each
    #[arg(long = "label", short, value_parser = parse::label, value_name = "KEY=VALUE")]
    pub(crate) label: Vec<(String, String)>,
    /// Whose it is
    #[arg(long, env = "ARK_OWNER", value_name = "OWNER")]
    pub(crate) owner: Option<Owner>,
    /// What each may use of the platform: inference, or inference=MODEL for one model alone
    #[arg(long, value_name = "PERMISSION")]
    pub(crate) allow: Vec<Permission>,
    /// TCP port at 127.0.0.1 of every replica where its program listens, for other agents of the owner
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..), value_name = "PORT")]
    pub(crate) tcp: Option<u16>,
    /// Working directory of the command
    #[arg(long, short, requires = "command", value_name = "DIR")]
    pub(crate) workdir: Option<String>,
    /// User (and group) the command runs as: name or number, USER[:GROUP]
    #[arg(long, short, requires = "command")]
    pub(crate) user: Option<String>,
    #[command(flatten)]
    pub(crate) health: HealthArgs,
    /// Begin a replica anew when it ends by itself: never, on-failure or always; with `:N` at most N times until it ran well.
    /// One that does not begin anew is replaced
    #[arg(long, value_parser = parse::restart, default_value = "always", value_name = "POLICY")]
    pub(crate) restart: RestartPolicy,
    /// So many fewer may be ready during an update
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub(crate) max_unavailable: u32,
    /// So many more may be there during an update
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub(crate) max_surge: u32,
    /// Wait until it is so; fail when it cannot be
    #[arg(long)]
    pub(crate) wait: bool,
    /// Program, and its arguments, that runs in each of them as long as it lives, a server for example
    #[arg(last = true, value_name = "CMD")]
    pub(crate) command: Vec<String>,
}

/// `ark service call`.
#[derive(Debug, Args)]
pub(crate) struct ServiceCallArgs {
    /// Name of the service
    pub(crate) service: String,
    /// Code for the warm interpreter of a replica, or `-` for that on standard input, instead of a program
    #[arg(long, value_name = "CODE", conflicts_with = "command")]
    pub(crate) eval: Option<String>,
    /// How long to wait for a replica that is ready [default: 10s]
    #[arg(long, value_parser = parse::patience, value_name = "TIME")]
    pub(crate) wait: Option<Duration>,
    /// End the program or the code after this time
    #[arg(long, value_parser = parse::duration, value_name = "TIME")]
    pub(crate) timeout: Option<Duration>,
    /// Program and its arguments
    #[arg(required_unless_present = "eval", trailing_var_arg = true, value_name = "CMD")]
    pub(crate) command: Vec<String>,
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use crate::args::{Cli, Verb};

    use super::*;

    fn action(line: &[&str]) -> Result<ServiceAction, String> {
        match Cli::try_parse_from([&["ark", "service"], line].concat()).map(|cli| cli.verb) {
            Ok(Verb::Service { action }) => Ok(action),
            Ok(other) => panic!("{other:?}"),
            Err(error) => Err(error.to_string()),
        }
    }

    #[test]
    fn a_service_is_described_by_options() {
        let line = [
            "create",
            "web",
            "-n",
            "3",
            "--template",
            "py",
            "-e",
            "A=1",
            "-l",
            "app=shop",
            "--max-surge",
            "2",
            "--tcp",
            "8080",
        ];
        let Ok(ServiceAction::Create(args)) = action(&line) else { panic!("it is made") };
        assert_eq!((args.replicas, args.max_unavailable, args.max_surge, args.tcp), (3, 0, 2, Some(8080)));
        assert_eq!(args.restart, RestartPolicy::Always { max_restarts: None });
        assert!(matches!(action(&["update", "web"]), Ok(ServiceAction::Set(_))));
        assert!(action(&["create", "web", "--template", "py", "--image", "base"]).is_err());
        assert!(action(&["create"]).is_err());
        let line = ["create", "web", "--tcp", "80", "--workdir", "/srv", "--", "httpd", "-f"];
        let Ok(ServiceAction::Create(args)) = action(&line) else { panic!("it is made") };
        assert_eq!(
            (args.command.as_slice(), args.workdir.as_deref()),
            (["httpd".to_owned(), "-f".to_owned()].as_slice(), Some("/srv"))
        );
        assert!(action(&["create", "web", "--user", "agent"]).is_err(), "nothing runs as that");
        assert!(action(&["create", "web", "httpd"]).is_err(), "a command stands behind --");
    }

    #[test]
    fn a_call_is_a_program_or_code() {
        let Ok(ServiceAction::Call(args)) = action(&["call", "web", "--", "ls", "-l"]) else {
            panic!("it is called")
        };
        assert_eq!(args.command, ["ls", "-l"]);
        assert!(action(&["call", "web", "--eval", "6*7"]).is_ok());
        assert!(action(&["call", "web"]).is_err());
        assert!(action(&["call", "web", "--eval", "6*7", "--", "ls"]).is_err());
        assert!(action(&["drain", "web", "web-1", "--grace", "0"]).is_ok());
        assert!(action(&["rm"]).is_err());
    }
}
