//! What `ark` prints, frozen: tables, JSON, help and the sentences of errors, each in a file of `frozen/`.
//!
//! `arkd` is a server that answers with the frozen wire formats of `api/types/schema`, so nothing in the output depends on
//! the day but how long ago things were. Those are days; each digit of a number of days is shown as `#`, as is each
//! of the version of this release. `ARK_BLESS=1 cargo test -p ark-cli --test cli` renews the files.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::host::{Host, agent, ark, problem, told};
use ark_types::problem::ProblemKind;
use axum::http::{Method, StatusCode, Uri};
use axum::middleware::map_response;
use axum::response::{IntoResponse, Response};
use axum::{Json, Router};
use serde_json::Value;

/// The value called `name` in the frozen `file`.
fn frozen(file: &str, name: &str) -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../types/schema/{file}.json"));
    let all: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    all.get(name).unwrap_or_else(|| panic!("{file} has no {name}")).clone()
}

fn answer(method: &Method, uri: &Uri) -> Response {
    let (file, name) = match (method.as_str(), uri.path().trim_start_matches("/v1/")) {
        ("GET", "agents") => ("agents", "list"),
        ("GET", "agents/a1") => return Json(agent("a1")).into_response(),
        ("GET", "agents/failed") => ("agents", "agent failed"),
        ("GET" | "PATCH", "agents/fork") => ("agents", "agent from an agent"),
        ("GET", "agents/fork/receipt") => ("receipts", "receipt"),
        ("GET", "events") => {
            // One page is all.
            let mut page = frozen("events", "list");
            page["next_after"] = page["newest"].clone();
            return Json(page).into_response();
        }
        ("GET", "queue") => ("scheduling", "queue"),
        ("GET", "hosts") => ("scheduling", "hosts"),
        ("GET", "owners") => ("scheduling", "owners"),
        ("GET", "templates") => ("templates", "list"),
        ("GET", "snapshots") => ("snapshots", "list"),
        ("GET", "images") => ("images", "list"),
        ("GET", "models") => ("models", "list"),
        ("GET", "models/router") => ("models", "model"),
        ("GET", "stats") => ("stats", "list"),
        ("GET", "consoles") => ("consoles", "list"),
        ("POST", "agents") => return problem(ProblemKind::HostFull, "no host has room: 64 MiB are missing"),
        ("DELETE", "owners/shop") => return StatusCode::NO_CONTENT.into_response(),
        _ => return problem(ProblemKind::AgentNotFound, "there is no agent \"nobody\""),
    };
    Json(frozen(file, name)).into_response()
}

fn server() -> Host {
    Host::start(Router::new().fallback(|method: Method, uri: Uri| async move { answer(&method, &uri) }))
}

/// `text` without what differs from day to day and from release to release: see the module.
fn masked(text: &str) -> String {
    let text = text.replace(env!("CARGO_PKG_VERSION"), "#.#.#");
    let mut out = String::new();
    let mut rest = text.as_str();
    while let Some(start) = rest.find(|c: char| c.is_ascii_digit()) {
        let (before, number) = rest.split_at(start);
        let (digits, after) =
            number.split_at(number.find(|c: char| !c.is_ascii_digit()).unwrap_or(number.len()));
        let is_days = after.strip_prefix(" d").is_some_and(|next| !next.starts_with(char::is_alphanumeric));
        out.push_str(before);
        out.push_str(&if is_days { "#".repeat(digits.len()) } else { digits.to_owned() });
        rest = after;
    }
    out + rest
}

/// Compares what `command` does with what is frozen under `file`, or renews that.
fn check(file: &str, args: &[&str], mut command: Command) {
    let run = command.env("COLUMNS", "100").env_remove("ARK_OWNER").env_remove("NO_COLOR").output();
    let (code, out, errors) = told(run.unwrap());
    let mut now = format!("$ ark {}\n", args.join(" ")) + &masked(&out);
    if !errors.is_empty() {
        now += &format!("── standard error\n{}", masked(&errors));
    }
    if code != 0 {
        now += &format!("── exit code {code}\n");
    }
    let path = golden().join(file);
    if std::env::var_os("ARK_BLESS").is_some_and(|v| v == "1") {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, &now).unwrap();
    }
    let frozen = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        frozen == now,
        "{file} is not what is frozen; if the change is meant: ARK_BLESS=1 cargo test -p ark-cli --test cli\nnow:\n{now}"
    );
}

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cli/frozen")
}

/// Every file of `frozen/<dir>` is one that a test looks at.
fn no_others(dir: &str, files: &BTreeSet<String>) {
    let found = std::fs::read_dir(golden().join(dir)).unwrap();
    let found: BTreeSet<String> = found
        .map(|entry| entry.unwrap())
        .filter(|entry| entry.file_type().unwrap().is_file())
        .map(|entry| entry.file_name().into_string().unwrap())
        .collect();
    assert_eq!(&found, files, "files of no case: delete them, or renew what is missing");
}

