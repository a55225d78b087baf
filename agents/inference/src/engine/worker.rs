//! The engine's thread: admits, computes one step for everybody, hands out what came of it, again.

use std::num::NonZeroU32;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError, mpsc as std_mpsc};
use std::thread::JoinHandle;
use std::time::Instant;

use llama_cpp_2::context::LlamaContext;
use llama_cpp_2::context::params::LlamaContextParams;
use llama_cpp_2::llama_backend::LlamaBackend;
use llama_cpp_2::llama_batch::LlamaBatch;
use llama_cpp_2::model::LlamaModel;
use llama_cpp_2::token::LlamaToken;
use tokio::sync::mpsc::UnboundedSender;

use super::embed::Embedder;
use super::sampler::Sampler;
use super::slots::{LEAST_SHARED, View, common, place};
use super::text::Output;
use super::tickless;
use super::{Config, Done, Event, Finish, LoadError, Request, RequestError, Shared, Usage, Work};

/// llama.cpp's number for "no flash attention": its kernel sums values in half precision.
const FLASH_ATTENTION_OFF: i32 = 0;
/// Least tokens of a prompt in one step, when several prompts share it.
const LEAST_CHUNK: usize = 16;

/// A session that waits or runs.
pub(super) struct Job {
    pub(super) prompt: Vec<LlamaToken>,
    pub(super) work: Prepared,
    pub(super) events: UnboundedSender<Event>,
    pub(super) deadline: Option<Instant>,
    pub(super) submitted: Instant,
}

/// What a step of llama.cpp can fail with.
pub(super) type Error = Box<dyn std::error::Error + Send + Sync>;

/// What is to be done, with what it takes.
pub(super) enum Prepared {
    Generate { sampler: Box<Sampler>, output: Output, left: u32 },
    Embed { sum: Vec<f32> },
}

/// Makes what a session's work takes, so that what is wrong with it is said at once.
pub(super) fn prepare(
    model: &LlamaModel,
    request: &Request,
    max_tokens: u32,
) -> Result<Prepared, RequestError> {
    Ok(match &request.work {
        Work::Generate { sampling, stop, .. } => Prepared::Generate {
            sampler: Box::new(Sampler::new(model, sampling)?),
            output: Output::new(stop.clone()),
            left: max_tokens,
        },
        Work::Embed => Prepared::Embed { sum: Vec::new() },
    })
}

struct Session {
    job: Job,
    /// Tokens of the prompt that are read.
    read: usize,
    /// The slot whose keys and values it waits for, and how many.
    awaits: Option<(usize, usize)>,
    /// The token it has said last, which the next step reads.
    said: Option<LlamaToken>,
    usage: Usage,
}

#[derive(Default)]
struct Slot {
    /// Tokens whose keys and values it has, in order from position 0.
    cached: Vec<LlamaToken>,
    used: u64,
    session: Option<Session>,
}

/// An output of a step: which slot's, at which place of the batch.
struct Wanted {
    slot: usize,
    index: i32,
}

pub(super) struct Worker<'a> {
    context: LlamaContext<'a>,
    embedder: Embedder<'a>,
    model: &'a LlamaModel,
    config: Config,
    shared: Arc<Shared>,
    slots: Vec<Slot>,
    clock: u64,
}

