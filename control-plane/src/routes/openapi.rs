//! `GET /v1/openapi.json`: the document made from the handlers.

use std::sync::LazyLock;

use ark_types::console::{ConsoleEnd, ConsoleGap, ConsolePiece};
use ark_types::exec::{ExecAck, ExecSession};
use ark_types::problem::{PROBLEM_JSON, Problem};
use axum::http::header;
use axum::response::IntoResponse;
use utoipa::openapi::response::Response;
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityRequirement, SecurityScheme};
use utoipa::openapi::{ContentBuilder, InfoBuilder, OpenApi, OpenApiBuilder, Ref, RefOr, ResponseBuilder};
use utoipa::{OpenApi as _, ToSchema as _};
use utoipa_axum::router::OpenApiRouter;

use super::{Shared, conventions, documented};

/// Name of the bearer token's scheme.
const TOKEN: &str = "token";

static DOCUMENT: LazyLock<String> = LazyLock::new(|| {
    let mut json = document().to_pretty_json().unwrap_or_default();
    json.push('\n');
    json
});

/// This document.
#[utoipa::path(
    get, path = "/openapi.json", tag = "host",
    responses((status = OK, body = serde_json::Value, description = "OpenAPI 3.1")),
)]
pub(super) async fn openapi() -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "application/json")], DOCUMENT.as_str())
}

/// Schemas that no handler names.
#[derive(utoipa::OpenApi)]
#[openapi(components(schemas(Problem, ExecSession, ExecAck, ConsolePiece, ConsoleGap, ConsoleEnd)))]
struct Extra;

/// The document's head, before any route.
pub(super) fn frame() -> OpenApiRouter<Shared> {
    let info = InfoBuilder::new()
        .title("NOA ARK")
        .version("1")
        .description(Some(
            "Disposable microVM agents. Every error is a problem (RFC 9457); on TCP every request bears the token. Every reply says \
             which `arkd` gave it (`Ark-Version`) and which API that is (`Ark-Api-Version`: v1); a request that names another one is \
             refused.",
        ))
        .build();
    let mut head = OpenApiBuilder::new().info(info).build();
    head.merge(Extra::openapi());
    let components = head.components.get_or_insert_default();
    let bearer = HttpBuilder::new().scheme(HttpAuthScheme::Bearer).build();
    components.add_security_scheme(TOKEN, SecurityScheme::Http(bearer));
    components.responses.insert("Problem".to_owned(), RefOr::T(problem_response()));
    // The empty alternative is the Unix socket, which asks for no token.
    head.security =
        Some(vec![SecurityRequirement::new::<_, _, String>(TOKEN, []), SecurityRequirement::default()]);
    OpenApiRouter::with_openapi(head)
}

fn problem_response() -> Response {
    let schema = Ref::from_schema_name(Problem::name());
    ResponseBuilder::new()
        .description("What failed, why, and what to do next")
        .content(PROBLEM_JSON, ContentBuilder::new().schema(Some(schema)).build())
        .build()
}

/// The OpenAPI document of the whole API.
#[must_use]
pub fn document() -> OpenApi {
    let (_, mut document) = documented().split_for_parts();
    for (path, item) in &mut document.paths.paths {
        conventions::document(path, item);
    }
    document
}