#[test]
fn what_is_listed_and_shown() {
    let host = server();
    let mut files = BTreeSet::new();
    for args in [
        &["ps"][..],
        &["ps", "--all"],
        &["events"],
        &["queue"],
        &["hosts"],
        &["quota"],
        &["templates"],
        &["snapshots"],
        &["images"],
        &["models"],
        &["model", "show", "router"],
        &["top", "--once"],
        &["logs", "--kept"],
        &["inspect", "a1"],
        &["inspect", "failed"],
        &["inspect", "fork"],
        &["receipt", "fork"],
        &["label", "fork", "app=shop", "old-"],
        &["version"],
    ] {
        for args in [args.to_vec(), [args, &["--json"]].concat()] {
            let file = format!("{}.txt", args.join("_").replace("--", ""));
            check(&file, &args, host.command(&args));
            files.insert(file);
        }
    }
    no_others("", &files);
}

#[test]
fn what_is_refused() {
    let host = server();
    let mut files = BTreeSet::new();
    for (name, args) in [
        ("no-agent", &["inspect", "nobody"][..]),
        ("no-agent-json", &["--json", "inspect", "nobody"]),
        ("no-room", &["create", "--image", "base"]),
        ("not-removed", &["rm", "nobody", "nothing"]),
        ("no-verb", &["mkae"]),
        ("no-option", &["ps", "--al"]),
        ("no-argument", &["exec", "a1"]),
        ("no-argument-json", &["--json", "exec", "a1"]),
        ("bad-name", &["create", "--name", "A_1"]),
        ("bad-memory", &["create", "--memory", "lots"]),
        ("bad-label", &["create", "--label", "app"]),
        ("bad-change", &["label", "a1", "app"]),
        ("bad-selector", &["ps", "-l", "app in x"]),
        ("bad-restart", &["create", "--restart", "sometimes"]),
        ("bad-model", &["model", "add", "x.gguf", "--name", "Qwen2.5"]),
        ("no-model-file", &["model", "add", "/nonexistent/x.gguf", "--name", "x"]),
        ("bad-place", &["cp", "a1:etc", "."]),
    ] {
        let file = format!("errors/{name}.txt");
        check(&file, args, host.command(args));
        files.insert(format!("{name}.txt"));
    }
    no_others("errors", &files);
}

/// Verbs that the help of `verbs` lists.
fn listed(dir: &Path, verbs: &[&str]) -> Vec<String> {
    let (_, help, _) = told(ark(dir, &[verbs, &["-h"]].concat()).output().unwrap());
    let after = help.split("Commands:\n").nth(1).unwrap_or_default();
    let rows = after.lines().take_while(|line| !line.is_empty());
    rows.filter_map(|row| Some(row.strip_prefix("  ")?.split_once(' ')?.0.to_owned()))
        .filter(|verb| !verb.is_empty())
        .collect()
}

#[test]
fn the_help_of_every_verb() {
    let dir = tempfile::tempdir().unwrap();
    let mut cases: Vec<Vec<String>> = vec![Vec::new()];
    for verb in listed(dir.path(), &[]) {
        let below = listed(dir.path(), &[&verb]);
        cases.push(vec![verb.clone()]);
        cases.extend(below.into_iter().map(|action| vec![verb.clone(), action]));
    }
    assert!(cases.len() > 30, "{cases:?}");
    let mut files = BTreeSet::new();
    for case in cases {
        let name = [&["ark".to_owned()], case.as_slice()].concat().join("_");
        let args: Vec<&str> = case.iter().map(String::as_str).chain(["--help"]).collect();
        check(&format!("help/{name}.txt"), &args, ark(dir.path(), &args));
        files.insert(format!("{name}.txt"));
    }
    no_others("help", &files);
}

#[test]
fn an_arkd_of_another_release_is_noticed_once() {
    let told_by = |version: &'static str| {
        let routes = Router::new().fallback(|method: Method, uri: Uri| async move { answer(&method, &uri) });
        Host::start_with(routes, |routes| {
            routes.layer(map_response(move |mut response: Response| async move {
                response.headers_mut().insert("ark-version", version.parse().unwrap());
                response
            }))
        })
    };
    let (code, _, errors) = told_by("99.1.0").run(&["ps"], "");
    assert_eq!((code, errors.matches("arkd is of 99.1.0").count()), (0, 1), "{errors}");
    let (code, _, errors) = told_by(concat!(env!("CARGO_PKG_VERSION"), "-later")).run(&["ps"], "");
    assert_eq!((code, errors.as_str()), (0, ""));
}
