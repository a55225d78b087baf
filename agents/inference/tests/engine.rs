//! The engine over a real model: batching, prefix cache, sampling, bounds, cancellation.

mod common;

use std::time::{Duration, Instant};

use ark_inference::engine::{
    Config, Constraint, Engine, Event, Finish, LoadError, Request, RequestError, Sampling, Work,
};
use common::{config, ended, engine, eventually, greedy, model, request, said, whole, with};

const PROMPTS: [&str; 8] = [
    "The first agent sorts invoices.",
    "A second one",
    "Which agent should sort invoices into folders by year, and which one should only look at them? Say it in a word.",
    "x",
    "In the beginning there was a microVM, and it was without form and void; and darkness was upon the face of the deep.",
    "1 2 3 4 5 6 7 8 9",
    "ünïcödé — €",
    "The first agent sorts letters.",
];

#[tokio::test(flavor = "multi_thread")]
async fn batched_text_is_the_text_alone() {
    let mut alone = Vec::new();
    for prompt in PROMPTS {
        // An engine of its own: neither neighbours nor a cache.
        let engine = engine(config());
        alone.push(said(&engine, request(&engine, prompt, 40)).await.0);
    }
    let engine = engine(config());
    for round in 0..3 {
        let replies: Vec<_> =
            PROMPTS.iter().map(|p| engine.submit(request(&engine, p, 40)).expect("it is taken")).collect();
        let together = futures_util::future::join_all(replies.into_iter().map(whole)).await;
        for ((text, done), expected) in together.iter().zip(&alone) {
            assert_eq!(text, expected, "round {round}");
            assert!(ended(done));
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn more_sessions_than_slots_all_end() {
    let engine = engine(Config { sessions: 3, ..config() });
    let replies: Vec<_> =
        (0..20).map(|i| engine.submit(request(&engine, PROMPTS[i % 8], 10)).expect("it is taken")).collect();
    for (_, done) in futures_util::future::join_all(replies.into_iter().map(whole)).await {
        assert!(ended(&done));
        assert!(done.usage.completion_tokens >= 1 && done.usage.completion_tokens <= 10);
    }
    assert_eq!(engine.load().queued, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prefix_is_computed_once() {
    let engine = engine(config());
    let shared = "All of these words come first, in every prompt that follows. ".repeat(4);
    let first = said(&engine, request(&engine, &format!("{shared}One."), 5)).await.1;
    assert_eq!(first.usage.cached_tokens, 0);
    let prefix = engine.tokenize(&shared, true, false).expect("it fits").len();
    let second = said(&engine, request(&engine, &format!("{shared}Two?"), 5)).await.1;
    assert!(second.usage.cached_tokens as usize >= prefix - 1, "{second:?}, prefix {prefix}");
    // Those who come at the same time share it as well: one computes it, the others wait for that.
    let other = "Nobody has read this beginning before, and several will read it now. ".repeat(4);
    let prefix = engine.tokenize(&other, true, false).expect("it fits").len();
    let replies: Vec<_> = ["a", "b", "c"]
        .iter()
        .map(|end| engine.submit(request(&engine, &format!("{other}{end}"), 5)).expect("it is taken"))
        .collect();
    let mut cached: Vec<_> = futures_util::future::join_all(replies.into_iter().map(whole))
        .await
        .iter()
        .map(|(_, done)| done.usage.cached_tokens as usize)
        .collect();
    cached.sort_unstable();
    assert!(
        cached[0] < prefix / 2 && cached[1] >= prefix - 1 && cached[2] >= prefix - 1,
        "{cached:?} of {prefix}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn cached_text_is_the_text_computed() {
    let shared =
        "The same beginning for all of them, long enough to be worth a copy, and then some. ".repeat(3);
    let mut cold = Vec::new();
    for end in ["one", "two", "three"] {
        let engine = engine(config());
        cold.push(said(&engine, request(&engine, &format!("{shared}{end}"), 30)).await.0);
    }
    let engine = engine(config());
    for (end, expected) in ["one", "two", "three"].iter().zip(&cold) {
        assert_eq!(&said(&engine, request(&engine, &format!("{shared}{end}"), 30)).await.0, expected);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_seed_gives_the_same_text_and_none_another() {
    let engine = engine(config());
    let seeded =
        |seed| Sampling { temperature: 1.5, top_k: 0, top_p: 1.0, min_p: 0.0, seed, ..Sampling::default() };
    let text = async |seed| said(&engine, with(&engine, "Dice:", seeded(seed), Some(30), &[])).await.0;
    let first = text(Some(7)).await;
    assert_eq!(first, text(Some(7)).await);
    assert_ne!(first, text(Some(8)).await);
    assert_ne!(text(None).await, text(None).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_text_ends_the_reply_and_is_left_out() {
    let engine = engine(config());
    let (all, _) = said(&engine, request(&engine, "Go on.", 40)).await;
    let stop: String = all.chars().skip(6).take(3).collect();
    let (text, done) = said(&engine, with(&engine, "Go on.", greedy(), Some(40), &[&stop])).await;
    assert_eq!(done.finish, Finish::Stop);
    assert!(!text.contains(&stop) && all.starts_with(&text), "{text:?} of {all:?} until {stop:?}");
    assert!(done.usage.completion_tokens < 40);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_grammar_holds() {
    let engine = engine(config());
    let held = |constraint| Sampling { constraint: Some(constraint), ..Sampling::default() };
    let gbnf = Constraint::Gbnf("root ::= (\"yes\" | \"no\") \"!\"".to_owned());
    let (text, done) = said(&engine, with(&engine, "Well?", held(gbnf), Some(20), &[])).await;
    assert!(["yes!", "no!"].contains(&text.trim()), "{text:?}");
    assert_eq!(done.finish, Finish::Stop);
    let schema = r#"{"type":"object","properties":{"agent":{"enum":["task","code","files"]}},"required":["agent"],"additionalProperties":false}"#;
    let (text, _) = said(
        &engine,
        with(&engine, "Which?", held(Constraint::JsonSchema(schema.to_owned())), Some(60), &[]),
    )
    .await;
    let value: serde_json::Value = serde_json::from_str(&text).expect("it is JSON");
    assert!(["task", "code", "files"].contains(&value["agent"].as_str().expect("a text")), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_grammar_is_refused() {
    let engine = engine(config());
    let refused = |constraint| {
        let sampling = Sampling { constraint: Some(constraint), ..greedy() };
        engine.submit(with(&engine, "x", sampling, Some(5), &[])).expect_err("it is refused")
    };
    for text in ["root ::= (", "", "nonsense", "leaf ::= \"x\"", "root ::= root \"x\"", "root ::= missing"] {
        assert_eq!(refused(Constraint::Gbnf(text.to_owned())), RequestError::Grammar, "{text:?}");
    }
    for text in ["{", "[]", "{\"$ref\": \"#/nowhere\"}", "{\"type\": \"no such\"}"] {
        assert_eq!(refused(Constraint::JsonSchema(text.to_owned())), RequestError::Schema, "{text:?}");
    }
    let long = "x".repeat(1 << 20);
    assert!(matches!(refused(Constraint::Gbnf(long)), RequestError::GrammarSize { .. }));
    // It still works.
    assert!(ended(&said(&engine, request(&engine, "x", 3)).await.1));
}

#[tokio::test(flavor = "multi_thread")]
async fn numbers_out_of_range_are_refused() {
    let engine = engine(config());
    let refused = |sampling| {
        engine.submit(with(&engine, "x", sampling, Some(5), &[])).expect_err("it is refused").to_string()
    };
    assert_eq!(
        refused(Sampling { temperature: -1.0, ..greedy() }),
        "temperature is -1, but must be from 0 to 10"
    );
    assert!(refused(Sampling { temperature: f32::NAN, ..greedy() }).contains("temperature"));
    assert!(refused(Sampling { top_p: 0.0, ..greedy() }).contains("top_p"));
    assert!(refused(Sampling { min_p: 1.1, ..greedy() }).contains("min_p"));
    let stops = with(&engine, "x", greedy(), Some(5), &[""]);
    assert_eq!(engine.submit(stops).expect_err("refused"), RequestError::Stops);
    let none = with(&engine, "x", greedy(), Some(0), &[]);
    assert_eq!(engine.submit(none).expect_err("refused"), RequestError::NoReply);
    let empty = Request { prompt: Vec::new(), ..request(&engine, "x", 5) };
    assert_eq!(engine.submit(empty).expect_err("refused"), RequestError::Empty);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_does_not_fit_the_context_is_an_error_with_numbers() {
    let engine = engine(Config { context: 64, ..config() });
    let long = "word ".repeat(100);
    let tokens =
        u32::try_from(engine.tokenize(&long, true, false).expect("not too large").len()).expect("small");
    assert_eq!(
        engine.submit(request(&engine, &long, 1)).expect_err("refused"),
        RequestError::Context { prompt: tokens, reply: 1, context: 64 }
    );
    assert!(matches!(engine.submit(request(&engine, "x", 64)), Err(RequestError::Context { .. })));
    assert!(matches!(
        engine.tokenize(&"x".repeat(10 << 20), true, false),
        Err(RequestError::TooLarge { .. })
    ));
    // All that fits is all that comes, when no number is given.
    let open = with(&engine, "x", greedy(), None, &[]);
    let room = 64 - u32::try_from(open.prompt.len()).expect("small");
    let (_, done) = said(&engine, open).await;
    assert!(done.finish == Finish::Stop || done.usage.completion_tokens == room, "{done:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dropped_reply_frees_its_slot() {
    let engine = engine(Config { sessions: 1, context: 2048, ..config() });
    let mut first = engine.submit(request(&engine, "Talk for long.", 2000)).expect("it is taken");
    assert!(first.next().await.is_some());
    let waiting = engine.submit(request(&engine, "Wait.", 2000)).expect("it is taken");
    let third = engine.submit(request(&engine, "Be short.", 3)).expect("it is taken");
    assert_eq!(engine.load().active, 1);
    drop(first);
    drop(waiting);
    assert!(ended(&whole(third).await.1));
    eventually("the engine is idle", || engine.load().active == 0 && engine.load().queued == 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deadline_ends_it_with_what_there_is() {
    let engine = engine(Config { sessions: 1, context: 2048, ..config() });
    let deadline = Some(Instant::now() + Duration::from_millis(50));
    let running =
        engine.submit(Request { deadline, ..request(&engine, "Talk for long.", 2000) }).expect("it is taken");
    let waiting =
        engine.submit(Request { deadline, ..request(&engine, "Wait.", 2000) }).expect("it is taken");
    for reply in [running, waiting] {
        let (_, done) = whole(reply).await;
        // A fast machine may be done by then.
        assert!(done.finish == Finish::Deadline || done.usage.total < Duration::from_millis(50), "{done:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_queue_is_bounded_and_owners_take_turns() {
    let engine = engine(Config { sessions: 1, context: 2048, queue: 8, ..config() });
    let owned = |owner: &str, tokens| Request { owner: owner.to_owned(), ..request(&engine, "Go.", tokens) };
    let first = engine.submit(owned("greedy", 2000)).expect("it is taken");
    eventually("it runs", || engine.load().active == 1).await;
    let many: Vec<_> = (0..4).map(|_| engine.submit(owned("greedy", 20)).expect("room")).collect();
    assert!(matches!(engine.submit(owned("greedy", 20)), Err(RequestError::Overloaded(_))));
    let modest = engine.submit(owned("modest", 20)).expect("room for others");
    drop(first);
    let (modest, many) =
        tokio::join!(whole(modest), futures_util::future::join_all(many.into_iter().map(whole)));
    // The second in line, though it came last.
    let longer = many.iter().filter(|(_, done)| done.usage.queued > modest.1.usage.queued).count();
    assert_eq!(longer, 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_embedding_has_length_one_and_does_not_depend_on_neighbours() {
    let engine = engine(config());
    let embed = |text: &str| Request { work: Work::Embed, ..request(&engine, text, 1) };
    let vector = async |text: &str| {
        let mut reply = engine.submit(embed(text)).expect("it is taken");
        let Some(Event::Embedding(vector)) = reply.next().await else { panic!("an embedding comes first") };
        assert!(matches!(reply.next().await, Some(Event::Done(_))));
        vector
    };
    let long = "A long text, which takes more than one step to read. ".repeat(5);
    let (alone, long_alone) = (vector("some text").await, vector(&long).await);
    assert_eq!(alone.len(), 64);
    assert!((alone.iter().map(|x| x * x).sum::<f32>() - 1.0).abs() < 1e-4);
    let talk = engine.submit(request(&engine, PROMPTS[4], 60)).expect("it is taken");
    let (a, b, c) = tokio::join!(vector("some text"), vector(&long), whole(talk));
    assert_eq!((a, b), (alone, long_alone));
    assert!(ended(&c.1));
}

#[test]
fn what_is_no_model_or_no_setting_is_refused() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("bad.gguf");
    std::fs::write(&path, b"not a model").expect("written");
    assert!(matches!(Engine::start(&path, config()), Err(LoadError::File(_))));
    let whole = std::fs::read(model()).expect("read");
    std::fs::write(&path, &whole[..whole.len() / 2]).expect("written");
    assert!(matches!(Engine::start(&path, config()), Err(LoadError::File(_))));
    for bad in [
        Config { context: 4096, ..config() },
        Config { sessions: 0, ..config() },
        Config { batch: 1, ..config() },
        Config { threads: 0, ..config() },
    ] {
        assert!(matches!(Engine::start(&model(), bad), Err(LoadError::Setting { .. })), "{bad:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn dropping_the_engine_ends_its_sessions() {
    let engine = engine(Config { context: 2048, ..config() });
    let mut reply = engine.submit(request(&engine, "Talk.", 2000)).expect("it is taken");
    assert!(reply.next().await.is_some());
    drop(engine);
    while let Some(event) = reply.next().await {
        assert!(!matches!(event, Event::Done(done) if done.finish == Finish::Failed));
    }
}
