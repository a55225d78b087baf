//! What the tests of engine and server share: a model of random weights, loaded by the real path.
#![allow(dead_code, reason = "each test file uses its part")]

use std::path::PathBuf;
use std::sync::OnceLock;

use ark_gguf::synthetic::Synthetic;
use ark_inference::engine::{Config, Done, Engine, Event, Finish, Reply, Request, Sampling, Work};

/// The model's file, written once a process.
pub(crate) fn model() -> PathBuf {
    static DIR: OnceLock<tempfile::TempDir> = OnceLock::new();
    DIR.get_or_init(|| {
        let dir = tempfile::tempdir().expect("a directory");
        std::fs::write(dir.path().join("model.gguf"), Synthetic::default().to_bytes()).expect("written");
        dir
    })
    .path()
    .join("model.gguf")
}

/// One thread: those of an engine wait for each other in loops, and tests run many engines at once.
pub(crate) fn config() -> Config {
    Config { context: 512, sessions: 8, batch: 64, threads: 1, queue: 64 }
}

pub(crate) fn engine(config: Config) -> Engine {
    Engine::start(&model(), config).expect("the model is loaded")
}

pub(crate) fn greedy() -> Sampling {
    Sampling { temperature: 0.0, ..Sampling::default() }
}

/// A request of up to `max_tokens` of the likeliest text.
pub(crate) fn request(engine: &Engine, prompt: &str, max_tokens: u32) -> Request {
    with(engine, prompt, greedy(), Some(max_tokens), &[])
}

pub(crate) fn with(
    engine: &Engine,
    prompt: &str,
    sampling: Sampling,
    max_tokens: Option<u32>,
    stop: &[&str],
) -> Request {
    Request {
        owner: "test".to_owned(),
        prompt: engine.tokenize(prompt, true, false).expect("it fits"),
        work: Work::Generate { sampling, max_tokens, stop: stop.iter().map(|s| (*s).to_owned()).collect() },
        deadline: None,
    }
}

/// The whole reply.
pub(crate) async fn whole(mut reply: Reply) -> (String, Done) {
    let mut text = String::new();
    loop {
        match reply.next().await.expect("the engine runs") {
            Event::Text(more) => text.push_str(&more),
            Event::Embedding(_) => panic!("no embedding was asked for"),
            Event::Done(done) => return (text, done),
        }
    }
}

pub(crate) async fn said(engine: &Engine, request: Request) -> (String, Done) {
    whole(engine.submit(request).expect("it is taken")).await
}

/// Waits for what becomes true soon.
pub(crate) async fn eventually(what: &str, mut is: impl FnMut() -> bool) {
    for _ in 0..3000 {
        if is() {
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    panic!("after half a minute: {what}");
}

pub(crate) fn ended(done: &Done) -> bool {
    matches!(done.finish, Finish::Stop | Finish::Length)
}
