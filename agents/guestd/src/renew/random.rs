//! The kernel's random generator (random(4)). Forks of one snapshot have the same state in it until something new comes in.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use nix::errno::Errno;

/// Bytes of a seed.
pub(super) const SEED_LEN: usize = 32;
/// The same in bits.
const SEED_BITS: libc::c_int = 256;

/// `struct rand_pool_info` (linux/random.h) with room for one seed.
#[repr(C)]
struct PoolInfo {
    /// How many bits of it nobody else can know.
    entropy_count: libc::c_int,
    buf_size: libc::c_int,
    buf: [u8; SEED_LEN],
}

// `_IOW('R', 3, int[2])` and `_IO('R', 7)`, linux/random.h.
nix::ioctl_write_ptr_bad!(
    add_entropy,
    nix::request_code_write!(b'R', 3, 2 * size_of::<libc::c_int>()),
    PoolInfo
);
nix::ioctl_none_bad!(reseed_now, nix::request_code_none!(b'R', 7));

/// Adds `seed` to the kernel's pool and has its generator take a new key from that at once: what is drawn afterwards is
/// this guest's own, whether the VM generation id has been noticed already or not.
pub(super) fn reseed(seed: &[u8; SEED_LEN]) -> io::Result<()> {
    let device = File::open("/dev/urandom")?;
    let info = PoolInfo {
        entropy_count: SEED_BITS,
        buf_size: libc::c_int::try_from(SEED_LEN).unwrap_or_default(),
        buf: *seed,
    };
    // SAFETY: RNDADDENTROPY reads a rand_pool_info with as many bytes behind it as its buf_size says.
    unsafe { add_entropy(device.as_raw_fd(), &raw const info) }?;
    // SAFETY: RNDRESEEDCRNG takes no argument.
    unsafe { reseed_now(device.as_raw_fd()) }?;
    Ok(())
}

/// `N` bytes of getrandom(2); at most 256, which the kernel gives whole.
pub(super) fn bytes<const N: usize>() -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    // SAFETY: `bytes` is writable and as long as said.
    let got = Errno::result(unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), N, 0) })?;
    if usize::try_from(got) == Ok(N) { Ok(bytes) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
}

/// A random UUID (version 4, RFC 9562) as text, as the kernel writes its boot id.
pub(super) fn uuid() -> io::Result<String> {
    let [b0, b1, b2, b3, b4, b5, version, b7, variant, b9, rest @ ..] = bytes::<16>()?;
    let head = hex(&[b0, b1, b2, b3]);
    let (time, version) = (hex(&[b4, b5]), hex(&[version & 0x0f | 0x40, b7]));
    let variant = hex(&[variant & 0x3f | 0x80, b9]);
    Ok(format!("{head}-{time}-{version}-{variant}-{}", hex(&rest)))
}

/// Hexadecimal digits of `bytes`.
pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The bytes that hexadecimal digits say, if they are as many as wanted.
pub(super) fn from_hex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let mut bytes = [0; N];
    let mut pairs = text.as_bytes().chunks_exact(2);
    for byte in &mut bytes {
        *byte = u8::from_str_radix(std::str::from_utf8(pairs.next()?).ok()?, 16).ok()?;
    }
    (text.len() == 2 * N).then_some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digits_and_bytes_are_turned_into_each_other() {
        assert_eq!(hex(&[0, 0xab, 0x10]), "00ab10");
        assert_eq!(from_hex("00ab10"), Some([0, 0xab, 0x10]));
        for bad in ["00ab1", "00ab1000", "00ab1g", "é"] {
            assert_eq!(from_hex::<3>(bad), None);
        }
    }

    #[test]
    fn a_boot_id_is_a_uuid_and_never_the_same() {
        let (a, b) = (uuid().unwrap(), uuid().unwrap());
        assert_ne!(a, b);
        for id in [a, b] {
            assert_eq!((id.len(), id.as_bytes()[14], id.matches('-').count()), (36, b'4', 4), "{id}");
            assert!(b"89ab".contains(&id.as_bytes()[19]), "{id}");
        }
    }
}
