//! Services: a name behind which a number of agents of one make stand, and that picks one for each call.
//!
//! Agents find services by themselves: any program of theirs connects to [`crate::guest::SERVICES_PORT`] of the host (CID 2,
//! vsock) and sends one line.
//!
//! | line | answer |
//! |---|---|
//! | `CONNECT <service>` | `OK <agent>`, and from then on the stream is one to the port of that replica; or `ERR <sentence>`, and the end |
//! | `LIST` | one [`FoundService`] as JSON a line, and the end; or `ERR <sentence>` |
//!
//! Lines end with `\n` and have at most [`MAX_LINE`] bytes with it. An agent finds the services of its own owner only.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::agent::{AgentName, AgentState};
use crate::eval::{EvalReply, EvalRequest};
use crate::exec::{ExecReply, ExecRequest};
use crate::healing::{AgentHealth, RestartPolicy};
use crate::health_check::HealthCheck;
use crate::image::ImageName;
use crate::label::{Labels, Owner};
use crate::permission::Permission;

/// Label of a replica: the service that it is one of.
pub const SERVICE_LABEL: &str = "ark.service";
/// Label of a replica: the generation that it is made as.
pub const GENERATION_LABEL: &str = "ark.generation";
/// Label of a replica that runs the command of its service.
pub const COMMAND_LABEL: &str = "ark.command";

/// Most replicas of a service.
pub const MAX_REPLICAS: u32 = 200;
/// Most services.
pub const MAX_SERVICES: usize = 1000;
/// Longest name of a service, bytes: that of a replica has a dash and eight more, and is a host name.
pub const MAX_SERVICE_NAME: usize = 54;
/// Longest that a call waits for a replica, milliseconds.
pub const MAX_CALL_WAIT_MS: u64 = 600_000;
/// How long a call waits for a replica when it does not say, milliseconds.
pub const DEFAULT_CALL_WAIT_MS: u64 = 10_000;

/// Ends of its command, for each replica that is wanted, after which a service whose restart policy has no bound of its own makes
/// no more replicas: see [`ServiceCommand`].
pub const MOST_ENDS: u32 = 5;
/// After this time without an end of a command those before count no more, seconds.
pub const QUIET_S: u64 = 600;

/// Longest line that an agent may send to find a service, bytes.
pub const MAX_LINE: usize = 128;

/// What an agent asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wish {
    /// To be connected with a replica of this service.
    Connect(AgentName),
    /// To know which services there are.
    List,
}

/// A line that says no [`Wish`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the line cannot be understood: send CONNECT and the name of a service, or LIST")]
pub struct NoWish;

impl Wish {
    /// Reads a line, without its end.
    ///
    /// # Errors
    /// [`NoWish`].
    pub fn parse(line: &[u8]) -> Result<Self, NoWish> {
        let text = std::str::from_utf8(line).map_err(|_| NoWish)?;
        match text.strip_suffix('\r').unwrap_or(text).split_once(' ') {
            Some(("CONNECT", name)) => Ok(Self::Connect(name.parse().map_err(|_| NoWish)?)),
            None if text.trim_end() == "LIST" => Ok(Self::List),
            _ => Err(NoWish),
        }
    }
}

impl fmt::Display for Wish {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Connect(service) => write!(f, "CONNECT {service}"),
            Self::List => f.write_str("LIST"),
        }
    }
}

/// A service, as an agent finds it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FoundService {
    /// Its name.
    pub name: AgentName,
    /// Replicas that take connections.
    pub ready: u32,
    /// Whether it takes connections at all: whether its spec names a port.
    pub connectable: bool,
}

