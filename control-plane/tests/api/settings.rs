//! Configuration and logs of the real program: checked, printed, reloaded, rotated.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use nix::sys::signal::Signal;
use serde_json::Value;

use crate::harness::{Place, Process, arkd, eventually, signal};

fn told(command: &mut Command) -> (bool, String, String) {
    let Output { status, stdout, stderr } = command.stdout(Stdio::piped()).output().unwrap();
    (status.success(), String::from_utf8(stdout).unwrap(), String::from_utf8(stderr).unwrap())
}

#[test]
fn the_configuration_is_checked_and_printed_without_a_start() {
    let place = Place::new();
    let file = place.path("arkd.toml");
    let flag = ["--config", file.to_str().unwrap(), "--check-config"];
    fs::write(&file, "[log]\nlevel = \"warn\"\n[timing]\nboot_s = 7\n").unwrap();
    let (ok, effective, errors) = told(arkd(&place, &flag).env("ARK_LOG_KEEP", "9"));
    assert!(ok && errors.is_empty(), "{errors}");
    let effective: toml::Table = toml::from_str(&effective).unwrap();
    assert_eq!(effective["log"]["level"].as_str(), Some("warn"));
    assert_eq!(effective["log"]["keep"].as_integer(), Some(9));
    assert_eq!(effective["pool"]["prepared"].as_integer(), Some(0), "ARK_POOL of the harness");
    assert_eq!(effective["timing"]["boot_s"].as_integer(), Some(7));

    fs::write(&file, "[log]\nlevle = \"warn\"\n").unwrap();
    let (ok, effective, errors) = told(&mut arkd(&place, &flag));
    assert!(!ok && effective.is_empty());
    assert!(errors.contains("arkd.toml, line 2, column 1: unknown field `levle`"), "{errors}");
    assert!(!place.path("run").exists(), "nothing was started");

    let (ok, defaults, _) = told(&mut arkd(&place, &["--print-default-config"]));
    assert!(ok);
    assert_eq!(defaults, arkd::settings::DEFAULT_FILE);
    let (ok, _, errors) = told(arkd(&place, &["--check-config"]).env("ARK_CONFIG", "/nonexistent.toml"));
    assert!(!ok && errors.contains("/nonexistent.toml cannot be read"), "{errors}");
}

/// The messages of a JSON log.
fn messages(log: &Path) -> Vec<Value> {
    let text = fs::read_to_string(log).unwrap_or_default();
    text.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"))).collect()
}

#[tokio::test]
async fn a_reload_takes_over_what_it_can_and_names_the_rest() {
    let place = Place::new();
    let (file, log) = (place.path("arkd.toml"), place.path("logs/arkd.log"));
    let write = |rest: &str| {
        fs::write(&file, format!("[log]\nfile = {:?}\n{rest}", log.display().to_string())).unwrap();
    };
    write("[pool]\nprepared = 1\nstandby = 0\n");
    let mut command = arkd(&place, &["--config", file.to_str().unwrap()]);
    command.env_remove("ARK_POOL").env_remove("ARK_STANDBY").stderr(Stdio::null());
    let child = Process::start(&place, &mut command);
    eventually("a VMM is prepared", async || place.agent_dirs() == 1).await;

    write("[pool]\nprepared = 0\nstandby = 0\n[listen]\ntcp = \"127.0.0.1:0\"\n");
    signal(child.child.id(), Signal::SIGHUP);
    eventually("the prepared VMM ends", async || place.agent_dirs() == 0).await;
    let of = |field: &str| -> Vec<String> {
        messages(&log).iter().filter_map(|m| m[field].as_str().map(str::to_owned)).collect()
    };
    eventually("what is not taken over is named", async || of("needs_restart") == ["listen.tcp"]).await;
    assert_eq!(of("taken_over"), ["pool.prepared"]);

    write("[pool]\nprepared = \"many\"\n");
    signal(child.child.id(), Signal::SIGHUP);
    let refused = async || messages(&log).iter().any(|m| m["level"] == "ERROR" && m["error"].is_string());
    eventually("a wrong file is refused", refused).await;

    write("level = \"error\"\n[pool]\nprepared = 1\nstandby = 0\n");
    signal(child.child.id(), Signal::SIGHUP);
    eventually("the file is read", async || place.agent_dirs() == 1).await;
    write("[pool]\nstandby = \"many\"\n");
    signal(child.child.id(), Signal::SIGHUP);
    let refused = async || messages(&log).iter().filter(|m| m["level"] == "ERROR").count() == 2;
    eventually("an error is still told", refused).await;
    assert_eq!(of("taken_over"), ["pool.prepared"], "what is less than an error is not");
}

