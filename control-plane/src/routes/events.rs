//! `GET /v1/events`: what happened, as pages or as a stream that can be taken up again.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use ark_types::event::{DEFAULT_EVENTS, EventList, MAX_EVENTS, Recorded, Stream};
use ark_types::problem::ProblemKind;
use axum::Json;
use axum::extract::{Query, State};
use axum::http::{HeaderMap, header};
use axum::response::sse::{Event as SseEvent, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::stream;
use serde::Deserialize;
use tokio::sync::{OwnedSemaphorePermit, watch};
use tokio_util::sync::CancellationToken;
use utoipa::IntoParams;

use super::Shared;
use crate::core::MAX_FOLLOWERS;
use crate::problems::Refusal;
use crate::store::{EventLog, ReadError};

/// Header with which a client takes a stream up again.
const LAST_EVENT_ID: &str = "last-event-id";
/// Events that a stream reads ahead of its client, at most.
const AHEAD: usize = 64;
/// Events that are looked through for one page, at most.
const MAX_SCAN: usize = 10 * MAX_EVENTS;
/// How often a stream without events shows that it lives.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// Which events.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub(super) struct EventQuery {
    /// Those after this position; from the oldest there is when absent.
    after: Option<u64>,
    /// At most so many on a page, 1 to 1000; 100 when absent. A stream has no end.
    limit: Option<usize>,
    /// Those of this stream, such as agent/0123456789abcdef.
    #[param(value_type = Option<String>)]
    stream: Option<Stream>,
    /// Those of this type, such as agent.created.
    #[serde(rename = "type")]
    kind: Option<String>,
}

impl EventQuery {
    fn lets(&self, event: &Recorded) -> bool {
        self.stream.as_ref().is_none_or(|stream| *stream == event.stream)
            && self.kind.as_ref().is_none_or(|kind| kind == event.event.kind())
    }
}

/// What happened, oldest first.
///
/// The reply is one page; `next_after` of it is `after` of the next one. With `Accept: text/event-stream` it is a stream of
/// server-sent events instead, each with its position as `id`, its type as `event` and itself as `data`, which goes on until the
/// client leaves and is taken up again with `Last-Event-ID` or `after`.
#[utoipa::path(
    get, path = "/events", tag = "events",
    params(EventQuery, ("last-event-id" = Option<u64>, Header, description = "Of a stream: the last event that arrived")),
    responses((
        status = OK, description = "Events",
        content((EventList = "application/json"), (String = "text/event-stream")),
    )),
)]
pub(super) async fn events(
    State(core): State<Shared>,
    Query(query): Query<EventQuery>,
    headers: HeaderMap,
) -> Result<Response, Refusal> {
    let streams = wants_stream(&headers);
    let last = if streams { last_event_id(&headers)? } else { None };
    let asked = last.or(query.after);
    let after = start(&core, asked).await?;
    let may_skip = asked.is_none();
    if streams {
        let place = Arc::clone(&core.followers).try_acquire_owned().map_err(|_| too_many())?;
        let follower = Follower {
            _place: place,
            closing: core.closing.clone(),
            newest: core.log.subscribe(),
            log: Arc::clone(&core.log),
            query,
            after,
            may_skip,
            ahead: VecDeque::new(),
            over: false,
        };
        let events = stream::unfold(follower, |mut follower| async {
            let event = follower.next().await?;
            Some((Ok::<_, axum::Error>(event), follower))
        });
        return Ok(Sse::new(events).keep_alive(KeepAlive::new().interval(KEEP_ALIVE)).into_response());
    }
    Ok(Json(page(&core, &query, after, may_skip).await?).into_response())
}

/// Whether the reply is to be server-sent events.
pub(super) fn wants_stream(headers: &HeaderMap) -> bool {
    let mut accepts = headers.get_all(header::ACCEPT).iter();
    accepts.any(|accept| accept.to_str().is_ok_and(|accept| accept.contains("text/event-stream")))
}

fn too_many() -> Refusal {
    let detail = format!(
        "{MAX_FOLLOWERS} clients follow the events already: end one of them, or ask for pages with `after` instead"
    );
    Refusal::new(ProblemKind::HostUnable, detail)
}

