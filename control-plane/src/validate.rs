//! Bounds of what clients send that types alone do not keep.

use std::collections::BTreeMap;

use ark_types::eval::{EvalRequest, MAX_CODE};
use ark_types::exec::{Encoding, ExecRequest, MAX_ARGS};
use ark_types::guest::{Frame, FrameError, Kind};
use ark_types::permission::{MAX_PERMISSIONS, Permission};
use ark_types::problem::ProblemKind;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use crate::problems::Refusal;

/// Longest path, as Linux has it (`PATH_MAX`, less its NUL).
const MAX_PATH: usize = 4095;

fn invalid(detail: impl Into<String>) -> Refusal {
    Refusal::new(ProblemKind::InvalidValue, detail)
}

fn no_nul(what: &str, text: &str) -> Result<(), Refusal> {
    if text.contains('\0') {
        Err(invalid(format!("{what} contains a NUL byte: leave it out")))
    } else {
        Ok(())
    }
}

/// Checks environment variables.
///
/// # Errors
/// A [`Refusal`] that names the variable.
pub fn check_env(env: &BTreeMap<String, String>) -> Result<(), Refusal> {
    if env.len() > MAX_ARGS {
        return Err(invalid(format!("{} environment variables are too many: at most {MAX_ARGS}", env.len())));
    }
    for (name, value) in env {
        if name.is_empty() || name.contains('=') {
            return Err(invalid(format!(
                "{name:?} cannot name an environment variable: it is empty or contains '='"
            )));
        }
        no_nul("the name of an environment variable", name)?;
        no_nul(&format!("the environment variable {name}"), value)?;
    }
    Ok(())
}

/// Checks what an agent is to be allowed.
///
/// # Errors
/// A [`Refusal`] when that is too much of a list.
pub fn check_allow(allow: &[Permission]) -> Result<(), Refusal> {
    if allow.len() > MAX_PERMISSIONS {
        return Err(invalid(format!(
            "{} permissions are too many: at most {MAX_PERMISSIONS}; `inference` stands for every model",
            allow.len()
        )));
    }
    Ok(())
}

/// Checks `request`, takes its `stdin` out decoded, and puts `agent_env` under its own.
///
/// # Errors
/// A [`Refusal`] that names the field.
pub fn prepare_exec(
    mut request: ExecRequest,
    agent_env: &BTreeMap<String, String>,
) -> Result<(Frame, Vec<u8>), Refusal> {
    match request.argv.first() {
        None => return Err(invalid("argv is empty: its first element is the program to run")),
        Some(program) if program.is_empty() => return Err(invalid("the program in argv is an empty text")),
        Some(_) => {}
    }
    if request.argv.len() > MAX_ARGS {
        return Err(invalid(format!("{} arguments are too many: at most {MAX_ARGS}", request.argv.len())));
    }
    for text in request.argv.iter().chain(&request.cwd).chain(&request.user) {
        no_nul("argv, cwd or user", text)?;
    }
    check_env(&request.env)?;
    if request.timeout_ms == Some(0) {
        return Err(invalid("timeout_ms is 0: leave it out for no limit"));
    }
    if request.resumable {
        return Err(invalid("resumable is for the exec WebSocket of an agent: leave it out here"));
    }
    let stdin = decode(request.stdin.take().unwrap_or_default(), request.encoding)?;
    for (name, value) in agent_env {
        request.env.entry(name.clone()).or_insert_with(|| value.clone());
    }
    let frame = Frame::json(Kind::Exec, &request).map_err(|error| match error {
        FrameError::TooLong(_) => invalid(format!("arguments and environment are too large: {error}")),
        other => Refusal::new(ProblemKind::Internal, other.to_string()),
    })?;
    Ok((frame, stdin))
}

/// Checks code for the evaluator.
///
/// # Errors
/// A [`Refusal`] that names the field.
pub fn check_eval(request: &EvalRequest) -> Result<(), Refusal> {
    if request.code.len() > MAX_CODE {
        return Err(invalid(format!("the code has {} bytes: at most {MAX_CODE}", request.code.len())));
    }
    if request.timeout_ms == Some(0) {
        return Err(invalid("timeout_ms is 0: leave it out for no limit"));
    }
    Ok(())
}

fn decode(text: String, encoding: Encoding) -> Result<Vec<u8>, Refusal> {
    match encoding {
        Encoding::Utf8 => Ok(text.into_bytes()),
        Encoding::Base64 => STANDARD.decode(text).map_err(|e| invalid(format!("stdin is not base64: {e}"))),
    }
}

