//! The engine: one thread owns a model and its context, and decodes all sessions together.
//!
//! ```text
//! submit ──► FairQueue ──► slot ──► every step: one token of each session that speaks, a chunk of each prompt ──► Event
//!            round robin    │       one llama_decode for all of them (continuous batching)
//!            over owners    └─ keys and values it still has of former sessions: the prefix cache
//! ```
//!
//! A slot is one sequence of the context with keys and values of its own, so what a session reads is where it would be had it the
//! context to itself; with kernels that compute each output row by itself (see `.cargo/config.toml`) a session's text does not
//! depend on who else is served. A session whose prompt begins like what some slot holds, or is about to hold, gets a copy of
//! that slot's keys and values instead of computing them. A text to be embedded takes a slot as well, for its turn, but is read
//! by a context of its own (`embed`).

mod embed;
mod queue;
mod request;
mod sampler;
mod slots;
mod text;
mod tickless;
mod worker;

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use ark_gguf::{GgufError, Header, Memory, Model, Serving};
use llama_cpp_2::llama_backend::LlamaBackend;
use llama_cpp_2::model::LlamaModel;
use llama_cpp_2::model::params::LlamaModelParams;
use llama_cpp_2::token::LlamaToken;
use tokio::sync::mpsc;

pub use queue::{FairQueue, Full};
pub use request::{Constraint, Done, Event, Finish, Request, RequestError, Sampling, Usage, Work};
use worker::{Job, Worker};

/// How an engine serves its model.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// Longest prompt and reply together, in tokens; at most what the model was trained for.
    pub context: u32,
    /// Sessions decoded at the same time, 1 to 64.
    pub sessions: u32,
    /// Most tokens that one step computes; a long prompt takes several steps.
    pub batch: u32,
    /// Threads that compute.
    pub threads: u32,
    /// Sessions that may wait for a slot; one owner may have half of them waiting.
    pub queue: usize,
}

impl Default for Config {
    fn default() -> Self {
        // Threads that compute wait for each other in loops, many times a token. On two busy processors one thread was 200 times as
        // fast as two, so one processor is left to everybody else.
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        let threads = u32::try_from(processors.saturating_sub(1).max(1)).unwrap_or(1);
        Self { context: 2048, sessions: 8, batch: 256, threads, queue: 2048 }
    }
}

