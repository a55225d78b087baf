//! An `ark-vmm`'s control socket.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use ark_types::vmm::{ControlReply, ControlRequest, SnapshotReport, VmMetrics};

/// Longest wait for a control socket to be there.
const LIMIT: Duration = Duration::from_secs(30);

/// A connection to it.
pub(crate) struct Control(BufReader<UnixStream>);

impl Control {
    /// Connects to the socket at `path`, as soon as it is there.
    pub(crate) fn connect(path: &Path) -> Self {
        let end = Instant::now() + LIMIT;
        loop {
            match UnixStream::connect(path) {
                Ok(stream) => return Self(BufReader::new(stream)),
                Err(error) => assert!(Instant::now() < end, "{}: {error}", path.display()),
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Asks for one thing; panics when it is refused.
    pub(crate) fn ask(&mut self, request: &ControlRequest) -> ControlReply {
        let line = serde_json::to_string(request).expect("JSON");
        writeln!(self.0.get_mut(), "{line}").expect("the VMM reads");
        let mut reply = String::new();
        self.0.read_line(&mut reply).expect("the VMM answers");
        match serde_json::from_str(&reply).expect("a reply") {
            ControlReply::Refused { why } => panic!("{line}: {why}"),
            reply => reply,
        }
    }

    /// Its counters.
    pub(crate) fn metrics(&mut self) -> VmMetrics {
        match self.ask(&ControlRequest::Metrics) {
            ControlReply::Metrics(metrics) => metrics,
            other => panic!("{other:?}"),
        }
    }

    /// Takes a snapshot into `dir`.
    pub(crate) fn snapshot(&mut self, dir: &Path) -> SnapshotReport {
        match self.ask(&ControlRequest::Snapshot { dir: dir.to_owned() }) {
            ControlReply::Snapshot(report) => report,
            other => panic!("{other:?}"),
        }
    }
}
