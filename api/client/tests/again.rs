//! Requests whose connection breaks: what makes something is sent once more with the same key, anything else is not.

use std::sync::{Arc, Mutex};

use ark_client::{Client, Endpoint, Error};
use ark_types::agent::CreateAgent;
use ark_types::exec::ExecRequest;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{UnixListener, UnixStream};

/// The key of every request that came, empty where there was none.
type Keys = Arc<Mutex<Vec<String>>>;

const AGENT: &str = r#"{"id":"0011223344556677","name":"a1","origin":{"from":"boot"},"image":"base","image_digest":"sha256:00",
"vcpus":1,"memory_mib":256,"state":"running","created_unix_ms":0,"auto_remove":false}"#;

fn least() -> CreateAgent {
    serde_json::from_str("{}").unwrap()
}

/// Reads the head of one request; its key.
async fn read(stream: &mut UnixStream) -> String {
    let mut head = Vec::new();
    while !head.windows(4).any(|end| end == b"\r\n\r\n") {
        let mut chunk = [0; 4096];
        let count = stream.read(&mut chunk).await.unwrap();
        assert_ne!(count, 0, "a request ends before its head does");
        head.extend_from_slice(&chunk[..count]);
    }
    let head = String::from_utf8_lossy(&head).to_lowercase();
    let key = head.lines().find_map(|line| line.strip_prefix("idempotency-key:"));
    key.map_or(String::new(), |key| key.trim().to_owned())
}

/// A client of a server that breaks the first `broken` connections off, after it has read what was asked for.
fn server(dir: &tempfile::TempDir, broken: usize) -> (Client, Keys) {
    let keys = Keys::default();
    let notes = keys.clone();
    let socket = dir.path().join("arkd.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let key = read(&mut stream).await;
            let count = {
                let mut notes = notes.lock().unwrap();
                notes.push(key);
                notes.len()
            };
            if count > broken {
                let head = format!("HTTP/1.1 201 Created\r\ncontent-length: {}\r\n", AGENT.len());
                let reply = format!("{head}content-type: application/json\r\n\r\n{AGENT}");
                stream.write_all(reply.as_bytes()).await.unwrap();
            }
        }
    });
    (Client::new(Endpoint::Unix(socket)), keys)
}

#[tokio::test]
async fn what_makes_something_is_sent_once_more_with_its_key() {
    let dir = tempfile::tempdir().unwrap();
    let (client, keys) = server(&dir, 1);
    let agent = client.create(&least()).await.unwrap();
    assert_eq!(agent.name.as_ref(), "a1");
    let sent = keys.lock().unwrap().clone();
    assert!(sent.len() == 2 && sent[0] == sent[1] && sent[0].len() == 32, "{sent:?}");
    client.create(&least()).await.unwrap();
    assert_ne!(keys.lock().unwrap()[2], sent[0], "another agent is another request");
}

#[tokio::test]
async fn nothing_is_sent_a_third_time_and_a_program_only_once() {
    let dir = tempfile::tempdir().unwrap();
    let (client, keys) = server(&dir, usize::MAX);
    assert!(matches!(client.create(&least()).await, Err(Error::Broken { .. })));
    assert_eq!(keys.lock().unwrap().len(), 2);
    let request = ExecRequest { argv: vec!["true".to_owned()], ..ExecRequest::default() };
    assert!(matches!(client.exec("a1", &request).await, Err(Error::Broken { .. })));
    let goes_with_its_program = CreateAgent { auto_remove: true, ..least() };
    assert!(matches!(client.create(&goes_with_its_program).await, Err(Error::Broken { .. })));
    assert_eq!(keys.lock().unwrap()[2..], [String::new(), String::new()]);
}
