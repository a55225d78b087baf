//! One attempt: an agent, the program or code in it, and what came of that.

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use ark_types::agent::CreateAgent;
use ark_types::eval::{EvalEnd, EvalReply, EvalRequest};
use ark_types::event::{Event, Stream};
use ark_types::exec::{ExecRequest, ExitStatus};
use ark_types::guest::Frame;
use ark_types::healing::RestartPolicy;
use ark_types::label::Labels;
use ark_types::problem::ProblemKind;
use ark_types::scheduling::Spread;
use ark_types::task::{
    AGENT_LABEL, ATTEMPT_VARIABLE, AttemptEnd, AttemptOutcome, CreateTask, ID_VARIABLE, TaskCommand, TaskEval,
};
use tracing::Instrument as _;

use super::decide::is_refusal;
use super::files::Head;
use super::output::Inlet;
use crate::agent::Handle;
use crate::core::Core;
use crate::guest::{capture_to, evaluate_to};
use crate::host::{millis, unix_ms};
use crate::problems::Refusal;
use crate::spawn::spawn;
use crate::telemetry::Phase;
use crate::traces::{VARIABLE, going_on, step};
use crate::validate::{check_env, check_eval, prepare_exec};

/// How long an attempt stands in the line for room; then another task may have its turn.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long an interpreter may take to learn its environment.
const SET_UP: Duration = Duration::from_secs(10);

/// Longest reason that is recorded, characters.
const MAX_REASON: usize = 1000;

/// What a guest is told about the attempt.
#[derive(Clone, Copy, Debug)]
pub(super) struct Which<'a> {
    /// Id of the task.
    pub(super) task: &'a str,
    /// Number of the attempt.
    pub(super) attempt: u32,
    /// W3C trace context that it is part of.
    pub(super) trace: Option<&'a str>,
}

impl Which<'_> {
    /// `own`, the environment that the task was asked for with, and what is told of the attempt.
    fn environment(self, own: &BTreeMap<String, String>) -> BTreeMap<String, String> {
        let mut env = own.clone();
        if let Some(trace) = self.trace {
            env.entry(VARIABLE.to_owned()).or_insert_with(|| trace.to_owned());
        }
        env.insert(ID_VARIABLE.to_owned(), self.task.to_owned());
        env.insert(ATTEMPT_VARIABLE.to_owned(), self.attempt.to_string());
        env
    }
}

/// How far an attempt has come; looked at by whoever has to clean up when it is given up half-way.
#[derive(Debug, Default)]
pub(super) struct Progress {
    agent: OnceLock<Handle>,
    told: OnceLock<()>,
}

impl Progress {
    /// Its agent, once there is one.
    pub(super) fn agent(&self) -> Option<&Handle> {
        self.agent.get()
    }

    /// Whether its beginning was handed to the log.
    pub(super) fn is_told(&self) -> bool {
        self.told.get().is_some()
    }
}

/// What an attempt came to.
#[derive(Debug)]
pub(super) enum Attempted {
    /// There was no agent to make it in.
    NoAgent(Refusal),
    /// It ended, and what came of it where its program or code did.
    Ended(AttemptEnd, Option<Head>),
}