/// What a service is to be: the body of `POST /v1/services` and of `PUT /v1/services/{service}`.
///
/// Replicas that run go on as they are when only `replicas` or `update` change. Any other change makes a new generation, which
/// takes the old one's place a few replicas at a time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ServiceSpec {
    /// Name: as that of an agent, and at most 54 characters.
    pub name: AgentName,
    /// Agents that are to serve, 0 to 200.
    pub replicas: u32,
    /// Image that they are made of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<ImageName>,
    /// Template that they are forked from, instead of `image`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub template: Option<AgentName>,
    /// As of an agent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vcpus: Option<u32>,
    /// As of an agent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_mib: Option<u64>,
    /// Environment variables that every program of every replica starts with. Their values are told to nobody.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// Labels of the replicas, beside `ark.service` and `ark.generation`.
    #[serde(default, skip_serializing_if = "Labels::is_empty")]
    pub labels: Labels,
    /// Who it belongs to, and its replicas with it.
    #[serde(default, skip_serializing_if = "Owner::is_default")]
    pub owner: Owner,
    /// What its replicas may use of the platform; nothing when absent.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub allow: Vec<Permission>,
    /// TCP port at 127.0.0.1 of every replica where its program listens: other agents of the owner are connected with it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// What runs in every replica for as long as that lives.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub command: Option<ServiceCommand>,
    /// How every replica is checked. It takes no calls before a check has passed; later the check is one of the agent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub health_check: Option<HealthCheck>,
    /// Whether a replica begins anew when its VMM ends; `always` when absent. One that does not is replaced.
    #[serde(default = "always")]
    pub restart: RestartPolicy,
    /// How a new generation takes the old one's place.
    #[serde(default)]
    pub update: UpdatePolicy,
}

/// A program that is started once in every replica of a service and is to run on, a server for example.
///
/// It has the environment of the service. A replica is ready while it runs, from when the health check of the service has passed
/// or, without one, its port takes connections; a service with neither has replicas that are ready at once.
///
/// Where it ends, however it does, its replica has failed and is replaced: after 1 s at first, twice as long each time, 60 s at
/// most. After more ends than the restart policy allows, or 5, for each replica that is wanted, and no 10 minutes without one in
/// between, no more replicas are made until the service is set again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ServiceCommand {
    /// Program and arguments; the program is looked up in the `PATH` when it has no slash.
    pub argv: Vec<String>,
    /// Working directory; `/root` (or `/` where it is missing) when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cwd: Option<String>,
    /// User name or numeric id, with `:group` if wanted; root when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
}

impl ServiceCommand {
    /// What a replica is asked to run.
    #[must_use]
    pub fn exec(&self) -> ExecRequest {
        let Self { argv, cwd, user } = self.clone();
        ExecRequest { argv, cwd, user, ..ExecRequest::default() }
    }
}

const fn always() -> RestartPolicy {
    RestartPolicy::Always { max_restarts: None }
}

impl ServiceSpec {
    /// It without the values of its environment, and their names.
    #[must_use]
    pub fn without_values(self) -> (Self, Vec<String>) {
        let names = self.env.keys().cloned().collect();
        (Self { env: BTreeMap::new(), ..self }, names)
    }

    /// Whether a replica of `self` is as one of `other` is to be.
    #[must_use]
    pub fn is_of_one_make(&self, other: &Self) -> bool {
        let Self { replicas, update, .. } = self.clone();
        Self { replicas, update, ..other.clone() } == *self
    }
}

/// How a new generation takes the old one's place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct UpdatePolicy {
    /// So many fewer than `replicas` may be ready meanwhile, 0 to 200.
    pub max_unavailable: u32,
    /// So many more than `replicas` may be there meanwhile, 0 to 200; not 0 where `max_unavailable` is.
    pub max_surge: u32,
}

impl Default for UpdatePolicy {
    fn default() -> Self {
        Self { max_unavailable: 0, max_surge: 1 }
    }
}

/// Body of `PATCH /v1/services/{service}`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ScaleService {
    /// Agents that are to serve from now on, 0 to 200.
    pub replicas: u32,
}

/// Body of `POST /v1/services/{service}/drain`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DrainReplica {
    /// Name or id of the replica.
    pub agent: String,
}

/// Whether a replica takes calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ReplicaState {
    /// It does.
    Ready,
    /// It is made, or begins anew.
    Starting,
    /// It is there and does not answer as it should, or stands still.
    Unready,
    /// It takes no new calls, finishes those under way and goes.
    Draining,
    /// It ended and goes.
    Ended,
}

