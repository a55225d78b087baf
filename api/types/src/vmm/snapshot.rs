//! Snapshots: a VM's memory and state in a directory, and how a VMM is told to go on from one.
//!
//! | file | holds |
//! |---|---|
//! | `manifest.json` | [`SnapshotManifest`], sealed by a checksum over itself |
//! | `state` | processors, interrupt controllers, devices |
//! | `sums` | which pages `memory` holds, and a checksum for each of its chunks |
//! | `memory` | guest memory, sparse: in a full snapshot a hole is zero, in a diff a page that `sums` does not name is the base's |
//!
//! A directory that has no `manifest.json` yet is being written, and nothing else ever changes one.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{DiskConfig, VmConfig};

/// Version of the format that this release writes, and the only one that it reads.
pub const SNAPSHOT_VERSION: u32 = 1;
/// Longest chain from a diff to the full snapshot below it, both counted.
pub const MAX_CHAIN: usize = 32;

macro_rules! hex_id {
    ($(#[$doc:meta])* $name:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
        #[serde(try_from = "String", into = "String")]
        #[schema(value_type = String, pattern = "^[0-9a-f]{32}$")]
        pub struct $name(pub [u8; 16]);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{self}")
            }
        }

        impl FromStr for $name {
            type Err = BadHex;
            fn from_str(text: &str) -> Result<Self, BadHex> {
                parse_hex(text).map(Self).ok_or_else(|| BadHex { what: $what, text: text.to_owned() })
            }
        }

        impl TryFrom<String> for $name {
            type Error = BadHex;
            fn try_from(text: String) -> Result<Self, BadHex> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> Self {
                id.to_string()
            }
        }
    };
}

/// A text that is not 32 hexadecimal digits.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not {what}: 32 of 0-9 and a-f")]
pub struct BadHex {
    what: &'static str,
    text: String,
}

/// 32 lower-case hexadecimal digits as bytes.
fn parse_hex(text: &str) -> Option<[u8; 16]> {
    let digit = |byte: u8| match byte {
        b'0'..=b'9' => Some(byte - b'0'),
        b'a'..=b'f' => Some(byte - b'a' + 10),
        _ => None,
    };
    let mut id = [0; 16];
    if text.len() != 32 {
        return None;
    }
    for (to, pair) in id.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
        let [high, low] = pair else { return None };
        *to = digit(*high)? << 4 | digit(*low)?;
    }
    Some(id)
}

hex_id! {
    /// Identity of a snapshot: 128 random bits, 32 hexadecimal digits. A diff names its base by it.
    SnapshotId, "a snapshot's id"
}
hex_id! {
    /// A VM generation id (ACPI VMGENID): 128 random bits, 32 hexadecimal digits, never used for two VMs.
    Generation, "a VM generation id"
}

/// What a snapshot is and what it needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotManifest {
    /// [`SNAPSHOT_VERSION`] of the writer.
    pub version: u32,
    /// Its identity.
    pub id: SnapshotId,
    /// The snapshot that this one is a diff over; none when it is full.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<SnapshotBase>,
    /// When it was taken, milliseconds since the Unix epoch.
    pub created_unix_ms: u64,
    /// Virtual processors.
    pub vcpus: u32,
    /// Memory, MiB.
    pub memory_mib: u64,
    /// The host's processor at that time.
    pub processor: ProcessorModel,
    /// Block devices, in order. Another path may be given at restore; size and content have to be the same.
    pub disks: Vec<DiskConfig>,
    /// Context id of the guest, when it has a socket device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest_cid: Option<u32>,
    /// [`VmConfig::labels`], as the VM was given them: digests of kernel and image among them.
    pub labels: BTreeMap<String, String>,
    /// Size of `state`, bytes.
    pub state_bytes: u64,
    /// SHA-256 of `state`, hexadecimal.
    pub state_sha256: String,
    /// Size of `sums`, bytes.
    pub sums_bytes: u64,
    /// SHA-256 of `sums`, hexadecimal: through it this manifest vouches for every byte of `memory`.
    pub sums_sha256: String,
    /// Bytes of `memory` that are no hole.
    pub written_bytes: u64,
}

