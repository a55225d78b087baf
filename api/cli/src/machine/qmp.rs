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
    use std::time::Duration;

    use tokio::io::AsyncWrite;
    use tokio::net::UnixListener;

    use super::*;

    async fn tell(stream: &mut (impl AsyncWrite + Unpin), line: &str) {
        stream.write_all(format!("{line}\n").as_bytes()).await.unwrap();
    }

    /// A monitor that answers every command, with an event before each answer, until it is told to quit.
    async fn monitor(listener: UnixListener) -> Vec<String> {
        let (read, mut write) = listener.accept().await.unwrap().0.into_split();
        let mut lines = BufReader::new(read).lines();
        tell(&mut write, r#"{"QMP":{}}"#).await;
        let mut said = Vec::new();
        while let Some(line) = lines.next_line().await.unwrap() {
            tell(&mut write, r#"{"event":"RTC_CHANGE"}"#).await;
            let info = line.contains("info registers");
            tell(&mut write, if info { r#"{"return":"RIP=1\n"}"# } else { r#"{"return":{}}"# }).await;
            let quit = line.contains("\"quit\"");
            said.push(line);
            if quit {
                break;
            }
        }
        said
    }

    #[tokio::test]
    async fn it_leaves_negotiation_first_and_waits_for_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qmp");
        let qemu = tokio::spawn(monitor(UnixListener::bind(&path).unwrap()));
        tokio::time::timeout(Duration::from_secs(5), quit(&path)).await.unwrap().unwrap();
        assert_eq!(qemu.await.unwrap(), [r#"{"execute":"qmp_capabilities"}"#, r#"{"execute":"quit"}"#]);
        assert!(quit(&dir.path().join("none")).await.is_err());
    }

    #[tokio::test]
    async fn registers_come_twice_and_without_what_else_qemu_says() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qmp");
        let _qemu = tokio::spawn(monitor(UnixListener::bind(&path).unwrap()));
        let said = tokio::time::timeout(Duration::from_secs(5), registers(&path)).await.unwrap().unwrap();
        assert_eq!(said, "RIP=1\nRIP=1\n");
    }
}
