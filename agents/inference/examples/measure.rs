//! What the engine does on this machine: `cargo run --release -p ark-inference --example measure -- MODEL.gguf`, or with
//! `--synthetic LAYERS WIDTH` in place of the model, one of random weights. Prints a figure a line.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use ark_gguf::synthetic::Synthetic;
use ark_inference::engine::{Config, Done, Engine, Event, Request, Sampling, Work};

/// Tokens of each reply.
const REPLY: u32 = 128;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let dir = std::env::temp_dir().join(format!("ark-measure-{}", std::process::id()));
    let path = match arguments.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["--synthetic", layers, width] => synthetic(&dir, layers.parse()?, width.parse()?)?,
        [path] => PathBuf::from(path),
        _ => return Err("usage: measure MODEL.gguf | --synthetic LAYERS WIDTH".into()),
    };
    let measured = measure(&path);
    let _ = std::fs::remove_dir_all(&dir);
    measured
}

fn synthetic(dir: &Path, layers: u32, width: u32) -> Result<PathBuf, Box<dyn Error>> {
    std::fs::create_dir_all(dir)?;
    let path = dir.join("model.gguf");
    let sizes = Synthetic {
        layers,
        embedding: width,
        feed_forward: width * 3,
        heads: (width / 32).max(1),
        kv_heads: (width / 64).max(1),
        ..Synthetic::default()
    };
    sizes.write(&mut std::io::BufWriter::new(std::fs::File::create(&path)?))?;
    Ok(path)
}

fn measure(path: &Path) -> Result<(), Box<dyn Error>> {
    let begin = Instant::now();
    let engine = Engine::start(path, Config { context: 1024, ..Config::default() })?;
    println!("load from file: {:.1} ms", ms(begin.elapsed()));
    println!("parameters: {}, file: {} bytes", engine.model().parameters, engine.model().file_bytes);
    println!(
        "memory by the formula: {} MiB, resident: {} MiB",
        engine.memory().total() >> 20,
        resident()? >> 20
    );
    let runtime = tokio::runtime::Builder::new_current_thread().build()?;
    runtime.block_on(async {
        // Once unmeasured: pages are read, threads woken.
        together(&engine, 1, 0).await?;
        let mut alone = 0.0;
        for sessions in [1, 2, 4, 8] {
            let rate = together(&engine, sessions, sessions).await?;
            if sessions == 1 {
                alone = rate;
            }
            println!("{sessions} at once: {rate:.0} tokens/s, {:.2}x", rate / alone);
        }
        prefix(&engine).await
    })
}

/// Tokens a second of this many sessions decoded together.
async fn together(engine: &Engine, sessions: usize, salt: usize) -> Result<f64, Box<dyn Error>> {
    let begin = Instant::now();
    let mut replies = Vec::new();
    for i in 0..sessions {
        replies.push(engine.submit(request(engine, &format!("{salt}.{i}: go on"), REPLY)?)?);
    }
    let mut tokens = 0;
    for mut reply in replies {
        tokens += end(&mut reply).await?.usage.completion_tokens;
    }
    Ok(f64::from(tokens) / begin.elapsed().as_secs_f64())
}

/// Time to the first token with a prefix of 512 tokens, cold and cached.
async fn prefix(engine: &Engine) -> Result<(), Box<dyn Error>> {
    let (mut cold, mut warm) = (Vec::new(), Vec::new());
    for round in 0..5 {
        let mut text = format!("{round} ");
        while engine.tokenize(&text, true, false)?.len() < 512 {
            text.push_str("word after word, ");
        }
        for (times, end_of_it) in [(&mut cold, "one"), (&mut warm, "two")] {
            let done = end(&mut engine.submit(request(engine, &format!("{text}{end_of_it}"), 2)?)?).await?;
            times.push(ms(done.usage.first_token));
        }
    }
    cold.sort_by(f64::total_cmp);
    warm.sort_by(f64::total_cmp);
    println!(
        "first token after 512 tokens: cold {:.1} ms, cached {:.1} ms, {:.2}x",
        cold[2],
        warm[2],
        warm[2] / cold[2]
    );
    Ok(())
}

fn request(engine: &Engine, prompt: &str, tokens: u32) -> Result<Request, Box<dyn Error>> {
    Ok(Request {
        owner: String::new(),
        prompt: engine.tokenize(prompt, true, false)?,
        work: Work::Generate {
            sampling: Sampling { temperature: 0.0, ..Sampling::default() },
            max_tokens: Some(tokens),
            stop: Vec::new(),
        },
        deadline: None,
    })
}

async fn end(reply: &mut ark_inference::engine::Reply) -> Result<Done, Box<dyn Error>> {
    while let Some(event) = reply.next().await {
        if let Event::Done(done) = event {
            return Ok(done);
        }
    }
    Err("the engine ended".into())
}

fn resident() -> Result<u64, Box<dyn Error>> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:")).ok_or("no VmRSS")?;
    Ok(line.trim().trim_end_matches(" kB").parse::<u64>()? << 10)
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
