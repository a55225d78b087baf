//! `GET /v1/agents/{agent}/logs`: the console of an agent. `GET /v1/consoles`: those of agents that are gone.

use std::io::{self, SeekFrom};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path as FilePath;
use std::time::Duration;

use ark_types::console::KeptConsoleList;
use ark_types::plain::plain;
use ark_types::problem::ProblemKind;
use axum::Json;
use axum::body::Body;
use axum::extract::{Path, Query, State};
use axum::http::{HeaderValue, header};
use axum::response::Response;
use futures_util::stream;
use serde::Deserialize;
use tokio::fs::File;
use tokio::io::{AsyncReadExt as _, AsyncSeekExt as _};
use tokio_util::sync::CancellationToken;
use utoipa::IntoParams;

use super::Shared;
use crate::agent::Handle;
use crate::problems::Refusal;

/// Bytes read at a time.
const CHUNK: u64 = 64 << 10;
/// Time between two looks at a console that is followed.
const FOLLOW_INTERVAL: Duration = Duration::from_millis(200);

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
#[utoipa::path(
    get, path = "/agents/{agent}/logs", tag = "agents",
    params(("agent" = String, Path, description = "Name or id of the agent"), Part),
    responses((status = OK, body = String, content_type = "text/plain", description = "The console, byte for byte")),
)]
pub(super) async fn logs(
    State(core): State<Shared>,
    Path(agent): Path<String>,
    Query(Part { follow, tail }): Query<Part>,
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
    let unreadable = |error: io::Error| {
        let why = plain(&error);
        Refusal::new(ProblemKind::HostUnable, format!("the console of {name} cannot be read: {why}"))
    };
    let file = open(&path, tail).await.map_err(unreadable)?;
    let body = match file {
        // The VMM has not begun it: there is nothing to show, and soon somebody may ask again.
        None => Body::empty(),
        Some(file) => {
            let console = Console { file, followed: agent.filter(|_| follow), closing: core.closing.clone() };
            Body::from_stream(stream::try_unfold(console, |mut console| async {
                let chunk = console.next().await?;
                Ok::<_, io::Error>(chunk.map(|chunk| (chunk, console)))
            }))
        }
    };
    let mut response = Response::new(body);
    let kind = HeaderValue::from_static("text/plain; charset=utf-8");
    response.headers_mut().insert(header::CONTENT_TYPE, kind);
    Ok(response)
}

/// A console being read.
struct Console {
    file: File,
    /// The agent whose end ends it; none when what there is now is all.
    followed: Option<Handle>,
    closing: CancellationToken,
}

impl Console {
    async fn next(&mut self) -> io::Result<Option<Vec<u8>>> {
        loop {
            // Looked at before the file: what is written until the end is then still read.
            let followed = self.followed.clone().filter(|agent| !agent.has_ended());
            let mut chunk = Vec::with_capacity(usize::try_from(CHUNK).unwrap_or_default());
            (&mut self.file).take(CHUNK).read_buf(&mut chunk).await?;
            if !chunk.is_empty() {
                return Ok(Some(chunk));
            }
            let Some(agent) = followed else { return Ok(None) };
            if self.is_replaced(agent.console()).await? {
                continue;
            }
            // The VMM takes the middle out of a console that is full: the file became shorter, and goes on at its end.
            if self.file.metadata().await?.len() < self.file.stream_position().await? {
                self.file.seek(SeekFrom::End(0)).await?;
            }
            // The end wakes at once, growth after a while.
            let news = tokio::time::timeout(FOLLOW_INTERVAL, agent.ended());
            if self.closing.run_until_cancelled(news).await.is_none() {
                return Ok(None);
            }
        }
    }
}

impl Console {
    /// Goes on in the file at `path` where that is another one by now, which begins with what this one holds: the agent began
    /// anew in a VMM that had one already. Whether it was.
    async fn is_replaced(&mut self, path: &FilePath) -> io::Result<bool> {
        let Ok(there) = tokio::fs::metadata(path).await else { return Ok(false) };
        let here = self.file.metadata().await?;
        if (there.dev(), there.ino()) == (here.dev(), here.ino()) {
            return Ok(false);
        }
        let read = self.file.stream_position().await?;
        self.file = File::open(path).await?;
        self.file.seek(SeekFrom::Start(read.min(there.len()))).await?;
        Ok(true)
    }
}

/// The console at `path`, placed where its last `tail` lines begin.
async fn open(path: &FilePath, tail: Option<u64>) -> io::Result<Option<File>> {
    let mut file = match File::open(path).await {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other?,
    };
    if let Some(lines) = tail {
        let start = start_of_last(&mut file, lines).await?;
        file.seek(SeekFrom::Start(start)).await?;
    }
    Ok(Some(file))
}

/// Where the last `lines` lines of `file` begin, found from its end, a chunk at a time.
async fn start_of_last(file: &mut File, lines: u64) -> io::Result<u64> {
    let len = file.seek(SeekFrom::End(0)).await?;
    let (mut end, mut seen, mut chunk) = (len, 0, Vec::new());
    while end > 0 {
        let start = end.saturating_sub(CHUNK);
        file.seek(SeekFrom::Start(start)).await?;
        chunk.clear();
        (&mut *file).take(end - start).read_to_end(&mut chunk).await?;
        for (at, byte) in chunk.iter().enumerate().rev() {
            let next_line = start + at as u64 + 1;
            // The newline that ends the file begins no line.
            if *byte == b'\n' && next_line < len {
                seen += 1;
                if seen == lines {
                    return Ok(next_line);
                }
            }
        }
        end = start;
    }
    Ok(if lines == 0 { len } else { 0 })
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn tail(text: &str, lines: u64) -> String {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console.log");
        std::fs::write(&path, text).unwrap();
        let mut shown = String::new();
        let file = open(&path, Some(lines)).await.unwrap();
        file.unwrap().read_to_string(&mut shown).await.unwrap();
        shown
    }

    #[tokio::test]
    async fn the_last_lines_are_found_with_and_without_a_final_newline() {
        assert_eq!(tail("a\nb\nc\n", 2).await, "b\nc\n");
        assert_eq!(tail("a\nb\nc", 2).await, "b\nc");
        assert_eq!(tail("a\nb\n", 9).await, "a\nb\n");
        assert_eq!(tail("a\nb\n", 0).await, "");
        assert_eq!(tail("", 3).await, "");
        assert_eq!(tail("\n\n\n", 1).await, "\n");
    }

    #[tokio::test]
    async fn a_tail_longer_than_a_chunk_is_found() {
        let line = format!("{}\n", "x".repeat(999));
        let text = line.repeat(200);
        assert_eq!(tail(&text, 150).await.len(), 150_000);
    }

    #[tokio::test]
    async fn a_console_that_was_not_begun_is_nothing() {
        assert!(open(FilePath::new("/nonexistent/console.log"), None).await.unwrap().is_none());
    }
}
