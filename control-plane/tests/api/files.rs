//! Files up and down.

use ark_types::files::{FileList, FileStat};
use ark_types::problem::ProblemKind;
use bytes::Bytes;
use http_body_util::BodyExt as _;
use hyper::{Method, StatusCode};

use crate::harness::Place;

#[tokio::test]
async fn files_of_all_sizes_go_up_and_come_down() {
    let place = Place::new();
    let ark = place.start().await;
    ark.client.create("a1", "base").await;
    for size in [0, 1, 300_000, 20 << 20] {
        let content: Bytes = (0..size).map(|n| u8::try_from(n % 251).unwrap()).collect::<Vec<_>>().into();
        let path = place.path("a file & more");
        let encoded = path.to_str().unwrap().replace(' ', "%20").replace('&', "%26");
        let up = format!("/v1/agents/a1/files?path={encoded}&mode=750");
        assert_eq!(ark.client.ask(Method::PUT, &up, content.clone()).await.status(), StatusCode::NO_CONTENT);
        let down = ark.client.get(&format!("/v1/agents/a1/files?path={encoded}")).await;
        assert!(down.body == content, "{size} bytes came down changed");
        assert_eq!(down.response.headers()["content-length"], size.to_string());
        assert_eq!(down.response.headers()["x-ark-mode"], "750");
        let stat: FileStat = ark.client.get(&format!("/v1/agents/a1/files/stat?path={encoded}")).await.json();
        assert_eq!((stat.size, stat.mode), (size, 0o750));
    }
    let dir = place.dir.path().to_str().unwrap();
    let list: FileList = ark.client.get(&format!("/v1/agents/a1/files/list?path={dir}")).await.json();
    let names: Vec<_> = list.entries.iter().map(|entry| entry.name.as_str()).collect();
    assert_eq!(names, ["a file & more", "assets", "run", "state"]);
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn files_whose_size_the_kernel_hides_come_down_whole() {
    let place = Place::new();
    let ark = place.start().await;
    ark.client.create("a1", "base").await;
    let down = ark.client.get("/v1/agents/a1/files?path=/proc/cpuinfo").await;
    assert!(!down.response.headers().contains_key("content-length"));
    assert!(down.body.starts_with(b"processor"));
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn what_cannot_be_is_refused() {
    let place = Place::new();
    let ark = place.start().await;
    ark.client.create("a1", "base").await;
    let client = &ark.client;
    client.get("/v1/agents/a1/files?path=/no/such").await.problem(ProblemKind::FileNotFound);
    client.get("/v1/agents/a1/files/stat?path=/no/such").await.problem(ProblemKind::FileNotFound);
    client.get("/v1/agents/a1/files?path=relative").await.problem(ProblemKind::InvalidValue);
    client.get("/v1/agents/a1/files").await.problem(ProblemKind::BadRequest);
    let bad_mode = client.ask(Method::PUT, "/v1/agents/a1/files?path=/tmp/x&mode=rw", "").await;
    bad_mode.problem(ProblemKind::InvalidValue);
    // The guest refuses before it has read all; the client still gets to read why.
    let full = client.ask(Method::PUT, "/v1/agents/a1/files?path=/full/x", vec![0; 8 << 20]).await;
    assert!(full.problem(ProblemKind::FileError).detail.contains("no space left"));
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn a_file_that_comes_short_breaks_the_download_off() {
    let place = Place::new();
    let ark = place.start().await;
    ark.client.create("a1", "shrinks").await;
    let request = ark.client.request(Method::GET, "/v1/agents/a1/files?path=/x", "");
    // The reply may break before or after its head went out; what must not come is a whole one.
    if let Ok(response) = ark.client.try_send(request).await {
        assert_eq!(response.headers()["content-length"], "10");
        assert!(response.into_body().collect().await.is_err());
    }
    ark.daemon.shut_down().await;
}

#[tokio::test]
async fn an_upload_that_breaks_leaves_nothing() {
    use tokio::io::AsyncWriteExt as _;
    let place = Place::new();
    let ark = place.start().await;
    ark.client.create("a1", "base").await;
    let path = place.path("half");
    let mut stream = ark.client.connect().await;
    let head = format!(
        "PUT /v1/agents/a1/files?path={} HTTP/1.1\r\nhost: ark\r\ncontent-length: 1000\r\n\r\nonly this",
        path.display()
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    let part = place.path("half.part");
    crate::harness::eventually("the upload begins", async || part.exists()).await;
    drop(stream);
    crate::harness::eventually("the part is removed", async || !part.exists()).await;
    assert!(!path.exists());
    ark.daemon.shut_down().await;
}
