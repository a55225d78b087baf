//! The inference server by itself, as a process on this host: what batching and the prefix cache are worth. No VM.

use std::path::Path;

use ark_tests::assets;

use crate::mcp::{Reply, Server, large_model, speed};
use crate::report::{Must, Report};

/// Sessions that are decoded together.
const SESSIONS: usize = 8;
/// Tokens of a reply whose speed is measured.
const REPLY: u32 = 96;
/// Turns of each figure.
const TURNS: usize = 5;
/// Least tokens of the beginning that prompts share.
const SHARED: u64 = 512;

/// Measures with the model in the file `bundled`, and with one of random weights in 200 MB.
pub(crate) fn measure(bundled: &Path, report: &mut Report) {
    let dir = tempfile::tempdir().expect("a directory");
    let large = large_model(dir.path());
    let program = assets().0.join("bin/ark-inference");
    let start = |model: &Path, more: &[&str]| Server::start(&program, dir.path(), model, more);
    let server = start(bundled, &[]);
    // It fits a processor's cache: there batching saves no reading of weights, which is what makes it worth while.
    throughput(&server, "bundled model", Must::Shown, report);
    first_token(&server, "bundled model", report);
    drop(server);
    let server = start(&large, &[]);
    throughput(&server, "200 MB model", Must::AtLeast(2.0), report);
    first_token(&server, "200 MB model", report);
    drop(server);
    threads(&start, &[("bundled model", bundled), ("200 MB model", &large)], report);
}

/// Tokens a second of all sessions together against one that is alone.
fn throughput(server: &Server, model: &str, must: Must, report: &mut Report) {
    let (mut alone, mut together) = (Vec::new(), Vec::new());
    for _ in 0..TURNS {
        alone.push(speed(&|| server.connect(), 1, REPLY, Reply::Streamed));
        together.push(speed(&|| server.connect(), SESSIONS, REPLY, Reply::Streamed));
    }
    let name = format!("tokens/s, {SESSIONS} sessions, {model}");
    report.against(&name, "1/s", &together, ("1 session", &alone), must);
}

/// Time to the first token of a prompt whose beginning another session has read, against one whose beginning nobody has.
fn first_token(server: &Server, model: &str, report: &mut Report) {
    let (mut first, mut second) = (server.connect(), server.connect());
    let (mut cold, mut warm) = (Vec::new(), Vec::new());
    for turn in 0..TURNS {
        let mut prompt = format!("{turn}. ");
        while first.tokens(&prompt) < SHARED {
            prompt.push_str("Agents read this instruction before they answer a question about invoices. ");
        }
        cold.push(first.generate(&format!("{prompt}Who sorts them?"), 1, turn).0);
        let (time, said) = second.generate(&format!("{prompt}Who pays for them?"), 1, turn);
        assert!(said["usage"]["cached_tokens"].as_u64() >= Some(SHARED - 2), "{said}");
        warm.push(time);
    }
    let name = format!("first token after {SHARED} shared ones, {model}");
    report.against(&name, "ms", &warm, ("cold", &cold), Must::AtMost(0.2));
}

/// One thread fewer than there are processors, which is the server's default, against one for each.
fn threads(start: &impl Fn(&Path, &[&str]) -> Server, models: &[(&str, &Path)], report: &mut Report) {
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let fewer = processors.saturating_sub(1).max(1);
    for (model, file) in models {
        let (mut all, mut less) = (Vec::new(), Vec::new());
        for (threads, speeds) in [(processors, &mut all), (fewer, &mut less)] {
            let server = start(file, &["--threads", &threads.to_string()]);
            speeds.extend((0..TURNS).map(|_| speed(&|| server.connect(), 1, REPLY, Reply::Streamed)));
        }
        let name = format!("tokens/s, {fewer} of {processors} threads, {model}");
        report.against(&name, "1/s", &less, (&format!("{processors}"), &all), Must::Shown);
    }
}
