//! `manifest.json`: `{"seal":"<SHA-256>","manifest":{...}}` and a newline, byte for byte. The seal is over the manifest's
//! text as it stands there, so nothing depends on how a JSON library orders or spaces it.

use std::cmp::Ordering;
use std::path::Path;

use ark_types::vmm::{MAX_DISKS, SNAPSHOT_VERSION, SnapshotManifest};
use serde::Deserialize;

use super::files::{digest, read_at_most};
use super::{MANIFEST, MAX_MANIFEST, MAX_MEMORY_MIB, MAX_STATE, PAGE, SnapshotError, sums};

const BEFORE_SEAL: &[u8] = br#"{"seal":""#;
const AFTER_SEAL: &[u8] = br#"","manifest":"#;
const END: &[u8] = b"}\n";
/// Hexadecimal digits of a SHA-256.
const SEAL_DIGITS: usize = 64;
/// Most virtual processors, as [`ark_types::vmm::VmConfig::vcpus`].
const MAX_VCPUS: u32 = 32;

/// The part of every version's file that tells its version.
#[derive(Deserialize)]
struct Head {
    manifest: Version,
}

#[derive(Deserialize)]
struct Version {
    version: u64,
}

/// The file's bytes.
pub(super) fn encode(manifest: &SnapshotManifest) -> Result<Vec<u8>, SnapshotError> {
    let text = serde_json::to_vec(manifest).map_err(|e| SnapshotError::Bounds(e.to_string()))?;
    let bytes = [BEFORE_SEAL, digest(&text).as_bytes(), AFTER_SEAL, &text, END].concat();
    if bytes.len() as u64 > MAX_MANIFEST {
        let what = format!(
            "its manifest would have {} bytes, at most {MAX_MANIFEST}: use fewer labels",
            bytes.len()
        );
        return Err(SnapshotError::Bounds(what));
    }
    bounds(manifest).map_err(SnapshotError::Bounds)?;
    Ok(bytes)
}

/// Reads and checks the manifest of the snapshot in `dir`.
pub(super) fn read(dir: &Path) -> Result<SnapshotManifest, SnapshotError> {
    let path = dir.join(MANIFEST);
    decode(&path, &read_at_most(&path, MAX_MANIFEST)?)
}

/// Checks the file's bytes: seal, version, every field. What is wrong is told apart only when something is.
pub(super) fn decode(path: &Path, bytes: &[u8]) -> Result<SnapshotManifest, SnapshotError> {
    let manifest = sealed(bytes).and_then(|text| serde_json::from_slice::<SnapshotManifest>(text).ok());
    match manifest.filter(|manifest| manifest.version == SNAPSHOT_VERSION) {
        Some(manifest) => {
            bounds(&manifest).map_err(|what| SnapshotError::damaged(path, what))?;
            Ok(manifest)
        }
        None => Err(explain(path, bytes)),
    }
}

/// Why these bytes are no manifest of this version: another version, then the seal, then a field.
fn explain(path: &Path, bytes: &[u8]) -> SnapshotError {
    let found = match serde_json::from_slice::<Head>(bytes) {
        Ok(head) => head.manifest.version,
        Err(e) => return SnapshotError::damaged(path, format!("it is not a manifest ({e})")),
    };
    match (found.cmp(&u64::from(SNAPSHOT_VERSION)), sealed(bytes)) {
        (Ordering::Less, _) => SnapshotError::Older { path: path.to_owned(), found },
        (Ordering::Greater, _) => SnapshotError::Newer { path: path.to_owned(), found },
        (Ordering::Equal, None) => SnapshotError::damaged(path, "its seal does not fit its content"),
        (Ordering::Equal, Some(text)) => {
            let why = serde_json::from_slice::<SnapshotManifest>(text).err();
            let why = why.map_or_else(String::new, |e| format!(" ({e})"));
            SnapshotError::damaged(path, format!("it is not a manifest of this format{why}"))
        }
    }
}

/// The manifest's text, when the seal is the one over it.
fn sealed(bytes: &[u8]) -> Option<&[u8]> {
    let (seal, rest) = bytes.strip_prefix(BEFORE_SEAL)?.split_at_checked(SEAL_DIGITS)?;
    let text = rest.strip_prefix(AFTER_SEAL)?.strip_suffix(END)?;
    (digest(text).as_bytes() == seal).then_some(text)
}

/// The bounds of every number.
fn bounds(manifest: &SnapshotManifest) -> Result<(), String> {
    let memory = manifest.memory_mib.saturating_mul(1 << 20);
    if !(1..=MAX_VCPUS).contains(&manifest.vcpus) {
        Err(format!("{} processors are not 1 to {MAX_VCPUS}", manifest.vcpus))
    } else if !(1..=MAX_MEMORY_MIB).contains(&manifest.memory_mib) {
        Err(format!("{} MiB of memory are not 1 to {MAX_MEMORY_MIB}", manifest.memory_mib))
    } else if manifest.disks.len() > MAX_DISKS {
        Err(format!("{} disks are more than {MAX_DISKS}", manifest.disks.len()))
    } else if manifest.guest_cid.is_some_and(|cid| cid < 3 || cid == u32::MAX) {
        Err("its guest's context id is a reserved one".to_owned())
    } else if manifest.state_bytes > MAX_STATE {
        Err(format!("{} bytes of state are more than {MAX_STATE}", manifest.state_bytes))
    } else if manifest.sums_bytes > sums::most_bytes(memory / PAGE) {
        Err(format!("{} bytes of sums are more than its memory can need", manifest.sums_bytes))
    } else if manifest.base.as_ref().is_some_and(|base| !base.path.is_absolute()) {
        Err("the path of its base is not absolute".to_owned())
    } else if manifest.base.as_ref().is_some_and(|base| base.id == manifest.id) {
        Err("it is its own base".to_owned())
    } else {
        Ok(())
    }
}
