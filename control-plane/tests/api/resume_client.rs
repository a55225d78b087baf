//! The client library over a proxy that breaks its connections: programs and consoles go on as if nothing had been.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use ark_client::{Client, Endpoint, Error, ExecEvent, LogPiece};
use ark_types::exec::{ExecRequest, ExitStatus};
use ark_types::layout::AgentDir;
use sha2::Digest as _;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;

use crate::harness::{Ark, Place, eventually, runs};

/// A way to `arkd` whose connections break after so many bytes of the reply, as long as there are breaks left.
struct Proxy {
    address: SocketAddr,
    breaks: Arc<AtomicUsize>,
    /// Breaks every connection there is.
    storm: CancellationToken,
}

impl Proxy {
    async fn start(arkd: SocketAddr, breaks: usize, size: usize) -> Self {
        let listener = TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], 0))).await.unwrap();
        let address = listener.local_addr().unwrap();
        let breaks = Arc::new(AtomicUsize::new(breaks));
        let storm = CancellationToken::new();
        let (left, all) = (Arc::clone(&breaks), storm.clone());
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let (left, all) = (Arc::clone(&left), all.child_token());
                tokio::spawn(async move {
                    let passes = pass(client, TcpStream::connect(arkd).await.unwrap(), &left, size);
                    let _ = all.run_until_cancelled(passes).await;
                });
            }
        });
        Self { address, breaks, storm }
    }
}

async fn pass(client: TcpStream, arkd: TcpStream, breaks: &AtomicUsize, size: usize) {
    let ((mut from_client, mut to_client), (mut from_arkd, mut to_arkd)) =
        (client.into_split(), arkd.into_split());
    let there = async { tokio::io::copy(&mut from_client, &mut to_arkd).await.map(drop) };
    let back = async {
        let (mut buffer, mut passed) = (vec![0; 16 << 10], 0);
        loop {
            let count = from_arkd.read(&mut buffer).await?;
            if count == 0 {
                return Ok(());
            }
            to_client.write_all(&buffer[..count]).await?;
            passed += count;
            let breaks =
                || breaks.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1));
            if passed >= size && breaks().is_ok() {
                return Ok::<(), std::io::Error>(());
            }
        }
    };
    tokio::select! { _ = there => {}, _ = back => {} }
}

async fn over_tcp(place: &Place) -> (Ark, SocketAddr, String) {
    let mut config = place.config();
    config.listen = Some(SocketAddr::from(([127, 0, 0, 1], 0)));
    let ark = place.start_with(config).await;
    let address = ark.daemon.tcp_address().unwrap();
    let token = std::fs::read_to_string(place.path("state/token")).unwrap().trim().to_owned();
    (ark, address, token)
}

#[tokio::test]
async fn a_program_does_not_notice_that_its_clients_connections_break() {
    let place = Place::new();
    let (ark, arkd, token) = over_tcp(&place).await;
    ark.client.create("a1", "base").await;
    let proxy = Proxy::start(arkd, 12, 500_000).await;
    let client = Client::new(Endpoint::Tcp { address: proxy.address.to_string(), token });
    let request = ExecRequest { argv: vec!["cat".into()], resumable: true, ..ExecRequest::default() };
    let mut program = client.exec_stream("a1", &request).await.unwrap();
    let sent: Vec<u8> = (0..8u32 << 18).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    let expected = sha2::Sha256::digest(&sent);
    let feeding = tokio::spawn(async move {
        for chunk in sent.chunks(50_000) {
            program.input.stdin(chunk).await.unwrap();
        }
        program.input.close_stdin().await.unwrap();
        program.input
    });
    let mut came = sha2::Sha256::new();
    let end = loop {
        match program.output.next().await.unwrap() {
            ExecEvent::Started(_) => {}
            ExecEvent::Stdout(bytes) => came.update(&bytes),
            ExecEvent::Stderr(bytes) => panic!("{bytes:?}"),
            ExecEvent::Exited(end) => break end,
        }
    };
    assert_eq!(end.status, ExitStatus::Exited { code: 0 });
    assert_eq!(came.finalize(), expected);
    assert_eq!(proxy.breaks.load(Ordering::SeqCst), 0, "every break came");
    drop(feeding.await.unwrap());
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn a_stream_that_is_left_ends_its_program_and_a_dead_arkd_is_told() {
    let place = Place::new();
    let (ark, arkd, token) = over_tcp(&place).await;
    ark.client.create("a1", "base").await;
    let proxy = Proxy::start(arkd, 0, 0).await;
    let client = Client::new(Endpoint::Tcp { address: proxy.address.to_string(), token });
    let request =
        ExecRequest { argv: vec!["sleep".into(), "1000".into()], resumable: true, ..ExecRequest::default() };
    let start = async || {
        let mut program = client.exec_stream("a1", &request).await.unwrap();
        let ExecEvent::Started(pid) = program.output.next().await.unwrap() else { panic!("it began") };
        (program, pid)
    };
    let (program, pid) = start().await;
    program.output.leave().await;
    eventually("it is gone", async || !runs(pid)).await;

    // Its session ends while nobody can reach it.
    let (mut program, pid) = start().await;
    drop(client);
    proxy.storm.cancel();
    let Error::Ended(_) = program.output.next().await.unwrap_err() else { panic!("it is told") };
    eventually("it is gone", async || !runs(pid)).await;
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn a_console_is_followed_over_connections_that_break() {
    let place = Place::new();
    let (ark, arkd, token) = over_tcp(&place).await;
    let agent = ark.client.create("a1", "base").await;
    let path = AgentDir(place.run().agents().join(&agent.id)).console();
    let proxy = Proxy::start(arkd, 5, 100_000).await;
    let client = Client::new(Endpoint::Tcp { address: proxy.address.to_string(), token });
    let mut console = client.follow_logs("a1", None).await.unwrap();
    let mut expected = std::fs::read(&path).unwrap();
    let more: Vec<u8> = (0..200_000u32).flat_map(|n| [(n % 251) as u8, b'\n']).collect();
    std::io::Write::write_all(&mut std::fs::OpenOptions::new().append(true).open(&path).unwrap(), &more)
        .unwrap();
    expected.extend_from_slice(&more);
    let mut came = Vec::new();
    while came.len() < expected.len() {
        match console.next().await.unwrap().unwrap() {
            LogPiece::Bytes(bytes) => came.extend_from_slice(&bytes),
            LogPiece::LeftOut(bytes) => panic!("{bytes} bytes are left out"),
        }
    }
    assert!(came == expected, "{} bytes of {}", came.len(), expected.len());
    assert_eq!(ark.client.delete("/v1/agents/a1").await.status(), hyper::StatusCode::NO_CONTENT);
    assert_eq!(console.next().await.unwrap(), None);
    ark.daemon.shut_down().await;
}
