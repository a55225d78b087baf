//! What users see: tables, ages, sizes, colours, JSON.

use std::io::{self, IsTerminal, Write};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;
use serde_json::json;

use crate::failure::Failure;

/// Where output goes and how it looks, decided once.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ui {
    /// Results as JSON.
    pub(crate) json: bool,
    /// Standard error is a terminal and `--json` was not asked for: progress and notes are welcome.
    pub(crate) progress: bool,
    /// Standard output takes colours.
    colour: bool,
}

/// A colour, as the parameter of ECMA-48's SGR sequence.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Colour {
    /// Something is wrong.
    Red = 31,
    /// All is well.
    Green = 32,
    /// Worth a look.
    Yellow = 33,
}

impl Ui {
    /// Looks at the terminal and at `NO_COLOR` (<https://no-color.org>).
    pub(crate) fn new(json: bool) -> Self {
        let colour = io::stdout().is_terminal() && colours_wanted();
        Self { json, progress: !json && io::stderr().is_terminal(), colour: colour && !json }
    }

    /// `text` in `colour` where standard output shows colours.
    pub(crate) fn paint(self, colour: Colour, text: &str) -> String {
        if self.colour { format!("\x1b[{}m{text}\x1b[0m", colour as u8) } else { text.to_owned() }
    }

    /// Writes a result: `value` as one line of JSON with `--json`, else what `human` makes of it.
    pub(crate) fn show<T: Serialize>(
        self,
        value: &T,
        human: impl FnOnce(&T) -> String,
    ) -> Result<(), Failure> {
        let mut text = if self.json {
            serde_json::to_string(value).map_err(|e| Failure::Output(e.into()))?
        } else {
            human(value)
        };
        if !text.is_empty() && !text.ends_with('\n') {
            text.push('\n');
        }
        let mut out = io::stdout().lock();
        out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(Failure::Output)
    }

    /// Writes the names of what was removed.
    pub(crate) fn show_removed(self, names: &[&String]) -> Result<(), Failure> {
        self.show(&json!({ "removed": names }), |_| names.iter().map(|name| format!("{name}\n")).collect())
    }

    /// Writes a line for the user to standard error, unless it is to be for machines.
    pub(crate) fn note(self, text: &str) {
        if !self.json {
            // A closed standard error is no reason to fail.
            let _ = writeln!(io::stderr(), "ark: {text}");
        }
    }
}

fn colours_wanted() -> bool {
    let set = |name: &str| std::env::var_os(name).is_some_and(|v| !v.is_empty());
    !set("NO_COLOR") && std::env::var_os("TERM").is_none_or(|t| t != "dumb")
}

/// `text` for a terminal: what could move the cursor or change colours is shown as an escape, so that a guest cannot
/// write over the user's screen with a file's name or an error message.
pub(crate) fn printable(text: &str) -> String {
    text.chars()
        .flat_map(|c| {
            let harmless = !c.is_control() || c == '\n';
            let (plain, escaped) = if harmless { (Some(c), None) } else { (None, Some(c.escape_default())) };
            plain.into_iter().chain(escaped.into_iter().flatten())
        })
        .collect()
}

/// Prints a message of ark to standard error, red on a terminal.
pub(crate) fn print_error(message: &str) {
    let mut err = io::stderr().lock();
    let prefix = if err.is_terminal() && colours_wanted() { "\x1b[31mark:\x1b[0m" } else { "ark:" };
    let _ = writeln!(err, "{prefix} {}", printable(message));
}

/// Rows under headings, columns as wide as their widest cell, two spaces apart, no trailing blanks.
pub(crate) fn table<const N: usize>(headings: [&str; N], rows: &[[String; N]]) -> String {
    let mut widths = headings.map(width);
    for row in rows {
        for (widest, cell) in widths.iter_mut().zip(row) {
            *widest = (*widest).max(width(cell));
        }
    }
    let mut text = line(headings.iter().copied(), &widths);
    for row in rows {
        text.push_str(&line(row.iter().map(String::as_str), &widths));
    }
    text
}

fn line<'a>(cells: impl Iterator<Item = &'a str>, widths: &[usize]) -> String {
    let mut text = String::new();
    for (cell, widest) in cells.zip(widths) {
        text.push_str(cell);
        text.push_str(&" ".repeat(widest.saturating_sub(width(cell)) + 2));
    }
    text.truncate(text.trim_end().len());
    text.push('\n');
    text
}

/// `text` on lines of at most `columns` characters, broken between words, every line after the first behind `indent` blanks.
/// A longer word, a path for example, stays whole.
pub(crate) fn wrapped(text: &str, columns: usize, indent: usize) -> String {
    let mut lines = String::new();
    let mut column = indent;
    for word in text.split_whitespace() {
        let wide = word.chars().count();
        if column > indent && column + 1 + wide > columns {
            lines.push('\n');
            lines.push_str(&" ".repeat(indent));
            column = indent;
        } else if column > indent {
            lines.push(' ');
            column += 1;
        }
        lines.push_str(word);
        column += wide;
    }
    lines
}

