//! `GET /v1/agents/{agent}/logs`: the console of an agent. `GET /v1/consoles`: those of agents that are gone.

use std::io;
use std::time::Duration;

use ark_types::console::{ConsoleEnd, ConsoleGap, ConsolePiece, KeptConsoleList, note};
use ark_types::exec::Encoding;
use ark_types::plain::plain;
use ark_types::problem::ProblemKind;
use axum::Json;
use axum::body::Body;
use axum::extract::{Path, Query, State};
use axum::http::{HeaderMap, HeaderValue, header};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse as _, Response};
use futures_util::stream;
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;
use utoipa::IntoParams;

use super::Shared;
use super::events::{last_event_id, wants_stream};
use crate::agent::Handle;
use crate::consoles::{Begin, Piece, Reading};
use crate::problems::Refusal;
use crate::validate::encode;

/// Time between two looks at a console that is followed.
const FOLLOW_INTERVAL: Duration = Duration::from_millis(200);
/// How often a stream without events shows that it lives.
const KEEP_ALIVE: Duration = Duration::from_secs(15);
/// Header with the offset of the first byte.
const CONSOLE_OFFSET: &str = "ark-console-offset";

/// Which part of a console.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub(super) struct Part {
    /// Go on until the agent ends.
    #[serde(default)]
    follow: bool,
    /// Begin with the last so many lines; with the first line when absent.
    tail: Option<u64>,
    /// Begin with the byte of this offset, the first one being 0.
    from: Option<u64>,
}

impl Part {
    /// Where to begin, for a client that has read to `last`.
    fn begin(&self, last: Option<u64>) -> Result<Begin, Refusal> {
        match (last.or(self.from), self.tail) {
            (Some(offset), None) => Ok(Begin::From(offset)),
            // That of the first request.
            (Some(offset), Some(_)) if last.is_some() && self.from.is_none() => Ok(Begin::From(offset)),
            (None, Some(lines)) => Ok(Begin::Tail(lines)),
            (None, None) => Ok(Begin::From(0)),
            (Some(_), Some(_)) => {
                let detail = "from and tail both say where to begin: leave one of them out";
                Err(Refusal::new(ProblemKind::InvalidValue, detail))
            }
        }
    }
}

/// Consoles of agents that did not start or ended by themselves, whether they are still known or not.
#[utoipa::path(
    get, path = "/consoles", tag = "agents",
    responses((status = OK, body = KeptConsoleList, description = "Oldest first")),
)]
pub(super) async fn list_consoles(State(core): State<Shared>) -> Json<KeptConsoleList> {
    Json(KeptConsoleList { consoles: core.consoles.list() })
}

