//! The one word `ark` says to QEMU's monitor (QMP: docs/interop/qmp-spec in QEMU's source): `quit`.

use std::io;
use std::path::Path;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;

/// Most bytes of QEMU's greeting and answers that are read.
const MAX_TALK: u64 = 64 << 10;

/// Asks QEMU to end at once, disks flushed. The caller bounds the time.
pub(crate) async fn quit(socket: &Path) -> io::Result<()> {
    let (read, mut write) = UnixStream::connect(socket).await?.into_split();
    let mut lines = BufReader::new(read.take(MAX_TALK)).lines();
    // The greeting; then the capabilities command leaves negotiation mode, and only then are others taken.
    lines.next_line().await?;
    write.write_all(b"{\"execute\":\"qmp_capabilities\"}\n{\"execute\":\"quit\"}\n").await?;
    // Until QEMU has closed the connection, or cut it: it quits either way.
    while let Ok(Some(_)) = lines.next_line().await {}
    Ok(())
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
