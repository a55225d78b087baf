//! `/mcp` against what the makers of MCP test servers with. The VMs' server is a fake.

use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::net::{TcpListener, UnixStream};
use tokio::process::Command;

use crate::harness::Place;
use crate::inference::serving;

/// Names the directory of the clients; `make mcp-peers` sets it.
const PEERS: &str = "ARK_MCP_PEERS";
/// What the suite is to find, and why.
const EXPECTED: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/mcp-peers/expected.yml");
/// Revisions of the protocol: the last with sessions, and the first without.
const REVISIONS: [&str; 2] = ["2025-11-25", "2026-07-28"];
/// When the suite hangs; it takes seconds.
const LIMIT: Duration = Duration::from_secs(300);

/// A port of the loopback whose connections end at `socket`: the suite knows no Unix sockets, and has no token to show.
async fn forwarded(socket: PathBuf) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            let mut server = UnixStream::connect(&socket).await.unwrap();
            tokio::spawn(async move { tokio::io::copy_bidirectional(&mut client, &mut server).await });
        }
    });
    port
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a package of npm: `make mcp-peers` runs it"]
async fn the_suite_of_its_makers_finds_only_what_is_expected() {
    let peers =
        std::env::var_os(PEERS).expect("ARK_MCP_PEERS names the clients' directory; run `make mcp-peers`");
    let peers = Path::new(&peers);
    let place = Place::new();
    let ark = serving(&place, place.config(), 1).await;
    let port = forwarded(place.run().api_socket()).await;
    for revision in REVISIONS {
        let mut suite = Command::new(peers.join("node"))
            .arg(peers.join("node_modules/.bin/conformance"))
            .args(["server", "--url", &format!("http://127.0.0.1:{port}/mcp"), "--requirements", revision])
            .args(["--expected-failures", EXPECTED])
            .current_dir(place.dir.path())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let status = tokio::time::timeout(LIMIT, suite.wait()).await.expect("it ends").unwrap();
        assert!(status.success(), "{revision}: what it printed above is not as expected.yml says");
    }
    ark.daemon.shut_down().await;
    assert_eq!(place.agent_dirs(), 0);
}
