//! `arkd`, the control plane of NOA ARK.

use std::process::ExitCode;

use ark_types::shutdown::AgentsFate;
use arkd::args::Args;
use arkd::config::Config;
use arkd::daemon::Daemon;
use arkd::logs::Log;
use arkd::notify::Notify;
use arkd::settings::{self, Settings};
use clap::Parser as _;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::signal::unix::{SignalKind, signal};

/// An error of any kind, on its way to standard error.
type Failure = Box<dyn std::error::Error>;

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("arkd: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<(), Failure> {
    if args.print_default_config {
        print!("{}", settings::DEFAULT_FILE);
        return Ok(());
    }
    let settings = settings::load(args, std::env::vars_os())?;
    if args.check_config {
        print!("{}", toml::to_string(&settings)?);
        return Ok(());
    }
    // Each agent costs some descriptors, and nothing in here minds how many there may be.
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, most, most)?;
    // Two workers: arkd moves bytes and waits; the processors belong to the agents.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let log = Log::begin(&settings, runtime.handle())?;
    runtime.block_on(serve(args, settings, &log))
}

async fn serve(args: &Args, mut settings: Settings, log: &Log) -> Result<(), Failure> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut hang_up = signal(SignalKind::hangup())?;
    let notify = Notify::from_env();
    let daemon = Daemon::start(Config::new(args, &settings)?).await?;
    notify.ready();
    let mut feeding = notify.watchdog().map(tokio::time::interval);
    let agents = loop {
        tokio::select! {
            _ = terminate.recv() => break AgentsFate::Keep,
            _ = interrupt.recv() => break AgentsFate::Keep,
            agents = daemon.asked_to_end() => break agents,
            _ = hang_up.recv() => {
                notify.reloading();
                reload(args, &mut settings, log, &daemon);
                notify.ready();
            }
            () = due(&mut feeding) => {
                if daemon.is_well().await {
                    notify.alive();
                }
            }
        }
    };
    notify.stopping();
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
    log.flush();
    Ok(())
}

/// The next time that the watchdog is fed; never where there is none.
async fn due(feeding: &mut Option<tokio::time::Interval>) {
    match feeding {
        Some(interval) => drop(interval.tick().await),
        None => std::future::pending().await,
    }
}

/// Reads the configuration again and takes over what can be; the rest is named.
fn reload(args: &Args, settings: &mut Settings, log: &Log, daemon: &Daemon) {
    let new = match settings::load(args, std::env::vars_os()) {
        Ok(new) => new,
        Err(error) => {
            tracing::error!(%error, "the configuration stays as it was");
            return;
        }
    };
    let changes = settings::changes(settings, &new);
    log.reload(&new.log);
    daemon.reload(&new);
    let (taken, left): (Vec<_>, Vec<_>) = changes.iter().partition(|change| change.reloadable);
    let names = |changes: &[&settings::Change]| {
        changes.iter().map(|change| change.key.as_str()).collect::<Vec<_>>().join(" ")
    };
    tracing::info!(taken_over = names(&taken), "the configuration was read again");
    if !left.is_empty() {
        tracing::warn!(needs_restart = names(&left), "these changes need a restart of arkd");
    }
    *settings = new.with_unreloadable_of(settings);
}