/// The base of a diff.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotBase {
    /// Its identity; checked against what is found at `path`.
    pub id: SnapshotId,
    /// Its directory, absolute.
    pub path: PathBuf,
}

/// A host's processor, by CPUID leaves 0, 1 and `0x8000_0002` to 4.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProcessorModel {
    /// `GenuineIntel`, `AuthenticAMD`.
    pub vendor: String,
    /// Family, extended family included.
    pub family: u32,
    /// Model, extended model included.
    pub model: u32,
    /// Stepping.
    pub stepping: u32,
    /// Name for people.
    pub brand: String,
}

/// A VM that goes on from a snapshot: one JSON object, told from a [`VmConfig`] by its `snapshot`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RestoreConfig {
    /// Directory of the snapshot.
    pub snapshot: PathBuf,
    /// The VM's new generation id.
    pub generation: Generation,
    /// Paths of the block devices, as many as the snapshot has.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<PathBuf>,
    /// Unix socket of the socket device, when the snapshot has one; see [`super::VsockConfig::uds_path`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uds_path: Option<PathBuf>,
    /// As [`VmConfig::console`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub console: Option<PathBuf>,
    /// As [`VmConfig::control_socket`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub control_socket: Option<PathBuf>,
    /// As [`VmConfig::exit_file`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_file: Option<PathBuf>,
}

/// What `ark-vmm run` is told: to boot a VM, or to go on from a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum RunConfig {
    /// Boot.
    Boot(VmConfig),
    /// Go on.
    Restore(RestoreConfig),
}

impl<'de> Deserialize<'de> for RunConfig {
    /// Looks for the key `snapshot`, so that an error is about the one kind that was meant.
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        use serde::de::Error;
        let value = serde_json::Value::deserialize(deserializer)?;
        if value.get("snapshot").is_some() {
            serde_json::from_value(value).map(Self::Restore).map_err(D::Error::custom)
        } else {
            serde_json::from_value(value).map(Self::Boot).map_err(D::Error::custom)
        }
    }
}

impl RunConfig {
    /// File that receives the exit record.
    #[must_use]
    pub fn exit_file(&self) -> Option<&PathBuf> {
        match self {
            Self::Boot(config) => config.exit_file.as_ref(),
            Self::Restore(config) => config.exit_file.as_ref(),
        }
    }
}

/// A snapshot that was taken while its VM went on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotReport {
    /// Its identity.
    pub id: SnapshotId,
    /// The snapshot that it is a diff over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<SnapshotId>,
    /// How long the VM stood still for it, microseconds.
    pub pause_us: u64,
    /// From the request until every byte was on disk, microseconds.
    pub durable_us: u64,
    /// Bytes of memory that it holds.
    pub written_bytes: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_its_32_digits_and_nothing_else() {
        let id: SnapshotId = "000102030405060708090a0b0c0d0eff".parse().unwrap();
        assert_eq!(id.to_string(), "000102030405060708090a0b0c0d0eff");
        assert_eq!(serde_json::to_string(&id).unwrap(), "\"000102030405060708090a0b0c0d0eff\"");
        for text in ["", "0", "000102030405060708090A0B0C0D0EFF", "000102030405060708090a0b0c0d0ef", "é"] {
            assert!(text.parse::<Generation>().unwrap_err().to_string().contains("generation"), "{text}");
        }
    }

    #[test]
    fn an_error_is_about_the_kind_of_configuration_that_was_meant() {
        let of = |text: &str| serde_json::from_str::<RunConfig>(text).unwrap_err().to_string();
        assert!(of(r#"{"snapshot":"/s"}"#).contains("generation"), "{}", of(r#"{"snapshot":"/s"}"#));
        assert!(of("{}").contains("kernel"), "{}", of("{}"));
    }
}
