//! Bounded reading: nothing is read past the file's length, and nothing is allocated before its bytes are known to be there.

use std::io::Read;

use crate::GgufError;

pub(crate) struct Reader<R> {
    inner: R,
    at: u64,
    len: u64,
}

impl<R: Read> Reader<R> {
    pub(crate) fn new(inner: R, len: u64) -> Self {
        Self { inner, at: 0, len }
    }

    /// Bytes read so far.
    pub(crate) fn at(&self) -> u64 {
        self.at
    }

    /// Fails unless `bytes` more are in the file.
    pub(crate) fn expect(&self, bytes: u64, what: &str) -> Result<(), GgufError> {
        let need = self.at.saturating_add(bytes);
        if need > self.len {
            return Err(GgufError::Truncated { what: what.to_owned(), need, have: self.len });
        }
        Ok(())
    }

    pub(crate) fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], GgufError> {
        self.expect(N as u64, what)?;
        let mut bytes = [0; N];
        self.inner.read_exact(&mut bytes)?;
        self.at += N as u64;
        Ok(bytes)
    }

    pub(crate) fn u32(&mut self, what: &str) -> Result<u32, GgufError> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    pub(crate) fn u64(&mut self, what: &str) -> Result<u64, GgufError> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    /// A string of at most `limit` bytes, with its length before it.
    pub(crate) fn string(&mut self, what: &str, limit: u64) -> Result<String, GgufError> {
        let len = self.u64(what)?;
        if len > limit {
            return Err(GgufError::Absurd { what: format!("the length of {what}"), found: len, limit });
        }
        self.expect(len, what)?;
        // `limit` is far below any usize.
        let mut bytes = vec![0; usize::try_from(len).unwrap_or_default()];
        self.inner.read_exact(&mut bytes)?;
        self.at += len;
        String::from_utf8(bytes).map_err(|_| GgufError::Damaged(format!("{what} is not UTF-8")))
    }

    /// Reads past `bytes` without keeping them.
    pub(crate) fn skip(&mut self, bytes: u64, what: &str) -> Result<(), GgufError> {
        self.expect(bytes, what)?;
        let copied = std::io::copy(&mut self.inner.by_ref().take(bytes), &mut std::io::sink())?;
        if copied != bytes {
            return Err(GgufError::Truncated {
                what: what.to_owned(),
                need: self.at + bytes,
                have: self.at + copied,
            });
        }
        self.at += bytes;
        Ok(())
    }
}
