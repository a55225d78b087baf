//! The server of a model in a guest: started, and asked until it answers.

use std::time::Duration;

use ark_types::guest::INFERENCE_PORT;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::time::{sleep, timeout};

use super::size::command;
use super::{ModelFile, ServeError};
use crate::guest::{Address, Dialled, connect, keep};

/// Revision of MCP that is spoken with the server.
const PROTOCOL: &str = "2025-11-25";
/// Between two tries.
const PAUSE: Duration = Duration::from_millis(200);
/// Longest answer, bytes.
const MAX_ANSWER: usize = 1 << 20;

/// Why one try came to nothing.
enum Miss {
    /// It may answer later.
    Yet(String),
    /// It never will.
    Wrong(String),
}

/// Has the guest at `address` serve `model`, and waits until it does, for as long as `limit`. One token is generated: a fork
/// finds all of the model in memory then.
///
/// # Errors
/// [`ServeError`]; the server may go on then.
pub(crate) async fn load(address: &Address, model: &ModelFile, limit: Duration) -> Result<(), ServeError> {
    let program = command(&model.name, model.context).exec();
    let keeping = keep(address, Some(&program)).await.map_err(ServeError::Start)?;
    let mut last = "it was not asked yet".to_owned();
    let answering = async {
        loop {
            match ask(address).await {
                Ok(()) => return Ok(()),
                Err(Miss::Wrong(why)) => return Err(ServeError::Wrong(why)),
                Err(Miss::Yet(why)) => last = why,
            }
            sleep(PAUSE).await;
        }
    };
    let answered = tokio::select! {
        ended = keeping.ended() => {
            let end = ended.map_err(ServeError::Lost)?;
            return Err(ServeError::Ended(String::from_utf8_lossy(&end.output).into_owned()));
        }
        answered = timeout(limit, answering) => answered,
    };
    answered.unwrap_or(Err(ServeError::Late { limit_s: limit.as_secs(), last }))
}

/// One conversation with the server.
async fn ask(address: &Address) -> Result<(), Miss> {
    let Dialled { stream, first, .. } =
        connect(address, INFERENCE_PORT).await.map_err(|failure| Miss::Yet(failure.to_string()))?;
    let mut peer = Peer { stream, read: first.to_vec() };
    let client = json!({ "name": "arkd", "version": env!("CARGO_PKG_VERSION") });
    let hello = json!({ "protocolVersion": PROTOCOL, "capabilities": {}, "clientInfo": client });
    // A server that ends at once has not begun to serve.
    peer.call(1, "initialize", &hello).await?;
    peer.send(&json!({ "jsonrpc": "2.0", "method": "notifications/initialized" })).await?;
    for (id, (tool, arguments)) in (2..).zip([
        ("tokenize", json!({ "text": "Hello" })),
        ("generate", json!({ "prompt": "Hello", "max_tokens": 1 })),
    ]) {
        let result = peer.call(id, "tools/call", &json!({ "name": tool, "arguments": arguments })).await?;
        if result["isError"] == json!(true) {
            return Err(Miss::Wrong(format!("{tool}: {}", excerpt(&result))));
        }
    }
    Ok(())
}

/// A server, one JSON-RPC message a line.
struct Peer {
    stream: UnixStream,
    /// What came and was not taken yet.
    read: Vec<u8>,
}

impl Peer {
    async fn send(&mut self, message: &Value) -> Result<(), Miss> {
        let line = format!("{message}\n");
        self.stream.write_all(line.as_bytes()).await.map_err(|e| Miss::Yet(e.to_string()))
    }

    /// The result of `method`.
    async fn call(&mut self, id: u64, method: &str, params: &Value) -> Result<Value, Miss> {
        let request = json!({ "jsonrpc": "2.0", "id": id, "method": method, "params": params });
        self.send(&request).await?;
        loop {
            let line = self.line().await?;
            let mut answer: Value = serde_json::from_slice(&line)
                .map_err(|e| Miss::Wrong(format!("{method}: a line is no JSON: {e}")))?;
            // Notifications may come between.
            if answer["id"] != json!(id) {
                continue;
            }
            return match answer.get_mut("result").map(Value::take) {
                Some(result) => Ok(result),
                None => Err(Miss::Wrong(format!("{method}: {}", excerpt(&answer["error"])))),
            };
        }
    }

    /// The next line, without its end.
    async fn line(&mut self) -> Result<Vec<u8>, Miss> {
        let mut searched = 0;
        loop {
            if let Some(end) = self.read.iter().skip(searched).position(|byte| *byte == b'\n') {
                let mut line: Vec<u8> = self.read.drain(..=searched + end).collect();
                line.pop();
                return Ok(line);
            }
            searched = self.read.len();
            if searched > MAX_ANSWER {
                return Err(Miss::Wrong(format!("a line has more than {MAX_ANSWER} bytes")));
            }
            match self.stream.read_buf(&mut self.read).await {
                Ok(1..) => {}
                Ok(0) => return Err(Miss::Yet("it closed the connection".to_owned())),
                Err(e) => return Err(Miss::Yet(e.to_string())),
            }
        }
    }
}

fn excerpt(value: &Value) -> String {
    value.to_string().chars().take(300).collect()
}