impl ReplicaState {
    /// Every state.
    pub const ALL: [Self; 5] = [Self::Ready, Self::Starting, Self::Unready, Self::Draining, Self::Ended];
}

impl fmt::Display for ReplicaState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Ready => "ready",
            Self::Starting => "starting",
            Self::Unready => "unready",
            Self::Draining => "draining",
            Self::Ended => "ended",
        })
    }
}

/// One agent of a service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Replica {
    /// The agent's name.
    pub agent: AgentName,
    /// The agent's id.
    pub id: String,
    /// Generation that it is made as.
    pub generation: u64,
    /// Whether it takes calls.
    pub state: ReplicaState,
    /// Where the agent is in its life.
    pub agent_state: AgentState,
    /// Whether its guest is heard.
    #[serde(default, skip_serializing_if = "AgentHealth::is_healthy")]
    pub health: AgentHealth,
    /// What it waits for to be ready, or how its command ended, as a sentence.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Calls under way in it.
    pub load: u32,
}

/// A replica whose command ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ReplicaFailure {
    /// The agent's name, under which its last output is kept until the next one fails.
    pub agent: AgentName,
    /// The agent's id.
    pub id: String,
    /// How its command ended and what it wrote last, as a sentence.
    pub reason: String,
    /// When that was known, milliseconds since the Unix epoch.
    pub at_unix_ms: u64,
}

/// A service as `arkd` reports it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Service {
    /// What it is to be, without the values of its environment.
    pub spec: ServiceSpec,
    /// Names of its environment's variables.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub env: Vec<String>,
    /// How often what its replicas are made as has changed, from 1.
    pub generation: u64,
    /// Replicas that take calls.
    pub ready: u32,
    /// Those of them that are made as they are to be.
    pub updated: u32,
    /// Its replicas, oldest first.
    pub replicas: Vec<Replica>,
    /// Whether its update failed, or its command ended too often, so that no more replicas are made until it is set again.
    pub is_stopped: bool,
    /// The last replica of it whose command ended, as far as this `arkd` knows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_failure: Option<ReplicaFailure>,
    /// What keeps it from being as it is to be, as sentences; empty when nothing does.
    pub conditions: Vec<String>,
}

/// Reply of `GET /v1/services`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ServiceList {
    /// Services, by name.
    pub services: Vec<Service>,
}

/// Body of `POST /v1/services/{service}/call`: what one of its replicas is to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ServiceCall {
    /// Run a program to its end.
    Exec(ExecRequest),
    /// Run code in its warm interpreter.
    Eval(EvalRequest),
}

/// Reply of `POST /v1/services/{service}/call`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ServiceReply {
    /// Name of the replica that answered.
    pub agent: AgentName,
    /// Its id.
    pub id: String,
    /// What it answered.
    pub result: CallResult,
}

/// What a replica answered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum CallResult {
    /// The program ended.
    Exec(ExecReply),
    /// The code ended.
    Eval(EvalReply),
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn wishes_are_lines() {
        let connect = Wish::Connect("web-1".parse().unwrap());
        for (line, wish) in [
            ("CONNECT web-1", Ok(connect.clone())),
            ("CONNECT web-1\r", Ok(connect)),
            ("LIST", Ok(Wish::List)),
            ("LIST\r", Ok(Wish::List)),
            ("CONNECT", Err(NoWish)),
            ("CONNECT ", Err(NoWish)),
            ("CONNECT Web", Err(NoWish)),
            ("CONNECT web 80", Err(NoWish)),
            ("LIST all", Err(NoWish)),
            ("GET / HTTP/1.1", Err(NoWish)),
        ] {
            assert_eq!(Wish::parse(line.as_bytes()), wish, "{line:?}");
        }
        let longest: AgentName = "x".repeat(63).parse().unwrap();
        assert!(Wish::Connect(longest).to_string().len() < MAX_LINE);
    }

    proptest! {
        #[test]
        fn any_line_is_a_wish_or_none(line in prop::collection::vec(any::<u8>(), 0..80)) {
            if let Ok(wish) = Wish::parse(&line) {
                prop_assert_eq!(Wish::parse(wish.to_string().as_bytes()), Ok(wish));
            }
        }
    }
}
