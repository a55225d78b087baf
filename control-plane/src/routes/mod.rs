//! The REST API under `/v1`, one file per noun. The OpenAPI document is made from these handlers.

mod agents;
mod conventions;
mod eval;
mod events;
mod exec;
mod files;
mod fork;
mod health;
mod host;
mod images;
mod logs;
mod models;
mod openapi;
mod paging;
mod pools;
mod scheduling;
mod services;
mod shutdown;
mod snapshots;
mod stats;
mod stream;
mod tasks;
mod templates;

use std::sync::Arc;

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::middleware::{from_fn, from_fn_with_state};
use axum::routing::get;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::core::Core;
use crate::etag::{Tagged, conditional};
use crate::idempotency::idempotent;
use crate::inference::{mcp_service, openai};
use crate::problems::translate;

pub use openapi::document;

/// What handlers share.
type Shared = Arc<Core>;

/// Most bytes of a JSON body: room for a few MiB of standard input.
pub(crate) const MAX_JSON: usize = 16 << 20;

/// Every route, documented.
fn documented() -> OpenApiRouter<Shared> {
    let v1 = OpenApiRouter::new()
        .routes(routes!(health::health))
        .routes(routes!(openapi::openapi))
        .routes(routes!(images::list_images))
        .routes(routes!(images::inspect_image))
        .routes(routes!(agents::create_agent, agents::list_agents))
        .routes(routes!(agents::inspect_agent, agents::label_agent, agents::delete_agent))
        .routes(routes!(fork::fork_agent))
        .routes(routes!(fork::pause_agent))
        .routes(routes!(fork::resume_agent))
        .routes(routes!(fork::receipt))
        .routes(routes!(events::events))
        .routes(routes!(eval::eval))
        .routes(routes!(exec::exec))
        .routes(routes!(exec::exec_stream))
        .routes(routes!(exec::resume_exec_stream))
        .routes(routes!(files::read_file, files::write_file))
        .routes(routes!(files::stat_file))
        .routes(routes!(files::list_files))
        .routes(routes!(snapshots::create_snapshot))
        .routes(routes!(snapshots::rewind_agent))
        .routes(routes!(snapshots::list_snapshots))
        .routes(routes!(snapshots::inspect_snapshot, snapshots::delete_snapshot))
        .routes(routes!(snapshots::compact_snapshot))
        .routes(routes!(snapshots::restore_snapshot))
        .routes(routes!(templates::create_template, templates::list_templates))
        .routes(routes!(templates::inspect_template, templates::delete_template))
        .routes(routes!(pools::list_pools))
        .routes(routes!(pools::inspect_pool, pools::set_pool, pools::delete_pool))
        .routes(routes!(models::list_models))
        .routes(routes!(models::inspect_model, models::add_model, models::delete_model))
        .routes(routes!(models::load_model))
        .routes(routes!(logs::logs))
        .routes(routes!(logs::list_consoles))
        .routes(routes!(stats::all_stats))
        .routes(routes!(stats::agent_stats))
        .routes(routes!(scheduling::list_waiting))
        .routes(routes!(scheduling::list_hosts))
        .routes(routes!(scheduling::list_owners))
        .routes(routes!(scheduling::inspect_owner, scheduling::set_quota, scheduling::delete_quota))
        .routes(routes!(services::create_service, services::list_services))
        .routes(routes!(
            services::inspect_service,
            services::set_service,
            services::scale_service,
            services::delete_service
        ))
        .routes(routes!(services::drain_replica))
        .routes(routes!(services::call_service))
        .routes(routes!(services::service_logs))
        .routes(routes!(openai::chat_completions))
        .routes(routes!(openai::completions))
        .routes(routes!(openai::embeddings))
        .routes(routes!(tasks::create_task, tasks::list_tasks))
        .routes(routes!(tasks::inspect_task, tasks::delete_task))
        .routes(routes!(tasks::task_logs))
        .routes(routes!(tasks::cancel_task))
        .routes(routes!(host::host_exec_stream))
        .routes(routes!(shutdown::shut_down));
    openapi::frame().nest("/v1", v1)
}

/// The API over `core`.
pub fn router(core: Arc<Core>) -> Router {
    let (routes, document) = documented().split_for_parts();
    let routes = routes.route("/metrics", get(stats::metrics));
    let routes = routes.layer(DefaultBodyLimit::max(MAX_JSON));
    let tagged = Tagged::new(routes.clone().with_state(Arc::clone(&core)), &document);
    routes
        .layer(from_fn_with_state(tagged, conditional))
        .layer(from_fn_with_state(Arc::clone(&core), idempotent))
        .layer(from_fn(translate))
        .with_state(Arc::clone(&core))
        // Its errors have a form of their own, so no layer is around it.
        .route_service("/mcp", mcp_service(&core))
}
