//! Errors in words that people read.

use std::fmt::Display;

/// What `error` says, without the error numbers that [`std::io::Error`] puts behind its words: `No such file or directory (os
/// error 2)` helps nobody who is not writing the program.
#[must_use]
pub fn plain(error: &(impl Display + ?Sized)) -> String {
    const MARK: &str = " (os error ";
    let text = error.to_string();
    let mut parts = text.split(MARK);
    let mut words = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        match part.split_once(')') {
            Some((number, rest)) if number.parse::<i32>().is_ok() => words.push_str(rest),
            _ => words.extend([MARK, part]),
        }
    }
    words
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[test]
    fn numbers_go_and_everything_else_stays() {
        assert_eq!(plain(&io::Error::from_raw_os_error(2)), "No such file or directory");
        assert_eq!(plain(&io::Error::from(io::ErrorKind::NotFound)), "entity not found");
        for text in ["", ")", "x (os error )", "(os error 2) x", "x (os error 2", "x (os error two)"] {
            assert_eq!(plain(text), text);
        }
        assert_eq!(plain("a (os error 32), b (os error -1); c"), "a, b; c");
    }
}
