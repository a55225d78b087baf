//! `arkd` as it is, but for the seconds of checkpoint policies, which are hundredths of one: a storm has them taken within its rounds.

use std::time::Duration;

use ark_types::shutdown::AgentsFate;
use arkd::args::Args;
use arkd::config::Config;
use arkd::daemon::Daemon;
use arkd::logs::Log;
use arkd::settings;
use clap::Parser as _;
use tokio::signal::unix::{SignalKind, signal};

#[tokio::main(worker_threads = 2)]
async fn main() {
    let args = Args::parse();
    let settings = settings::load(&args, std::env::vars_os()).unwrap();
    let log = Log::begin(&settings, &tokio::runtime::Handle::current()).unwrap();
    let mut terminate = signal(SignalKind::terminate()).unwrap();
    let mut config = Config::new(&args, &settings).unwrap();
    config.timing.checkpoint_second = Duration::from_millis(10);
    let daemon = Daemon::start(config).await.unwrap();
    let fate = tokio::select! {
        _ = terminate.recv() => AgentsFate::Keep,
        fate = daemon.asked_to_end() => fate,
    };
    match fate {
        AgentsFate::End => daemon.shut_down().await,
        AgentsFate::Keep => drop(daemon.leave().await),
    }
    log.flush();
}
