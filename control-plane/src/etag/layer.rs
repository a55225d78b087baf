//! The layer around every route.

use std::collections::HashSet;
use std::sync::Arc;

use ark_types::problem::ProblemKind;
use axum::Router;
use axum::body::{Body, to_bytes};
use axum::extract::{MatchedPath, Request, State};
use axum::http::{Method, StatusCode, Uri, header};
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};
use serde::Deserialize;
use tower::ServiceExt as _;
use utoipa::openapi::OpenApi;

use super::{Condition, ETag, Turns};
use crate::idempotency::KEYLESS;
use crate::problems::Refusal;

/// Most bytes of a representation that is tagged.
const MAX_THING: usize = 4 << 20;

/// What the layer needs: the routes, to look at a thing, what can be asked of them, and whose turn it is.
#[derive(Clone, Debug)]
pub struct Tagged {
    routes: Router,
    /// Routes and methods that change something.
    changes: Arc<HashSet<(String, Method)>>,
    turns: Arc<Turns>,
}

impl Tagged {
    /// Over `routes`, as they are without the layer and as `document` describes them.
    #[must_use]
    pub fn new(routes: Router, document: &OpenApi) -> Self {
        let changes = document.paths.paths.iter().flat_map(|(path, item)| {
            let methods = [
                (&item.post, Method::POST),
                (&item.put, Method::PUT),
                (&item.patch, Method::PATCH),
                (&item.delete, Method::DELETE),
            ];
            methods.into_iter().filter_map(|(known, method)| known.as_ref().map(|_| (path.clone(), method)))
        });
        Self { routes, changes: Arc::new(changes.collect()), turns: Arc::default() }
    }

    /// The tag of the thing at `path`, if it is there and has one.
    async fn look(&self, path: &str) -> Option<ETag> {
        tag(self.get(path).await?).await.1
    }

    /// What a turn with the thing at `path` is a turn with: its id where it has one, as it may have several paths.
    async fn identity(&self, path: &str) -> String {
        #[derive(Deserialize)]
        struct Identified {
            id: String,
        }
        let thing = async {
            let body = to_bytes(self.get(path).await?.into_body(), MAX_THING).await.ok()?;
            serde_json::from_slice::<Identified>(&body).ok()
        };
        thing.await.map_or_else(|| path.to_owned(), |thing| thing.id)
    }

    async fn get(&self, path: &str) -> Option<Response> {
        let request = Request::get(path).body(Body::empty()).ok()?;
        self.routes.clone().oneshot(request).await.ok()
    }
}

/// See the module.
pub async fn conditional(State(tagged): State<Tagged>, request: Request, next: Next) -> Response {
    let Some(route) = request.extensions().get::<MatchedPath>().cloned() else {
        return next.run(request).await;
    };
    if *request.method() == Method::GET {
        return if is_thing(route.as_str()) { read(request, next).await } else { next.run(request).await };
    }
    // What cannot be asked for is refused as that, whatever the condition.
    if !tagged.changes.contains(&(route.as_str().to_owned(), request.method().clone())) {
        return next.run(request).await;
    }
    let condition = Condition::of(request.headers(), &header::IF_MATCH);
    let replaces = matches!(*request.method(), Method::PUT | Method::PATCH) && is_thing(route.as_str());
    if condition.is_none() && !replaces {
        return next.run(request).await;
    }
    let Some(thing) = thing_of(route.as_str(), request.uri()) else {
        return failed("nothing that could be tagged is at this address").into_response();
    };
    let turn = tagged.turns.take(&tagged.identity(&thing).await).await;
    if let Some(condition) = condition {
        // What is not there is told by the route itself.
        if let Some(now) = tagged.look(&thing).await
            && !condition.matches(&now)
        {
            return failed(&format!("{thing} is {now} by now")).into_response();
        }
    }
    // A program may run for hours, and changes nothing that a turn could guard.
    let is_call = route.as_str().rsplit('/').next().is_some_and(|last| KEYLESS.contains(&last));
    let _turn = (!is_call).then_some(turn);
    let response = next.run(request).await;
    if replaces { tag(response).await.0 } else { response }
}

/// A thing, or that it has not changed.
async fn read(request: Request, next: Next) -> Response {
    let known = Condition::of(request.headers(), &header::IF_NONE_MATCH);
    let (mut response, tag) = tag(next.run(request).await).await;
    let is_known = tag.is_some_and(|tag| known.is_some_and(|known| known.matches_weakly(&tag)));
    if is_known {
        *response.status_mut() = StatusCode::NOT_MODIFIED;
        *response.body_mut() = Body::empty();
        response.headers_mut().remove(header::CONTENT_TYPE);
        response.headers_mut().remove(header::CONTENT_LENGTH);
    }
    response
}

fn failed(why: &str) -> Refusal {
    let detail =
        format!("the condition in `If-Match` does not hold: {why}; look at it again, and decide anew");
    Refusal::new(ProblemKind::PreconditionFailed, detail)
}

/// Whether the route is that of one thing: it ends in a parameter.
fn is_thing(route: &str) -> bool {
    route.ends_with('}')
}

/// The path of the thing that a request to `route` is about: up to the route's last parameter.
fn thing_of(route: &str, uri: &Uri) -> Option<String> {
    let segments = route.split('/').collect::<Vec<_>>();
    let last = segments.iter().rposition(|segment| is_thing(segment))?;
    let path: Vec<&str> = uri.path().split('/').take(last + 1).collect();
    Some(path.join("/"))
}

/// The reply with its tag in its head, if it is a thing, and that.
async fn tag(response: Response) -> (Response, Option<ETag>) {
    let is_json = response.headers().get(header::CONTENT_TYPE).is_some_and(|kind| kind == "application/json");
    if response.status() != StatusCode::OK || !is_json {
        return (response, None);
    }
    let (mut parts, body) = response.into_parts();
    let Ok(body) = to_bytes(body, MAX_THING).await else {
        let detail = format!("a reply is longer than {MAX_THING} bytes, so it has no tag; report this");
        return (Refusal::new(ProblemKind::Internal, detail).into_response(), None);
    };
    let tag = ETag::of(&body);
    if let Some(tag) = &tag {
        parts.headers.insert(header::ETAG, tag.to_header());
    }
    (Response::from_parts(parts, Body::from(body)), tag)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_about_the_thing_that_its_route_names_last() {
        let thing = |route: &str, path: &str| thing_of(route, &path.parse().unwrap());
        let agent = Some("/v1/agents/a%201".to_owned());
        assert_eq!(thing("/v1/agents/{agent}", "/v1/agents/a%201?grace_ms=0"), agent);
        assert_eq!(thing("/v1/agents/{agent}/pause", "/v1/agents/a%201/pause"), agent);
        assert_eq!(thing("/v1/agents", "/v1/agents"), None);
    }
}