/// What the guest's kernel and init wrote to the serial console; of an agent that is gone, too, while its console is kept.
///
/// Its bytes have offsets, from 0 on for as long as the agent exists. `from` begins at one; the reply's `ark-console-offset` says where it
/// begins. The limit on a console's size leaves out its middle: a line says how many bytes, and offsets go on behind them. With
/// `Accept: text/event-stream` the reply is server-sent events: `console` (a `ConsolePiece`), `left_out` (a `ConsoleGap`) and `end` (a
/// `ConsoleEnd`), each with the offset behind it as `id`, taken up again with `Last-Event-ID` or `from`.
#[utoipa::path(
    get, path = "/agents/{agent}/logs", tag = "agents",
    params(
        ("agent" = String, Path, description = "Name or id of the agent"),
        Part,
        ("last-event-id" = Option<u64>, Header, description = "Of a stream of events: the offset that was reached"),
    ),
    responses((
        status = OK, description = "The console, byte for byte",
        headers(("ark-console-offset" = u64, description = "Offset of the first byte")),
        content((String = "text/plain"), (String = "text/event-stream")),
    )),
)]
pub(super) async fn logs(
    State(core): State<Shared>,
    Path(agent): Path<String>,
    Query(part): Query<Part>,
    headers: HeaderMap,
) -> Result<Response, Refusal> {
    let (path, agent, name) = match core.registry.find(&agent) {
        Ok(known) => {
            let own = known.console().clone();
            // One that ended under an earlier `arkd` may have no directory any more.
            let kept = if known.has_ended() && !own.exists() { core.consoles.find(known.id()) } else { None };
            (kept.unwrap_or(own), Some(known), agent)
        }
        Err(unknown) => (core.consoles.find(&agent).ok_or(unknown)?, None, agent),
    };
    let streams = wants_stream(&headers);
    let last = if streams { last_event_id(&headers)? } else { None };
    let begin = part.begin(last)?;
    let unreadable = |error: io::Error| {
        let why = plain(&error);
        Refusal::new(ProblemKind::HostUnable, format!("the console of {name} cannot be read: {why}"))
    };
    let mut reading = Reading::open(&path, begin).await.map_err(unreadable)?;
    // A console that its VMM has not begun has nothing to show, and soon somebody may ask again.
    let end = match &mut reading {
        Some(reading) => reading.end().await.map_err(unreadable)?,
        None => 0,
    };
    let offset = reading.as_ref().map_or(0, Reading::offset);
    if let Begin::From(from) = begin
        && from > end
    {
        let detail = format!(
            "the console of {name} has no byte {from}, so far there are {end}: it is another agent's than before, or begin with from={end}"
        );
        return Err(Refusal::new(ProblemKind::InvalidValue, detail));
    }
    let followed = agent.filter(|_| part.follow);
    let console = Console { reading, followed, closing: core.closing.clone(), is_over: false };
    let mut response = if streams {
        let events = stream::try_unfold(console, |mut console| async {
            let event = console.next_event().await?;
            Ok::<_, io::Error>(event.map(|event| (event, console)))
        });
        Sse::new(events).keep_alive(KeepAlive::new().interval(KEEP_ALIVE)).into_response()
    } else {
        let body = Body::from_stream(stream::try_unfold(console, |mut console| async {
            let bytes = console.next_bytes().await?;
            Ok::<_, io::Error>(bytes.map(|bytes| (bytes, console)))
        }));
        ([(header::CONTENT_TYPE, "text/plain; charset=utf-8")], body).into_response()
    };
    response.headers_mut().insert(CONSOLE_OFFSET, HeaderValue::from(offset));
    Ok(response)
}

/// A console on its way to a client.
struct Console {
    /// None when its VMM has not begun it.
    reading: Option<Reading>,
    /// The agent whose end ends it; none when what there is now is all.
    followed: Option<Handle>,
    closing: CancellationToken,
    /// Nothing follows.
    is_over: bool,
}

impl Console {
    async fn next_bytes(&mut self) -> io::Result<Option<Vec<u8>>> {
        Ok(self.next().await?.map(|piece| match piece {
            Piece::Bytes { bytes, .. } => bytes,
            Piece::LeftOut { bytes, .. } => note(bytes).into_bytes(),
        }))
    }

    async fn next_event(&mut self) -> io::Result<Option<Event>> {
        if self.is_over {
            return Ok(None);
        }
        Ok(match self.next().await? {
            Some(Piece::Bytes { offset, bytes }) => {
                let end = offset.saturating_add(bytes.len() as u64);
                let encoding =
                    if std::str::from_utf8(&bytes).is_ok() { Encoding::Utf8 } else { Encoding::Base64 };
                let piece = ConsolePiece { offset, data: encode(&bytes, encoding), encoding };
                Some(event("console", end, &piece))
            }
            Some(Piece::LeftOut { offset, bytes }) => {
                let gap = ConsoleGap { offset, bytes };
                Some(event("left_out", offset.saturating_add(bytes), &gap))
            }
            // An `arkd` that ends has not told the last of it.
            None if self.closing.is_cancelled() => None,
            None => {
                self.is_over = true;
                let offset = self.reading.as_ref().map_or(0, Reading::offset);
                Some(event("end", offset, &ConsoleEnd { offset }))
            }
        })
    }

    async fn next(&mut self) -> io::Result<Option<Piece>> {
        let Some(reading) = &mut self.reading else { return Ok(None) };
        loop {
            // Looked at before the file: what is written until the end is then still read.
            let followed = self.followed.as_ref().filter(|agent| !agent.has_ended());
            if let Some(piece) = reading.next().await? {
                return Ok(Some(piece));
            }
            let Some(agent) = followed else { return Ok(None) };
            // The end wakes at once, growth after a while.
            let news = tokio::time::timeout(FOLLOW_INTERVAL, agent.ended());
            if self.closing.run_until_cancelled(news).await.is_none() {
                return Ok(None);
            }
        }
    }
}

fn event(kind: &str, id: u64, data: &impl Serialize) -> Event {
    // Strings and numbers always are JSON.
    Event::default().id(id.to_string()).event(kind).json_data(data).unwrap_or_default()
}
