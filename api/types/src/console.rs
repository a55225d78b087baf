//! Consoles: how they are read from any byte on, and those of agents that are gone.
//!
//! A byte of a console has an offset: how much the guest wrote before it, since the agent was made. The file keeps so much of the
//! beginning and the end; between them stands a [`note`] of what was left out, and offsets go on as if it had been there.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::agent::AgentName;
use crate::exec::Encoding;
use crate::image::ImageName;

/// The console of an agent that did not start or ended by itself, kept within the operator's limits; `GET
/// /v1/agents/{agent}/logs` serves it by the agent's id or name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct KeptConsole {
    /// The agent's id.
    pub id: String,
    /// The agent's name; a later agent may have it, too.
    pub name: AgentName,
    /// The agent's image.
    pub image: ImageName,
    /// When the agent ended, milliseconds since the Unix epoch.
    pub ended_unix_ms: u64,
    /// Why it ended, as a sentence.
    pub reason: String,
    /// Size of the console, bytes.
    pub bytes: u64,
}

/// Reply of `GET /v1/consoles`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct KeptConsoleList {
    /// Oldest first.
    pub consoles: Vec<KeptConsole>,
}

/// Bytes from the beginning that stay when a console's middle is left out.
pub const HEAD_BYTES: u64 = 256 << 10;
/// Longest [`note`].
pub const MAX_NOTE: usize = 64;
const NOTE_BEGINS: &str = "\n[console: ";
const NOTE_ENDS: &str = " bytes left out here]\n";

/// What a console's file says in the place of `left_out` bytes.
#[must_use]
pub fn note(left_out: u64) -> String {
    format!("{NOTE_BEGINS}{left_out}{NOTE_ENDS}")
}

/// How many bytes the [`note`] at the front of `bytes` stands for, and its length; none where there is none.
#[must_use]
pub fn read_note(bytes: &[u8]) -> Option<(u64, usize)> {
    let bytes = bytes.get(..MAX_NOTE).unwrap_or(bytes);
    let rest = bytes.strip_prefix(NOTE_BEGINS.as_bytes())?;
    let digits = rest.iter().take_while(|byte| byte.is_ascii_digit()).count();
    let (number, rest) = rest.split_at_checked(digits)?;
    let left_out = std::str::from_utf8(number).ok()?.parse().ok()?;
    let len = NOTE_BEGINS.len() + digits + NOTE_ENDS.len();
    rest.starts_with(NOTE_ENDS.as_bytes()).then_some((left_out, len))
}

/// A piece of a console: the data of an event `console` of `GET /v1/agents/{agent}/logs` as server-sent events. The event's id is
/// the offset behind it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ConsolePiece {
    /// Offset of its first byte.
    pub offset: u64,
    /// The bytes.
    pub data: String,
    /// How they are written: as text where they are UTF-8.
    pub encoding: Encoding,
}

/// A part of a console that the limit took: the data of an event `left_out`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ConsoleGap {
    /// Offset of its first byte.
    pub offset: u64,
    /// How many bytes there were.
    pub bytes: u64,
}

/// Nothing will follow: the data of an event `end`, the last one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ConsoleEnd {
    /// Bytes that the guest wrote in all.
    pub offset: u64,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_note_is_read_back_and_nothing_else_is_one(left_out: u64, rest: Vec<u8>) {
            let text = note(left_out);
            prop_assert!(text.len() <= MAX_NOTE);
            let bytes = [text.as_bytes(), &rest].concat();
            prop_assert_eq!(read_note(&bytes), Some((left_out, text.len())));
            prop_assert_eq!(read_note(&bytes[..text.len() - 1]), None);
            prop_assert_eq!(read_note(&rest), None);
        }
    }

    #[test]
    fn a_note_of_more_than_there_can_be_is_none() {
        assert_eq!(read_note(b"\n[console: 99999999999999999999999 bytes left out here]\n"), None);
        assert_eq!(note(7), "\n[console: 7 bytes left out here]\n", "as VMMs write it");
        assert_eq!(read_note(b"\n[console:  bytes left out here]\n"), None);
    }
}
