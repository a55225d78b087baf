//! Events as pages and as a stream, and agents by what they are.

use std::collections::VecDeque;

use ark_types::agent::{AgentList, AgentState};
use ark_types::event::{EventList, Recorded, Stream};
use ark_types::problem::Problem;
use hyper::Method;
use hyper::header::ACCEPT;

use crate::error::Error;
use crate::files::ByteStream;
use crate::rest::{Client, empty};
use crate::uri;

/// Longest event that is read, bytes: labels have their bounds far below.
pub(crate) const MAX_EVENT: usize = 1 << 20;

/// Which agents; the default is those that were not removed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AgentQuery {
    /// Also those that were removed and are remembered.
    pub all: bool,
    /// In this state.
    pub state: Option<AgentState>,
    /// With these labels, as in [`ark_types::label::Selector`].
    pub labels: Option<String>,
}

/// Which events; the default is all.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EventQuery {
    /// Those after this position.
    pub after: Option<u64>,
    /// Those of this stream.
    pub stream: Option<Stream>,
}

impl EventQuery {
    fn target(&self) -> String {
        let after = self.after.map(|after| after.to_string());
        let stream = self.stream.as_ref().map(AsRef::as_ref);
        uri::query("/v1/events", &[("after", after.as_deref()), ("stream", stream)])
    }
}

impl Client {
    /// `GET /v1/agents`, every page of it.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn agents_where(&self, query: &AgentQuery) -> Result<AgentList, Error> {
        let state = query.state.map(|state| state.to_string());
        let mut list = AgentList { agents: Vec::new(), next_cursor: None };
        loop {
            let parameters = [
                ("all", query.all.then_some("true")),
                ("state", state.as_deref()),
                ("labels", query.labels.as_deref()),
                ("cursor", list.next_cursor.as_deref()),
            ];
            let page: AgentList = self.get(&uri::query("/v1/agents", &parameters)).await?;
            list.agents.extend(page.agents);
            list.next_cursor = page.next_cursor;
            if list.next_cursor.is_none() {
                return Ok(list);
            }
        }
    }

    /// `GET /v1/events`: one page; ask for the next with its `next_after`.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn events(&self, query: &EventQuery) -> Result<EventList, Error> {
        self.get(&query.target()).await
    }

    /// `GET /v1/events` as a stream, which goes on until `arkd` ends.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn follow_events(&self, query: &EventQuery) -> Result<EventStream, Error> {
        let headers = [(ACCEPT, "text/event-stream")];
        let response = self.send(Method::GET, &query.target(), &headers, empty()).await?;
        let endpoint = self.endpoint().to_string();
        let body = ByteStream::new(self.endpoint(), response.into_body());
        Ok(EventStream { endpoint, body, begun: Vec::new(), come: VecDeque::new() })
    }
}

/// Events as they are recorded.
#[derive(Debug)]
pub struct EventStream {
    endpoint: String,
    body: ByteStream,
    /// What has come of the next event.
    begun: Vec<u8>,
    come: VecDeque<Told>,
}

/// One server-sent event with data.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Told {
    /// Its type.
    pub(crate) kind: String,
    /// Its data.
    pub(crate) data: String,
}

impl EventStream {
    /// The next event; `None` when `arkd` ended the stream.
    ///
    /// # Errors
    /// See [`Error`]; a [`Problem`] when the log let go of events that had not been read yet.
    pub async fn next(&mut self) -> Result<Option<Recorded>, Error> {
        loop {
            if let Some(Told { kind, data }) = self.come.pop_front() {
                if kind == "problem" {
                    return Err(match serde_json::from_str::<Problem>(&data) {
                        Ok(problem) => problem.into(),
                        Err(error) => self.nonsense(&error.to_string()),
                    });
                }
                return serde_json::from_str(&data).map(Some).map_err(|e| self.nonsense(&e.to_string()));
            }
            let Some(bytes) = self.body.next().await? else { return Ok(None) };
            self.begun.extend_from_slice(&bytes);
            self.come.extend(take_whole(&mut self.begun));
            if self.begun.len() > MAX_EVENT {
                return Err(self.nonsense(&format!("an event is longer than {MAX_EVENT} bytes")));
            }
        }
    }

    fn nonsense(&self, excerpt: &str) -> Error {
        Error::Answer { endpoint: self.endpoint.clone(), status: 200, excerpt: excerpt.to_owned() }
    }
}

/// Takes the whole events out of `begun`; those without data, such as signs of life, are passed over.
pub(crate) fn take_whole(begun: &mut Vec<u8>) -> Vec<Told> {
    let mut all = Vec::new();
    while let Some(end) = begun.windows(2).position(|pair| pair == b"\n\n") {
        let block: Vec<u8> = begun.drain(..end + 2).collect();
        let text = String::from_utf8_lossy(&block);
        let field = |name: &str| {
            let values = text.lines().filter_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            let values: Vec<&str> = values.map(|value| value.strip_prefix(' ').unwrap_or(value)).collect();
            values.join("\n")
        };
        let told = Told { kind: field("event"), data: field("data") };
        if !told.data.is_empty() {
            all.push(told);
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_whole_whatever_the_pieces() {
        let text = "id: 7\nevent: agent.ready\ndata: {\"a\":\ndata:1}\n\n: sign of life\n\ndata: x\n\nda";
        let told = |kind: &str, data: &str| Told { kind: kind.to_owned(), data: data.to_owned() };
        for size in 1..text.len() {
            let (mut begun, mut all) = (Vec::new(), Vec::new());
            for piece in text.as_bytes().chunks(size) {
                begun.extend_from_slice(piece);
                all.extend(take_whole(&mut begun));
            }
            assert_eq!(all, [told("agent.ready", "{\"a\":\n1}"), told("", "x")]);
            assert_eq!(begun, b"da");
        }
    }
}
