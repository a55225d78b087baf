//! Models that say something, in the form of OpenAI's API: whole, or piece by piece as it is said.

use std::collections::VecDeque;

use http_body_util::{BodyExt as _, Full};
use hyper::Method;
use hyper::header::{ACCEPT, CONTENT_TYPE};
use serde_json::Value;

use crate::error::Error;
use crate::events::{MAX_EVENT, Told, take_whole};
use crate::files::ByteStream;
use crate::rest::Client;

const CHAT: &str = "/v1/chat/completions";
/// Data of the last event of a stream.
const DONE: &str = "[DONE]";

impl Client {
    /// `POST /v1/chat/completions`: the whole reply to `request`, a chat completion.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn chat(&self, request: &Value) -> Result<Value, Error> {
        self.post(CHAT, request).await
    }

    /// `POST /v1/chat/completions` with `stream`, whatever `request` says about that: dropping what is returned cancels the call.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn chat_stream(&self, request: &Value) -> Result<ChatStream, Error> {
        let mut request = request.clone();
        if let Value::Object(fields) = &mut request {
            fields.insert("stream".to_owned(), Value::Bool(true));
        }
        let headers = [(CONTENT_TYPE, "application/json"), (ACCEPT, "text/event-stream")];
        let body = Full::from(request.to_string()).map_err(|never| match never {}).boxed_unsync();
        let response = self.send(Method::POST, CHAT, &headers, body).await?;
        let body = ByteStream::new(self.endpoint(), response.into_body());
        let endpoint = self.endpoint().to_string();
        Ok(ChatStream { endpoint, body, begun: Vec::new(), come: VecDeque::new(), is_over: false })
    }
}

/// A reply as it is said.
#[derive(Debug)]
pub struct ChatStream {
    endpoint: String,
    body: ByteStream,
    /// What has come of the next event.
    begun: Vec<u8>,
    come: VecDeque<Told>,
    is_over: bool,
}

impl ChatStream {
    /// The next piece of text; `None` when the reply is whole.
    ///
    /// # Errors
    /// See [`Error`]: what was said before stands, and nothing follows.
    pub async fn next(&mut self) -> Result<Option<String>, Error> {
        loop {
            while let Some(Told { data, .. }) = self.come.pop_front() {
                if data == DONE {
                    self.is_over = true;
                    return Ok(None);
                }
                let chunk: Value = serde_json::from_str(&data).map_err(|e| self.nonsense(&e.to_string()))?;
                if let Some(message) = chunk.pointer("/error/message").and_then(Value::as_str) {
                    return Err(Error::Model(message.to_owned()));
                }
                match chunk.pointer("/choices/0/delta/content").and_then(Value::as_str) {
                    None | Some("") => {}
                    Some(text) => return Ok(Some(text.to_owned())),
                }
            }
            if self.is_over {
                return Ok(None);
            }
            let Some(bytes) = self.body.next().await? else {
                let why = "the model's reply ended early".to_owned();
                return Err(Error::Broken { endpoint: self.endpoint.clone(), why });
            };
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
