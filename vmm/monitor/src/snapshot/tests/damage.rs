//! Whatever is done to the files: a VM never goes on from what is not the snapshot.

use std::ffi::CString;
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;
use std::path::Path;

use proptest::prelude::*;

use super::{MIB, chain_of_two, content, map, refused, replace, scratch, take, zeroed};
use crate::snapshot::{Chain, MANIFEST, MEMORY, STATE, SUMS, Scope, SnapshotError, manifest, verify};

const SEALED: [&str; 3] = [MANIFEST, STATE, SUMS];

#[test]
fn a_flipped_bit_in_the_manifest_state_or_sums_is_refused() {
    let scratch = scratch();
    let (full, diff) = chain_of_two(scratch.path());
    for dir in [&full, &diff] {
        for name in SEALED {
            let path = dir.join(name);
            let bytes = fs::read(&path).unwrap();
            for at in 0..bytes.len() {
                let mut flipped = bytes.clone();
                flipped[at] ^= 1 << (at % 8);
                replace(&path, &flipped);
                refused(dir);
            }
            replace(&path, &bytes);
        }
        Chain::open(dir).unwrap();
    }
}

proptest! {
    #[test]
    fn any_change_of_a_manifest_is_refused(at in any::<prop::sample::Index>(), xor in 1_u8.., cut in 0_usize..3) {
        let scratch = scratch();
        let dir = scratch.path().join("s");
        take(&dir, &zeroed(MIB), None);
        let path = dir.join(MANIFEST);
        let good = fs::read(&path).unwrap();
        let mut bytes = good.clone();
        let at = at.index(bytes.len());
        bytes[at] ^= xor;
        prop_assert!(manifest::decode(&path, &bytes).is_err());
        bytes.truncate(bytes.len() - cut);
        bytes.insert(at.min(bytes.len()), xor);
        prop_assert!(bytes == good || manifest::decode(&path, &bytes).is_err());
    }

    #[test]
    fn any_bytes_as_a_manifest_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        prop_assert!(manifest::decode(Path::new("/s/manifest.json"), &bytes).is_err());
    }
}

#[test]
fn a_flipped_bit_in_memory_is_found_or_does_not_matter() {
    /// Coprime to the size of a page, so that places within pages vary, and small enough to meet the diff's own pages.
    const STEP: usize = 8191;
    let scratch = scratch();
    let (full, diff) = chain_of_two(scratch.path());
    let before = content(&map(&diff), 2 * MIB);
    for dir in [&full, &diff] {
        let path = dir.join(MEMORY);
        let bytes = fs::read(&path).unwrap();
        let mut found = 0;
        for at in (0..bytes.len()).step_by(STEP).chain([0, bytes.len() - 1]) {
            let mut flipped = bytes.clone();
            flipped[at] ^= 1 << (at % 8);
            replace(&path, &flipped);
            match verify(dir, Scope::Top) {
                Err(error @ SnapshotError::Damaged { .. }) => {
                    assert!(error.to_string().contains("0x"), "{error}");
                    found += 1;
                }
                Err(error) => panic!("{error}"),
                // Of a diff, what it does not name is never seen.
                Ok(_) => assert_eq!(content(&map(&diff), 2 * MIB), before, "{at}"),
            }
            assert_eq!(verify(&diff, Scope::WholeChain).is_err(), verify(dir, Scope::Top).is_err());
        }
        let all = bytes.len().div_ceil(STEP) + 2;
        assert!(if dir == &full { found == all } else { (1..all).contains(&found) }, "{found} of {all}");
        replace(&path, &bytes);
    }
    assert_eq!(verify(&diff, Scope::WholeChain).unwrap().snapshots, 2);
    assert_eq!(verify(&diff, Scope::Top).unwrap().bytes, 3 * 4096);
}

#[test]
fn a_file_that_is_shorter_longer_or_gone_is_refused() {
    let scratch = scratch();
    let (full, diff) = chain_of_two(scratch.path());
    for name in [MANIFEST, STATE, SUMS, MEMORY] {
        // What a diff needs of its base is all but its state.
        let dirs = if name == STATE { vec![&diff] } else { vec![&full, &diff] };
        for dir in dirs {
            let path = dir.join(name);
            let bytes = fs::read(&path).unwrap();
            for length in [0, 1, bytes.len() / 2, bytes.len() - 1] {
                replace(&path, &bytes[..length]);
                let error = refused(&diff);
                assert!(error.to_string().contains(name), "{error}");
            }
            replace(&path, &[&bytes[..], b"\0"].concat());
            refused(&diff);
            fs::remove_file(&path).unwrap();
            assert!(refused(&diff).to_string().contains("does not exist"));
            fs::write(&path, &bytes).unwrap();
        }
    }
    Chain::open(&diff).unwrap();
}

