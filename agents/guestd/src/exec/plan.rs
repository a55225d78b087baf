//! From an [`ExecRequest`] to exactly what execve(2) needs.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::path::Path;

use ark_types::exec::{ExecRequest, MAX_ARGS, TtySize};
use ark_types::guest::{ErrorCode, GuestError};

use crate::failure::failure;
use crate::user::{User, look_up};

/// `PATH` of a program whose request names none: Debian's for root.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Home of root, and the working directory when the request names none.
const ROOT_HOME: &str = "/root";
/// `TERM` of a program with a terminal whose request names none.
const DEFAULT_TERM: &str = "xterm";

/// A checked request.
#[derive(Debug)]
pub(crate) struct Plan {
    /// Paths to try, in order.
    pub(crate) programs: Vec<CString>,
    /// Arguments, the program's name first.
    pub(crate) argv: Vec<CString>,
    /// `NAME=value`.
    pub(crate) env: Vec<CString>,
    /// Directories to try, in order.
    pub(crate) dirs: Vec<CString>,
    /// Who to become; `None` stays who guestd is.
    pub(crate) user: Option<User>,
    /// Size of the terminal, if one is wanted.
    pub(crate) tty: Option<TtySize>,
    /// Name of the program, for messages.
    pub(crate) name: String,
}

fn bad(message: impl Into<String>) -> GuestError {
    failure(ErrorCode::BadRequest, message)
}

fn c_string(what: &str, text: impl Into<Vec<u8>>) -> Result<CString, GuestError> {
    CString::new(text).map_err(|_| bad(format!("{what} has a NUL byte in it")))
}

impl Plan {
    /// Checks `request` and completes it from the users' files below `root`.
    pub(crate) fn new(request: ExecRequest, root: &Path) -> Result<Self, GuestError> {
        let ExecRequest { argv, mut env, cwd, user, tty, stdin, timeout_ms: _, encoding: _, resumable: _ } =
            request;
        let name =
            argv.first().filter(|n| !n.is_empty()).ok_or_else(|| bad("argv names no program"))?.clone();
        if argv.len() > MAX_ARGS || env.len() > MAX_ARGS {
            return Err(bad(format!("more than {MAX_ARGS} arguments or environment variables")));
        }
        if stdin.is_some() {
            return Err(bad("stdin has no place in an Exec frame; send it as Stdin frames"));
        }
        if let Some(name) = env.keys().find(|k| k.is_empty() || k.contains('=')) {
            return Err(bad(format!("{name:?} cannot be the name of an environment variable")));
        }
        let user = user.map(|spec| look_up(root, &spec)).transpose()?;
        let home = user.as_ref().map_or(ROOT_HOME, |u| u.home.as_str()).to_owned();
        complete(&mut env, &home, user.as_ref(), tty.is_some());
        let dirs = match cwd {
            Some(dir) => vec![c_string("the working directory", dir)?],
            None => vec![c_string("the home directory", home)?, c"/".to_owned()],
        };
        let path = env.get("PATH").map_or("", String::as_str);
        Ok(Self {
            programs: candidates(&name, path)?,
            argv: argv.into_iter().map(|a| c_string("an argument", a)).collect::<Result<_, _>>()?,
            env: env
                .into_iter()
                .map(|(name, value)| c_string("the environment", format!("{name}={value}")))
                .collect::<Result<_, _>>()?,
            dirs,
            user,
            tty,
            name,
        })
    }
}

/// Adds what every program expects in its environment, where the request has not set it.
fn complete(env: &mut BTreeMap<String, String>, home: &str, user: Option<&User>, tty: bool) {
    let mut default = |name: &str, value: &str| {
        if !env.contains_key(name) {
            env.insert(name.to_owned(), value.to_owned());
        }
    };
    default("PATH", DEFAULT_PATH);
    default("HOME", home);
    if let Some(name) = user.map_or(Some("root"), |u| u.name.as_deref()) {
        default("USER", name);
    }
    if tty {
        default("TERM", DEFAULT_TERM);
    }
}

/// Where the program `name` may be: itself when it has a slash, else below each directory of `path` (an empty one is the
/// working directory, as in execvp(3)).
fn candidates(name: &str, path: &str) -> Result<Vec<CString>, GuestError> {
    let c = |text: String| c_string("the program's name", text);
    if name.contains('/') {
        return Ok(vec![c(name.to_owned())?]);
    }
    path.split(':').map(|dir| c(format!("{}/{name}", if dir.is_empty() { "." } else { dir }))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(change: impl FnOnce(&mut ExecRequest)) -> Result<Plan, GuestError> {
        let mut request = ExecRequest { argv: vec!["true".into()], ..ExecRequest::default() };
        change(&mut request);
        Plan::new(request, Path::new("/nonexistent"))
    }

    #[test]
    fn a_program_is_looked_for_in_the_path_of_its_own_environment() {
        let found = plan(|r| {
            r.env.insert("PATH".into(), "/a::b".into());
        });
        assert_eq!(found.unwrap().programs, [c"/a/true", c"./true", c"b/true"].map(ToOwned::to_owned));
        assert_eq!(plan(|r| r.argv = vec!["./x".into()]).unwrap().programs, [c"./x".to_owned()]);
        assert_eq!(plan(|_| ()).unwrap().programs.len(), 6);
    }

    #[test]
    fn the_environment_is_completed_and_never_overridden() {
        let plan = plan(|r| {
            r.env.insert("HOME".into(), "/elsewhere".into());
            r.tty = Some(TtySize { rows: 1, cols: 1 });
        });
        let env = plan.unwrap().env;
        assert!(env.contains(&c"HOME=/elsewhere".to_owned()) && env.contains(&c"TERM=xterm".to_owned()));
        assert_eq!(env.len(), 4);
    }

    #[test]
    fn requests_out_of_bounds_are_refused() {
        let many = vec!["x".to_owned(); MAX_ARGS + 1];
        let refused = [
            plan(|r| r.argv.clear()),
            plan(|r| r.argv = vec![String::new()]),
            plan(|r| r.argv = many),
            plan(|r| r.argv.push("a\0b".into())),
            plan(|r| r.cwd = Some("\0".into())),
            plan(|r| r.stdin = Some("x".into())),
            plan(|r| {
                r.env.insert("A=B".into(), String::new());
            }),
        ];
        for result in refused {
            assert_eq!(result.unwrap_err().code, ErrorCode::BadRequest);
        }
        assert_eq!(plan(|r| r.user = Some("nobody".into())).unwrap_err().code, ErrorCode::UnknownUser);
    }
}
