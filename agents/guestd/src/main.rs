//! `ark-guestd`: PID 1 of every guest, and the one the host speaks to.
//!
//! | called as | does |
//! |---|---|
//! | PID 1 without arguments | makes the guest usable ([`boot`]), says hello, serves operations over vsock |
//! | `ark-guestd serve --listen PATH` | serves the same operations over a Unix socket, without touching the system; with `--evaluator FILE`, that evaluates Python |
//! | `ark-guestd connect SERVICE`, `ark-guestd services` | connects standard input and output with a replica of a service, or lists services ([`connect`]); programs in a guest find it at [`connect::PLACE`] |
//!
//! Serving, it collects orphans where the kernel gives it any. Threads, no runtime:
//!
//! ```text
//!   main ── reaps orphans              hello ── heartbeats
//!   workers (2 waiting, up to 264) ── accept, then serve one operation: exec runs one poll loop on its worker
//! ```

use ark_types::plain::plain;
use std::env;
use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::thread;

use ark_link::{Address, Listener, Stream};

mod boot;
mod bridge;
mod children;
mod connect;
mod dial;
mod eval;
mod exec;
mod failure;
mod files;
mod gateway;
mod keep;
mod poll;
mod renew;
mod server;
mod system;
mod user;

use eval::Evaluators;
use server::Server;

/// Version told in hello.
const VERSION: &str = env!("CARGO_PKG_VERSION");
const USAGE: &str = "usage: ark-guestd serve --listen PATH [--evaluator FILE]\n       ark-guestd connect SERVICE\n       ark-guestd services\n       (without arguments it is the PID 1 of a guest)";

fn main() -> ExitCode {
    one_heap();
    keep_descriptors();
    children::block_sigchld();
    let arguments: Vec<OsString> = env::args_os().skip(1).collect();
    match arguments.as_slice() {
        [serve, listen, path] if serve == "serve" && listen == "--listen" => serve_unix(path.into(), None),
        [serve, listen, path, evaluator, file]
            if serve == "serve" && listen == "--listen" && evaluator == "--evaluator" =>
        {
            serve_unix(path.into(), Some(file.into()))
        }
        [connect, service] if connect == "connect" => connect::connect(service),
        [services] if services == "services" => connect::list(),
        [version] if version == "--version" => {
            println!("ark-guestd {VERSION}");
            ExitCode::SUCCESS
        }
        // The kernel hands PID 1 what it does not know of its command line.
        _ if system::is_init() => boot::run(),
        _ => fail(USAGE),
    }
}

fn fail(message: &str) -> ExitCode {
    eprintln!("ark-guestd: {message}");
    ExitCode::from(2)
}

/// One heap for all threads: the C library would map one per thread, and ours hold little and live short.
fn one_heap() {
    // SAFETY: no other thread runs yet; the call only sets a parameter.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}

/// Keeps from programs what this process was started with beyond the standard streams.
fn keep_descriptors() {
    // SAFETY: no memory effects; marks descriptors close-on-exec, which are nobody's but ours to mark.
    unsafe { libc::close_range(3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC.cast_signed()) };
}

/// Serves operations over a Unix socket at `path`, for ever; `evaluator` is what evaluates Python if not the image's own.
fn serve_unix(path: PathBuf, evaluator: Option<PathBuf>) -> ExitCode {
    children::default_signals();
    let listener = match listen_unix(&path) {
        Ok(listener) => listener,
        Err(message) => return fail(&message),
    };
    let server = Server::new(listener, Evaluators::new(evaluator));
    if let Err(e) = server.start() {
        return fail(&format!("no thread could be started: {}", plain(&e)));
    }
    if system::is_init() || is_subreaper() {
        server.children.reap();
    }
    loop {
        thread::park();
    }
}

/// Listens at `path`; a socket that nobody serves any more is replaced.
fn listen_unix(path: &Path) -> Result<Listener, String> {
    let address = Address::Unix(path.to_owned());
    let stale = fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_socket());
    if stale && Stream::connect(&address).is_err() {
        fs::remove_file(path)
            .map_err(|e| format!("the stale socket {} stays: {}", path.display(), plain(&e)))?;
    }
    Listener::bind(&address).map_err(|e| format!("cannot listen at {}: {}", path.display(), plain(&e)))
}

/// Whether orphaned descendants become this process' children (`PR_SET_CHILD_SUBREAPER`, prctl(2)).
fn is_subreaper() -> bool {
    let mut answer: libc::c_int = 0;
    // SAFETY: PR_GET_CHILD_SUBREAPER writes one int.
    unsafe { libc::prctl(libc::PR_GET_CHILD_SUBREAPER, &raw mut answer) };
    answer != 0
}
