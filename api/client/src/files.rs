//! Bodies that are streamed: files and logs.

use std::io;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use futures_util::TryStreamExt;
use http_body_util::{BodyExt, StreamBody};
use hyper::Response;
use hyper::body::{Frame, Incoming};
use hyper::header::CONTENT_LENGTH;
use tokio::io::AsyncRead;
use tokio_util::io::ReaderStream;

use crate::connect::Endpoint;
use crate::error::Error;
use crate::rest::RequestBody;

/// Bytes read from an upload's source at once.
const CHUNK: usize = 128 << 10;

/// A body as it arrives.
#[derive(Debug)]
pub struct ByteStream {
    endpoint: Endpoint,
    body: Incoming,
}

impl ByteStream {
    pub(crate) fn new(endpoint: &Endpoint, body: Incoming) -> Self {
        Self { endpoint: endpoint.clone(), body }
    }

    /// The next bytes; `None` after the last.
    ///
    /// # Errors
    /// [`Error::Broken`] when the body ends before its announced length.
    pub async fn next(&mut self) -> Result<Option<Bytes>, Error> {
        loop {
            match self.body.frame().await {
                None => return Ok(None),
                Some(Err(e)) => return Err(Error::broken(&self.endpoint, &e)),
                // Trailers, which arkd does not send, are passed over.
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        return Ok(Some(data));
                    }
                }
            }
        }
    }

    /// All bytes, as long as there are at most `limit`.
    ///
    /// # Errors
    /// [`Error::Broken`] when there are more, or when the connection broke.
    pub async fn collect(mut self, limit: usize) -> Result<Vec<u8>, Error> {
        let mut all = Vec::new();
        while let Some(bytes) = self.next().await? {
            if all.len() + bytes.len() > limit {
                let why = format!("more than the expected {limit} bytes came");
                return Err(Error::Broken { endpoint: self.endpoint.to_string(), why });
            }
            all.extend_from_slice(&bytes);
        }
        Ok(all)
    }
}

/// A file on its way out of an agent.
#[derive(Debug)]
pub struct Download {
    /// Size in bytes, where the file has one (files of `/proc` do not).
    pub size: Option<u64>,
    /// Permission bits.
    pub mode: u32,
    /// Content.
    pub content: ByteStream,
}

impl Download {
    pub(crate) fn new(endpoint: &Endpoint, response: Response<Incoming>) -> Result<Self, Error> {
        let header = |name: &str| response.headers().get(name).and_then(|v| v.to_str().ok());
        let size = header(CONTENT_LENGTH.as_str()).and_then(|v| v.parse().ok());
        let Some(mode) = header("x-ark-mode").and_then(|v| u32::from_str_radix(v, 8).ok()) else {
            return Err(Error::Answer {
                endpoint: endpoint.to_string(),
                status: response.status().as_u16(),
                excerpt: "no x-ark-mode header".to_owned(),
            });
        };
        Ok(Self { size, mode, content: ByteStream::new(endpoint, response.into_body()) })
    }
}

/// Keeps the error of an upload's source: hyper reports only that the body failed.
#[derive(Clone, Default)]
pub(crate) struct ReadError(Arc<Mutex<Option<io::Error>>>);

impl ReadError {
    /// The error, once.
    pub(crate) fn take(&self) -> Option<io::Error> {
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take()
    }

    fn keep(&self, error: io::Error) -> io::Error {
        let copy = io::Error::new(error.kind(), error.to_string());
        *self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(error);
        copy
    }
}

/// A request body that reads `source` as it is sent, and where an error of that source is found.
pub(crate) fn upload_body(source: impl AsyncRead + Send + 'static) -> (RequestBody, ReadError) {
    let read_error = ReadError::default();
    let keeper = read_error.clone();
    let frames = ReaderStream::with_capacity(source, CHUNK)
        .map_ok(Frame::<Bytes>::data)
        .map_err(move |e| keeper.keep(e));
    (BodyExt::boxed_unsync(StreamBody::new(frames)), read_error)
}
