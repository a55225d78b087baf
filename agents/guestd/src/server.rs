//! Takes connections and serves one operation after another on each.
//!
//! A few threads take turns at accept(2); the one that got a connection serves it itself, so no operation waits for a
//! thread to be made or for a hand-over. A thread that finds enough others waiting ends. The first frame must come within
//! [`FIRST_FRAME`], and so must that of the next operation; a connection whose operation failed takes no other. Beyond [`MAX_OPERATIONS`] at once an operation is refused; power-off never is.

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use ark_link::{Connection, LinkError, Listener};
use ark_types::guest::{ErrorCode, Frame, GuestError, Kind, PathRequest};

use crate::children::Children;
use crate::eval::Evaluators;
use crate::failure::{Failure, failure};
use crate::keep::Keeper;
use crate::renew::Renewals;
use crate::{dial, eval, exec, files, system};

/// Most operations at once.
const MAX_OPERATIONS: usize = 256;
/// Most threads: those of the operations and some that refuse what is too much.
const MAX_THREADS: usize = MAX_OPERATIONS + 8;
/// Threads that wait for a connection while nothing goes on.
const WAITING_THREADS: usize = 3;
/// Stack of a thread. The deepest path (a JSON request parsed, a file opened) takes under 32 KiB in a debug build.
const THREAD_STACK: usize = 128 << 10;
/// How long a connection may take to say what it wants.
const FIRST_FRAME: Duration = Duration::from_secs(10);
/// How long a host that is silent may take to close after the last frame.
const LAST_SILENCE: Duration = Duration::from_secs(1);
/// How long a host may go on sending after the last frame.
const LAST_WORDS: Duration = Duration::from_secs(60);
/// How long a host that asked for power-off may take to read the answer and close: the machine's end would overtake it.
const FAREWELL: Duration = Duration::from_millis(300);
/// Pause after an accept(2) that failed for want of something, descriptors for example.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// The operations' server.
pub(crate) struct Server {
    listener: Listener,
    /// Held by the thread whose turn at accept(2) it is: a connection wakes one thread, not all.
    turn: Mutex<()>,
    threads: AtomicUsize,
    waiting: AtomicUsize,
    operations: AtomicUsize,
    /// Children of this process, for as long as it lives: interpreters outlive the operations that start them.
    pub(crate) children: &'static Children,
    evaluators: Evaluators,
    keeper: Keeper,
    renewals: Renewals,
}

/// Counts one more for as long as it lives.
struct Counted<'a>(&'a AtomicUsize);

