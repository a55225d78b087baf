//! Messages: where they go, how they look, which there are, and how long they are kept.
//!
//! What is logged goes to standard error, or to a file that is rotated here: it is written whole, line by line, so that no
//! message is torn, and no other program has to be told to let go of it.

mod rotate;

use std::io::{self, IsTerminal as _};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use ark_types::plain::plain;
use tokio::runtime::Handle;
use tracing_subscriber::filter::FilterExt as _;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Layer, Registry, fmt, reload};

use crate::settings::{self, LogFormat};
use crate::traces::{Traces, not_in_logs};

pub use rotate::{Limits, RotatedFile};

impl From<&settings::Log> for Limits {
    fn from(log: &settings::Log) -> Self {
        Self { bytes: log.max_size_mib.get() << 20, keep: log.keep.count() }
    }
}

/// Why there is no log.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The file.
    #[error(
        "the log file {path} cannot be written: {}; correct `file` in [log], or its directory's mode",
        plain(source)
    )]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The collector.
    #[error("traces cannot be sent: {0}; correct `otlp_endpoint` in [telemetry]")]
    Traces(#[from] opentelemetry_otlp::ExporterBuildError),
    /// Somebody else logs in this process.
    #[error("the log was begun before")]
    Twice,
}

/// The log of this process, as far as it can be changed while it is written.
#[derive(Debug)]
pub struct Log {
    filter: reload::Handle<EnvFilter, Registry>,
    file: Option<Target>,
    traces: Option<Traces>,
}

impl Log {
    /// Begins to log as `settings` say, and to send traces, if they name a collector, on `runtime`.
    ///
    /// # Errors
    /// [`LogError`].
    pub fn begin(settings: &settings::Settings, runtime: &Handle) -> Result<Self, LogError> {
        let traces = Traces::begin(&settings.telemetry, runtime)?;
        let (traces, spans) = traces.unzip();
        let settings = &settings.log;
        let file = match &settings.file {
            None => None,
            Some(path) => {
                let path = PathBuf::from(path.clone());
                let opened = RotatedFile::open(path.clone(), Limits::from(settings));
                Some(Target(Arc::new(Mutex::new(opened.map_err(|source| LogError::File { path, source })?))))
            }
        };
        let format = settings.format.unwrap_or(match file {
            Some(_) => LogFormat::Json,
            None => LogFormat::Text,
        });
        let lines: Box<dyn Layer<_> + Send + Sync> = match &file {
            Some(file) => lines(format, false, file.clone()),
            None => lines(format, io::stderr().is_terminal(), io::stderr),
        };
        let (filter, handle) = reload::Layer::new(settings.level.filter());
        let lines = lines.with_filter(filter.and(not_in_logs()));
        tracing_subscriber::registry().with(lines).with(spans).try_init().map_err(|_| LogError::Twice)?;
        Ok(Self { filter: handle, file, traces })
    }

    /// Waits a moment until what was traced is with the collector.
    pub fn flush(&self) {
        if let Some(traces) = &self.traces {
            traces.flush();
        }
    }

    /// Takes over what of `settings` can be: level, size, files kept.
    pub fn reload(&self, settings: &settings::Log) {
        // It fails only when nobody logs any more.
        let _ = self.filter.reload(settings.level.filter());
        if let Some(Target(file)) = &self.file {
            file.lock().unwrap_or_else(PoisonError::into_inner).limit(Limits::from(settings));
        }
    }
}

fn lines<S, W>(format: LogFormat, colours: bool, writer: W) -> Box<dyn Layer<S> + Send + Sync>
where
    S: tracing::Subscriber + for<'span> tracing_subscriber::registry::LookupSpan<'span>,
    W: for<'writer> MakeWriter<'writer> + Send + Sync + 'static,
{
    match format {
        LogFormat::Text => fmt::layer().with_ansi(colours).with_writer(writer).boxed(),
        LogFormat::Json => fmt::layer().json().flatten_event(true).with_writer(writer).boxed(),
    }
}

/// The file, shared by all who log.
#[derive(Clone, Debug)]
struct Target(Arc<Mutex<RotatedFile>>);

impl io::Write for Target {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).write_line(line).map(|()| line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'writer> MakeWriter<'writer> for Target {
    type Writer = Self;
    fn make_writer(&'writer self) -> Self {
        self.clone()
    }
}
