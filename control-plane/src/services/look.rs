//! The task that sees to it that services are as they are to be.

use std::sync::{Arc, Weak};
use std::time::Duration;

use ark_types::agent::AgentName;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::entry::Order;
use crate::core::Core;
use crate::spawn::spawn;

/// How often services are looked at when nothing happens: health and the end of waits are no events.
const LOOK: Duration = Duration::from_millis(500);
/// Least time between two looks: what happens at once is looked at once.
const PAUSE: Duration = Duration::from_millis(20);

/// Looks after the services of `core` until that goes or `closing` is cancelled.
pub(super) async fn look_after(core: Weak<Core>, closing: CancellationToken) {
    tokio::select! {
        () = closing.cancelled() => {}
        () = look(core) => {}
    }
}

async fn look(core: Weak<Core>) {
    let both = core.upgrade().map(|core| (core.log.subscribe(), Arc::clone(&core.services.wake)));
    let Some((mut newest, wake)) = both else { return };
    loop {
        let Some(core) = core.upgrade() else { return };
        let (orders, any) = core.services.attend(&core);
        for (service, order) in orders {
            obey(&core, service, order);
        }
        core.services.looks.send_modify(|looks| *looks = looks.wrapping_add(1));
        drop(core);
        sleep(PAUSE).await;
        if any {
            // A notice, an event or the time: either way it is looked again.
            let news = async {
                tokio::select! {
                    () = wake.notified() => {}
                    _ = newest.changed() => {}
                }
            };
            let _ = timeout(LOOK, news).await;
        } else {
            wake.notified().await;
        }
    }
}

fn obey(core: &Arc<Core>, service: AgentName, order: Order) {
    match order {
        Order::Make { request, generation } => {
            let core = Arc::clone(core);
            tokio::spawn(async move {
                let Some(name) = request.name.clone() else { return };
                let made = spawn(&core, *request).await.map(|_| ());
                if let Err(error) = &made {
                    tracing::warn!(%service, replica = %name, error = error.0.detail, "a replica did not start");
                }
                core.services.made(&service, &name, generation, made);
            });
        }
        Order::Remove(handle, grace) => {
            tracing::info!(%service, replica = %handle.name(), "a replica goes");
            handle.ask_removal(grace);
        }
    }
}
