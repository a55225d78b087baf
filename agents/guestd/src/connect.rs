//! Finding services from within a guest, for programs that do not speak vsock: a replica's port on standard input and output.

use std::ffi::OsStr;
use std::io::{self, Read, Write};
use std::process::ExitCode;
use std::sync::Arc;
use std::thread;

use ark_link::socket::HOST_CID;
use ark_link::{Address, Stream};
use ark_types::guest::SERVICES_PORT;
use ark_types::plain::plain;
use ark_types::service::Wish;

/// Where programs in a guest find this program.
pub(crate) const PLACE: &str = "/run/ark/guestd";

/// Longest first line of an answer, bytes.
const MAX_ANSWER: u64 = 4096;

/// Exit code when there is no replica to be connected with.
const FAILED: u8 = 1;

/// Connects standard input and output with a replica of `service`, until both sides are done.
pub(crate) fn connect(service: &OsStr) -> ExitCode {
    let Some(service) = service.to_str().and_then(|name| name.parse().ok()) else {
        return fail(&format!("{} cannot be the name of a service", service.display()));
    };
    match ask(&Wish::Connect(service)).and_then(bridge) {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => fail(&why),
    }
}

/// Writes the services that there are, as JSON lines.
pub(crate) fn list() -> ExitCode {
    let told = call(&Wish::List).and_then(|stream| {
        let mut text = String::new();
        (&stream).read_to_string(&mut text).map_err(|e| broken(&e))?;
        if let Some(why) = text.strip_prefix("ERR ") { Err(why.trim_end().to_owned()) } else { Ok(text) }
    });
    match told {
        Ok(text) => match io::stdout().write_all(text.as_bytes()) {
            Ok(()) => ExitCode::SUCCESS,
            Err(e) => fail(&format!("standard output cannot be written: {}", plain(&e))),
        },
        Err(why) => fail(&why),
    }
}

fn fail(why: &str) -> ExitCode {
    eprintln!("ark-guestd: {why}");
    ExitCode::from(FAILED)
}

fn broken(error: &io::Error) -> String {
    format!("the connection to the host broke: {}", plain(error))
}

/// Tells the host `wish`.
fn call(wish: &Wish) -> Result<Stream, String> {
    let host = Address::Vsock { cid: HOST_CID, port: SERVICES_PORT };
    let stream =
        Stream::connect(&host).map_err(|e| format!("the host does not answer at {host}: {}", plain(&e)))?;
    (&stream).write_all(format!("{wish}\n").as_bytes()).map_err(|e| broken(&e))?;
    Ok(stream)
}

/// The stream that `wish` leads to, once the host said that it does.
#[expect(
    clippy::unbuffered_bytes,
    reason = "a buffer would take what comes behind the line, which is not for us"
)]
fn ask(wish: &Wish) -> Result<Stream, String> {
    let stream = call(wish)?;
    let mut line = Vec::new();
    for byte in (&stream).take(MAX_ANSWER).bytes() {
        match byte.map_err(|e| broken(&e))? {
            b'\n' => break,
            byte => line.push(byte),
        }
    }
    let line = String::from_utf8_lossy(&line).into_owned();
    match line.strip_prefix("ERR ") {
        None if line.starts_with("OK ") => Ok(stream),
        None => Err("the host closed the connection without an answer".to_owned()),
        Some(why) => Err(why.to_owned()),
    }
}

/// Copies standard input to `stream` and `stream` to standard output, until its end: standard input may be open for ever.
fn bridge(stream: Stream) -> Result<(), String> {
    let stream = Arc::new(stream);
    let towards = Arc::clone(&stream);
    let sending = thread::Builder::new().spawn(move || {
        // Whoever does not listen any more has said all there is.
        let _ = io::copy(&mut io::stdin().lock(), &mut &*towards);
        let _ = towards.finish();
    });
    sending.map_err(|e| format!("no thread could be started: {}", plain(&e)))?;
    let mut stdout = io::stdout().lock();
    let copied = io::copy(&mut &*stream, &mut stdout).and_then(|_| stdout.flush());
    copied.map_err(|e| broken(&e))
}