/// Characters of a cell on the screen, colours not counted.
fn width(cell: &str) -> usize {
    let mut count = 0;
    let mut in_escape = false;
    for c in cell.chars() {
        match c {
            '\x1b' => in_escape = true,
            'm' if in_escape => in_escape = false,
            _ if in_escape => {}
            _ => count += 1,
        }
    }
    count
}

/// Bytes with a binary unit: `0 B`, `1.5 KiB`, `37 MiB`.
pub(crate) fn size(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    // Four digits of a unit at most are shown, so precision beyond f64 does not matter.
    let mut value = bytes as f64;
    let mut unit = "B";
    for name in UNITS {
        unit = name;
        // 1023.95 would be shown as 1024.0
        if value < 1023.5 || name == "TiB" {
            break;
        }
        value /= 1024.0;
    }
    if unit == "B" || value >= 9.95 { format!("{value:.0} {unit}") } else { format!("{value:.1} {unit}") }
}

/// A span of milliseconds in its largest unit: `850 ms`, `12 s`, `3 min`, `5 h`, `2 d`.
pub(crate) fn span(millis: u64) -> String {
    match millis {
        0..1_000 => format!("{millis} ms"),
        1_000..120_000 => format!("{} s", millis / 1_000),
        120_000..7_200_000 => format!("{} min", millis / 60_000),
        7_200_000..172_800_000 => format!("{} h", millis / 3_600_000),
        _ => format!("{} d", millis / 86_400_000),
    }
}

/// A span of microseconds: `850 µs`, `1.2 ms`, and like [`span`] from 10 ms on.
pub(crate) fn micros(micros: u64) -> String {
    match micros {
        0..1_000 => format!("{micros} µs"),
        1_000..10_000 => format!("{}.{} ms", micros / 1_000, micros % 1_000 / 100),
        _ => span(micros / 1_000),
    }
}

/// How long ago `unix_ms` was; clocks that disagree give zero.
pub(crate) fn age(unix_ms: u64) -> String {
    span(now_unix_ms().saturating_sub(unix_ms))
}

/// Milliseconds since the Unix epoch.
pub(crate) fn now_unix_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}

/// The last `count` lines of `text`, indented for quoting under an error.
pub(crate) fn tail(text: &str, count: usize) -> String {
    let lines: Vec<&str> = text.lines().filter(|l| !l.trim().is_empty()).collect();
    let from = lines.len().saturating_sub(count);
    lines.get(from..).unwrap_or_default().iter().map(|l| format!("\n  {}", l.trim_end())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_line_up_whatever_the_cells_hold() {
        let rows = [
            ["a1".to_owned(), "\x1b[32mrunning\x1b[0m".to_owned(), "2 min".to_owned()],
            ["längerer-name".to_owned(), "failed".to_owned(), String::new()],
        ];
        let golden = "\
NAME           STATE    AGE
a1             \x1b[32mrunning\x1b[0m  2 min
längerer-name  failed
";
        assert_eq!(table(["NAME", "STATE", "AGE"], &rows), golden);
        assert_eq!(table(["NAME", "STATE", "AGE"], &[]), "NAME  STATE  AGE\n");
    }

    #[test]
    fn long_text_is_broken_between_words() {
        assert_eq!(wrapped("one two  three", 9, 2), "one two\n  three");
        assert_eq!(wrapped("one two", 10, 2), "one two");
        assert_eq!(wrapped("/a/long/path and more", 8, 4), "/a/long/path\n    and\n    more");
        assert_eq!(wrapped("", 8, 4), "");
    }

    #[test]
    fn sizes_and_spans_read_well() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (1536, "1.5 KiB"),
            (1_048_575, "1.0 MiB"),
            (39_000_000, "37 MiB"),
            (8 << 30, "8.0 GiB"),
            (u64::MAX, "16777216 TiB"),
        ] {
            assert_eq!(size(bytes), text);
        }
        for (millis, text) in [
            (0, "0 ms"),
            (999, "999 ms"),
            (59_999, "59 s"),
            (119_999, "119 s"),
            (120_000, "2 min"),
            (7_199_999, "119 min"),
            (7_200_000, "2 h"),
            (172_800_000, "2 d"),
        ] {
            assert_eq!(span(millis), text);
        }
    }

    #[test]
    fn short_spans_keep_a_digit() {
        for (us, text) in [
            (0, "0 µs"),
            (999, "999 µs"),
            (1_250, "1.2 ms"),
            (9_999, "9.9 ms"),
            (10_000, "10 ms"),
            (2_500_000, "2 s"),
        ] {
            assert_eq!(micros(us), text);
        }
    }

    #[test]
    fn a_guest_cannot_write_over_the_screen() {
        assert_eq!(printable("a\x1b[2Jb\r\nc\u{9b}"), "a\\u{1b}[2Jb\\r\nc\\u{9b}");
    }

    #[test]
    fn the_tail_of_a_log_is_quoted_without_blank_lines() {
        assert_eq!(tail("one\n\ntwo  \nthree\n", 2), "\n  two\n  three");
        assert_eq!(tail("", 5), "");
    }
}