impl Worker<'_> {
    /// Starts the thread and waits until its context is there.
    pub(super) fn spawn(
        backend: &'static LlamaBackend,
        model: Arc<LlamaModel>,
        config: Config,
        shared: Arc<Shared>,
    ) -> Result<JoinHandle<()>, LoadError> {
        let (ready, started) = std_mpsc::sync_channel(1);
        let thread = std::thread::Builder::new()
            .name("ark-engine".to_owned())
            .spawn(move || {
                tickless::stay();
                let contexts = model.new_context(backend, parameters(&config)).and_then(|context| {
                    Ok((context, model.new_context(backend, Embedder::parameters(&config))?))
                });
                match contexts {
                    Ok((context, embedding)) => {
                        let _ = ready.send(Ok(()));
                        let embedder = Embedder::new(embedding);
                        let slots = (0..config.sessions).map(|_| Slot::default()).collect();
                        Worker { context, embedder, model: &model, config, shared, slots, clock: 0 }.run();
                    }
                    Err(error) => drop(ready.send(Err(error))),
                }
            })
            .map_err(LoadError::Thread)?;
        match started.recv() {
            Ok(Ok(())) => Ok(thread),
            Ok(Err(error)) => Err(LoadError::Llama { what: "make a context", source: error.into() }),
            Err(error) => Err(LoadError::Llama { what: "make a context", source: error.into() }),
        }
    }

    fn run(mut self) {
        let capacity = self.config.batch as usize;
        let mut batch = LlamaBatch::new(capacity, 1);
        while self.admit() {
            self.drop_gone();
            self.copy_prefixes();
            batch.clear();
            let wanted = self.fill(&mut batch, capacity);
            if batch.n_tokens() > 0 {
                match self.context.decode(&mut batch) {
                    Ok(()) => self.hand_out(&wanted),
                    Err(error) => self.fail(&error),
                }
            }
            self.embed();
        }
    }

    /// Puts waiting sessions into idle slots; sleeps while there is nothing to do. False when the engine stops.
    fn admit(&mut self) -> bool {
        let shared = Arc::clone(&self.shared);
        let mut state = shared.state();
        loop {
            if shared.stopping.load(Ordering::Acquire) {
                return false;
            }
            let now = Instant::now();
            for job in state.queue.take_if(|job| job.is_gone(now)) {
                job.end(Finish::Deadline, job.usage());
            }
            while self.slots.iter().any(|s| s.session.is_none()) {
                let Some(job) = state.queue.pop() else { break };
                self.seat(job);
            }
            state.active = self.slots.iter().filter(|s| s.session.is_some()).count();
            if state.active > 0 {
                return true;
            }
            state = shared.wake.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Gives a session the slot where least is to be computed.
    fn seat(&mut self, job: Job) {
        let usage = job.usage();
        self.clock += 1;
        if let Prepared::Embed { .. } = job.work {
            // It leaves the slot's keys and values as they are.
            if let Some(slot) = self.slots.iter_mut().filter(|s| s.session.is_none()).min_by_key(|s| s.used) {
                slot.session = Some(Session { job, read: 0, awaits: None, said: None, usage });
            }
            return;
        }
        let views: Vec<_> = self.slots.iter().map(Slot::view).collect();
        let Some(placement) = place(&views, &job.prompt, job.prompt.len().saturating_sub(1)) else { return };
        let awaits = placement.from.map(|from| (from, placement.keep));
        if let Some(slot) = self.slots.get_mut(placement.slot) {
            slot.used = self.clock;
            slot.session = Some(Session { job, read: 0, awaits, said: None, usage });
        }
        if awaits.is_none() {
            self.keep(placement.slot, placement.keep);
        }
    }

    /// Cuts a slot down to `keep` tokens, which its session need not read.
    fn keep(&mut self, index: usize, keep: usize) {
        let Some(slot) = self.slots.get_mut(index) else { return };
        slot.cached.truncate(keep);
        if let Some(session) = &mut slot.session {
            session.awaits = None;
            session.read = keep;
            session.usage.cached_tokens = small(keep);
        }
        let (Ok(sequence), Ok(first)) = (u32::try_from(index), u32::try_from(keep)) else { return };
        // Only caches that keep a running state cannot cut off an end, and no served architecture has one.
        if let Err(error) = self.context.clear_kv_cache_seq(Some(sequence), Some(first), None) {
            tracing::error!("slot {index} cannot be cut down to {keep} tokens: {error}");
        }
    }

    /// Ends sessions whose caller is gone or whose time is over.
    fn drop_gone(&mut self) {
        let now = Instant::now();
        self.clock += 1;
        for slot in &mut self.slots {
            let gone = slot.session.as_ref().is_some_and(|s| s.job.is_gone(now));
            if gone {
                slot.leave(Finish::Deadline, self.clock);
            }
        }
    }

    /// Copies keys and values for those who wait for them, where they are there by now.
    fn copy_prefixes(&mut self) {
        for index in 0..self.slots.len() {
            let Some(slot) = self.slots.get(index) else { continue };
            let Some(session) = &slot.session else { continue };
            let Some((from, want)) = session.awaits else { continue };
            let Some(source) = self.slots.get(from) else { continue };
            let prompt = &session.job.prompt;
            let have = common(&source.cached, prompt).min(want);
            let coming = common(source.view().coming, prompt).min(want);
            if have < want && coming >= want {
                continue;
            }
            if have < LEAST_SHARED {
                let own = common(&slot.cached, prompt).min(want);
                self.keep(index, own);
                continue;
            }
            let cached = source.cached.clone();
            // Slots have memory of their own, so all of it is copied, and what is not shared is cut off.
            self.context.copy_cache(signed(from), signed(index), -1);
            if let Some(slot) = self.slots.get_mut(index) {
                slot.cached = cached;
            }
            self.keep(index, have);
        }
    }

    /// Puts into the batch what each session has to read: those that speak first, then prompts, evenly.
    fn fill(&mut self, batch: &mut LlamaBatch<'_>, capacity: usize) -> Vec<Wanted> {
        let mut wanted = Vec::new();
        for (index, slot) in self.slots.iter_mut().enumerate() {
            let Some(token) = slot.session.as_ref().and_then(|s| s.said) else { continue };
            wanted.push(Wanted { slot: index, index: batch.n_tokens() });
            slot.put(batch, index, &[token]);
        }
        let reading = |slot: &Slot| {
            slot.session.as_ref().is_some_and(|s| !s.embeds() && s.said.is_none() && s.awaits.is_none())
        };
        let prompts = self.slots.iter().filter(|s| reading(s)).count();
        let mut room = capacity.saturating_sub(wanted.len());
        let share = room.checked_div(prompts).unwrap_or(0).max(LEAST_CHUNK);
        // Who begins changes from step to step, for a small batch may not have room for all.
        let first = usize::try_from(self.clock).unwrap_or(0) % self.slots.len().max(1);
        for index in (first..self.slots.len()).chain(0..first) {
            let Some(slot) = self.slots.get_mut(index).filter(|s| reading(s)) else { continue };
            let Some(session) = &slot.session else { continue };
            let rest = session.job.prompt.get(session.read..).unwrap_or_default();
            let chunk: Vec<_> = rest.iter().copied().take(share.min(room)).collect();
            let ends = chunk.len() == rest.len();
            slot.put(batch, index, &chunk);
            if ends && !chunk.is_empty() {
                wanted.push(Wanted { slot: index, index: batch.n_tokens() - 1 });
            }
            room -= chunk.len();
        }
        wanted
    }

    /// Gives each session what the step has computed for it.
    fn hand_out(&mut self, wanted: &[Wanted]) {
        self.clock += 1;
        for output in wanted {
            let Some(slot) = self.slots.get_mut(output.slot) else { continue };
            let Some(session) = &mut slot.session else { continue };
            let Prepared::Generate { sampler, .. } = &mut session.job.work else { continue };
            let ended = match sampler.next(&self.context, output.index) {
                Some(token) => session.say(self.model, token),
                None => Some(Finish::Failed),
            };
            if let Some(finish) = ended {
                slot.leave(finish, self.clock);
            }
        }
    }

    /// Reads more of one text that is to be embedded: of the one that is begun, for it has the embedder's keys and values.
    fn embed(&mut self) {
        let texts = self.slots.iter_mut().filter(|s| s.session.as_ref().is_some_and(Session::embeds));
        let key = |slot: &Slot| slot.session.as_ref().map(|s| (s.read == 0, s.job.submitted));
        let Some(slot) = texts.min_by_key(|s| key(s)) else { return };
        let Some(session) = &mut slot.session else { return };
        let Prepared::Embed { sum } = &mut session.job.work else { return };
        let finish = match self.embedder.read(&session.job.prompt, session.read, sum) {
            Ok(tokens) => {
                session.read += tokens;
                session.embedded().then_some(Finish::Stop)
            }
            Err(error) => {
                tracing::error!("a text cannot be embedded: {error}");
                Some(Finish::Failed)
            }
        };
        if let Some(finish) = finish {
            slot.leave(finish, self.clock);
        }
    }

    /// Ends all sessions that were in a step that failed; what their slots hold is unknown.
    fn fail(&mut self, error: &dyn std::error::Error) {
        tracing::error!("a step failed, its sessions end: {error}");
        self.clock += 1;
        let stepped = |slot: &&mut Slot| slot.session.as_ref().is_some_and(|s| !s.embeds());
        for index in 0..self.slots.len() {
            let Some(slot) = self.slots.get_mut(index).filter(stepped) else { continue };
            slot.leave(Finish::Failed, self.clock);
            self.keep(index, 0);
        }
    }
}

impl Slot {
    fn view(&self) -> View<'_> {
        let coming = self
            .session
            .as_ref()
            .filter(|s| !s.embeds())
            .map(|s| s.job.prompt.as_slice())
            .filter(|prompt| prompt.len() > self.cached.len());
        View {
            busy: self.session.is_some(),
            cached: &self.cached,
            coming: coming.unwrap_or(&self.cached),
            used: self.used,
        }
    }

    /// Adds tokens to the batch, and to what the slot will hold after it.
    fn put(&mut self, batch: &mut LlamaBatch<'_>, index: usize, tokens: &[LlamaToken]) {
        let last = tokens.len().saturating_sub(1);
        let Some(session) = &mut self.session else { return };
        let ends = session.read + tokens.len() >= session.job.prompt.len();
        for (i, token) in tokens.iter().enumerate() {
            let output = ends && i == last;
            if batch.add(*token, signed(self.cached.len()), &[signed(index)], output).is_err() {
                // The batch has room for all that `fill` puts in.
                tracing::error!("the batch is full");
                return;
            }
            self.cached.push(*token);
        }
        if session.said.take().is_none() {
            session.read += tokens.len();
        }
    }

    /// Ends the session; the slot keeps its keys and values for those who begin alike.
    fn leave(&mut self, finish: Finish, clock: u64) {
        if let Some(mut session) = self.session.take() {
            session.finish(finish);
            self.used = clock;
        }
    }
}

