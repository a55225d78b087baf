//! Taking snapshots: names, forks, crashes, full disks.

use std::ffi::CString;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use ark_types::vmm::ExitReason;
use vm_memory::{Bytes, GuestAddress};

use super::{MIB, STATE_BYTES, about, chain_of_two, content, map, scratch, take, zeroed};
use crate::snapshot::{Chain, Draft, SnapshotError};

/// Runs `work` in a child made by fork(2), as a VMM does, and returns its exit status.
fn in_child(work: impl FnOnce() -> i32) -> i32 {
    // SAFETY: the child runs `work`, which takes no lock that another thread may hold, and leaves by _exit.
    let child = unsafe { libc::fork() };
    assert!(child >= 0);
    if child == 0 {
        let status = work();
        // SAFETY: ends the child at once.
        unsafe { libc::_exit(status) };
    }
    let mut status = 0;
    // SAFETY: the pointer is that of `status`.
    assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
    assert!(libc::WIFEXITED(status), "{status:#x}");
    libc::WEXITSTATUS(status)
}

#[test]
fn a_child_writes_the_moment_it_was_made() {
    let scratch = scratch();
    let dir = scratch.path().join("s");
    let memory = zeroed(4 * MIB);
    memory.write_slice(&[5; 100_000], GuestAddress(MIB)).unwrap();
    let before = content(&memory, 4 * MIB);
    let draft = Draft::begin(&dir, about(), None).unwrap();
    let id = draft.id();
    let mut pipe = [0; 2];
    // SAFETY: the pointer is that of two integers.
    assert_eq!(unsafe { libc::pipe(pipe.as_mut_ptr()) }, 0);
    let waits = &memory;
    let (child_draft, parent_memory) = (draft, &memory);
    std::thread::scope(|scope| {
        scope.spawn(move || {
            // The guest goes on as soon as the child is there.
            let mut byte = [0];
            // SAFETY: the pointer is that of one byte.
            assert_eq!(unsafe { libc::read(pipe[0], byte.as_mut_ptr().cast(), 1) }, 1);
            parent_memory.write_slice(&[6; 1 << 20], GuestAddress(0)).unwrap();
        });
        let status = in_child(move || {
            // SAFETY: the pointer is that of one byte.
            unsafe { libc::write(pipe[1], [1_u8].as_ptr().cast(), 1) };
            std::thread::sleep(std::time::Duration::from_millis(50));
            i32::from(child_draft.write(waits, STATE_BYTES).is_err())
        });
        assert_eq!(status, 0);
    });
    let chain = Chain::open(&dir).unwrap();
    assert_eq!(chain.manifest().id, id);
    assert!(content(&map(&dir), 4 * MIB) == before);
    assert!(content(&memory, MIB).iter().all(|byte| *byte == 6));
}

#[test]
fn it_is_there_whole_or_not_at_all_and_nobody_can_change_it() {
    let scratch = scratch();
    let (full, diff) = chain_of_two(scratch.path());
    for dir in [&full, &diff] {
        let mut names: Vec<_> = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, ["manifest.json", "memory", "state", "sums"]);
        for name in names {
            assert_eq!(fs::metadata(dir.join(name)).unwrap().permissions().mode() & 0o777, 0o400);
        }
        assert_eq!(fs::metadata(dir).unwrap().permissions().mode() & 0o777, 0o700);
    }
    assert_eq!(fs::read_dir(scratch.path()).unwrap().count(), 2, "nothing but the snapshots");
}

#[test]
fn zeroes_are_holes() {
    let scratch = scratch();
    let dir = scratch.path().join("s");
    let memory = zeroed(8 * MIB);
    memory.write_slice(&vec![0; 4 << 20], GuestAddress(0)).unwrap();
    memory.write_slice(&[1], GuestAddress(6 * MIB)).unwrap();
    assert_eq!(take(&dir, &memory, None).written_bytes, 4096);
    use std::os::unix::fs::MetadataExt;
    let file = fs::metadata(dir.join("memory")).unwrap();
    assert_eq!(file.len(), 8 * MIB);
    assert!(file.blocks() * 512 < MIB, "{}", file.blocks());
}

#[test]
fn a_name_that_cannot_be_had_is_refused_with_a_sentence() {
    let scratch = scratch();
    let dir = scratch.path().join("s");
    let refused = |dir: &Path| match Draft::begin(dir, about(), None).unwrap_err() {
        error @ SnapshotError::Place { .. } => error.to_string(),
        error => panic!("{error}"),
    };
    assert!(refused(Path::new("s")).contains("absolute"));
    assert!(refused(Path::new("/")).contains("absolute"));
    assert!(refused(scratch.path()).contains("exists already"));
    assert!(refused(&dir.join("deeper")).contains("make that first"));
    let draft = Draft::begin(&dir, about(), None).unwrap();
    assert!(refused(&dir).contains("another one is being written"));
    draft.abandon();
    assert_eq!(fs::read_dir(scratch.path()).unwrap().count(), 0);
}

#[test]
fn what_a_killed_writer_left_is_cleared_away() {
    let scratch = scratch();
    let (dir, tmp) = (scratch.path().join("s"), scratch.path().join("s.tmp"));
    fs::create_dir_all(tmp.join("memory")).unwrap();
    fs::write(tmp.join("memory/deeper"), b"x").unwrap();
    fs::write(tmp.join("manifest.json"), b"{}").unwrap();
    std::os::unix::fs::symlink("/", tmp.join("link")).unwrap();
    take(&dir, &zeroed(MIB), None);
    assert!(Chain::open(&dir).is_ok() && !tmp.exists() && Path::new("/").exists());
}

