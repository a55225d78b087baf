//! A connection becomes one to a program at 127.0.0.1.

mod common;

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener};
use std::thread;

use ark_types::guest::{DialRequest, ErrorCode, GuestError, Kind};
use common::Guestd;

#[test]
fn both_sides_are_passed_on_until_both_are_done() {
    let guestd = Guestd::start();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let program = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut heard = Vec::new();
        stream.read_to_end(&mut heard).unwrap();
        // It has heard the end, and still answers.
        stream.write_all(&heard).unwrap();
        heard.len()
    });
    let mut connection = guestd.ask(Kind::Dial, &DialRequest { port });
    assert_eq!(connection.recv().unwrap().unwrap().kind, Kind::Ok);
    let sent: Vec<u8> = (0..2_000_000u32).map(|n| n.to_le_bytes()[0]).collect();
    connection.send_encoded(&sent).unwrap();
    connection.stream().finish().unwrap();
    let mut back = Vec::new();
    connection.stream().read_to_end(&mut back).unwrap();
    assert_eq!(program.join().unwrap(), sent.len());
    assert!(back == sent, "{} bytes came back", back.len());
}

#[test]
fn an_end_of_either_is_one_of_both() {
    let guestd = Guestd::start();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let request = DialRequest { port: listener.local_addr().unwrap().port() };
    // The host leaves.
    let mut connection = guestd.ask(Kind::Dial, &request);
    assert_eq!(connection.recv().unwrap().unwrap().kind, Kind::Ok);
    let (mut program, _) = listener.accept().unwrap();
    drop(connection);
    assert_eq!(program.read(&mut [0; 4]).unwrap(), 0);
    drop(program);
    // The program leaves.
    let mut connection = guestd.ask(Kind::Dial, &request);
    assert_eq!(connection.recv().unwrap().unwrap().kind, Kind::Ok);
    let (program, _) = listener.accept().unwrap();
    program.shutdown(Shutdown::Both).unwrap();
    drop(program);
    assert_eq!(connection.stream().read(&mut [0; 4]).unwrap(), 0);
}

#[test]
fn a_port_where_nobody_listens_is_told() {
    let guestd = Guestd::start();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    drop(listener);
    let frame = guestd.answer(Kind::Dial, &DialRequest { port });
    assert_eq!(frame.kind, Kind::Error);
    let GuestError { code, message } = frame.parse().unwrap();
    assert_eq!(code, ErrorCode::NotListening);
    assert!(message.contains(&format!("127.0.0.1:{port}")), "{message}");
}
