//! Traces: what a request led to and how long each step took, told to an OpenTelemetry collector.
//!
//! ```text
//!  traceparent of the client ─► request ─┬─ admission
//!                                        ├─ queue                            (until there is room)
//!                                        ├─ claim ── renewal                 (a standby becomes the agent)
//!                                        ├─ restore ── renewal               (or a fork is made)
//!                                        ├─ boot                             (or a guest is booted)
//!                                        └─ exec ─► TRACEPARENT in the program's environment
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
/// Header and, in capitals, environment variable of the W3C trace context.
const TRACEPARENT: &str = "traceparent";

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
    let propagator = TraceContextPropagator::new();
    let ours = span.context();
    let is_told = ours.span().span_context().is_sampled();
    let context =
        if is_told { ours } else { propagator.extract_with_context(&Context::new(), &Headers(headers)) };
    let mut parent = Parent(None);
    propagator.inject_context(&context, &mut parent);
    parent.0
}

/// Has the program of `request` go on with the trace `traceparent`, unless its own environment says otherwise.
pub fn pass_on(request: &mut ExecRequest, traceparent: Option<String>) {
    if let Some(value) = traceparent {
        request.env.entry(TRACEPARENT.to_uppercase()).or_insert(value);
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
}
