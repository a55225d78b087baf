//! What an evaluator sends and is sent. The code it evaluates can write to the pipe as well: nothing of it is believed
//! beyond its form, and nothing is longer than the host was promised.

use ark_types::eval::{EvalException, MAX_VALUE};
use serde::{Deserialize, Serialize};

/// Most bytes of a line: three texts of [`MAX_VALUE`] bytes, each of which JSON may write with six, and what holds them.
pub(super) const MAX_LINE: usize = 3 * 6 * MAX_VALUE + (4 << 10);
/// Most bytes of an exception's type.
const MAX_KIND: usize = 256;

/// What the evaluator is to do.
#[derive(Serialize)]
#[serde(untagged)]
pub(super) enum Task<'a> {
    /// Evaluate code; texts of the reply have at most `limit` bytes.
    Code { code: &'a str, limit: usize },
    /// Reseed its generators.
    Seed { seed: &'a str },
}

/// A task on its way.
#[derive(Serialize)]
struct Request<'a> {
    id: u64,
    #[serde(flatten)]
    task: &'a Task<'a>,
}

/// `task` as the line that request `id` is.
pub(super) fn request_line(id: u64, task: &Task<'_>) -> serde_json::Result<Vec<u8>> {
    let mut line = serde_json::to_vec(&Request { id, task })?;
    line.push(b'\n');
    Ok(line)
}

/// An evaluator's answer to request `id`.
#[derive(Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub(super) struct Reply {
    pub(super) id: u64,
    pub(super) value: Option<String>,
    pub(super) exception: Option<EvalException>,
    pub(super) random: Option<String>,
    pub(super) error: Option<String>,
}

impl Reply {
    /// The reply that `line` is; none when it is something else.
    pub(super) fn parse(line: &[u8]) -> Option<Self> {
        let mut reply: Self = serde_json::from_slice(line).ok()?;
        if let Some(exception) = &mut reply.exception {
            cut(&mut exception.kind, MAX_KIND);
            cut(&mut exception.message, MAX_VALUE);
            cut(&mut exception.traceback, MAX_VALUE);
            reply.value = None;
        }
        for text in [&mut reply.value, &mut reply.error].into_iter().flatten() {
            cut(text, MAX_VALUE);
        }
        Some(reply)
    }
}

fn cut(text: &mut String, most: usize) {
    text.truncate(text.floor_char_boundary(most));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_of_a_reply_are_cut_and_what_is_no_reply_is_passed_over() {
        let long = "é".repeat(MAX_VALUE);
        let line = format!(r#"{{"id": 3, "value": "{long}"}}"#);
        let reply = Reply::parse(line.as_bytes()).unwrap();
        assert_eq!((reply.id, reply.value.unwrap().len()), (3, MAX_VALUE));
        let line = format!(
            r#"{{"id": 3, "value": "x", "exception": {{"kind": "{long}", "message": "{long}", "traceback": "t"}}}}"#
        );
        let reply = Reply::parse(line.as_bytes()).unwrap();
        let exception = reply.exception.unwrap();
        assert_eq!((reply.value, exception.kind.len(), exception.message.len()), (None, MAX_KIND, MAX_VALUE));
        for line in [&b""[..], b"null", b"3", b"{\"id\": -1}", b"{\"id\": 1, \"value\": 3}", b"\xff{}"] {
            assert_eq!(Reply::parse(line), None, "{line:?}");
        }
    }

    #[test]
    fn a_request_is_one_line() {
        let line = request_line(7, &Task::Code { code: "a\nb", limit: 9 }).unwrap();
        assert_eq!(line, b"{\"id\":7,\"code\":\"a\\nb\",\"limit\":9}\n");
        assert_eq!(request_line(8, &Task::Seed { seed: "ff" }).unwrap(), b"{\"id\":8,\"seed\":\"ff\"}\n");
    }
}