/// Why a model is not served.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The file is not what it should be.
    #[error(transparent)]
    File(#[from] GgufError),
    /// A setting that this model cannot be served with.
    #[error("{name} is {found}, but must be from {least} to {most}")]
    Setting {
        /// What was set.
        name: &'static str,
        /// To what.
        found: u32,
        /// The least allowed.
        least: u32,
        /// The most allowed.
        most: u32,
    },
    /// llama.cpp refused it; its reason is in the log.
    #[error("llama.cpp cannot {what}: {source}; its own words are in the log")]
    Llama {
        /// What it was to do.
        what: &'static str,
        /// What it said.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// No thread could be started.
    #[error("no thread for the engine: {0}")]
    Thread(std::io::Error),
}

/// What callers and the engine's thread share.
struct Shared {
    state: Mutex<State>,
    wake: Condvar,
    stopping: AtomicBool,
}

struct State {
    queue: FairQueue<Job>,
    active: usize,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing that holds the lock can leave the state half changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How busy an engine is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Load {
    /// Sessions that are being decoded.
    pub active: usize,
    /// Sessions that wait for a slot.
    pub queued: usize,
}

/// A model that is being served. Dropping it ends its sessions.
pub struct Engine {
    llama: Arc<LlamaModel>,
    model: Model,
    config: Config,
    memory: Memory,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Engine")
            .field("model", &self.model.name)
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}

/// One reply as it comes. Dropping it cancels the session.
#[derive(Debug)]
pub struct Reply {
    events: mpsc::UnboundedReceiver<Event>,
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Most tokens of the reply.
    pub max_tokens: u32,
}

impl Reply {
    /// The next event; `None` after [`Event::Done`], or when the engine was stopped.
    pub async fn next(&mut self) -> Option<Event> {
        self.events.recv().await
    }

    /// An event that is there already.
    pub fn try_next(&mut self) -> Option<Event> {
        self.events.try_recv().ok()
    }
}

fn backend() -> Result<&'static LlamaBackend, LoadError> {
    static BACKEND: OnceLock<Result<LlamaBackend, String>> = OnceLock::new();
    BACKEND
        .get_or_init(|| {
            llama_cpp_2::send_logs_to_tracing(llama_cpp_2::LogOptions::default());
            LlamaBackend::init().map_err(|e| e.to_string())
        })
        .as_ref()
        .map_err(|e| LoadError::Llama { what: "start", source: e.clone().into() })
}

impl Engine {
    /// Checks the file at `path`, loads it and starts serving it.
    ///
    /// # Errors
    /// A file that is no model, a setting it cannot be served with, or what llama.cpp says.
    pub fn start(path: &Path, config: Config) -> Result<Self, LoadError> {
        let model = Model::try_from(&Header::open(path)?)?;
        let trained = u32::try_from(model.context).unwrap_or(u32::MAX);
        within("the context", config.context, 16, trained)?;
        within("the number of sessions", config.sessions, 1, 64)?;
        within("the batch", config.batch, config.sessions, 8192)?;
        within("the number of threads", config.threads, 1, 512)?;
        let serving = Serving {
            context: config.context.into(),
            sessions: config.sessions.into(),
            batch: config.batch.into(),
            cache: ark_gguf::CacheType::F16,
        };
        let memory = ark_gguf::memory(&model, &serving);
        // Read, not mapped: where the model is a disk, a mapping of it had the guest's kernel spin without end. Forks of a VM
        // share the weights either way.
        let params = LlamaModelParams::default().with_use_mmap(false);
        let llama = LlamaModel::load_from_file(backend()?, path, &params)
            .map_err(|e| LoadError::Llama { what: "load the model", source: e.into() })?;
        let llama = Arc::new(llama);
        let shared = Arc::new(Shared {
            state: Mutex::new(State { queue: FairQueue::new(config.queue), active: 0 }),
            wake: Condvar::new(),
            stopping: AtomicBool::new(false),
        });
        let thread = Worker::spawn(backend()?, Arc::clone(&llama), config, Arc::clone(&shared))?;
        Ok(Self { llama, model, config, memory, shared, thread: Some(thread) })
    }

    /// What is served.
    #[must_use]
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// How it is served.
    #[must_use]
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The memory that serving it is expected to take.
    #[must_use]
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// How busy it is.
    #[must_use]
    pub fn load(&self) -> Load {
        let state = self.shared.state();
        Load { active: state.active, queued: state.queue.len() }
    }

    /// The tokens of a text. With `special`, names of control tokens in it become those tokens; with `begin`, the tokens that
    /// the model wants around a text are added.
    ///
    /// # Errors
    /// A text that cannot fit the context, whatever its tokens are; with the numbers.
    pub fn tokenize(&self, text: &str, begin: bool, special: bool) -> Result<Vec<LlamaToken>, RequestError> {
        // The longest tokens of any vocabulary have some hundred bytes; this bounds the tokenizer's work before it begins.
        let limit = (self.config.context as usize).saturating_mul(64).min(4 << 20);
        if text.len() > limit {
            return Err(RequestError::TooLarge { bytes: text.len(), limit });
        }
        Ok(self.llama.vocab().tokenize(text.as_bytes(), begin, special))
    }

    /// The text of one token; control tokens have theirs in angle brackets or the like.
    #[must_use]
    pub fn piece(&self, token: LlamaToken) -> String {
        String::from_utf8_lossy(&self.llama.vocab().token_to_piece(token, true, None)).into_owned()
    }

    /// Texts of the tokens that begin and end a text, for chat templates; empty where the model has none.
    #[must_use]
    pub fn marks(&self) -> (String, String) {
        let vocab = self.llama.vocab();
        let text = |token: LlamaToken| if token.0 < 0 { String::new() } else { self.piece(token) };
        (text(vocab.bos()), text(vocab.eos()))
    }

    /// Whether the tokens of a text begin with one of the tokenizer's own.
    #[must_use]
    pub fn adds_begin(&self) -> bool {
        self.llama.vocab().should_add_bos()
    }

    /// Queues a session.
    ///
    /// # Errors
    /// Parameters out of range, a grammar that is none, a prompt that does not fit the context, a full queue.
    pub fn submit(&self, request: Request) -> Result<Reply, RequestError> {
        let max_tokens = request.check(self.config.context)?;
        let work = worker::prepare(&self.llama, &request, max_tokens)?;
        let prompt_tokens = u32::try_from(request.prompt.len()).unwrap_or(u32::MAX);
        let (sender, events) = mpsc::unbounded_channel();
        let job = Job {
            prompt: request.prompt,
            work,
            events: sender,
            deadline: request.deadline,
            submitted: Instant::now(),
        };
        if self.shared.stopping.load(Ordering::Acquire) {
            return Err(RequestError::Stopped);
        }
        self.shared.state().queue.push(&request.owner, job).map_err(RequestError::Overloaded)?;
        self.shared.wake.notify_one();
        Ok(Reply { events, prompt_tokens, max_tokens })
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::Release);
        // The lock orders this after the thread's look at the flag and before its wait.
        drop(self.shared.state());
        self.shared.wake.notify_one();
        if let Some(thread) = self.thread.take() {
            // It ends after the step it is in; a panic of its own was reported where it happened.
            let _ = thread.join();
        }
    }
}

fn within(name: &'static str, found: u32, least: u32, most: u32) -> Result<(), LoadError> {
    if (least..=most).contains(&found) {
        Ok(())
    } else {
        Err(LoadError::Setting { name, found, least, most })
    }
}