impl Session {
    /// Whether it asks for an embedding.
    fn embeds(&self) -> bool {
        matches!(self.job.work, Prepared::Embed { .. })
    }

    /// Takes the next token of the reply; why it ends, if it does.
    fn say(&mut self, model: &LlamaModel, token: LlamaToken) -> Option<Finish> {
        let Prepared::Generate { output, left, .. } = &mut self.job.work else { return Some(Finish::Failed) };
        if self.usage.completion_tokens == 0 {
            self.usage.first_token = self.job.submitted.elapsed();
        }
        self.usage.completion_tokens += 1;
        if model.vocab().is_eog(token) {
            return Some(Finish::Stop);
        }
        let (text, stopped) = output.push(&model.vocab().token_to_piece(token, false, None));
        if !text.is_empty() {
            // A caller that left is noticed before the next step.
            let _ = self.job.events.send(Event::Text(text));
        }
        if stopped {
            return Some(Finish::Stop);
        }
        *left = left.saturating_sub(1);
        if *left == 0 {
            return Some(Finish::Length);
        }
        self.said = Some(token);
        None
    }

    /// Gives the embedding when all tokens are in it.
    fn embedded(&mut self) -> bool {
        if self.read < self.job.prompt.len() {
            return false;
        }
        self.usage.first_token = self.job.submitted.elapsed();
        if let Prepared::Embed { sum } = &mut self.job.work {
            let length = sum.iter().map(|x| x * x).sum::<f32>().sqrt();
            if length > 0.0 {
                sum.iter_mut().for_each(|x| *x /= length);
            }
            let _ = self.job.events.send(Event::Embedding(std::mem::take(sum)));
        }
        true
    }

