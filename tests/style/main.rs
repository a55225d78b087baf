//! The house rules that no compiler keeps: arrows between rooms, lengths of files, no word of the build machine.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use cargo_metadata::{DependencyKind, MetadataCommand};

/// Which of our crates each of our crates may use. A new arrow is a decision: it is made here.
const ARROWS: &[(&str, &[&str])] = &[
    ("ark-types", &[]),
    ("ark-hal", &[]),
    ("ark-devices", &[]),
    ("ark-vmm", &["ark-devices", "ark-hal", "ark-types"]),
    ("ark-mcp", &[]),
    ("arkd", &["ark-gguf", "ark-mcp", "ark-types"]),
    ("ark-client", &["ark-types"]),
    ("ark-cli", &["ark-client", "ark-types"]),
    ("ark-link", &["ark-types"]),
    ("ark-gguf", &[]),
    ("ark-ai", &["ark-link", "ark-types"]),
    ("ark-inference", &["ark-gguf", "ark-link", "ark-mcp", "ark-types"]),
    ("ark-guestd", &["ark-link", "ark-types"]),
    ("ark-chaos", &["ark-types"]),
    ("ark-tests", &["ark-chaos", "ark-gguf", "ark-types", "arkd"]),
];

/// Longest file, in lines.
const MAX_LINES: usize = 600;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ is in the repository").to_owned()
}

#[test]
fn arrows_between_rooms_are_the_house_plans() {
    let metadata = MetadataCommand::new()
        .manifest_path(root().join("Cargo.toml"))
        .no_deps()
        .exec()
        .expect("cargo metadata");
    let allowed: BTreeMap<_, _> = ARROWS.iter().copied().collect();
    for package in &metadata.packages {
        let may = allowed
            .get(package.name.as_str())
            .unwrap_or_else(|| panic!("{} has no line in ARROWS", package.name));
        let ours = package
            .dependencies
            .iter()
            .filter(|d| d.kind == DependencyKind::Normal && d.path.is_some())
            .map(|d| d.name.as_str());
        for used in ours {
            assert!(may.contains(&used), "{} → {used} is not in the house plan", package.name);
        }
    }
    assert_eq!(metadata.packages.len(), ARROWS.len(), "every room is listed");
}

#[test]
fn types_have_no_runtime_and_only_hal_knows_kvm() {
    let metadata = MetadataCommand::new()
        .manifest_path(root().join("Cargo.toml"))
        .no_deps()
        .exec()
        .expect("cargo metadata");
    let uses = |package: &str, dependency: &str| {
        metadata
            .packages
            .iter()
            .any(|p| p.name.as_str() == package && p.dependencies.iter().any(|d| d.name == dependency))
    };
    for runtime in ["tokio", "axum", "hyper"] {
        for package in ["ark-types", "ark-hal", "ark-devices", "ark-vmm", "ark-link", "ark-guestd"] {
            assert!(!uses(package, runtime), "{package} uses {runtime}");
        }
    }
    for package in metadata.packages.iter().filter(|p| p.name.as_str() != "ark-hal") {
        for kvm in ["kvm-ioctls", "kvm-bindings"] {
            assert!(!uses(&package.name, kvm), "{} uses {kvm}", package.name);
        }
    }
}

/// Files of the repository that people write: code, scripts, configuration, prose.
fn sources() -> Vec<PathBuf> {
    const WRITTEN: [&str; 8] = ["rs", "sh", "toml", "md", "config", "py", "txt", "yml"];
    walkdir::WalkDir::new(root())
        .into_iter()
        .filter_entry(|e| !["target", "build", ".git"].iter().any(|skip| e.file_name() == *skip))
        .flatten()
        .filter(|e| e.file_type().is_file())
        .map(walkdir::DirEntry::into_path)
        .filter(|p| {
            let named = ["Makefile", "run", "init"].iter().any(|n| p.file_name().is_some_and(|f| f == *n));
            named || p.extension().and_then(|e| e.to_str()).is_some_and(|e| WRITTEN.contains(&e))
        })
        .collect()
}

#[test]
fn no_file_is_longer_than_a_reader_can_hold() {
    let long: Vec<_> = sources()
        .into_iter()
        .filter(|p| p.extension().is_some_and(|e| e == "rs" || e == "sh"))
        .filter_map(|p| {
            let lines = std::fs::read_to_string(&p).ok()?.lines().count();
            (lines > MAX_LINES).then_some((p, lines))
        })
        .collect();
    assert!(long.is_empty(), "over {MAX_LINES} lines: {long:?}");
}

#[test]
fn every_debian_package_stands_in_one_list() {
    for path in sources().into_iter().filter(|p| p.extension().is_some_and(|e| e == "sh")) {
        let text = std::fs::read_to_string(&path).unwrap_or_default();
        // A script may say what to install, or ask apt what it would do; only the Makefile answers yes to it.
        let installs = text
            .lines()
            .any(|l| l.contains(concat!("apt-get", " ")) && l.contains(concat!("install", " -y")));
        assert!(
            !installs,
            "{} installs packages; list them in guest-images/debian-packages.txt",
            path.display()
        );
    }
}

#[test]
fn what_is_unfinished_is_not_in_the_tree() {
    let marks = [
        concat!("TO", "DO"),
        concat!("FIX", "ME"),
        concat!("X", "XX"),
        concat!("todo", "!("),
        concat!("unimpl", "emented!("),
    ];
    for path in sources().into_iter().filter(|p| p.extension().is_some_and(|e| e == "rs" || e == "sh")) {
        // What mktemp makes a name of is no mark.
        let text = std::fs::read_to_string(&path).unwrap_or_default().replace(&"X".repeat(6), "");
        for mark in marks {
            assert!(!text.contains(mark), "{mark} in {}", path.display());
        }
    }
}
