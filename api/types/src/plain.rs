//! Errors in words that people read.

use std::fmt::Display;

/// What `error` says, without the error number that [`std::io::Error`] puts behind it: `No such file or directory (os error
/// 2)` helps nobody who is not writing the program.
#[must_use]
pub fn plain(error: &(impl Display + ?Sized)) -> String {
    let mut text = error.to_string();
    let numbered = text.strip_suffix(')').and_then(|rest| rest.rsplit_once(" (os error "));
    if let Some((words, number)) = numbered
        && number.parse::<i32>().is_ok()
    {
        text.truncate(words.len());
    }
    text
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[test]
    fn numbers_go_and_everything_else_stays() {
        assert_eq!(plain(&io::Error::from_raw_os_error(2)), "No such file or directory");
        assert_eq!(plain(&io::Error::from(io::ErrorKind::NotFound)), "entity not found");
        for text in ["", ")", "x (os error )", "(os error 2) x", "about (os error 2) and (more)"] {
            assert_eq!(plain(text), text);
        }
        assert_eq!(plain("IO error: Broken pipe (os error 32)"), "IO error: Broken pipe");
    }
}
