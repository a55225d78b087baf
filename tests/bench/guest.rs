//! A guest's control port, over our hybrid vsock (a Unix socket) or the host's own AF_VSOCK (QEMU with vhost).

use std::io::{Read, Write};
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use ark_types::exec::{ExecEnd, ExecRequest};
use ark_types::guest::{CONTROL_PORT, Decoder, Frame, Kind, Renew};
use nix::sys::socket::sockopt::ReceiveTimeout;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, VsockAddr, connect, setsockopt, socket};
use nix::sys::time::{TimeVal, TimeValLike};

/// How to reach a guest.
#[derive(Clone, Debug)]
pub(crate) enum Address {
    /// Hybrid vsock: the VMM's Unix socket.
    Hybrid(PathBuf),
    /// The host kernel's vsock.
    Kernel { cid: u32 },
}

impl Address {
    /// A stream to `port` of the guest, or why there is none.
    pub(crate) fn connect(&self, port: u32) -> std::io::Result<std::fs::File> {
        match self {
            Self::Hybrid(path) => {
                let mut stream = UnixStream::connect(path)?;
                writeln!(stream, "CONNECT {port}")?;
                let mut byte = [0u8];
                loop {
                    stream.read_exact(&mut byte)?;
                    if byte == *b"\n" {
                        break;
                    }
                }
                Ok(std::fs::File::from(OwnedFd::from(stream)))
            }
            Self::Kernel { cid } => {
                let fd = socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
                connect(std::os::fd::AsRawFd::as_raw_fd(&fd), &VsockAddr::new(*cid, port))?;
                // SAFETY: the descriptor was just made by `socket` and is handed over whole.
                Ok(unsafe { std::fs::File::from_raw_fd(fd.into_raw_fd()) })
            }
        }
    }

    /// Runs `argv` in the guest and returns what it printed.
    ///
    /// Panics when the program fails: a benchmark without its program has no figure.
    pub(crate) fn exec(&self, argv: &[&str]) -> String {
        let (output, end) = self.try_exec(argv).unwrap_or_else(|e| panic!("{argv:?}: {e}"));
        assert_eq!(end.status.shell_code(), 0, "{argv:?} failed in the guest: {output}");
        output
    }

    /// Has a restored guest become somebody else, as `order` says.
    ///
    /// Panics when it does not: a benchmark of half a claim has no figure.
    pub(crate) fn renew(&self, order: &Renew) {
        let mut stream = self.connect(CONTROL_PORT).expect("the guest takes connections");
        let frame = Frame::json(Kind::Renew, order).expect("JSON");
        stream.write_all(&frame.encode()).expect("the guest reads");
        let mut decoder = Decoder::new();
        let mut buffer = vec![0; 64 << 10];
        let answer = loop {
            if let Some(frame) = decoder.next().expect("a frame") {
                break frame;
            }
            let n = stream.read(&mut buffer).expect("the guest answers");
            assert!(n > 0, "the guest hung up");
            decoder.feed(&buffer[..n]);
        };
        assert!(
            answer.kind == Kind::Renewed,
            "{:?}: {}",
            answer.kind,
            String::from_utf8_lossy(&answer.payload)
        );
    }

    /// Runs `argv` in the guest: what it printed and how it ended, or why that cannot be known.
    pub(crate) fn try_exec(&self, argv: &[&str]) -> std::io::Result<(String, ExecEnd)> {
        Self::exec_over(self.connect(CONTROL_PORT)?, argv)
    }

    /// The same, given up when nothing is heard for `patience`: a guest that was just restored may have let go of a
    /// connection without a word.
    pub(crate) fn exec_within(
        &self,
        patience: Duration,
        argv: &[&str],
    ) -> std::io::Result<(String, ExecEnd)> {
        let stream = self.connect(CONTROL_PORT)?;
        let patience =
            TimeVal::microseconds(i64::try_from(patience.as_micros()).map_err(std::io::Error::other)?);
        setsockopt(&stream, ReceiveTimeout, &patience)?;
        Self::exec_over(stream, argv)
    }

    fn exec_over(mut stream: std::fs::File, argv: &[&str]) -> std::io::Result<(String, ExecEnd)> {
        let request =
            ExecRequest { argv: argv.iter().map(|a| (*a).to_owned()).collect(), ..ExecRequest::default() };
        let frame = Frame::json(Kind::Exec, &request).map_err(std::io::Error::other)?;
        stream.write_all(&[frame.encode(), Frame::empty(Kind::StdinClose).encode()].concat())?;
        let mut decoder = Decoder::new();
        let mut output = Vec::new();
        let mut buffer = vec![0; 64 << 10];
        loop {
            let n = stream.read(&mut buffer)?;
            if n == 0 {
                return Err(std::io::ErrorKind::UnexpectedEof.into());
            }
            decoder.feed(&buffer[..n]);
            while let Some(frame) = decoder.next().map_err(std::io::Error::other)? {
                match frame.kind {
                    Kind::Stdout | Kind::Stderr => output.extend_from_slice(&frame.payload),
                    Kind::Exited => {
                        let end = frame.parse().map_err(std::io::Error::other)?;
                        return Ok((String::from_utf8_lossy(&output).into_owned(), end));
                    }
                    Kind::Error => {
                        return Err(std::io::Error::other(String::from_utf8_lossy(&frame.payload)));
                    }
                    _ => {}
                }
            }
        }
    }
}
