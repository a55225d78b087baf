//! What `ark` says to QEMU's monitor (QMP: docs/interop/qmp-spec in QEMU's source).

use std::io;
use std::path::Path;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;

/// Most bytes of QEMU's greeting and answers that are read.
const MAX_TALK: u64 = 1 << 20;
/// What every processor does, in QEMU's words.
const REGISTERS: &str =
    r#"{"execute":"human-monitor-command","arguments":{"command-line":"info registers -a"}}"#;

/// Asks QEMU to end at once, disks flushed. The caller bounds the time.
pub(crate) async fn quit(socket: &Path) -> io::Result<()> {
    say(socket, &[r#"{"execute":"quit"}"#]).await.map(drop)
}

/// The registers of every processor, twice, so that one can see which of them stand still. The caller bounds the time.
pub(crate) async fn registers(socket: &Path) -> io::Result<String> {
    let answers = say(socket, &[REGISTERS, REGISTERS]).await?;
    let texts = answers.iter().filter_map(|line| {
        let answer: serde_json::Value = serde_json::from_str(line).ok()?;
        Some(answer["return"].as_str()?.to_owned())
    });
    Ok(texts.collect())
}

/// Says the commands one after the other and returns an answer's line to each, or to those before QEMU closed the connection.
async fn say(socket: &Path, commands: &[&str]) -> io::Result<Vec<String>> {
    let (read, mut write) = UnixStream::connect(socket).await?.into_split();
    let mut lines = BufReader::new(read.take(MAX_TALK)).lines();
    let mut answers = Vec::new();
    // The greeting; then the capabilities command leaves negotiation mode, and only then are others taken.
    lines.next_line().await?;
    for command in [r#"{"execute":"qmp_capabilities"}"#].iter().chain(commands) {
        write.write_all(format!("{command}\n").as_bytes()).await?;
        loop {
            match lines.next_line().await {
                Ok(Some(event)) if event.contains("\"event\":") => {}
                Ok(Some(answer)) => break answers.push(answer),
                // QEMU closes the connection, or cuts it, when it quits.
                Ok(None) | Err(_) => return Ok(answers),
            }
        }
    }
    Ok(answers)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn it_waits_for_the_greeting_and_for_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qmp");
        let listener = tokio::net::UnixListener::bind(&path).unwrap();
        let qemu = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            stream.write_all(b"{\"QMP\":{}}\n").await.unwrap();
            let mut said = String::new();
            let mut reader = BufReader::new(&mut stream);
            while !said.contains("\"quit\"") {
                reader.read_line(&mut said).await.unwrap();
            }
            stream.write_all(b"{\"return\":{}}\n{\"return\":{}}\n").await.unwrap();
            said
        });
        tokio::time::timeout(std::time::Duration::from_secs(5), quit(&path)).await.unwrap().unwrap();
        assert!(qemu.await.unwrap().starts_with("{\"execute\":\"qmp_capabilities\"}\n"));
        assert!(quit(&dir.path().join("none")).await.is_err());
    }
}