/// The position from which on the client takes a stream up again.
pub(super) fn last_event_id(headers: &HeaderMap) -> Result<Option<u64>, Refusal> {
    let Some(value) = headers.get(LAST_EVENT_ID) else { return Ok(None) };
    match value.to_str().ok().and_then(|text| text.parse().ok()) {
        Some(id) => Ok(Some(id)),
        None => {
            let detail = format!(
                "{LAST_EVENT_ID} is no position in this stream: send the `id` of the last event that arrived"
            );
            Err(Refusal::new(ProblemKind::InvalidValue, detail))
        }
    }
}

/// The position to begin after, which the log has reached and not let go of: that which is `asked` for, or the oldest.
async fn start(core: &Shared, asked: Option<u64>) -> Result<u64, Refusal> {
    let Some(after) = asked else {
        return match core.log.read(0, 1).await {
            Err(ReadError::Compacted { floor, .. }) => Ok(floor),
            other => Ok(other.map(|_| 0)?),
        };
    };
    let newest = *core.log.subscribe().borrow();
    if after > newest {
        let detail = format!(
            "no event has the position {after} yet, the newest has {newest}: this log is not the one you read before, so begin anew without `after`"
        );
        return Err(Refusal::new(ProblemKind::InvalidValue, detail));
    }
    core.log.read(after, 1).await?;
    Ok(after)
}

/// The page after `after`; where it `may_skip`, what the log lets go of meanwhile is no longer the oldest there is.
async fn page(core: &Shared, query: &EventQuery, after: u64, may_skip: bool) -> Result<EventList, Refusal> {
    let limit = query.limit.unwrap_or(DEFAULT_EVENTS);
    if !(1..=MAX_EVENTS).contains(&limit) {
        let detail = format!("{limit} events are no page: ask for 1 to {MAX_EVENTS}");
        return Err(Refusal::new(ProblemKind::InvalidValue, detail));
    }
    let mut list = EventList { events: Vec::new(), next_after: after, newest: after };
    let mut scanned = 0;
    while scanned < MAX_SCAN && list.events.len() < limit {
        let events = match core.log.read(list.next_after, MAX_EVENTS).await {
            Err(ReadError::Compacted { floor, .. }) if may_skip && scanned == 0 => {
                list.next_after = floor;
                continue;
            }
            other => other?,
        };
        if events.is_empty() {
            break;
        }
        scanned += events.len();
        for event in events {
            if list.events.len() == limit {
                break;
            }
            list.next_after = event.position;
            if query.lets(&event) {
                list.events.push(Recorded::clone(&event));
            }
        }
    }
    list.newest = (*core.log.subscribe().borrow()).max(list.next_after);
    Ok(list)
}

/// One client that reads along. It asks for more only when the client took what there was, so a slow one costs a few events of
/// memory and holds nobody up.
struct Follower {
    /// One of those that there are for followers.
    _place: OwnedSemaphorePermit,
    closing: CancellationToken,
    log: Arc<dyn EventLog>,
    newest: watch::Receiver<u64>,
    query: EventQuery,
    after: u64,
    /// Nothing was read yet, and it is to begin with the oldest there is by then.
    may_skip: bool,
    ahead: VecDeque<Arc<Recorded>>,
    over: bool,
}

impl Follower {
    /// The next event for the client; none when there will be none.
    async fn next(&mut self) -> Option<SseEvent> {
        while !self.over {
            if let Some(event) = self.ahead.pop_front() {
                return Some(told(&event));
            }
            // Before the log is read: what comes after that wakes it again.
            self.newest.borrow_and_update();
            match self.log.read(self.after, AHEAD).await {
                Ok(events) if events.is_empty() => tokio::select! {
                    () = self.closing.cancelled() => return None,
                    changed = self.newest.changed() => changed.ok()?,
                },
                Err(ReadError::Compacted { floor, .. }) if self.may_skip => self.after = floor,
                Ok(events) => {
                    self.may_skip = false;
                    self.after = events.last().map_or(self.after, |last| last.position);
                    self.ahead.extend(events.into_iter().filter(|event| self.query.lets(event)));
                }
                Err(error) => {
                    // It was so slow that the log let go of what it had not read, or the disk fails.
                    self.over = true;
                    return Some(farewell(error));
                }
            }
        }
        None
    }
}

fn told(event: &Recorded) -> SseEvent {
    let told = SseEvent::default().id(event.position.to_string()).event(event.event.kind());
    // Strings, numbers and maps of strings always are JSON.
    told.json_data(event).unwrap_or_default()
}

fn farewell(error: ReadError) -> SseEvent {
    let Refusal(problem) = error.into();
    SseEvent::default().event("problem").json_data(problem).unwrap_or_default()
}
