//! From a reply's bytes to its text: whole characters only, and nothing of a stop text.

/// What is left of the bytes of a reply that has not been given out.
#[derive(Debug, Default)]
pub(super) struct Output {
    /// Bytes of a character whose end has not come.
    partial: Vec<u8>,
    /// Text that may be the beginning of a stop text.
    held: String,
    stops: Vec<String>,
}

impl Output {
    pub(super) fn new(stops: Vec<String>) -> Self {
        Self { stops, ..Self::default() }
    }

    /// Takes the next bytes; the text that can be given out, and whether a stop text came.
    pub(super) fn push(&mut self, bytes: &[u8]) -> (String, bool) {
        self.partial.extend_from_slice(bytes);
        self.decode(false);
        if let Some(at) = self.stops.iter().filter_map(|s| self.held.find(s.as_str())).min() {
            self.held.truncate(at);
            return (std::mem::take(&mut self.held), true);
        }
        let keep = self.stops.iter().map(|s| overlap(&self.held, s)).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - keep);
        (std::mem::replace(&mut self.held, rest), false)
    }

    /// What was held back, when no more comes.
    pub(super) fn finish(&mut self) -> String {
        self.decode(true);
        std::mem::take(&mut self.held)
    }

    /// Moves whole characters from `partial` to `held`; bytes that are none become U+FFFD.
    fn decode(&mut self, end: bool) {
        let mut rest: &[u8] = &self.partial;
        loop {
            match std::str::from_utf8(rest) {
                Ok(text) => {
                    self.held.push_str(text);
                    rest = &[];
                }
                Err(error) => {
                    let (valid, after) = rest.split_at(error.valid_up_to());
                    self.held.push_str(&String::from_utf8_lossy(valid));
                    match error.error_len() {
                        Some(len) => {
                            self.held.push('\u{fffd}');
                            rest = after.get(len..).unwrap_or_default();
                            continue;
                        }
                        None if end => {
                            self.held.push('\u{fffd}');
                            rest = &[];
                        }
                        None => rest = after,
                    }
                }
            }
            break;
        }
        self.partial = rest.to_vec();
    }
}

/// Length in bytes of the longest end of `text` that `stop` begins with.
fn overlap(text: &str, stop: &str) -> usize {
    text.char_indices()
        .map(|(at, _)| text.len() - at)
        .find(|len| text.get(text.len() - len..).is_some_and(|end| stop.starts_with(end)))
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(stops: &[&str], pieces: &[&[u8]]) -> (Vec<String>, bool) {
        let mut output = Output::new(stops.iter().map(|s| (*s).to_owned()).collect());
        let mut texts = Vec::new();
        for piece in pieces {
            let (text, stopped) = output.push(piece);
            texts.push(text);
            if stopped {
                return (texts, true);
            }
        }
        texts.push(output.finish());
        (texts, false)
    }

    #[test]
    fn characters_are_whole() {
        let euro = "€".as_bytes();
        let (texts, _) = all(&[], &[&euro[..1], &euro[1..2], &[euro[2], b'x']]);
        assert_eq!(texts, ["", "", "€x", ""]);
    }

    #[test]
    fn bytes_that_are_no_character_are_marked() {
        assert_eq!(all(&[], &[b"a\xffb", b"\xe2\x82"]).0.concat(), "a\u{fffd}b\u{fffd}");
        assert_eq!(all(&[], &[b"\xe2", b"\x28"]).0.concat(), "\u{fffd}(");
    }

    #[test]
    fn a_stop_text_over_pieces_is_left_out() {
        let (texts, stopped) = all(&["END"], &[b"go E", b"N", b"D more"]);
        assert!(stopped);
        assert_eq!(texts, ["go ", "", ""]);
    }

    #[test]
    fn what_only_looked_like_a_stop_text_is_given() {
        let (texts, stopped) = all(&["END"], &[b"E", b"N", b"E"]);
        assert!(!stopped);
        assert_eq!(texts, ["", "", "EN", "E"]);
    }

    #[test]
    fn the_first_of_several_stop_texts_counts() {
        assert_eq!(all(&["y", "bx"], &[b"abxy"]), (vec!["a".to_owned()], true));
    }
}