/// Makes the attempt `which` of a task that was created then. Its agent stays in `progress`, for the caller to remove; what it
/// writes goes to `inlet`.
pub(super) async fn attempt(
    core: &Arc<Core>,
    request: &CreateTask,
    which: Which<'_>,
    created_unix_ms: u64,
    progress: &Progress,
    mut inlet: Inlet,
) -> Attempted {
    let agent = match spawn(core, agent_for(request, which.task)).await {
        Ok(agent) => agent,
        Err(refusal) => return Attempted::NoAgent(refusal),
    };
    let Ok(handle) = core.registry.find(&agent.id) else {
        return Attempted::Ended(lost("its agent ended at once"), None);
    };
    let _ = progress.agent.set(handle.clone());
    // Its agent is one that goes with its client; this is the client.
    let _client = handle.streaming();
    let started = Event::TaskStarted { attempt: which.attempt, agent: Some(agent.id) };
    let _ = progress.told.set(());
    if let Err(error) = core.ledger.record(Stream::task(which.task), vec![started]).await {
        let reason = Some(format!("its beginning cannot be recorded: {error}"));
        let end = AttemptEnd { outcome: AttemptOutcome::CutOff, reason, exit_code: None, output: None };
        return Attempted::Ended(end, None);
    }
    if which.attempt == 1 {
        core.telemetry.task_began(Duration::from_millis(unix_ms().saturating_sub(created_unix_ms)));
    }
    let step = step(if request.eval.is_some() { "eval" } else { "exec" });
    let trace = going_on(&step, which.trace);
    let work = Work {
        core,
        agent: &handle,
        which: Which { trace: trace.as_deref(), ..which },
        timeout_ms: request.timeout_ms,
    };
    let doing = async {
        match (&request.command, &request.eval) {
            (Some(command), _) => work.run(command, &mut inlet).await,
            (None, Some(eval)) => work.evaluate(eval, &mut inlet).await,
            // Checked when it was created.
            (None, None) => Err(Refusal::new(ProblemKind::InvalidValue, "the task has nothing to do")),
        }
    };
    let done = tokio::select! {
        done = doing.instrument(step) => done,
        // Whom a moment's silence costs all that it did has as long again.
        () = handle.hangs(core.config.timing.silence) => Err(hung(core)),
    };
    match done {
        Ok((end, head)) => Attempted::Ended(end, Some(head)),
        Err(Refusal(problem)) => {
            let outcome = match problem.kind {
                kind if is_refusal(kind) => AttemptOutcome::Refused,
                ProblemKind::DeadlinePassed => AttemptOutcome::TimedOut,
                _ => AttemptOutcome::Lost,
            };
            let reason = Some(shortened(&problem.detail));
            Attempted::Ended(AttemptEnd { outcome, reason, exit_code: None, output: None }, None)
        }
    }
}

/// Nothing was heard of the guest for twice as long as it may be silent.
fn hung(core: &Core) -> Refusal {
    let silence = 2 * core.config.timing.silence.as_secs();
    Refusal::new(
        ProblemKind::AgentGone,
        format!("the guest of its agent hangs: it was not heard for {silence} s"),
    )
}

/// The end of an attempt whose agent is no more.
pub(super) fn lost(reason: &str) -> AttemptEnd {
    AttemptEnd {
        outcome: AttemptOutcome::Lost,
        reason: Some(shortened(reason)),
        exit_code: None,
        output: None,
    }
}

/// What a guest may have said, short enough to be recorded.
pub(super) fn shortened(text: &str) -> String {
    text.chars().take(MAX_REASON).collect()
}

fn agent_for(request: &CreateTask, id: &str) -> CreateAgent {
    let label = BTreeMap::from([(AGENT_LABEL.to_owned(), id.to_owned())]);
    CreateAgent {
        name: None,
        image: request.image.clone(),
        template: request.template.clone(),
        cold: false,
        vcpus: request.vcpus,
        memory_mib: request.memory_mib,
        env: BTreeMap::new(),
        auto_remove: true,
        labels: Labels::try_from(label).unwrap_or_default(),
        owner: request.owner.clone(),
        allow: request.allow.clone(),
        freeze_on_inference: request.freeze_on_inference,
        priority: request.priority,
        queue_timeout_ms: Some(millis(PATIENCE)),
        anti_affinity: None,
        spread: Spread::default(),
        restart: RestartPolicy::default(),
        ttl_s: None,
        idle_timeout_s: None,
        checkpoint: None,
        health_check: None,
    }
}

/// What a guest is asked, to run `command`, and its input.
///
/// # Errors
/// A [`Refusal`] that names the field.
pub(super) fn program(
    command: &TaskCommand,
    which: Which<'_>,
    timeout_ms: Option<u64>,
) -> Result<(Frame, Vec<u8>), Refusal> {
    let TaskCommand { argv, env, cwd, user, stdin, encoding } = command.clone();
    let env = which.environment(&env);
    let request =
        ExecRequest { argv, env, cwd, user, timeout_ms, tty: None, stdin, encoding, resumable: false };
    prepare_exec(request, &BTreeMap::new())
}