    fn finish(&mut self, finish: Finish) {
        if let Prepared::Generate { output, .. } = &mut self.job.work {
            let rest = output.finish();
            if !rest.is_empty() {
                let _ = self.job.events.send(Event::Text(rest));
            }
        }
        self.job.end(finish, self.usage);
    }
}

impl Job {
    fn is_gone(&self, now: Instant) -> bool {
        self.events.is_closed() || self.deadline.is_some_and(|d| d <= now)
    }

    fn usage(&self) -> Usage {
        Usage {
            prompt_tokens: small(self.prompt.len()),
            queued: self.submitted.elapsed(),
            ..Usage::default()
        }
    }

    fn end(&self, finish: Finish, usage: Usage) {
        let usage = Usage { total: self.submitted.elapsed(), ..usage };
        // Whoever left does not need to know.
        let _ = self.events.send(Event::Done(Done { finish, usage }));
    }
}

/// A context for all sessions.
pub(super) fn parameters(config: &Config) -> LlamaContextParams {
    let threads = signed(config.threads as usize);
    let per_session = config.context.next_multiple_of(256);
    LlamaContextParams::default()
        .with_n_ctx(NonZeroU32::new(per_session.saturating_mul(config.sessions)))
        .with_n_seq_max(config.sessions)
        .with_n_batch(config.batch)
        .with_n_ubatch(config.batch)
        .with_n_threads(threads)
        .with_n_threads_batch(threads)
        .with_kv_unified(false)
        .with_swa_full(true)
        .with_flash_attention_policy(FLASH_ATTENTION_OFF)
        .with_no_perf(true)
}

fn small(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}

/// Slots and positions are far below 2^31.
pub(super) fn signed(n: usize) -> i32 {
    i32::try_from(n).unwrap_or(i32::MAX)
}
