//! Traces: what a request led to and how long each step took, told to an OpenTelemetry collector.
//!
//! ```text
//!  traceparent of the client ─► request ─┬─ admission
//!                                        ├─ queue                            (until there is room)
//!                                        ├─ claim ── renewal                 (a standby becomes the agent)
//!                                        ├─ restore ── renewal               (or a fork is made)
//!                                        ├─ boot                             (or a guest is booted)
//!                                        └─ exec ─► TRACEPARENT in the program's environment
//!  the same, kept with a task ─► attempt ─┬─ admission, queue, claim, …        (each attempt, also under a later `arkd`)
//!                                         └─ exec ─► TRACEPARENT
//! ```
//!
//! Off until the operator names a collector. Spans are `tracing`'s, of the target [`TARGET`], which no log shows; without a
//! collector none is ever made. A collector that is slow or down costs nothing but spans, which are counted: see [`export`].

mod export;

use std::time::Duration;

use ark_types::exec::ExecRequest;
use axum::http::HeaderMap;
use opentelemetry::propagation::{Extractor, Injector, TextMapPropagator as _};
use opentelemetry::trace::{TraceContextExt as _, TracerProvider as _};
use opentelemetry::{Context, KeyValue};
use opentelemetry_http::hyper::HyperClient;
use opentelemetry_otlp::{WithExportConfig as _, WithHttpConfig as _};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{Sampler, SdkTracerProvider};
use tokio::runtime::Handle;
use tracing::Span;
use tracing::field::Empty;
use tracing_opentelemetry::OpenTelemetrySpanExt as _;
use tracing_subscriber::Layer;
use tracing_subscriber::filter::filter_fn;
use tracing_subscriber::layer::Filter;
use tracing_subscriber::registry::LookupSpan;

use crate::settings;

pub use export::{Counts, counts};

/// Target of every span that is told to the collector.
pub const TARGET: &str = "ark::trace";
/// How long the collector may take to receive a batch.
const EXPORT_LIMIT: Duration = Duration::from_secs(3);
/// Header of the W3C trace context.
const TRACEPARENT: &str = "traceparent";
/// The environment variable.
pub const VARIABLE: &str = "TRACEPARENT";

/// What takes spans from the subscriber `S`.
pub type Spans<S> = Box<dyn Layer<S> + Send + Sync>;

/// The spans of this process on their way out.
#[derive(Debug)]
pub struct Traces(export::Queue);

impl Traces {
    /// What makes spans of the target [`TARGET`] known to the collector that `settings` name, if they name one.
    ///
    /// # Errors
    /// When the exporter cannot be made of that address.
    pub fn begin<S>(
        settings: &settings::Telemetry,
        runtime: &Handle,
    ) -> Result<Option<(Self, Spans<S>)>, opentelemetry_otlp::ExporterBuildError>
    where
        S: tracing::Subscriber + for<'span> LookupSpan<'span> + Send + Sync,
    {
        let Some(endpoint) = &settings.otlp_endpoint else { return Ok(None) };
        let exporter = opentelemetry_otlp::SpanExporter::builder()
            .with_http()
            .with_http_client(HyperClient::with_default_connector(EXPORT_LIMIT, None))
            .with_endpoint(endpoint.traces())
            .with_timeout(EXPORT_LIMIT)
            .build()?;
        let resource = Resource::builder_empty()
            .with_service_name("arkd")
            .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")))
            .build();
        let queue = export::Queue::start(exporter, runtime.clone());
        let provider = SdkTracerProvider::builder()
            // A client that has its requests sampled or not has decided for us.
            .with_sampler(Sampler::ParentBased(Box::new(Sampler::TraceIdRatioBased(
                settings.sample_ratio.get(),
            ))))
            .with_span_processor(queue.clone())
            .with_resource(resource)
            .build();
        let layer = tracing_opentelemetry::layer()
            .with_tracer(provider.tracer("arkd"))
            .with_location(false)
            .with_threads(false)
            .with_tracked_inactivity(false)
            .with_filter(filter_fn(|metadata| metadata.target() == TARGET));
        Ok(Some((Self(queue), layer.boxed())))
    }

    /// Waits a moment until what has ended is with the collector.
    pub fn flush(&self) {
        self.0.flush(EXPORT_LIMIT);
    }
}

/// Keeps spans of the target [`TARGET`] out of logs.
#[must_use]
pub fn not_in_logs<S>() -> impl Filter<S> + Send + Sync + 'static {
    filter_fn(|metadata: &tracing::Metadata<'_>| metadata.target() != TARGET)
}

/// The span of a request, under the one that its client named.
#[must_use]
pub fn request(method: &'static str, route: &str, headers: &HeaderMap) -> Span {
    let span = tracing::info_span!(
        target: TARGET, "request",
        otel.name = format!("{method} {route}"), otel.kind = "server",
        http.request.method = method, http.route = route, http.response.status_code = Empty, otel.status_code = Empty,
    );
    if !span.is_disabled() {
        // It fails only for a span that was entered before.
        let _ = span.set_parent(TraceContextPropagator::new().extract(&Headers(headers)));
    }
    span
}

/// Notes how the request of `span` was answered.
pub fn answered(span: &Span, status: u16) {
    span.record("http.response.status_code", status);
    if status >= 500 {
        span.record("otel.status_code", "ERROR");
    }
}