impl<'a> Counted<'a> {
    fn new(counter: &'a AtomicUsize) -> Self {
        counter.fetch_add(1, Ordering::Relaxed);
        Self(counter)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Server {
    /// A server of `listener`'s connections. There is one in a process.
    pub(crate) fn new(listener: Listener, evaluators: Evaluators) -> Arc<Self> {
        Arc::new(Self {
            listener,
            turn: Mutex::new(()),
            threads: AtomicUsize::new(0),
            waiting: AtomicUsize::new(0),
            operations: AtomicUsize::new(0),
            children: Box::leak(Box::default()),
            evaluators,
            keeper: Keeper::default(),
            renewals: Renewals::default(),
        })
    }

    /// Starts serving.
    ///
    /// # Errors
    /// When not even one thread can be made.
    pub(crate) fn start(self: &Arc<Self>) -> io::Result<()> {
        (0..WAITING_THREADS).try_for_each(|_| self.add_thread())
    }

    fn add_thread(self: &Arc<Self>) -> io::Result<()> {
        let server = Arc::clone(self);
        thread::Builder::new().stack_size(THREAD_STACK).spawn(move || server.work())?;
        Ok(())
    }

    /// One thread's life.
    fn work(self: &Arc<Self>) {
        let threads = Counted::new(&self.threads);
        loop {
            let waiting = Counted::new(&self.waiting);
            let connection = self.accept();
            drop(waiting);
            let may_grow = self.threads.load(Ordering::Relaxed) < MAX_THREADS;
            if may_grow && self.waiting.load(Ordering::Relaxed) == 0 {
                // Should it fail, this thread comes back to accept, only later.
                let _ = self.add_thread();
            }
            self.serve(connection);
            if self.waiting.load(Ordering::Relaxed) >= WAITING_THREADS {
                break;
            }
        }
        drop(threads);
    }

    /// Waits for this thread's turn and then for a connection.
    fn accept(&self) -> Connection {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            match self.listener.accept() {
                Ok(stream) => return Connection::new(stream),
                Err(_) => thread::sleep(ACCEPT_PAUSE),
            }
        }
    }

    /// Serves one connection to its end and tells the host what went wrong, if it still listens. The host closes first.
    fn serve(&self, mut connection: Connection) {
        let mut first = connection.recv_within(FIRST_FRAME);
        let result = loop {
            let served = match first {
                Ok(Some(first)) => self.operate(&mut connection, &first),
                Ok(None) => return,
                Err(broken) => Err(broken.into()),
            };
            match served {
                Ok(()) => first = next_operation(&mut connection),
                Err(Failure::Guest(error)) => break tell(&mut connection, &error),
                Err(Failure::Link(broken)) => break Err(broken),
            }
        };
        // Of a connection that is broken nobody is left to hear.
        let _ = result.and_then(|()| connection.drain(LAST_SILENCE, LAST_WORDS));
    }

    /// Serves the operation that `first` names, until its last frame has been sent.
    fn operate(&self, connection: &mut Connection, first: &Frame) -> Result<(), Failure> {
        let _operation = Counted::new(&self.operations);
        if first.kind == Kind::PowerOff {
            return power_off(connection);
        }
        if self.operations.load(Ordering::Relaxed) > MAX_OPERATIONS {
            let message =
                format!("the agent runs {MAX_OPERATIONS} operations already; try again when one has ended");
            return Err(failure(ErrorCode::Exhausted, message).into());
        }
        match first.kind {
            Kind::Exec => exec::serve(connection, first.parse()?, self.children),
            Kind::Keep => self.keeper.serve(connection, first.parse()?, self.children),
            Kind::KeptOutput => self.keeper.tell_output(connection),
            Kind::FileRead => files::read(connection, &first.parse::<PathRequest>()?.path),
            Kind::FileWrite => files::write(connection, &first.parse()?),
            Kind::FileStat => files::stat(connection, &first.parse::<PathRequest>()?.path),
            Kind::FileList => files::list(connection, &first.parse::<PathRequest>()?.path),
            Kind::ClockSet => {
                system::set_clock(first.parse()?)?;
                Ok(connection.send(&Frame::json(Kind::ClockSet, &system::clock())?)?)
            }
            Kind::Renew => {
                let renewed = self.renewals.renew(&first.parse()?, &self.evaluators)?;
                Ok(connection.send(&Frame::json(Kind::Renewed, &renewed)?)?)
            }
            Kind::Dial => dial::serve(connection, first.parse()?),
            Kind::Eval => eval::serve(connection, &first.parse()?, &self.evaluators, self.children),
            kind => {
                Err(failure(ErrorCode::BadRequest, format!("a {kind:?} frame begins no operation")).into())
            }
        }
    }
}

/// The frame that names the next operation, or none when the host has closed. What was on its way to a program when that
/// ended is dropped.
fn next_operation(connection: &mut Connection) -> Result<Option<Frame>, LinkError> {
    connection.stream().set_nonblocking(false)?;
    loop {
        let frame = connection.recv_within(FIRST_FRAME)?;
        let late = |f: &Frame| matches!(f.kind, Kind::Stdin | Kind::StdinClose | Kind::Signal | Kind::Resize);
        if !frame.as_ref().is_some_and(late) {
            return Ok(frame);
        }
    }
}

/// Sends `error` as the last frame.
fn tell(connection: &mut Connection, error: &GuestError) -> Result<(), LinkError> {
    connection.stream().set_nonblocking(false)?;
    connection.send(&Frame::json(Kind::Error, error)?)
}

/// Serves `PowerOff`; does not return when it does what it is asked.
fn power_off(connection: &mut Connection) -> Result<(), Failure> {
    if !system::is_init() {
        let message = "only a guest's PID 1 can power it off; this guestd serves another system";
        return Err(failure(ErrorCode::BadRequest, message).into());
    }
    // Whoever does not wait for the answer still gets what was asked for.
    let _ = connection.send(&Frame::empty(Kind::Ok)).and_then(|()| connection.drain(FAREWELL, FAREWELL));
    system::power_off()
}