/// What an interpreter is asked, to learn its environment, and then to run the code of `eval`. The first binds no name and leaves
/// the lines of the second as they are.
///
/// # Errors
/// A [`Refusal`] that names the field.
pub(super) fn code(
    eval: &TaskEval,
    which: Which<'_>,
    timeout_ms: Option<u64>,
) -> Result<[EvalRequest; 2], Refusal> {
    check_env(&eval.env)?;
    // A JSON object of strings is a Python dictionary of the same strings.
    let env = serde_json::to_string(&which.environment(&eval.env)).unwrap_or_default();
    let set_up = EvalRequest {
        code: format!("__import__('os').environ.update({env})"),
        language: eval.language,
        timeout_ms: Some(millis(SET_UP)),
    };
    let code = EvalRequest { code: eval.code.clone(), language: eval.language, timeout_ms };
    check_eval(&set_up)
        .map_err(|_| Refusal::new(ProblemKind::InvalidValue, "the environment of the code is too large"))?;
    check_eval(&code)?;
    Ok([set_up, code])
}

/// Waits for what a guest does, a little longer than the guest itself lets it go on.
async fn in_time<T>(
    core: &Core,
    timeout_ms: Option<u64>,
    work: impl Future<Output = Result<T, Refusal>>,
) -> Result<T, Refusal> {
    let Some(ms) = timeout_ms else { return work.await };
    let limit = Duration::from_millis(ms).saturating_add(core.config.timing.exec_slack);
    tokio::time::timeout(limit, work).await.unwrap_or_else(|_| {
        Err(Refusal::new(
            ProblemKind::DeadlinePassed,
            format!("it did not end after its {ms} ms, and its agent hangs"),
        ))
    })
}

/// What is to be done in an agent.
struct Work<'a> {
    core: &'a Core,
    agent: &'a Handle,
    which: Which<'a>,
    timeout_ms: Option<u64>,
}