/// A step of what the current span is about.
#[must_use]
pub fn step(name: &'static str) -> Span {
    tracing::info_span!(target: TARGET, "step", otel.name = name)
}

/// A step of what `parent` is about, wherever that is.
#[must_use]
pub fn step_of(parent: &Span, name: &'static str) -> Span {
    tracing::info_span!(target: TARGET, parent: parent, "step", otel.name = name)
}

/// The trace context that a program in a guest is to go on with: that of `span`, if it is told to a collector, else the one
/// that the client sent, if it is well-formed.
#[must_use]
pub fn traceparent(span: &Span, headers: &HeaderMap) -> Option<String> {
    told(span).or_else(|| {
        let propagator = TraceContextPropagator::new();
        written(&propagator.extract_with_context(&Context::new(), &Headers(headers)))
    })
}

/// The trace context of `span`, if it is told to a collector.
fn told(span: &Span) -> Option<String> {
    let context = span.context();
    let is_told = context.span().span_context().is_sampled();
    is_told.then(|| written(&context)).flatten()
}

fn written(context: &Context) -> Option<String> {
    let mut parent = Parent(None);
    TraceContextPropagator::new().inject_context(context, &mut parent);
    parent.0
}

/// The trace context that a task keeps which a request of `span` asks for: as [`traceparent`], or that of a new trace which no
/// collector is told of.
#[must_use]
pub fn lasting(span: &Span, headers: &HeaderMap) -> String {
    traceparent(span, headers).unwrap_or_else(|| {
        // Zero is no id.
        let trace = rand::random::<u128>().max(1);
        let parent = rand::random::<u64>().max(1);
        format!("00-{trace:032x}-{parent:016x}-00")
    })
}

/// The span of the attempt number `attempt` of a task, in the trace that the task keeps.
#[must_use]
pub fn attempt(task: &str, attempt: u32, traceparent: Option<&str>) -> Span {
    let span = tracing::info_span!(
        target: TARGET, parent: None, "attempt",
        otel.name = "task attempt", ark.task.id = task, ark.task.attempt = i64::from(attempt), ark.task.outcome = Empty,
        otel.status_code = Empty,
    );
    if !span.is_disabled() {
        let _ = span.set_parent(TraceContextPropagator::new().extract(&Kept(traceparent)));
    }
    span
}

/// Notes how the attempt of `span` ended.
pub fn attempted(span: &Span, outcome: &str, is_failure: bool) {
    span.record("ark.task.outcome", outcome);
    if is_failure {
        span.record("otel.status_code", "ERROR");
    }
}

/// The trace context that what a task runs is to go on with: that of `span`, if it is told to a collector, else the one that the
/// task keeps.
#[must_use]
pub fn going_on(span: &Span, kept: Option<&str>) -> Option<String> {
    told(span).or_else(|| kept.map(str::to_owned))
}

/// Has the program of `request` go on with the trace `traceparent`, unless its own environment says otherwise.
pub fn pass_on(request: &mut ExecRequest, traceparent: Option<String>) {
    if let Some(value) = traceparent {
        request.env.entry(VARIABLE.to_owned()).or_insert(value);
    }
}

struct Headers<'a>(&'a HeaderMap);

impl Extractor for Headers<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key)?.to_str().ok()
    }

    fn keys(&self) -> Vec<&str> {
        self.0.keys().map(axum::http::HeaderName::as_str).collect()
    }
}

/// The one value that a task keeps.
struct Kept<'a>(Option<&'a str>);

impl Extractor for Kept<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.filter(|_| key == TRACEPARENT)
    }

    fn keys(&self) -> Vec<&str> {
        vec![TRACEPARENT]
    }
}

/// The one value that is passed on; `tracestate` is the collectors' own business.
struct Parent(Option<String>);

impl Injector for Parent {
    fn set(&mut self, key: &str, value: String) {
        if key == TRACEPARENT {
            self.0 = Some(value);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(value: &str) -> HeaderMap {
        HeaderMap::from_iter([(axum::http::HeaderName::from_static(TRACEPARENT), value.parse().unwrap())])
    }

    #[test]
    fn without_a_collector_a_clients_own_context_is_passed_on_if_it_is_one() {
        let sent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        let span = request("GET", "/", &headers(sent));
        assert!(span.is_disabled());
        assert_eq!(traceparent(&span, &headers(sent)).as_deref(), Some(sent));
        for wrong in ["", "00-0-0-01", "00-00000000000000000000000000000000-b7ad6b7169203331-01", "x"] {
            assert_eq!(traceparent(&span, &headers(wrong)), None, "{wrong:?}");
        }
        assert_eq!(traceparent(&span, &HeaderMap::new()), None);
    }

    #[test]
    fn a_task_keeps_its_clients_context_or_one_of_its_own() {
        let sent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        let span = request("POST", "/", &headers(sent));
        assert_eq!(lasting(&span, &headers(sent)), sent);
        let own = lasting(&span, &HeaderMap::new());
        assert_eq!(traceparent(&span, &headers(&own)).as_deref(), Some(own.as_str()), "it is well-formed");
        assert!(own.ends_with("-00") && own != lasting(&span, &HeaderMap::new()), "{own}");
        assert_eq!(going_on(&span, Some(&own)), Some(own));
    }
}