#[test]
fn a_manifest_that_could_not_be_read_back_is_not_written() {
    let scratch = scratch();
    let mut wide = about();
    wide.labels.insert("long".to_owned(), "x".repeat(1 << 20));
    let mut none = about();
    none.vcpus = 0;
    for (about, says) in [(wide, "labels"), (none, "processors")] {
        let draft = Draft::begin(&scratch.path().join("s"), about, None).unwrap();
        let error = draft.write(&zeroed(MIB), STATE_BYTES).unwrap_err();
        assert!(matches!(&error, SnapshotError::Bounds(what) if what.contains(says)), "{error}");
        assert_eq!(fs::read_dir(scratch.path()).unwrap().count(), 0);
    }
}

/// What a child says of a write that had to fail for want of space.
const FULL: i32 = 3;

fn fails_for_space(dir: &Path, draft: Draft, memory: &vm_memory::GuestMemoryMmap) -> i32 {
    match draft.write(memory, STATE_BYTES) {
        Err(error @ SnapshotError::Full { .. })
            if error.exit_reason() == ExitReason::HostError && error.to_string().contains("free some") =>
        {
            let tmp = dir.with_extension("tmp");
            if dir.exists() || tmp.exists() { 4 } else { FULL }
        }
        Err(_) => 5,
        Ok(_) => 6,
    }
}

#[test]
fn a_limit_on_file_sizes_is_a_full_disk() {
    let scratch = scratch();
    let dir = scratch.path().join("s");
    let memory = zeroed(4 * MIB);
    let draft = Draft::begin(&dir, about(), None).unwrap();
    let status = in_child(|| {
        let limit = libc::rlimit { rlim_cur: MIB, rlim_max: MIB };
        // SAFETY: the pointer is that of the limit.
        let limited = unsafe { libc::setrlimit(libc::RLIMIT_FSIZE, &raw const limit) };
        // SAFETY: changes what this process does about a signal, nothing else.
        let ignored = unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
        if limited != 0 || ignored == libc::SIG_ERR { 7 } else { fails_for_space(&dir, draft, &memory) }
    });
    assert_eq!(status, FULL);
}

#[test]
fn a_full_disk_leaves_nothing_behind() {
    /// A child that may not make a file system of its own cannot try.
    const NOT_ALLOWED: i32 = 77;
    let scratch = scratch();
    let memory = zeroed(4 * MIB);
    memory.write_slice(&vec![3; 3 << 20], GuestAddress(0)).unwrap();
    let mount = CString::new(scratch.path().as_os_str().as_bytes()).unwrap();
    let status = in_child(|| {
        // SAFETY: concerns this process alone, no memory of ours.
        if unsafe { libc::unshare(libc::CLONE_NEWNS) } != 0
            // SAFETY: as above; single-threaded after fork, as a new user namespace demands.
            && unsafe { libc::unshare(libc::CLONE_NEWUSER | libc::CLONE_NEWNS) } != 0
        {
            return NOT_ALLOWED;
        }
        let (none, tmpfs, size) = (c"none".as_ptr(), c"tmpfs".as_ptr(), c"size=1m".as_ptr());
        // SAFETY: C strings and null, all living through the call.
        unsafe {
            libc::mount(
                none,
                c"/".as_ptr(),
                std::ptr::null(),
                libc::MS_REC | libc::MS_PRIVATE,
                std::ptr::null(),
            )
        };
        // SAFETY: C strings that live through the call.
        if unsafe { libc::mount(tmpfs, mount.as_ptr(), tmpfs, 0, size.cast()) } != 0 {
            return NOT_ALLOWED;
        }
        let dir = scratch.path().join("s");
        match Draft::begin(&dir, about(), None) {
            Ok(draft) => fails_for_space(&dir, draft, &memory),
            Err(_) => 8,
        }
    });
    assert!([FULL, NOT_ALLOWED].contains(&status), "{status}");
}

#[test]
fn a_snapshot_that_its_writer_named_but_told_nobody_of_goes_and_others_stay() {
    let dir = scratch();
    let (ours, theirs) = (dir.path().join("ours"), dir.path().join("theirs"));
    let memory = zeroed(MIB);
    take(&theirs, &memory, None);
    let draft = Draft::begin(&ours, about(), None).unwrap();
    // SAFETY: the child only writes the snapshot and ends; of the other threads' locks it needs the allocator's alone, which
    // the C library keeps usable.
    match unsafe { libc::fork() } {
        0 => {
            let written = draft.write(&memory, STATE_BYTES).is_ok();
            // SAFETY: ends the process at once.
            unsafe { libc::_exit(i32::from(!written)) }
        }
        child => {
            let mut status = 0;
            // SAFETY: the pointer is to an integer.
            assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
            assert_eq!(status, 0);
        }
    }
    assert!(Chain::open(&ours).is_ok());
    draft.abandon();
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    let taken = Draft::begin(&ours, about(), None).unwrap();
    fs::rename(&theirs, &ours).unwrap();
    taken.abandon();
    assert!(Chain::open(&ours).is_ok(), "another's snapshot of that name stays");
}
