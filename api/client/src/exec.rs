//! Programs with their streams connected: frames over a WebSocket, one per binary message.

use ark_types::exec::{ExecEnd, ExecRequest, TtySize};
use ark_types::guest::{
    EncodedFrame, Frame, GuestError, HEADER_LEN, Kind, MAX_PAYLOAD, SignalRequest, Started,
};
use ark_types::plain::plain;
use bytes::Bytes;
use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{SinkExt, StreamExt};
use hyper::header::{AUTHORIZATION, HeaderValue};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;
use tokio_tungstenite::tungstenite::{self, Message};

use crate::connect::{Endpoint, Stream};
use crate::error::Error;
use crate::rest::refusal;

/// What a running program tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ExecEvent {
    /// It runs, with this process id in the guest.
    Started(u32),
    /// Bytes of standard output, or of its terminal.
    Stdout(Bytes),
    /// Bytes of standard error.
    Stderr(Bytes),
    /// It ended; nothing follows.
    Exited(ExecEnd),
}

/// A running program.
pub struct ExecStream {
    /// Towards the program.
    pub input: ExecInput,
    /// From the program.
    pub output: ExecOutput,
}

/// Towards a program.
pub struct ExecInput {
    sink: SplitSink<WebSocketStream<Stream>, Message>,
}

/// From a program. Dropping both halves closes the stream, and the guest then kills the program's process group.
pub struct ExecOutput {
    stream: SplitStream<WebSocketStream<Stream>>,
}

impl ExecStream {
    /// Opens the WebSocket at `target` and asks for `request`.
    pub(crate) async fn open(
        endpoint: &Endpoint,
        target: &str,
        request: &ExecRequest,
    ) -> Result<Self, Error> {
        let stream = endpoint.connect().await.map_err(|e| Error::connect(endpoint, e))?;
        let mut handshake = format!("ws://{}{target}", endpoint.authority())
            .into_client_request()
            .map_err(|e| Error::Request(e.to_string()))?;
        if let Some(authorization) = endpoint.authorization() {
            let value = HeaderValue::from_str(&authorization).map_err(|e| Error::Request(e.to_string()))?;
            handshake.headers_mut().insert(AUTHORIZATION, value);
        }
        let whole = Some(HEADER_LEN + MAX_PAYLOAD);
        let config = WebSocketConfig::default().max_message_size(whole).max_frame_size(whole);
        let (socket, _) = tokio_tungstenite::client_async_with_config(handshake, stream, Some(config))
            .await
            .map_err(|e| match e {
                tungstenite::Error::Http(answer) => {
                    let status = answer.status().as_u16();
                    refusal(endpoint, status, answer.body().as_deref().unwrap_or_default())
                }
                other => Error::broken(endpoint, &other),
            })?;
        let (sink, stream) = socket.split();
        let mut input = ExecInput { sink };
        input.send(&Frame::json(Kind::Exec, request)?).await?;
        Ok(Self { input, output: ExecOutput { stream } })
    }
}

impl ExecInput {
    /// Sends bytes to the program's standard input, or types them at its terminal.
    ///
    /// # Errors
    /// [`Error::Ended`] when the stream is closed.
    pub async fn stdin(&mut self, bytes: &[u8]) -> Result<(), Error> {
        for chunk in bytes.chunks(MAX_PAYLOAD) {
            self.send(&Frame::raw(Kind::Stdin, chunk)?).await?;
        }
        Ok(())
    }

    /// Ends the program's standard input.
    ///
    /// # Errors
    /// [`Error::Ended`] when the stream is closed.
    pub async fn close_stdin(&mut self) -> Result<(), Error> {
        self.send(&Frame::empty(Kind::StdinClose)).await
    }

    /// Sends a signal (1 to 64) to the program's process group.
    ///
    /// # Errors
    /// [`Error::Ended`] when the stream is closed.
    pub async fn signal(&mut self, signal: u8) -> Result<(), Error> {
        self.send(&Frame::json(Kind::Signal, &SignalRequest { signal })?).await
    }

    /// Tells the program's terminal its new size.
    ///
    /// # Errors
    /// [`Error::Ended`] when the stream is closed.
    pub async fn resize(&mut self, size: TtySize) -> Result<(), Error> {
        self.send(&Frame::json(Kind::Resize, &size)?).await
    }

    async fn send(&mut self, frame: &Frame) -> Result<(), Error> {
        let message = Message::Binary(frame.encode().into());
        self.sink.send(message).await.map_err(|e| Error::Ended(plain(&e)))
    }
}

impl ExecOutput {
    /// What the program says next. Cancel-safe. After [`ExecEvent::Exited`] or an error there is nothing more to ask.
    ///
    /// # Errors
    /// [`Error::Guest`] when the program could not be started, [`Error::Ended`] when the stream ends without
    /// [`ExecEvent::Exited`], [`Error::Frame`] when it makes no sense.
    pub async fn next(&mut self) -> Result<ExecEvent, Error> {
        loop {
            let message = match self.stream.next().await {
                None => return Err(Error::Ended("the connection was closed".to_owned())),
                Some(Err(e)) => return Err(Error::Ended(plain(&e))),
                Some(Ok(message)) => message,
            };
            match message {
                Message::Binary(bytes) => return event(EncodedFrame::try_from(bytes)?),
                Message::Close(why) => {
                    let why = why.map(|w| w.reason.to_string()).filter(|w| !w.is_empty());
                    return Err(Error::Ended(why.unwrap_or_else(|| "the connection was closed".to_owned())));
                }
                // Pings are answered by the library; text is not part of the protocol.
                Message::Ping(_) | Message::Pong(_) | Message::Text(_) | Message::Frame(_) => {}
            }
        }
    }
}

fn event(frame: EncodedFrame) -> Result<ExecEvent, Error> {
    match frame.kind() {
        Kind::Started => Ok(ExecEvent::Started(frame.parse::<Started>()?.pid)),
        Kind::Stdout => Ok(ExecEvent::Stdout(frame.into_payload())),
        Kind::Stderr => Ok(ExecEvent::Stderr(frame.into_payload())),
        Kind::Exited => Ok(ExecEvent::Exited(frame.parse()?)),
        Kind::Error => Err(Error::Guest(frame.parse::<GuestError>()?)),
        other => Err(Error::Ended(format!("a {other:?} frame has no place here"))),
    }
}
