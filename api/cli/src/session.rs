//! A program whose streams are ours: standard input, output and error, signals, and its terminal.
//!
//! ```text
//!  stdin ──thread──► pump ──► ExecInput ═══ WebSocket ═══ ExecOutput ──► relay ──► stdout, stderr
//!  signals, SIGWINCH ──► watch ──┘                                        └► the program's end
//! ```
//! A connection that breaks is taken up again by the client; nothing of that is seen here.
//! The directions are separate tasks: a program that does not read its input can still be heard and killed.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ark_client::{ExecEvent, ExecInput, ExecOutput, ExecStream};
use ark_types::exec::{ExecEnd, ExecReply, ExitStatus, MAX_CAPTURE, TtySize};
use futures_util::FutureExt;
use nix::libc::{SIGINT, SIGKILL};
use tokio::io::{AsyncWriteExt, Stdout};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Notify, mpsc};
use tokio_util::task::AbortOnDropHandle;

use crate::failure::Failure;
use crate::signals::{Escape, Signals};
use crate::terminal;

/// Bytes read from standard input at once.
const CHUNK: usize = 64 << 10;
/// Chunks of standard input that wait for the program.
const WAITING_CHUNKS: usize = 4;
/// Signals and sizes that wait; more come only from a stuck connection.
const WAITING_WORDS: usize = 16;
/// The key that, pressed often enough, kills a program that has a terminal: Ctrl-].
const ESCAPE_KEY: u8 = 0x1d;
/// Longest wait for a killed program's end.
const KILL_DEADLINE: Duration = Duration::from_secs(2);
/// How much longer than `--timeout` the guest may take to say that the program was killed: it has 2 s between TERM and
/// KILL, and a slow host.
const TIMEOUT_GRACE: Duration = Duration::from_secs(10);

/// How a program is connected.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wiring {
    /// Send standard input.
    pub(crate) stdin: bool,
    /// The program has a terminal: raw mode, sizes.
    pub(crate) tty: bool,
    /// Keep output for a JSON reply instead of writing it.
    pub(crate) capture: bool,
    /// The program's time.
    pub(crate) timeout: Option<Duration>,
}

/// What goes to the program besides its input.
enum Word {
    Signal(u8),
    Resize(TtySize),
}

/// Connects a program until it ends.
pub(crate) async fn attach(
    stream: ExecStream,
    signals: Signals,
    wiring: Wiring,
) -> Result<ExecReply, Failure> {
    let typed = wiring.tty && wiring.stdin && terminal::stdin_is_terminal();
    let _raw = typed.then(raw_mode).transpose()?;
    let kill = Arc::new(Notify::new());
    let (words, inbox) = mpsc::channel(WAITING_WORDS);
    let stdin = wiring.stdin.then(read_stdin).transpose()?;
    let pump = pump(stream.input, inbox, stdin, wiring.tty, kill.clone());
    let _pump = AbortOnDropHandle::new(tokio::spawn(pump));
    let _watch = AbortOnDropHandle::new(tokio::spawn(watch(signals, words.clone(), kill.clone())));
    if wiring.tty {
        let changes = signal(SignalKind::window_change())
            .map_err(|source| Failure::System { what: "cannot listen for signals", source })?;
        tokio::spawn(follow_size(changes, words.downgrade()));
    }
    let deadline = async {
        match wiring.timeout {
            Some(timeout) => tokio::time::sleep(timeout.saturating_add(TIMEOUT_GRACE)).await,
            None => std::future::pending().await,
        }
    };
    let mut output = stream.output;
    let ended = {
        let relay = relay(&mut output, wiring.capture);
        tokio::pin!(relay);
        tokio::select! {
            reply = &mut relay => reply,
            () = deadline => Err(Failure::Timeout),
            () = kill.notified() => {
                let _ = words.try_send(Word::Signal(number(SIGKILL)));
                match tokio::time::timeout(KILL_DEADLINE, relay).await {
                    Ok(reply) => reply,
                    Err(_) => Ok(reply(Capture::default(), killed())),
                }
            }
        }
    };
    // Where the program still runs, closing the stream makes the guest kill its process group.
    output.leave().await;
    ended
}

fn raw_mode() -> Result<terminal::RawMode, Failure> {
    terminal::RawMode::enter()
        .map_err(|source| Failure::System { what: "cannot set the terminal up", source })
}

fn number(signal: i32) -> u8 {
    u8::try_from(signal).unwrap_or(u8::MAX)
}

fn killed() -> ExecEnd {
    ExecEnd { status: ExitStatus::Signaled { signal: number(SIGKILL) }, duration_us: 0 }
}

/// Sends input, signals and sizes; ends when the connection does, which the relay reports.
async fn pump(
    mut input: ExecInput,
    mut inbox: mpsc::Receiver<Word>,
    mut stdin: Option<mpsc::Receiver<Vec<u8>>>,
    tty: bool,
    kill: Arc<Notify>,
) -> Result<(), ark_client::Error> {
    // A program with a terminal but without our input has a terminal at which nobody types.
    if stdin.is_none() && !tty {
        input.close_stdin().await?;
    }
    let mut escape = Escape::default();
    loop {
        tokio::select! {
            biased;
            word = inbox.recv() => match word {
                Some(Word::Signal(signal)) => input.signal(signal).await?,
                Some(Word::Resize(size)) => input.resize(size).await?,
                None => return Ok(()),
            },
            chunk = next_chunk(&mut stdin) => match chunk {
                Some(bytes) => {
                    let presses = bytes.iter().filter(|b| tty && **b == ESCAPE_KEY).count();
                    if (0..presses).any(|_| escape.press(Instant::now())) {
                        kill.notify_one();
                    }
                    input.stdin(&bytes).await?;
                }
                None => {
                    stdin = None;
                    input.close_stdin().await?;
                }
            },
        }
    }
}