/// `bytes` as `encoding` has them.
#[must_use]
pub fn encode(bytes: &[u8], encoding: Encoding) -> String {
    match encoding {
        Encoding::Utf8 => String::from_utf8_lossy(bytes).into_owned(),
        Encoding::Base64 => STANDARD.encode(bytes),
    }
}

/// Checks the path of a file in a guest.
///
/// # Errors
/// A [`Refusal`] that says what is wrong with it.
pub fn check_path(path: &str) -> Result<(), Refusal> {
    no_nul("path", path)?;
    if !path.starts_with('/') {
        return Err(invalid(format!("the path {path:?} is not absolute: begin it with '/'")));
    }
    if path.len() > MAX_PATH {
        return Err(invalid(format!("the path has {} bytes: at most {MAX_PATH}", path.len())));
    }
    Ok(())
}

/// Permission bits from octal digits.
///
/// # Errors
/// A [`Refusal`].
pub fn parse_mode(text: &str) -> Result<u32, Refusal> {
    u32::from_str_radix(text, 8)
        .ok()
        .filter(|mode| *mode <= 0o7777)
        .ok_or_else(|| invalid(format!("the mode {text:?} is not octal digits up to 7777, such as 644")))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn request(argv: &[&str]) -> ExecRequest {
        ExecRequest { argv: argv.iter().map(ToString::to_string).collect(), ..ExecRequest::default() }
    }

    fn why(request: ExecRequest) -> String {
        prepare_exec(request, &BTreeMap::new()).unwrap_err().0.detail
    }

    #[test]
    fn an_exec_out_of_bounds_is_refused_with_the_field_named() {
        assert!(why(request(&[])).contains("argv is empty"));
        assert!(why(request(&[""])).contains("empty text"));
        assert!(why(request(&["a"; MAX_ARGS + 1])).contains("too many"));
        assert!(why(request(&["a\0b"])).contains("NUL"));
        assert!(why(request(&["a", &"x".repeat(300_000)])).contains("too large"));
        assert!(why(ExecRequest { timeout_ms: Some(0), ..request(&["a"]) }).contains("timeout_ms"));
        assert!(why(ExecRequest { resumable: true, ..request(&["a"]) }).contains("resumable"));
        let stdin = Some("!".to_owned());
        assert!(why(ExecRequest { stdin, encoding: Encoding::Base64, ..request(&["a"]) }).contains("base64"));
        let env = BTreeMap::from([("A=B".to_owned(), String::new())]);
        assert!(why(ExecRequest { env, ..request(&["a"]) }).contains("A=B"));
    }

    #[test]
    fn the_requests_environment_wins_over_the_agents() {
        let env = |pairs: &[(&str, &str)]| -> BTreeMap<String, String> {
            pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
        };
        let ask = ExecRequest { env: env(&[("A", "mine")]), stdin: Some("in".into()), ..request(&["a"]) };
        let (frame, stdin) = prepare_exec(ask, &env(&[("A", "agent"), ("B", "agent")])).unwrap();
        let sent: ExecRequest = frame.parse().unwrap();
        assert_eq!(sent.env, env(&[("A", "mine"), ("B", "agent")]));
        assert_eq!((sent.stdin, stdin), (None, b"in".to_vec()));
    }

    #[test]
    fn code_is_bounded_and_a_timeout_of_nothing_refused() {
        let code = |len| EvalRequest { code: "x".repeat(len), ..EvalRequest::default() };
        check_eval(&code(MAX_CODE)).unwrap();
        assert!(check_eval(&code(MAX_CODE + 1)).unwrap_err().0.detail.contains("at most"));
        assert!(check_eval(&EvalRequest { timeout_ms: Some(0), ..code(1) }).is_err());
    }

    #[test]
    fn paths_are_absolute_and_modes_octal() {
        check_path("/a").unwrap();
        assert!(check_path("a").is_err() && check_path("").is_err() && check_path("/\0").is_err());
        assert!(check_path(&format!("/{}", "a".repeat(MAX_PATH))).is_err());
        assert_eq!(parse_mode("644").unwrap(), 0o644);
        for bad in ["", "8", "10000", "-1", "0o644", "rw"] {
            assert!(parse_mode(bad).is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn bytes_survive_base64(bytes: Vec<u8>) {
            prop_assert_eq!(decode(encode(&bytes, Encoding::Base64), Encoding::Base64).unwrap(), bytes);
        }
    }
}
