//! Spans on their way to the collector: a bounded queue and a thread that empties it.
//!
//! Whoever ends a span never waits: where the queue is full, the span is dropped and counted. The thread sends what has come
//! together; a batch that the collector does not take is dropped and counted, too.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use opentelemetry::Context;
use opentelemetry_otlp::SpanExporter;
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::trace::{Span, SpanData, SpanExporter as _, SpanProcessor};
use tokio::runtime::Handle;

/// Spans that wait at most.
const QUEUE: usize = 4096;
/// Spans of a batch at most.
const BATCH: usize = 512;
/// How long the first span of a batch waits for others.
const GATHER: Duration = Duration::from_millis(500);

/// Spans of this process that had an end, since it has one subscriber.
static SENT: AtomicU64 = AtomicU64::new(0);
static DROPPED: AtomicU64 = AtomicU64::new(0);

/// What became of spans.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counts {
    /// The collector has them.
    pub sent: u64,
    /// Nobody has.
    pub dropped: u64,
}

/// What became of the spans of this process.
#[must_use]
pub fn counts() -> Counts {
    Counts { sent: SENT.load(Ordering::Relaxed), dropped: DROPPED.load(Ordering::Relaxed) }
}

enum Message {
    Span(Box<SpanData>),
    Resource(Box<Resource>),
    /// Answered when all that came before is sent.
    Flush(SyncSender<()>),
}

/// The way in; clones lead to the same thread, which ends with the last one.
#[derive(Clone, Debug)]
pub(super) struct Queue(SyncSender<Message>);

impl Queue {
    /// Starts the thread, which sends by `exporter` on `runtime`.
    pub(super) fn start(exporter: SpanExporter, runtime: Handle) -> Self {
        let (sender, receiver) = sync_channel(QUEUE);
        let work = move || send_all(exporter, &receiver, &runtime);
        if let Err(error) = std::thread::Builder::new().name("traces".to_owned()).spawn(work) {
            // The receiver is gone with it, so every span is dropped and counted.
            eprintln!("arkd: the thread that sends traces cannot be started: {error}");
        }
        Self(sender)
    }

    /// Waits up to `limit` until what has come is sent.
    pub(super) fn flush(&self, limit: Duration) {
        let (done, is_done) = sync_channel(1);
        if self.0.try_send(Message::Flush(done)).is_ok() {
            // Late or never: either way nobody waits any longer.
            let _ = is_done.recv_timeout(limit);
        }
    }
}

impl SpanProcessor for Queue {
    fn on_start(&self, _: &mut Span, _: &Context) {}

    fn on_end(&self, span: SpanData) {
        if self.0.try_send(Message::Span(Box::new(span))).is_err() {
            DROPPED.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.flush(GATHER);
        Ok(())
    }

    fn shutdown_with_timeout(&self, limit: Duration) -> OTelSdkResult {
        self.flush(limit);
        Ok(())
    }

    fn set_resource(&mut self, resource: &Resource) {
        // The first message there is: the queue has room.
        let _ = self.0.try_send(Message::Resource(Box::new(resource.clone())));
    }
}

fn send_all(mut exporter: SpanExporter, queue: &Receiver<Message>, runtime: &Handle) {
    while let Ok(message) = queue.recv() {
        let mut batch = Vec::new();
        let mut waiting = Vec::new();
        let deadline = Instant::now() + GATHER;
        let mut next = Some(message);
        while let Some(message) = next {
            match message {
                Message::Span(span) => batch.push(*span),
                Message::Resource(resource) => exporter.set_resource(&resource),
                Message::Flush(done) => waiting.push(done),
            }
            let patience = if waiting.is_empty() {
                deadline.saturating_duration_since(Instant::now())
            } else {
                Duration::ZERO
            };
            next = match queue.recv_timeout(patience) {
                Ok(message) if batch.len() < BATCH => Some(message),
                Ok(message) => {
                    send(&exporter, std::mem::take(&mut batch), runtime);
                    Some(message)
                }
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => None,
            };
        }
        send(&exporter, batch, runtime);
        // Who no longer waits needs no answer.
        for done in waiting {
            let _ = done.try_send(());
        }
    }
}

fn send(exporter: &SpanExporter, batch: Vec<SpanData>, runtime: &Handle) {
    let count = u64::try_from(batch.len()).unwrap_or(u64::MAX);
    if count == 0 {
        return;
    }
    match runtime.block_on(exporter.export(batch)) {
        Ok(()) => SENT.fetch_add(count, Ordering::Relaxed),
        Err(error) => {
            tracing::debug!(%error, spans = count, "the collector does not take spans");
            DROPPED.fetch_add(count, Ordering::Relaxed)
        }
    };
}
