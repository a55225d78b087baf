//! `arkd`, the control plane of NOA ARK.

use std::io::IsTerminal as _;
use std::process::ExitCode;

use ark_types::shutdown::AgentsFate;
use arkd::args::{Args, LogFormat};
use arkd::config::Config;
use arkd::daemon::Daemon;
use clap::Parser as _;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    let args = Args::parse();
    start_log(args.log_format);
    // Two workers: arkd moves bytes and waits; the processors belong to the agents.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let served = match runtime {
        Ok(runtime) => runtime.block_on(serve(&args)),
        Err(error) => Err(error.into()),
    };
    match served {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("arkd: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn serve(args: &Args) -> Result<(), Box<dyn std::error::Error>> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let daemon = Daemon::start(Config::from_args(args)?).await?;
    let agents = tokio::select! {
        _ = terminate.recv() => AgentsFate::Keep,
        _ = interrupt.recv() => AgentsFate::Keep,
        agents = daemon.asked_to_end() => agents,
    };
    match agents {
        AgentsFate::End => {
            tracing::info!("ending: agents are stopped");
            daemon.shut_down().await;
        }
        AgentsFate::Keep => {
            let left = daemon.leave().await;
            tracing::info!("arkd ends; {left} agents run on");
        }
    }
    Ok(())
}

fn start_log(format: LogFormat) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match format {
        LogFormat::Text => log.with_ansi(std::io::stderr().is_terminal()).init(),
        LogFormat::Json => log.json().init(),
    }
}