/// The next chunk; never, when there is no standard input.
async fn next_chunk(stdin: &mut Option<mpsc::Receiver<Vec<u8>>>) -> Option<Vec<u8>> {
    match stdin {
        Some(chunks) => chunks.recv().await,
        None => std::future::pending().await,
    }
}

/// Passes signals on; enough interrupts in a row kill.
async fn watch(mut signals: Signals, words: mpsc::Sender<Word>, kill: Arc<Notify>) {
    let mut escape = Escape::default();
    loop {
        let signal = signals.next().await;
        // When the connection is stuck the word is lost, and the escape remains.
        let _ = words.try_send(Word::Signal(signal));
        if signal == number(SIGINT) && escape.press(Instant::now()) {
            kill.notify_one();
        }
    }
}

/// Tells the program's terminal the size of ours, now and whenever it changes.
async fn follow_size(mut changes: tokio::signal::unix::Signal, words: mpsc::WeakSender<Word>) {
    loop {
        let Some(words) = words.upgrade() else { return };
        let _ = words.try_send(Word::Resize(terminal::size()));
        drop(words);
        if changes.recv().await.is_none() {
            return;
        }
    }
}

/// Reads standard input in a thread of its own: a terminal's read cannot be cancelled, and ark must be able to end.
fn read_stdin() -> Result<mpsc::Receiver<Vec<u8>>, Failure> {
    let system = |source| Failure::System { what: "cannot read standard input", source };
    let fd = io::stdin().as_fd().try_clone_to_owned().map_err(system)?;
    let mut file = File::from(fd);
    let (sender, receiver) = mpsc::channel(WAITING_CHUNKS);
    let read = move || {
        let mut buffer = vec![0; CHUNK];
        loop {
            match file.read(&mut buffer) {
                Ok(0) => return,
                Ok(count) => {
                    let chunk = buffer.get(..count).unwrap_or_default().to_vec();
                    if sender.blocking_send(chunk).is_err() {
                        return;
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                // The input cannot be read any more (a terminal that hung up): it has ended.
                Err(_) => return,
            }
        }
    };
    std::thread::Builder::new().name("stdin".to_owned()).spawn(read).map_err(system)?;
    Ok(receiver)
}

/// Output that is kept for a JSON reply.
#[derive(Default)]
struct Capture {
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    truncated: bool,
}

/// Writes or keeps what the program says until it ends.
async fn relay(output: &mut ExecOutput, capture: bool) -> Result<ExecReply, Failure> {
    let mut stdout = tokio::io::stdout();
    let result = pass_on(output, &mut stdout, capture).await;
    // However it ended, what came before is shown.
    let shown = stdout.flush().await.map_err(Failure::Output);
    let reply = result?;
    shown.map(|()| reply)
}

async fn pass_on(output: &mut ExecOutput, stdout: &mut Stdout, capture: bool) -> Result<ExecReply, Failure> {
    let mut stderr = tokio::io::stderr();
    let mut kept = Capture::default();
    loop {
        let event = match output.next().now_or_never() {
            Some(event) => event?,
            // Nothing more has come yet: the user gets to see what there is.
            None => {
                stdout.flush().await.map_err(Failure::Output)?;
                output.next().await?
            }
        };
        match event {
            ExecEvent::Started(_) => {}
            ExecEvent::Stdout(bytes) if capture => keep(&mut kept.stdout, &bytes, &mut kept.truncated),
            ExecEvent::Stderr(bytes) if capture => keep(&mut kept.stderr, &bytes, &mut kept.truncated),
            ExecEvent::Stdout(bytes) => stdout.write_all(&bytes).await.map_err(Failure::Output)?,
            ExecEvent::Stderr(bytes) => {
                // What came first is seen first where both are one terminal.
                stdout.flush().await.map_err(Failure::Output)?;
                // Nobody reads our standard error: that is no reason to end the program.
                let _ = stderr.write_all(&bytes).await;
                let _ = stderr.flush().await;
            }
            ExecEvent::Exited(end) => return Ok(reply(kept, end)),
        }
    }
}

fn keep(kept: &mut Vec<u8>, bytes: &[u8], truncated: &mut bool) {
    let room = MAX_CAPTURE.saturating_sub(kept.len());
    let fits = bytes.get(..room).unwrap_or(bytes);
    kept.extend_from_slice(fits);
    *truncated |= fits.len() < bytes.len();
}

fn reply(kept: Capture, end: ExecEnd) -> ExecReply {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    ExecReply {
        status: end.status,
        exit_code: end.status.shell_code(),
        stdout: text(&kept.stdout),
        stderr: text(&kept.stderr),
        truncated: kept.truncated,
        duration_us: end.duration_us,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn captured_output_is_bounded_and_says_so() {
        let (mut kept, mut truncated) = (Vec::new(), false);
        keep(&mut kept, &vec![1; MAX_CAPTURE - 1], &mut truncated);
        keep(&mut kept, &[2], &mut truncated);
        assert!(!truncated && kept.len() == MAX_CAPTURE);
        keep(&mut kept, &[], &mut truncated);
        assert!(!truncated);
        keep(&mut kept, &[3], &mut truncated);
        assert!(truncated && kept.len() == MAX_CAPTURE);
    }

    #[test]
    fn a_killed_program_has_the_shells_code() {
        assert_eq!(reply(Capture::default(), killed()).exit_code, 137);
    }
}