impl Work<'_> {
    async fn run(&self, command: &TaskCommand, inlet: &mut Inlet) -> Result<(AttemptEnd, Head), Refusal> {
        let (frame, stdin) = program(command, self.which, self.timeout_ms)?;
        let address = self.agent.guest()?;
        let began = Instant::now();
        let running = async {
            match capture_to(address, &frame, &stdin, inlet).await {
                Ok(end) => Ok(end),
                Err(failure) => Err(Refusal::from(self.agent.explain(failure).await)),
            }
        };
        let end = in_time(self.core, self.timeout_ms, running).await?;
        self.core.telemetry.phase(Phase::Exec, began.elapsed());
        let (outcome, reason) = match end.status {
            ExitStatus::Exited { code: 0 } => (AttemptOutcome::Succeeded, None),
            ExitStatus::Exited { code } => {
                (AttemptOutcome::Failed, Some(format!("the program exited with code {code}")))
            }
            ExitStatus::Signaled { signal } => {
                (AttemptOutcome::Failed, Some(format!("signal {signal} ended the program")))
            }
            ExitStatus::TimedOut => {
                let ms = self.timeout_ms.unwrap_or_default();
                (AttemptOutcome::TimedOut, Some(format!("the program ran longer than its {ms} ms")))
            }
        };
        let exit_code = Some(end.status.shell_code());
        let head = Head { exit_code, duration_us: end.duration_us, ..Head::default() };
        Ok((AttemptEnd { outcome, reason, exit_code, output: None }, head))
    }

    async fn evaluate(&self, eval: &TaskEval, inlet: &mut Inlet) -> Result<(AttemptEnd, Head), Refusal> {
        let [set_up, code] = code(eval, self.which, self.timeout_ms)?;
        let misbehaves = |why: &str| {
            let detail = format!("the interpreter did not take its environment: {why}");
            Refusal::new(ProblemKind::GuestMisbehaved, detail)
        };
        let learning = async { Ok(self.agent.eval(&set_up).await?) };
        match in_time(self.core, set_up.timeout_ms, learning).await {
            Ok(EvalReply { exception: None, .. }) => {}
            Ok(EvalReply { exception: Some(exception), .. }) => return Err(misbehaves(&exception.kind)),
            // That was not the code's own time.
            Err(Refusal(problem)) if problem.kind == ProblemKind::DeadlinePassed => {
                return Err(misbehaves(&problem.detail));
            }
            Err(refusal) => return Err(refusal),
        }
        let address = self.agent.guest()?;
        let began = Instant::now();
        let running = async {
            match evaluate_to(address, &code, inlet).await {
                Ok(end) => Ok(end),
                Err(failure) => Err(Refusal::from(self.agent.explain(failure).await)),
            }
        };
        let EvalEnd { value, exception, duration_us } = in_time(self.core, self.timeout_ms, running).await?;
        self.core.telemetry.phase(Phase::Eval, began.elapsed());
        let (outcome, reason) = match &exception {
            None => (AttemptOutcome::Succeeded, None),
            // What it says is output, and may be a secret.
            Some(exception) => {
                (AttemptOutcome::Failed, Some(shortened(&format!("the code raised {}", exception.kind))))
            }
        };
        let exit_code = Some(u8::from(exception.is_some()));
        let head = Head { exit_code, value, exception, duration_us };
        Ok((AttemptEnd { outcome, reason, exit_code, output: None }, head))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WHICH: Which<'static> = Which { task: "00", attempt: 3, trace: Some("00-1-2-00") };

    #[test]
    fn a_program_is_told_which_attempt_it_is_whatever_its_own_environment_says() {
        let env = [("A", "1"), (ATTEMPT_VARIABLE, "9")].map(|(k, v)| (k.to_owned(), v.to_owned())).into();
        let command = TaskCommand {
            argv: vec!["true".to_owned()],
            env,
            stdin: Some("aGk=".to_owned()),
            encoding: ark_types::exec::Encoding::Base64,
            ..TaskCommand::default()
        };
        let (frame, stdin) = program(&command, WHICH, Some(7)).unwrap();
        let request: ExecRequest = frame.parse().unwrap();
        let told = |name: &str| request.env.get(name).map(String::as_str);
        assert_eq!(
            (told("A"), told(ID_VARIABLE), told(ATTEMPT_VARIABLE)),
            (Some("1"), Some("00"), Some("3"))
        );
        assert_eq!((stdin.as_slice(), request.timeout_ms), (&b"hi"[..], Some(7)));
        assert_eq!(told("TRACEPARENT"), Some("00-1-2-00"));
        let own = [(VARIABLE.to_owned(), "mine".to_owned())].into();
        assert_eq!(WHICH.environment(&own).get(VARIABLE).map(String::as_str), Some("mine"));
        assert!(
            program(&TaskCommand::default(), WHICH, None).unwrap_err().0.detail.contains("argv is empty")
        );
    }

    #[test]
    fn code_finds_its_environment_and_keeps_its_lines() {
        let env = BTreeMap::from([("A".to_owned(), "\"'\n\u{e9}".to_owned())]);
        let eval = TaskEval { code: "1/0".to_owned(), env, ..TaskEval::default() };
        let [set_up, code] = code(&eval, WHICH, None).unwrap();
        let told = "{\"A\":\"\\\"'\\n\u{e9}\",\"ARK_TASK_ATTEMPT\":\"3\",\"ARK_TASK_ID\":\"00\",\"TRACEPARENT\":\"00-1-2-00\"}";
        assert_eq!(set_up.code, format!("__import__('os').environ.update({told})"));
        assert_eq!((code.code.as_str(), code.timeout_ms), ("1/0", None));
        let large = BTreeMap::from([("A".to_owned(), "x".repeat(1 << 17))]);
        let refused = super::code(&TaskEval { env: large, ..eval }, WHICH, None).unwrap_err();
        assert!(refused.0.detail.contains("environment"));
    }
}
