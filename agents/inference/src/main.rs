//! `ark-inference`: serves models to whoever connects.

mod listen;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use ark_inference::engine::{Config, Engine};
use ark_inference::server::{Models, Served, serve};
use ark_link::Address;
use ark_types::guest::INFERENCE_PORT;
use clap::{Args, Parser};
use listen::Listening;

/// Serves language models in GGUF files over MCP (Model Context Protocol), one JSON-RPC message a line.
#[derive(Parser)]
#[command(version)]
struct Cli {
    /// A model and the name it is served by; the first is taken where a call names none.
    #[arg(long = "model", value_name = "NAME=PATH", required = true, value_parser = named)]
    models: Vec<(String, PathBuf)>,
    #[command(flatten)]
    place: Place,
    /// Longest prompt and reply together, in tokens [default: what the model was trained for, at most 4096].
    #[arg(long)]
    context: Option<u32>,
    /// Sessions decoded at the same time.
    #[arg(long, default_value_t = Config::default().sessions)]
    sessions: u32,
    /// Most tokens that one step computes.
    #[arg(long, default_value_t = Config::default().batch)]
    batch: u32,
    /// Threads that compute [default: one for each processor but one].
    #[arg(long)]
    threads: Option<u32>,
    /// Calls that may wait.
    #[arg(long, default_value_t = Config::default().queue)]
    queue: usize,
}

/// Where callers come from.
#[derive(Args)]
#[group(required = true, multiple = false)]
struct Place {
    /// Serves one caller on standard input and output.
    #[arg(long)]
    stdio: bool,
    /// Listens on a Unix socket of this user.
    #[arg(long, value_name = "PATH")]
    unix: Option<PathBuf>,
    /// Listens on vsock, for the host.
    #[arg(long, value_name = "PORT", num_args = 0..=1, default_missing_value = DEFAULT_PORT)]
    vsock: Option<u32>,
}

/// [`INFERENCE_PORT`], as the command line has it.
const DEFAULT_PORT: &str = "1030";
const _: () = assert!(INFERENCE_PORT == 1030);

/// Longest context without being asked for: a trained one of 128 Ki tokens would take gigabytes.
const DEFAULT_CONTEXT: u64 = 4096;

fn named(text: &str) -> Result<(String, PathBuf), String> {
    let (name, path) =
        text.split_once('=').ok_or("a model is NAME=PATH, such as router=/models/router.gguf")?;
    let good = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    if name.is_empty() || name.len() > 64 || !name.chars().all(good) {
        return Err(format!(
            "\"{name}\" is no name: 1 to 64 letters, digits, dots, dashes or underscores are"
        ));
    }
    Ok((name.to_owned(), path.into()))
}

fn main() -> ExitCode {
    // Standard output may be the wire.
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| "error,ark_inference=info,llama-cpp-2=warn".into());
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    match run(&Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ark-inference: {error}");
            ExitCode::FAILURE
        }
    }
}

/// llama.cpp's kernels are built for this, see `.cargo/config.toml`; without it the first step would end in a signal.
fn check_processor() -> Result<(), String> {
    let missing: Vec<_> = [
        ("AVX2", std::arch::is_x86_feature_detected!("avx2")),
        ("FMA", std::arch::is_x86_feature_detected!("fma")),
        ("F16C", std::arch::is_x86_feature_detected!("f16c")),
        ("BMI2", std::arch::is_x86_feature_detected!("bmi2")),
    ]
    .iter()
    .filter_map(|(name, there)| (!there).then_some(*name))
    .collect();
    if missing.is_empty() {
        return Ok(());
    }
    Err(format!(
        "this processor has no {}, which inference needs (x86-64-v3); use another host",
        missing.join(", ")
    ))
}

fn run(cli: &Cli) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    check_processor()?;
    let mut served = Vec::new();
    for (name, path) in &cli.models {
        let header = ark_gguf::Header::open(path).map_err(|e| format!("{}: {e}", path.display()))?;
        let model = ark_gguf::Model::try_from(&header).map_err(|e| format!("{}: {e}", path.display()))?;
        let usual = u32::try_from(model.context.min(DEFAULT_CONTEXT)).unwrap_or(u32::MAX);
        let default = Config::default();
        let config = Config {
            context: cli.context.unwrap_or(usual),
            sessions: cli.sessions,
            batch: cli.batch,
            threads: cli.threads.unwrap_or(default.threads),
            queue: cli.queue,
        };
        let engine = Engine::start(path, config).map_err(|e| format!("{}: {e}", path.display()))?;
        tracing::info!(
            "{name} is served: {} parameters, context {} for {} sessions, about {} MiB",
            engine.model().parameters,
            config.context,
            config.sessions,
            engine.memory().total() >> 20
        );
        served.push(Served::new(name.clone(), engine));
    }
    let models = Arc::new(Models::new(served).ok_or("no model was given")?);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(async {
        let address = match (&cli.place.unix, cli.place.vsock) {
            (Some(path), _) => Address::Unix(path.clone()),
            (None, Some(port)) => Address::Vsock { cid: ark_link::socket::ANY_CID, port },
            (None, None) => {
                serve(models, tokio::io::stdin(), tokio::io::stdout(), true).await?;
                return Ok(());
            }
        };
        Listening::new(&address).map_err(|e| format!("cannot listen on {address}: {e}"))?.serve(models).await
    })
}
