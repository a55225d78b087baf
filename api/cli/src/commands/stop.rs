//! `ark stop`: everything ark started on this machine.

use serde_json::json;

use crate::daemon;
use crate::failure::Failure;
use crate::host::Context;
use crate::machine::Stopped;

/// Stops arkd with its agents, and the emulated host with its own; what does not run is no error.
pub(crate) async fn stop(context: &Context) -> Result<(), Failure> {
    let arkd = daemon::stop(&context.dirs).await?;
    let machine = context.machine().stop(context.ui).await? != Stopped::DidNotRun;
    context.ui.show(&json!({ "arkd": arkd, "machine": machine }), |_| {
        let stopped = match (arkd, machine) {
            (false, false) => "nothing runs",
            (true, false) => "stopped: arkd and its agents",
            (false, true) => "stopped: the emulated host and its agents",
            (true, true) => "stopped: arkd, the emulated host, and their agents",
        };
        stopped.to_owned()
    })
}