#[tokio::test]
async fn arkd_may_open_as_many_files_as_the_system_lets_it() {
    let place = Place::new();
    let envs: Vec<_> = arkd(&place, &[])
        .get_envs()
        .filter_map(|(key, value)| Some((key.to_owned(), value?.to_owned())))
        .collect();
    let mut command = Command::new("sh");
    command.args(["-c", "ulimit -Sn 256 && exec \"$0\"", env!("CARGO_BIN_EXE_arkd")]).envs(envs);
    let child = Process::start(&place, command.stderr(Stdio::null()));
    eventually("it may open more", async || {
        let limits = fs::read_to_string(format!("/proc/{}/limits", child.child.id())).unwrap();
        let line = limits.lines().find(|line| line.starts_with("Max open files")).unwrap();
        let (soft, hard) = (line.split_whitespace().nth(3), line.split_whitespace().nth(4));
        soft == hard && soft != Some("256")
    })
    .await;
}

#[tokio::test]
async fn a_log_that_is_standard_error_too_is_rotated_with_it() {
    let place = Place::new();
    let log = place.path("state/arkd.log");
    fs::create_dir_all(place.path("state")).unwrap();
    fs::write(&log, "x".repeat(1 << 20)).unwrap();
    let errors = fs::OpenOptions::new().append(true).open(&log).unwrap();
    let mut command = arkd(&place, &["--fallback-log-file", log.to_str().unwrap()]);
    let child = Process::start(&place, command.env("ARK_LOG_MAX_SIZE_MIB", "1").stderr(errors));
    eventually("arkd says something", async || {
        fs::read_to_string(&log).is_ok_and(|text| text.contains("listening"))
    })
    .await;
    let aside = place.path("state/arkd.log.1");
    assert_eq!(fs::metadata(&aside).unwrap().len(), 1 << 20);
    let standard_error = fs::metadata(format!("/proc/{}/fd/2", child.child.id())).unwrap();
    assert_eq!(standard_error.ino(), fs::metadata(&log).unwrap().ino(), "standard error follows");
    assert!(!fs::read_to_string(&log).unwrap().starts_with('{'), "lines for people");
}

#[tokio::test]
async fn the_service_manager_is_told_of_every_turn_and_that_arkd_lives() {
    let place = Place::new();
    let path = place.path("notify");
    let manager = tokio::net::UnixDatagram::bind(&path).unwrap();
    let mut command = arkd(&place, &[]);
    command.env("NOTIFY_SOCKET", &path).env("WATCHDOG_USEC", "200000").stderr(Stdio::null());
    let child = Process::start(&place, &mut command);
    let next = async || {
        let mut buffer = [0; 256];
        let limit = std::time::Duration::from_secs(20);
        let count = tokio::time::timeout(limit, manager.recv(&mut buffer)).await.unwrap().unwrap();
        String::from_utf8(buffer[..count].to_vec()).unwrap()
    };
    assert!(next().await.starts_with("READY=1\n"));
    assert!(place.run().api_socket().exists(), "it is ready when it says so");
    assert_eq!((next().await, next().await), ("WATCHDOG=1\n".to_owned(), "WATCHDOG=1\n".to_owned()));
    let until = async |wanted: &str| while !next().await.starts_with(wanted) {};
    signal(child.child.id(), Signal::SIGHUP);
    until("RELOADING=1\nMONOTONIC_USEC=").await;
    until("READY=1\n").await;
    signal(child.child.id(), Signal::SIGTERM);
    until("STOPPING=1\n").await;
}
