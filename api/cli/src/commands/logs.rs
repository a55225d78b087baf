//! `ark logs`: an agent's serial console, and those of agents that are gone.

use std::io;

use ark_client::{Client, LogPiece};
use ark_types::console::{KeptConsole, note};
use serde_json::json;
use tokio::io::AsyncWriteExt;

use super::agents::{REASON_WIDTH, explain};
use crate::args::LogsArgs;
use crate::failure::Failure;
use crate::host::Context;
use crate::output::{age, printable, size, table};

/// Longest line that is written as one JSON object; a longer one is split.
const MAX_LINE: usize = 64 << 10;

/// Copies the console to standard output; with `--json`, a JSON object `{"line": …}` for each line.
pub(crate) async fn logs(context: &Context, args: &LogsArgs) -> Result<(), Failure> {
    let client = context.client().await?;
    let Some(agent) = &args.agent else { return kept(context, &client).await };
    let mut out = Writer { lines: context.ui.json.then(Vec::new), stdout: tokio::io::stdout() };
    if args.follow {
        let mut console = match client.follow_logs(agent, args.tail).await {
            Ok(console) => console,
            Err(error) => return Err(explain(&client, error).await),
        };
        while let Some(piece) = console.next().await? {
            match piece {
                LogPiece::Bytes(bytes) => out.write(&bytes).await,
                LogPiece::LeftOut(bytes) => out.write(note(bytes).as_bytes()).await,
            }
            .map_err(Failure::Output)?;
        }
    } else {
        let mut console = match client.logs(agent, args.tail).await {
            Ok(console) => console,
            Err(error) => return Err(explain(&client, error).await),
        };
        while let Some(bytes) = console.next().await? {
            out.write(&bytes).await.map_err(Failure::Output)?;
        }
    }
    out.finish().await.map_err(Failure::Output)
}

/// `ark logs --kept`.
async fn kept(context: &Context, client: &Client) -> Result<(), Failure> {
    let list = client.consoles().await?;
    context.ui.show(&list, |list| {
        let row = |kept: &KeptConsole| {
            let reason = printable(&kept.reason).replace('\n', " ");
            [
                kept.name.to_string(),
                kept.id.clone(),
                kept.image.to_string(),
                age(kept.ended_unix_ms),
                size(kept.bytes),
                reason.chars().take(REASON_WIDTH).collect(),
            ]
        };
        let rows: Vec<_> = list.consoles.iter().map(row).collect();
        table(["NAME", "ID", "IMAGE", "ENDED", "SIZE", "REASON"], &rows)
    })
}

/// Standard output for a log, as it is or line by line.
pub(crate) struct Writer {
    /// The begun line, where lines become objects.
    pub(crate) lines: Option<Vec<u8>>,
    /// Where it goes.
    pub(crate) stdout: tokio::io::Stdout,
}

impl Writer {
    /// Takes the next bytes of the log.
    pub(crate) async fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        let text = match &mut self.lines {
            None => bytes.to_vec(),
            Some(begun) => objects(begun, bytes),
        };
        self.stdout.write_all(&text).await?;
        self.stdout.flush().await
    }

    /// Writes a last line without an end.
    pub(crate) async fn finish(mut self) -> io::Result<()> {
        match self.lines.as_ref() {
            Some(begun) if !begun.is_empty() => self.write(b"\n").await,
            _ => Ok(()),
        }
    }
}

/// The whole lines of what has come, as JSON objects; the rest stays in `begun`.
fn objects(begun: &mut Vec<u8>, bytes: &[u8]) -> Vec<u8> {
    let mut text = Vec::new();
    for piece in bytes.split_inclusive(|b| *b == b'\n').flat_map(|line| line.chunks(MAX_LINE)) {
        begun.extend_from_slice(piece);
        if piece.ends_with(b"\n") || begun.len() >= MAX_LINE {
            let line = String::from_utf8_lossy(begun);
            let object = json!({ "line": line.trim_end_matches(['\r', '\n']) });
            text.extend_from_slice(object.to_string().as_bytes());
            text.push(b'\n');
            begun.clear();
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_become_objects_whatever_the_pieces() {
        let mut begun = Vec::new();
        assert_eq!(objects(&mut begun, b"on"), b"");
        assert_eq!(objects(&mut begun, b"e\r\n\ntw"), b"{\"line\":\"one\"}\n{\"line\":\"\"}\n");
        assert_eq!(begun, b"tw");
        let long = objects(&mut Vec::new(), &vec![b'x'; 3 * MAX_LINE]);
        assert_eq!(long.iter().filter(|b| **b == b'\n').count(), 3, "a line without an end does not pile up");
    }
}
