//! The layer around every route: a request with a key is carried out by a task of its own, and recorded before its reply leaves.

use std::sync::Arc;
use std::time::Duration;

use ark_types::event::Event;
use ark_types::idempotency::{IDEMPOTENCY_KEY, IDEMPOTENCY_REPLAYED, KeptReply, MAX_REPLY};
use ark_types::problem::ProblemKind;
use axum::body::{Body, Bytes, to_bytes};
use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderName, HeaderValue, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;
use tracing::{Instrument as _, Span};

use super::{Bound, CURRENT, Decision, KEYLESS, KeyDigest, RequestDigest};
use crate::core::Core;
use crate::problems::Refusal;
use crate::routes::MAX_JSON;

/// How long a request waits for the same one that is under way.
const PATIENCE: Duration = Duration::from_secs(30);
/// How often a reply that is owed to the log is looked after.
const RETRY: Duration = Duration::from_millis(200);
/// Headers of a reply that are kept.
const KEPT_HEADERS: [HeaderName; 3] = [header::CONTENT_TYPE, header::LOCATION, header::ETAG];

/// See the module.
pub async fn idempotent(State(core): State<Arc<Core>>, request: Request, next: Next) -> Response {
    pass(core, request, next).await.unwrap_or_else(IntoResponse::into_response)
}

async fn pass(core: Arc<Core>, request: Request, next: Next) -> Result<Response, Refusal> {
    // Other methods may be sent again as they are.
    if request.method() != Method::POST {
        return Ok(next.run(request).await);
    }
    let bad = |error: super::InvalidKey| Refusal::new(ProblemKind::BadRequest, error.to_string());
    let Some(key) = KeyDigest::of(request.headers()).map_err(bad)? else {
        return Ok(next.run(request).await);
    };
    check_takes_key(&request)?;
    let (parts, body) = request.into_parts();
    let body = to_bytes(body, MAX_JSON).await.map_err(|_| {
        let detail = format!("the body is longer than {MAX_JSON} bytes, or broke off");
        Refusal::new(ProblemKind::TooLarge, detail)
    })?;
    let target = parts.uri.path_and_query().map_or("", |target| target.as_str());
    let digest = RequestDigest::of(parts.method.as_str(), target, &body);
    match find_turn(&core, key, digest).await? {
        Turn::Mine(under_way) => {
            carry_out(under_way, digest, Request::from_parts(parts, Body::from(body)), next).await
        }
        Turn::Over(reply) => Ok(again(reply)),
    }
}

fn check_takes_key(request: &Request) -> Result<(), Refusal> {
    let route = request.extensions().get::<MatchedPath>().map_or("", MatchedPath::as_str);
    let last = route.rsplit('/').next().unwrap_or_default();
    if KEYLESS.contains(&last) {
        let detail = format!(
            "{route} takes no {IDEMPOTENCY_KEY}: what programs say is not kept, so it could not be said again; send the request without"
        );
        return Err(Refusal::new(ProblemKind::BadRequest, detail));
    }
    Ok(())
}

/// Whose turn it is.
enum Turn {
    Mine(UnderWay),
    Over(KeptReply),
}

/// Waits, not for ever, until a request is not under way any more: then it is to be carried out, or was.
async fn find_turn(core: &Arc<Core>, key: KeyDigest, request: RequestDigest) -> Result<Turn, Refusal> {
    let deadline = tokio::time::Instant::now() + PATIENCE;
    loop {
        match core.requests.decide(&core.ledger, key, request) {
            Decision::CarryOut(over) => {
                return Ok(Turn::Mine(UnderWay { core: Arc::clone(core), key, over }));
            }
            Decision::Replay(reply) => return Ok(Turn::Over(reply)),
            Decision::Refuse => {
                let detail = format!(
                    "this {IDEMPOTENCY_KEY} came with another request before: send a new key with a new request"
                );
                return Err(Refusal::new(ProblemKind::IdempotencyKeyReused, detail));
            }
            Decision::Wait(over) => {
                tokio::time::timeout_at(deadline, over.cancelled()).await.map_err(|_| under_way())?;
            }
        }
    }
}

