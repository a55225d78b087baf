//! `GET /v1/health`.

use ark_types::health::{Health, HealthStatus, LogHealth, LogState};
use axum::Json;
use axum::extract::State;

use super::Shared;
use crate::host::{self, Memory, millis};
use crate::problems::Refusal;
use crate::store::Condition;

/// Whether agents can be created here, and why not. Waits for the host probe when `arkd` has just started.
#[utoipa::path(get, path = "/health", tag = "host", responses((status = OK, body = Health, description = "Health")))]
pub(super) async fn health(State(core): State<Shared>) -> Result<Json<Health>, Refusal> {
    let kvm = core.probe().await;
    // A host that hides its memory still runs; creation will say what is wrong.
    let memory_mib = Memory::read().map_or(0, |memory| memory.total_mib);
    let (state, why) = match core.log.condition().borrow().clone() {
        Condition::Writable => (LogState::Writable, None),
        Condition::Full(why) => (LogState::Full, Some(why)),
        Condition::Failing(why) => (LogState::Failing, Some(why)),
    };
    let newest = *core.log.subscribe().borrow();
    Ok(Json(Health {
        status: match (kvm.usable, state) {
            (false, _) => HealthStatus::Degraded,
            (true, LogState::Writable) => HealthStatus::Ok,
            (true, LogState::Full | LogState::Failing) => HealthStatus::ReadOnly,
        },
        version: env!("CARGO_PKG_VERSION").to_owned(),
        pid: std::process::id(),
        host: core.config.host_kind,
        kvm,
        cpus: host::cpus(),
        memory_mib,
        agents: core.registry.living(),
        uptime_ms: millis(core.started.elapsed()),
        log: LogHealth { state, newest, why },
    }))
}
