//! Files in and out of an agent.

use std::fs;

use ark_tests::World;

/// A file of `len` bytes that are not all the same, in `world`.
fn make(world: &World, name: &str, len: usize) -> Vec<u8> {
    let mut state = 0x2545_f491u32;
    let bytes: Vec<u8> = (0..len)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            state.to_be_bytes()[0]
        })
        .collect();
    fs::write(world.path().join(name), &bytes).expect("the file can be written");
    bytes
}

#[test]
fn files_of_no_one_and_many_bytes_survive_the_round_trip() {
    let world = World::new();
    world.create("a1");
    for len in [0, 1, 65_536, 3_000_001] {
        let name = format!("f{len}");
        let sent = make(&world, &name, len);
        let _ = world.ark(["cp", &name, "a1:/tmp/"]).ok();
        let _ = world.ark(["cp", &format!("a1:/tmp/{name}"), "back"]).ok();
        assert!(fs::read(world.path().join("back")).expect("it came back") == sent, "{len} bytes");
    }
    world.end();
}

#[test]
fn two_hundred_megabytes_survive_the_round_trip() {
    let world = World::new();
    let _ = world.ark(["create", "--image", "base", "--name", "a1", "--memory", "768"]).ok();
    let sent = make(&world, "big", 200_000_000);
    let _ = world.ark(["cp", "big", "a1:/root/big"]).ok();
    assert_eq!(world.sh("a1", "stat -c %s /root/big").ok().stdout, "200000000\n");
    let _ = world.ark(["cp", "a1:/root/big", "back"]).ok();
    assert!(fs::read(world.path().join("back")).expect("it came back") == sent);
    world.end();
}

#[test]
fn the_mode_comes_along_and_parents_are_made() {
    use std::os::unix::fs::PermissionsExt;
    let world = World::new();
    world.create("a1");
    make(&world, "tool", 10);
    fs::set_permissions(world.path().join("tool"), fs::Permissions::from_mode(0o750)).expect("chmod");
    let _ = world.ark(["cp", "tool", "a1:/opt/new/dir/tool"]).ok();
    assert_eq!(world.sh("a1", "stat -c %a /opt/new/dir/tool").ok().stdout, "750\n");
    world.end();
}

#[test]
fn what_is_not_there_is_named() {
    let world = World::new();
    world.create("a1");
    world.ark(["cp", "a1:/no/such", "x"]).exits(125).complains_about(&["/no/such"]);
    assert!(!world.path().join("x").exists(), "a failed download leaves no file");
    world.ark(["cp", "nothing-here", "a1:/tmp/"]).exits(125).complains_about(&["nothing-here"]);
    world.ark(["cp", "nobody:/etc/passwd", "x"]).exits(125).complains_about(&["nobody"]);
    world.end();
}

#[test]
fn a_broken_upload_leaves_nothing_behind() {
    let world = World::new();
    world.create("a1");
    let mut running = world.start(["cp", "-", "a1:/tmp/half"]);
    running.write(&[7; 300_000]);
    ark_tests::eventually("the upload has begun", std::time::Duration::from_secs(10), || {
        !world.sh("a1", "ls -A /tmp").ok().stdout.is_empty()
    });
    running.signal(nix::sys::signal::Signal::SIGKILL);
    let _ = running.wait();
    ark_tests::eventually("the guest tidied up", std::time::Duration::from_secs(10), || {
        world.sh("a1", "ls -A /tmp").ok().stdout.is_empty()
    });
    world.end();
}

#[test]
fn a_full_guest_disk_is_a_sentence() {
    let world = World::new();
    world.create("a1");
    make(&world, "big", 150_000_000);
    world.ark(["cp", "big", "a1:/root/big"]).exits(125).complains_about(&["/root/big", "space"]);
    assert_eq!(world.sh("a1", "ls -A /root").ok().stdout.trim(), "", "nothing half written stays");
    world.end();
}
