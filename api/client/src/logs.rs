//! An agent's console as it grows, taken up again by its offset when the connection breaks.

use std::collections::VecDeque;
use std::time::Duration;

use ark_types::console::{ConsoleGap, ConsolePiece};
use ark_types::exec::Encoding;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use hyper::Method;
use hyper::header::ACCEPT;
use serde::de::DeserializeOwned;
use tokio::time::sleep;

use crate::error::Error;
use crate::events::{MAX_EVENT, Told, take_whole};
use crate::files::ByteStream;
use crate::rest::{Client, empty};
use crate::uri;

/// Attempts to go on in a row without anything new.
const TRIES: u32 = 8;
/// Pause before the second attempt; each is twice as long as the one before, up to [`LONGEST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// See [`FIRST_PAUSE`].
const LONGEST_PAUSE: Duration = Duration::from_millis(1600);

/// What comes next of a console.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LogPiece {
    /// What the guest wrote.
    Bytes(Bytes),
    /// So many bytes that the limit on a console's size took before they could be read.
    LeftOut(u64),
}

/// A console that is followed.
#[derive(Debug)]
pub struct LogStream {
    client: Client,
    agent: String,
    /// Lines to begin with, as long as nothing has come.
    tail: Option<u64>,
    /// Offset of what comes next, once something has come.
    offset: Option<u64>,
    body: Option<ByteStream>,
    begun: Vec<u8>,
    come: VecDeque<Told>,
    is_over: bool,
}

impl Client {
    /// `GET /v1/agents/{agent}/logs` as events: the serial console, its last `tail` lines or all of it, until the agent ends. A
    /// connection that breaks is made again up to 8 times (about 6 s) and goes on where it was.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn follow_logs(&self, agent: &str, tail: Option<u64>) -> Result<LogStream, Error> {
        let mut stream = LogStream {
            client: self.clone(),
            agent: agent.to_owned(),
            tail,
            offset: None,
            body: None,
            begun: Vec::new(),
            come: VecDeque::new(),
            is_over: false,
        };
        stream.body = Some(stream.open().await?);
        Ok(stream)
    }
}

impl LogStream {
    async fn open(&self) -> Result<ByteStream, Error> {
        let begin = match (self.offset, self.tail) {
            (Some(offset), _) => format!("&from={offset}"),
            (None, Some(lines)) => format!("&tail={lines}"),
            (None, None) => String::new(),
        };
        let target = uri::agent(&self.agent, &format!("/logs?follow=true{begin}"));
        let headers = [(ACCEPT, "text/event-stream")];
        let response = self.client.send(Method::GET, &target, &headers, empty()).await?;
        Ok(ByteStream::new(self.client.endpoint(), response.into_body()))
    }

    /// What comes next; `None` when the agent has ended and all was told.
    ///
    /// # Errors
    /// See [`Error`]: the connection broke and could not be made again.
    pub async fn next(&mut self) -> Result<Option<LogPiece>, Error> {
        loop {
            while let Some(told) = self.come.pop_front() {
                if let Some(piece) = self.sort(&told)? {
                    return Ok(Some(piece));
                }
            }
            if self.is_over {
                return Ok(None);
            }
            let broke = match &mut self.body {
                Some(body) => match body.next().await {
                    Ok(Some(bytes)) => {
                        self.begun.extend_from_slice(&bytes);
                        self.come.extend(take_whole(&mut self.begun));
                        if self.begun.len() > MAX_EVENT {
                            return Err(self.nonsense(format!("an event is longer than {MAX_EVENT} bytes")));
                        }
                        continue;
                    }
                    // What is complete says so.
                    Ok(None) => None,
                    Err(error) => Some(error),
                },
                None => None,
            };
            self.begun.clear();
            self.body = Some(self.again(broke).await?);
        }
    }

    /// A connection that goes on where the one before `broke`.
    async fn again(&self, broke: Option<Error>) -> Result<ByteStream, Error> {
        let (mut pause, mut last) = (FIRST_PAUSE, broke);
        for _ in 0..TRIES {
            match self.open().await {
                Ok(body) => return Ok(body),
                Err(error @ Error::Problem(_)) => return Err(error),
                Err(error) => last = Some(last.unwrap_or(error)),
            }
            sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
        Err(last.unwrap_or_else(|| Error::Broken {
            endpoint: self.client.endpoint().to_string(),
            why: "the console ended early".to_owned(),
        }))
    }

    fn sort(&mut self, told: &Told) -> Result<Option<LogPiece>, Error> {
        match told.kind.as_str() {
            "console" => {
                let piece: ConsolePiece = self.parse(&told.data)?;
                let bytes = match piece.encoding {
                    Encoding::Utf8 => piece.data.into_bytes(),
                    Encoding::Base64 => {
                        STANDARD.decode(piece.data).map_err(|e| self.nonsense(e.to_string()))?
                    }
                };
                self.offset = Some(piece.offset.saturating_add(bytes.len() as u64));
                Ok(Some(LogPiece::Bytes(bytes.into())))
            }
            "left_out" => {
                let gap: ConsoleGap = self.parse(&told.data)?;
                self.offset = Some(gap.offset.saturating_add(gap.bytes));
                Ok(Some(LogPiece::LeftOut(gap.bytes)))
            }
            "end" => {
                self.is_over = true;
                Ok(None)
            }
            // Of a later release.
            _ => Ok(None),
        }
    }

    fn parse<T: DeserializeOwned>(&self, data: &str) -> Result<T, Error> {
        serde_json::from_str(data).map_err(|e| self.nonsense(e.to_string()))
    }

    fn nonsense(&self, excerpt: String) -> Error {
        Error::Answer { endpoint: self.client.endpoint().to_string(), status: 200, excerpt }
    }
}