#[test]
fn older_and_newer_releases_are_told_from_damage() {
    let path = Path::new("/s/manifest.json");
    let of = |text: &str| manifest::decode(path, text.as_bytes()).unwrap_err().to_string();
    let newer = of(r#"{"manifest":{"version":2,"pages":[{"of":"tomorrow"}]},"signature":7}"#);
    assert!(newer.contains("newer release (format 2), this one reads 1: update"), "{newer}");
    let older = of(r#"{"seal":"","manifest":{"version":0}}"#);
    assert!(older.contains("older release (format 0), this one reads 1: take it again"), "{older}");
    for foreign in ["", "{}", "[]", "null", "\u{0}", r#"{"manifest":{}}"#, r#"{"manifest":{"version":-1}}"#] {
        assert!(of(foreign).contains("is not a manifest"), "{foreign}: {}", of(foreign));
    }
    assert!(of(r#"{"seal":"","manifest":{"version":1}}"#).contains("seal"));
}

#[test]
fn a_sealed_manifest_with_absurd_numbers_is_refused() {
    let scratch = scratch();
    let dir = scratch.path().join("s");
    take(&dir, &zeroed(MIB), None);
    let good = String::from_utf8(fs::read(dir.join(MANIFEST)).unwrap()).unwrap();
    let text = good.split_once(r#""manifest":"#).unwrap().1.strip_suffix("}\n").unwrap();
    let reseal = |text: &str| {
        let seal = crate::snapshot::files::digest(text.as_bytes());
        replace(&dir.join(MANIFEST), format!("{{\"seal\":\"{seal}\",\"manifest\":{text}}}\n").as_bytes());
    };
    reseal(text);
    Chain::open(&dir).unwrap();
    for (from, to) in [
        (r#""vcpus":2"#, r#""vcpus":0"#),
        (r#""vcpus":2"#, r#""vcpus":33"#),
        (r#""memory_mib":1"#, r#""memory_mib":0"#),
        (r#""memory_mib":1"#, r#""memory_mib":18446744073709551615"#),
        (r#""memory_mib":1"#, r#""memory_mib":2"#),
        (r#""guest_cid":3"#, r#""guest_cid":2"#),
        (r#""state_bytes":"#, r#""state_bytes":9999999"#),
        (r#""sums_bytes":"#, r#""sums_bytes":9999999"#),
        (r#""labels":{"#, r#""unknown":1,"labels":{"#),
    ] {
        assert!(text.contains(from), "{from} in {text}");
        reseal(&text.replacen(from, to, 1));
        refused(&dir);
    }
}

#[test]
fn what_is_no_regular_file_is_refused_at_once() {
    let scratch = scratch();
    let (_, dir) = chain_of_two(scratch.path());
    for name in [MANIFEST, STATE, SUMS, MEMORY] {
        let path = dir.join(name);
        let kept = scratch.path().join("kept");
        fs::rename(&path, &kept).unwrap();

        fs::create_dir(&path).unwrap();
        assert!(matches!(refused(&dir), SnapshotError::Foreign { .. }));
        fs::remove_dir(&path).unwrap();

        let c_path = CString::new(path.as_os_str().as_bytes()).unwrap();
        // SAFETY: the path is a C string that lives through the call.
        assert_eq!(unsafe { libc::mkfifo(c_path.as_ptr(), 0o600) }, 0);
        assert!(matches!(refused(&dir), SnapshotError::Foreign { .. }));
        fs::remove_file(&path).unwrap();

        drop(UnixListener::bind(&path).unwrap());
        assert!(matches!(refused(&dir), SnapshotError::Foreign { .. }));
        fs::remove_file(&path).unwrap();

        for target in [&path, &kept, Path::new("/dev/zero")] {
            symlink(target, &path).unwrap();
            assert!(matches!(refused(&dir), SnapshotError::Foreign { .. }));
            fs::remove_file(&path).unwrap();
        }
        fs::rename(&kept, &path).unwrap();
    }
    Chain::open(&dir).unwrap();

    let file = scratch.path().join("file");
    File::create(&file).unwrap();
    assert!(matches!(refused(&file), SnapshotError::Foreign { .. }));
    let circle = scratch.path().join("circle");
    symlink(&circle, &circle).unwrap();
    assert!(matches!(refused(&circle), SnapshotError::Foreign { .. }));
    assert!(matches!(refused(&scratch.path().join("nothing")), SnapshotError::Missing { .. }));
}
