//! The server of a model in the fake guest: it says hello, counts letters, and generates nothing.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;

use ark_types::guest::ErrorCode;
use serde_json::{Value, json};

use super::Machine;

/// What it is called.
pub(super) const PROGRAM: &str = "ark-inference";
/// How a connection to it begins.
pub(super) const CONNECT: &[u8; 13] = b"CONNECT 1030\n";

/// A process that lives as long as the server would. Its model is the second disk, and its image has to be one that has it.
pub(super) fn start(argv: &[String], machine: &Machine) -> Result<Vec<String>, (ErrorCode, String)> {
    let mut memory = machine.memory.lock().unwrap();
    if !memory.script.starts_with("inference") {
        return Err((ErrorCode::ProgramNotFound, format!("there is no program {PROGRAM}")));
    }
    let (name, path) = argv[2].split_once('=').unwrap();
    assert_eq!((argv[1].as_str(), path, argv[3].as_str()), ("--model", "/dev/vdb", "--vsock"));
    let fails = |why: &str| vec!["/bin/sh".to_owned(), "-c".to_owned(), format!("echo '{why}' >&2; exit 1")];
    let Some(disk) = machine.disks.get(1) else { return Ok(fails("/dev/vdb: no such file")) };
    assert!(disk.read_only, "a model is not written to");
    if memory.script == "inference-fails" {
        return Ok(fails("llama.cpp cannot load the model"));
    }
    // As it is on the disk that the VMM was given.
    assert!(std::fs::read(&disk.path).unwrap().starts_with(b"GGUF"));
    memory.serves = Some(name.to_owned());
    Ok(vec!["/bin/sleep".to_owned(), "1000".to_owned()])
}

/// One connection.
pub(super) fn serve(mut stream: UnixStream, machine: &Machine) {
    let Some(model) = machine.memory.lock().unwrap().serves.clone() else { return };
    stream.write_all(b"OK 1073741824\n").unwrap();
    for line in BufReader::new(stream.try_clone().unwrap()).lines() {
        let Ok(line) = line else { return };
        let request: Value = serde_json::from_str(&line).unwrap();
        let Some(id) = request.get("id") else { continue };
        let arguments = &request["params"]["arguments"];
        let result = match (request["method"].as_str().unwrap(), request["params"]["name"].as_str()) {
            ("initialize", _) => json!({ "protocolVersion": request["params"]["protocolVersion"] }),
            ("tools/call", Some("tokenize")) => {
                let count = arguments["text"].as_str().unwrap().len();
                json!({ "structuredContent": { "model": model, "count": count } })
            }
            ("tools/call", Some("generate")) => {
                assert_eq!(arguments["max_tokens"], 1);
                json!({ "structuredContent": { "model": model, "text": "" } })
            }
            other => panic!("{other:?}"),
        };
        // A notification may come before any answer.
        let told = json!({ "jsonrpc": "2.0", "method": "notifications/progress", "params": {} });
        let answer = json!({ "jsonrpc": "2.0", "id": id, "result": result });
        if stream.write_all(format!("{told}\n{answer}\n").as_bytes()).is_err() {
            return;
        }
    }
}