fn under_way() -> Refusal {
    let detail =
        format!("a request with this {IDEMPOTENCY_KEY} is still being carried out: send it again later");
    Refusal::new(ProblemKind::IdempotencyUnderWay, detail)
}

/// A request with a key that is under way, while this lives.
struct UnderWay {
    core: Arc<Core>,
    key: KeyDigest,
    over: CancellationToken,
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.core.requests.table().end(self.key);
        self.over.cancel();
    }
}

/// Carries `request` out in a task of its own: it goes on when its client leaves.
async fn carry_out(
    turn: UnderWay,
    digest: RequestDigest,
    request: Request,
    next: Next,
) -> Result<Response, Refusal> {
    let (answer, answered) = oneshot::channel();
    let bound = Arc::new(Bound::new(turn.key, digest));
    let work = async move {
        let response = CURRENT.scope(Arc::clone(&bound), next.run(request)).await;
        let settled = settle(&turn.core, &bound, response).await;
        let is_owed = settled.is_err();
        // Whoever asked may have left.
        let _ = answer.send(settled);
        if is_owed {
            await_record(&turn.core, &bound).await;
        }
    };
    tokio::spawn(work.instrument(Span::current()));
    answered.await.unwrap_or_else(|_| {
        let detail = "the request was interrupted; its key is free, so send it again";
        Err(Refusal::new(ProblemKind::Internal, detail))
    })
}

/// Records what became of a request, and what is replied to it then.
async fn settle(core: &Core, bound: &Bound, response: Response) -> Result<Response, Refusal> {
    if !response.status().is_success() {
        if *bound.has_made() {
            // Nothing of it is left, so nobody has to wait for that.
            drop(core.ledger.record(bound.stream(), vec![Event::RequestDropped {}]));
        }
        return Ok(response);
    }
    let (parts, body) = response.into_parts();
    let body = to_bytes(body, MAX_REPLY).await.map_err(|_| {
        let detail = format!("the reply is longer than {MAX_REPLY} bytes, so it cannot be kept; report this");
        Refusal::new(ProblemKind::Internal, detail)
    })?;
    let kept = |name: &HeaderName| {
        let value = parts.headers.get(name)?.to_str().ok()?;
        Some((name.to_string(), value.to_owned()))
    };
    let reply = KeptReply {
        request: bound.request.to_string(),
        status: parts.status.as_u16(),
        headers: KEPT_HEADERS.iter().filter_map(kept).collect(),
        body: String::from_utf8_lossy(&body).into_owned(),
    };
    let answered = Event::RequestAnswered { key: bound.key.to_string(), reply };
    core.ledger.record(bound.stream(), vec![answered]).await.map_err(|error| {
        let Refusal(mut problem) = error.into();
        problem.detail = format!(
            "it is done, but that is not recorded yet: {}; send it again with its key",
            problem.detail
        );
        Refusal(problem)
    })?;
    core.ledger.caught_up().await;
    Ok(Response::from_parts(parts, Body::from(body)))
}

/// Waits until the log took in what is owed to it of a request, so that nobody carries it out again before.
async fn await_record(core: &Core, bound: &Bound) {
    while core.ledger.settled(&bound.stream()).is_err() {
        tokio::time::sleep(RETRY).await;
    }
    core.ledger.caught_up().await;
}

/// The reply that was given before.
fn again(reply: KeptReply) -> Response {
    let KeptReply { status, headers, body, .. } = reply;
    let mut response = Response::new(Body::from(Bytes::from(body)));
    *response.status_mut() = StatusCode::from_u16(status).unwrap_or(StatusCode::OK);
    for (name, value) in &headers {
        // They came from a reply, so they are some.
        if let (Ok(name), Ok(value)) = (name.parse::<HeaderName>(), HeaderValue::from_str(value)) {
            response.headers_mut().insert(name, value);
        }
    }
    response.headers_mut().insert(IDEMPOTENCY_REPLAYED, HeaderValue::from_static("true"));
    response
}
