//! Code for an evaluator, from the command line, a file or standard input.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use ark_types::eval::MAX_CODE;
use ark_types::plain::plain;

use crate::failure::Failure;

/// `text` as code, or standard input's when it is `-`.
pub(super) fn from_argument(text: &str) -> Result<String, Failure> {
    if text == "-" {
        return bounded(io::stdin().lock(), "standard input");
    }
    checked(text.to_owned())
}

/// `text`, when it is short enough.
pub(super) fn checked(text: String) -> Result<String, Failure> {
    if text.len() > MAX_CODE { Err(too_long("the code")) } else { Ok(text) }
}

fn too_long(what: &str) -> Failure {
    Failure::Usage(format!(
        "{what} is longer than the {} KiB that can be evaluated at once: copy it into an agent with `ark cp`, and have the \
         code run that file",
        MAX_CODE >> 10
    ))
}

/// The content of `path`, or standard input's when it is `-`.
pub(super) fn from_file(path: &Path) -> Result<String, Failure> {
    if path == Path::new("-") {
        return bounded(io::stdin().lock(), "standard input");
    }
    let what = path.display().to_string();
    let file = File::open(path).map_err(|e| Failure::Usage(format!("cannot read {what}: {}", plain(&e))))?;
    bounded(file, &what)
}

/// Reads code of at most [`MAX_CODE`] bytes; `what` is its origin in words.
fn bounded(source: impl Read, what: &str) -> Result<String, Failure> {
    let mut bytes = Vec::new();
    let most = u64::try_from(MAX_CODE).unwrap_or(u64::MAX);
    source
        .take(most.saturating_add(1))
        .read_to_end(&mut bytes)
        .map_err(|e| Failure::Usage(format!("cannot read {what}: {}", plain(&e))))?;
    if bytes.len() > MAX_CODE {
        return Err(too_long(what));
    }
    String::from_utf8(bytes).map_err(|_| Failure::Usage(format!("{what} is no UTF-8 text, so it is no code")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_is_text_of_a_bounded_length() {
        assert_eq!(from_argument("6*7").unwrap(), "6*7");
        assert_eq!(from_argument(&"x".repeat(MAX_CODE)).unwrap().len(), MAX_CODE);
        let long = from_argument(&"x".repeat(MAX_CODE + 1)).unwrap_err().to_string();
        assert!(long.contains("64 KiB") && long.contains("ark cp"), "{long}");
        assert!(bounded(&b"\xff"[..], "x").unwrap_err().to_string().contains("UTF-8"));
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("warm.py");
        let missing = from_file(&path).unwrap_err().to_string();
        assert!(missing.contains("warm.py: No such file"), "{missing}");
        std::fs::write(&path, "import json\n").unwrap();
        assert_eq!(from_file(&path).unwrap(), "import json\n");
    }
}
