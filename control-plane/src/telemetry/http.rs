//! Requests by route template, method and status, and the time until the head of each reply.

use std::sync::Arc;
use std::time::Instant;

use axum::Router;
use axum::extract::{MatchedPath, Request, State};
use axum::http::Method;
use axum::middleware::{Next, from_fn_with_state};
use axum::response::Response;
use tracing::Instrument as _;

use crate::core::Core;
use crate::traces;

/// `routes`, every request to them counted. Put it outside of everything that answers by itself.
pub fn measured(routes: Router, core: &Arc<Core>) -> Router {
    routes.layer(from_fn_with_state(Arc::clone(core), measure))
}

async fn measure(State(core): State<Arc<Core>>, request: Request, next: Next) -> Response {
    let began = Instant::now();
    let method = word(request.method());
    // Paths have names in them that clients chose: only the template is told.
    let matched = request.extensions().get::<MatchedPath>();
    let route = matched.map_or_else(|| "none".to_owned(), |path| template(path.as_str()));
    let span = traces::request(method, &route, request.headers());
    let response = next.run(request).instrument(span.clone()).await;
    traces::answered(&span, response.status().as_u16());
    let status = response.status().as_u16().to_string();
    let telemetry = &core.telemetry;
    let time = telemetry
        .request_time
        .get_or_create_owned(&[("route", route.clone().into()), ("method", method.into())]);
    time.observe(began.elapsed().as_secs_f64());
    let labels = [("route", route.into()), ("method", method.into()), ("status", status.into())];
    telemetry.requests.get_or_create(&labels).inc();
    response
}

/// `/v1/agents/:agent` for `/v1/agents/{agent}`: many who read metrics stumble over braces in a value.
fn template(path: &str) -> String {
    path.replace('{', ":").replace('}', "")
}

/// The method; clients may invent some.
fn word(method: &Method) -> &'static str {
    match method.as_str() {
        "GET" => "GET",
        "HEAD" => "HEAD",
        "POST" => "POST",
        "PUT" => "PUT",
        "PATCH" => "PATCH",
        "DELETE" => "DELETE",
        "OPTIONS" => "OPTIONS",
        _ => "other",
    }
}
