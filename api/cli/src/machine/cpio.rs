//! A writer for cpio archives in the `newc` format (Linux: Documentation/driver-api/early-userspace/buffer-format.rst):
//! what the kernel unpacks as its first root file system, several one after another if need be.

/// Type bits of a directory (inode(7), `S_IFDIR`).
const DIRECTORY: u32 = 0o040_000;
/// Type bits of a regular file (inode(7), `S_IFREG`).
const REGULAR: u32 = 0o100_000;
/// Archives are padded to this; the kernel wants the next one to begin at a multiple of 4.
const BLOCK: usize = 512;

/// An archive under construction. Everything in it belongs to root.
#[derive(Debug, Default)]
pub(crate) struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

/// Content too large for the format's 32-bit size field.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0} is too large for a cpio archive")]
pub(crate) struct TooLarge(String);

impl Archive {
    /// An empty archive.
    pub(crate) fn new() -> Self {
        Self::default()
    }

    /// Adds a directory; one that the kernel has already made keeps its content.
    pub(crate) fn directory(&mut self, path: &str, mode: u32) -> Result<(), TooLarge> {
        self.entry(path, DIRECTORY | mode, 2, &[])
    }

    /// Adds a file; its directory must have been added before.
    pub(crate) fn file(&mut self, path: &str, mode: u32, content: &[u8]) -> Result<(), TooLarge> {
        self.entry(path, REGULAR | mode, 1, content)
    }

    /// The finished archive.
    pub(crate) fn finish(mut self) -> Vec<u8> {
        self.entries = 0;
        // A name this short has a length.
        let _ = self.entry("TRAILER!!!", 0, 1, &[]);
        pad(&mut self.bytes, BLOCK);
        self.bytes
    }

    fn entry(&mut self, path: &str, mode: u32, links: u32, content: &[u8]) -> Result<(), TooLarge> {
        let length = |n: usize| u32::try_from(n).map_err(|_| TooLarge(path.to_owned()));
        let (name_size, size) = (length(path.len() + 1)?, length(content.len())?);
        // ino, mode, uid, gid, nlink, mtime, filesize, devmajor, devminor, rdevmajor, rdevminor, namesize, check
        let fields = [self.entries, mode, 0, 0, links, 0, size, 0, 0, 0, 0, name_size, 0];
        self.entries += 1;
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        pad(&mut self.bytes, 4);
        self.bytes.extend_from_slice(content);
        pad(&mut self.bytes, 4);
        Ok(())
    }
}

/// Fills `bytes` up with zeros to a multiple of `block`.
pub(crate) fn pad(bytes: &mut Vec<u8>, block: usize) {
    bytes.resize(bytes.len().next_multiple_of(block), 0);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Vec<u8> {
        let mut archive = Archive::new();
        archive.directory("ark", 0o700).unwrap();
        archive.file("ark/token", 0o600, b"abcde").unwrap();
        archive.finish()
    }

    #[test]
    fn the_bytes_are_those_of_the_format() {
        let bytes = sample();
        assert_eq!(bytes.len(), 512);
        let file = &bytes[116..];
        let header = concat!(
            "070701", "00000001", "00008180", "00000000", "00000000", "00000001", "00000000", "00000005",
            "00000000", "00000000", "00000000", "00000000", "0000000a", "00000000"
        );
        assert_eq!(&file[..110], header.as_bytes());
        assert_eq!(&file[110..128], b"ark/token\0abcde\0\0\0");
    }

    /// busybox and GNU cpio agree with us, where one of them is installed.
    #[test]
    fn a_real_cpio_unpacks_it() {
        use std::io::Write as _;
        use std::process::{Command, Stdio};
        let dir = tempfile::tempdir().unwrap();
        let unpack = |program: &str, args: &[&str]| {
            let mut child = Command::new(program)
                .args(args)
                .current_dir(dir.path())
                .stdin(Stdio::piped())
                .stderr(Stdio::null())
                .spawn()
                .ok()?;
            child.stdin.take()?.write_all(&sample()).ok()?;
            child.wait().ok()
        };
        let Some(status) = unpack("busybox", &["cpio", "-i"]).or_else(|| unpack("cpio", &["-i"])) else {
            return;
        };
        assert!(status.success());
        assert_eq!(std::fs::read(dir.path().join("ark/token")).unwrap(), b"abcde");
    }
}
