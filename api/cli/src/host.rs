//! Which host agents run on, and the way to it.

use ark_client::Client;
use ark_types::version::is_same_release;

use crate::args::{Global, HostChoice, MachineSize};
use crate::daemon;
use crate::dirs::Dirs;
use crate::failure::Failure;
use crate::machine::Machine;
use crate::output::Ui;
use crate::probe;

/// What every verb works with.
pub(crate) struct Context {
    /// Options of every verb.
    pub(crate) global: Global,
    /// Where things are.
    pub(crate) dirs: Dirs,
    /// What the user sees.
    pub(crate) ui: Ui,
}

/// Where agents run, and why there.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Decision {
    /// On this machine's KVM.
    Native,
    /// In the emulated host, for this reason.
    Machine(String),
}

impl Context {
    /// Decides where agents run; the probe runs only when the user left it open.
    pub(crate) async fn decide(&self) -> Result<Decision, Failure> {
        Ok(match self.global.host {
            HostChoice::Native => Decision::Native,
            HostChoice::Machine => Decision::Machine("asked for by --host or ARK_HOST".to_owned()),
            HostChoice::Auto => {
                let report = probe::cached(&self.dirs).await?;
                if report.usable { Decision::Native } else { Decision::Machine(report.reason) }
            }
        })
    }

    /// The emulated host of this user.
    pub(crate) fn machine(&self) -> Machine {
        Machine::new(self.dirs.clone(), self.global.port)
    }

    /// A client of an `arkd` that answers; starts what is needed for that, and says so when that is the emulated host.
    pub(crate) async fn client(&self) -> Result<Client, Failure> {
        self.connect(false).await
    }

    /// The same for verbs that boot an agent: at a terminal they always say that software emulation is in use, because
    /// it explains their speed.
    pub(crate) async fn client_to_boot(&self) -> Result<Client, Failure> {
        self.connect(self.ui.progress).await
    }

    async fn connect(&self, announce: bool) -> Result<Client, Failure> {
        let client = self.reach(announce).await?;
        let ours = env!("CARGO_PKG_VERSION");
        if let Some(theirs) = client.server_version()
            && !is_same_release(ours, theirs)
        {
            self.ui.note(&format!(
                "this is ark {ours}, and arkd is of {theirs}: some of what they say to each other may get lost; `ark stop` ends that arkd, and the next command starts one of this release"
            ));
        }
        Ok(client)
    }

    async fn reach(&self, announce: bool) -> Result<Client, Failure> {
        match self.decide().await? {
            Decision::Native => Ok(daemon::ensure(&self.dirs).await?),
            Decision::Machine(reason) => {
                let machine = self.machine();
                // The advice that follows the reason is for `ark doctor`.
                let reason = reason.split("; ").next().unwrap_or_default();
                let notice = format!("using software emulation (QEMU): {reason}");
                if let Some(client) = machine.running_client().await? {
                    if announce {
                        self.ui.note(&notice);
                    }
                    return Ok(client);
                }
                self.ui.note(&notice);
                Ok(machine.start(&MachineSize::default(), self.ui).await?.client)
            }
        }
    }
}
