//! Names, sizes and configurations at and beyond their bounds.

use ark_types::agent::AgentName;
use ark_types::exec::ExitStatus;
use ark_types::image::ImageName;
use ark_types::scheduling::Resources;
use ark_types::vmm::{
    ConfigError, DiskConfig, Generation, MAX_CMDLINE, MAX_DISKS, RunConfig, SnapshotManifest, VmConfig,
    VsockConfig, check_size,
};
use proptest::prelude::*;

proptest! {
    #[test]
    fn names_are_labels(text in "[a-zA-Z0-9-]{0,70}") {
        let inner = text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
        let label = inner && (1..=63).contains(&text.len()) && !text.starts_with('-') && !text.ends_with('-');
        prop_assert_eq!(text.parse::<AgentName>().is_ok(), label);
        prop_assert_eq!(text.parse::<ImageName>().is_ok(), label);
        let json = serde_json::to_string(&text).unwrap();
        prop_assert_eq!(serde_json::from_str::<AgentName>(&json).is_ok(), label);
    }

    #[test]
    fn no_text_makes_a_name_or_a_configuration_panic(text in "\\PC{0,80}") {
        let _ = text.parse::<AgentName>();
        let _ = serde_json::from_str::<VmConfig>(&text);
        let _ = serde_json::from_str::<RunConfig>(&text);
        let _ = serde_json::from_str::<SnapshotManifest>(&text);
    }

    #[test]
    fn ids_are_their_hexadecimal_digits(id in any::<[u8; 16]>(), text in "[0-9a-fA-F]{30,34}") {
        let id = Generation(id);
        prop_assert_eq!(id.to_string().parse::<Generation>(), Ok(id));
        let valid = text.len() == 32 && !text.bytes().any(|b| b.is_ascii_uppercase());
        prop_assert_eq!(text.parse::<Generation>().is_ok(), valid);
        prop_assert_eq!(serde_json::from_value::<Generation>(text.into()).is_ok(), valid);
    }

    #[test]
    fn sizes_are_bounded_by_the_host(vcpus in 0u32..100, memory in 0u64..3000, host in 64u64..3000) {
        let fits = (1..=32).contains(&vcpus) && memory >= 64 && memory <= host;
        prop_assert_eq!(check_size(vcpus, memory, host).is_ok(), fits);
    }
}

#[test]
fn names_cannot_be_paths() {
    for bad in ["", ".", "..", "a/b", "a b", "a_b", "ä", "A", "-a", "a-", "a\0", "a\n"] {
        let error = bad.parse::<ImageName>().unwrap_err().to_string();
        assert!(error.contains("use 1 to 63 of a-z"), "{error}");
    }
}

fn config(change: impl FnOnce(&mut VmConfig)) -> Result<(), ConfigError> {
    let mut config: VmConfig = serde_json::from_str(r#"{"kernel":"/k","vcpus":1,"memory_mib":128}"#).unwrap();
    change(&mut config);
    config.check(1024)
}

#[test]
fn a_configuration_beyond_a_bound_is_refused_by_name() {
    let disk = DiskConfig { path: "/d".into(), read_only: true };
    let vsock = |guest_cid| Some(VsockConfig { guest_cid, uds_path: "/v".into() });
    assert!(config(|c| c.disks = vec![disk.clone(); MAX_DISKS]).is_ok());
    assert!(config(|c| c.cmdline = "x".repeat(MAX_CMDLINE)).is_ok());
    assert!(config(|c| c.vsock = vsock(3)).is_ok());
    assert_eq!(config(|c| c.vcpus = 1000), Err(ConfigError::Vcpus(1000)));
    assert_eq!(config(|c| c.vcpus = 0), Err(ConfigError::Vcpus(0)));
    assert_eq!(config(|c| c.memory_mib = 1), Err(ConfigError::MemoryTooSmall(1)));
    assert_eq!(config(|c| c.memory_mib = 1025), Err(ConfigError::MemoryTooLarge { asked: 1025, host: 1024 }));
    assert_eq!(
        config(|c| c.disks = vec![disk.clone(); MAX_DISKS + 1]),
        Err(ConfigError::Disks(MAX_DISKS + 1))
    );
    assert_eq!(config(|c| c.cmdline = "x".repeat(MAX_CMDLINE + 1)), Err(ConfigError::Cmdline));
    assert_eq!(config(|c| c.cmdline = "a\nb".to_owned()), Err(ConfigError::Cmdline));
    for cid in [0, 1, 2, u32::MAX] {
        assert_eq!(config(|c| c.vsock = vsock(cid)), Err(ConfigError::GuestCid(cid)));
    }
    let unknown = r#"{"kernel":"/k","vcpus":1,"memory_mib":128,"gpu":true}"#;
    assert!(serde_json::from_str::<VmConfig>(unknown).unwrap_err().to_string().contains("gpu"));
}

#[test]
fn shell_codes_never_overflow() {
    assert_eq!(ExitStatus::Signaled { signal: 9 }.shell_code(), 137);
    assert_eq!(ExitStatus::Signaled { signal: 255 }.shell_code(), 255);
    assert_eq!(ExitStatus::TimedOut.shell_code(), 124);
}

fn amount() -> impl Strategy<Value = Resources> {
    (any::<u64>(), 0..1000_u64, 0..1000_u64).prop_map(|(agents, memory_mib, vcpus)| Resources {
        agents,
        memory_mib,
        vcpus,
    })
}

proptest! {
    #[test]
    fn amounts_add_up(a in amount(), b in amount()) {
        let (sum, rest) = (a.plus(b), a.minus(b));
        prop_assert!(a.is_within(&sum) && b.is_within(&sum) && rest.is_within(&a));
        prop_assert_eq!(b.is_within(&a), rest.plus(b) == a);
        prop_assert_eq!(a.times(2), a.plus(a));
    }
}
