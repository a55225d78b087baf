//! Bad input: each with a sentence and nothing left behind.

use std::fs;
use std::path::Path;

use ark_tests::{World, assets};
use ark_types::layout::Assets;

#[test]
fn impossible_sizes_are_refused_before_anything_starts() {
    let world = World::new();
    for (flag, value, word) in [
        ("--memory", "0", "memory"),
        ("--memory", "1", "memory"),
        ("--memory", "999999999", "memory"),
        ("--vcpus", "0", "vcpus"),
        ("--vcpus", "1000", "vcpus"),
    ] {
        let said = world.ark(["create", "--image", "base", "--name", "x", flag, value]);
        said.exits(125).complains_about(&[value, word]);
    }
    assert_eq!(world.ark(["ps", "-a", "--json"]).ok().json()["agents"].as_array().map(Vec::len), Some(0));
    assert_eq!(world.vmms(), []);
    world.end();
}

#[test]
fn an_unknown_image_is_refused_with_those_that_exist() {
    let world = World::new();
    let said = world.ark(["run", "--image", "nope", "--", "true"]);
    said.exits(125).complains_about(&["nope", "base", "python"]);
    world.end();
}

#[test]
fn a_name_taken_and_a_name_impossible_are_refused() {
    let world = World::new();
    world.create("a1");
    world.ark(["create", "--image", "base", "--name", "a1"]).exits(125).complains_about(&["a1", "belongs"]);
    world.ark(["create", "--image", "base", "--name", "Not A Name"]).exits(125).complains_about(&["name"]);
    assert_eq!(world.vmms().len(), 1);
    world.end();
}

#[test]
fn programs_that_cannot_run_have_dockers_exit_codes() {
    let world = World::new();
    world.create("a1");
    world.ark(["exec", "a1", "--", "no-such-program"]).exits(127).complains_about(&["no-such-program"]);
    world.ark(["exec", "a1", "--", "/etc/passwd"]).exits(126).complains_about(&["/etc/passwd"]);
    let bad_dir = world.ark(["exec", "--workdir", "/no/such/dir", "a1", "--", "true"]);
    bad_dir.exits(126).complains_about(&["/no/such/dir"]);
    world
        .ark(["exec", "--user", "nobody-here", "a1", "--", "true"])
        .exits(125)
        .complains_about(&["nobody-here"]);
    world
        .ark(["run", "--image", "base", "--", "no-such-program"])
        .exits(127)
        .complains_about(&["no-such-program"]);
    world.ark(["exec", "nobody", "--", "true"]).exits(125).complains_about(&["nobody"]);
    assert_eq!(world.vmms().len(), 1, "the run's agent is gone");
    world.end();
}

/// A copy of the assets that shares everything but `kernel/` and `images/`, to be damaged.
fn damaged(world: &Path, damage: impl Fn(&Path)) -> Assets {
    let dir = world.join("assets");
    let from = assets().0;
    fs::create_dir_all(dir.join("kernel")).expect("mkdir");
    fs::create_dir_all(dir.join("images")).expect("mkdir");
    std::os::unix::fs::symlink(from.join("bin"), dir.join("bin")).expect("symlink");
    for file in ["kernel/vmlinux", "kernel/guestd.cpio", "images/base.erofs", "images/base.json"] {
        fs::copy(from.join(file), dir.join(file)).expect("copy");
    }
    damage(&dir);
    Assets(dir)
}

/// What is done to a kernel, and its name.
type Damage = (&'static str, fn(&Path));

#[test]
fn a_kernel_that_is_missing_truncated_or_no_elf_is_refused() {
    let cases: [Damage; 3] = [
        ("missing", |k| fs::remove_file(k).expect("rm")),
        ("truncated", |k| {
            fs::File::options().write(true).open(k).and_then(|f| f.set_len(100_000)).expect("cut");
        }),
        ("not ELF", |k| fs::write(k, "MZ this is no kernel".repeat(1000)).expect("write")),
    ];
    for (what, damage) in cases {
        let scratch = tempfile::tempdir().expect("a directory");
        let world = World::with_assets(damaged(scratch.path(), |dir| damage(&dir.join("kernel/vmlinux"))));
        let said = world.ark(["run", "--image", "base", "--", "true"]).exits(125);
        assert!(said.stderr.contains("vmlinux"), "{what}: {:?}", said.stderr);
        said.complains_about(&["kernel"]);
        world.end();
    }
}

#[test]
fn a_corrupt_image_or_manifest_is_refused() {
    let flip = |dir: &Path| {
        let file = dir.join("images/base.erofs");
        let mut bytes = fs::read(&file).expect("read");
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        fs::write(&file, bytes).expect("write");
    };
    let cut = |dir: &Path| {
        let file = fs::File::options().write(true).open(dir.join("images/base.erofs")).expect("open");
        file.set_len(5000).expect("cut");
    };
    let garble = |dir: &Path| fs::write(dir.join("images/base.json"), "{\"name\": 3").expect("write");
    let cases: [&dyn Fn(&Path); 3] = [&flip, &cut, &garble];
    for damage in cases {
        let scratch = tempfile::tempdir().expect("a directory");
        let world = World::with_assets(damaged(scratch.path(), damage));
        world.ark(["run", "--image", "base", "--", "true"]).exits(125).complains_about(&["base"]);
        assert_eq!(world.vmms(), []);
        world.end();
    }
}

/// A file system of one page over a directory, for as long as this lives.
struct Full<'a>(&'a Path);

impl<'a> Full<'a> {
    fn mount(over: &'a Path) -> Self {
        let mount = std::process::Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=4k,nr_inodes=3", "tmpfs"])
            .arg(over)
            .status();
        assert!(mount.expect("mount runs").success(), "VM tests run as root");
        Self(over)
    }
}

impl Drop for Full<'_> {
    fn drop(&mut self) {
        let umount = std::process::Command::new("umount").arg(self.0).status();
        assert!(
            umount.is_ok_and(|s| s.success()) || std::thread::panicking(),
            "{} stays mounted",
            self.0.display()
        );
    }
}

#[test]
fn a_host_without_room_for_an_agents_directory_says_so() {
    let world = World::new();
    let _ = world.ark(["ps"]).ok();
    let agents = world.run_dir().agents();
    fs::create_dir_all(&agents).expect("mkdir");
    let full = Full::mount(&agents);
    let said = world.ark(["create", "--image", "base", "--name", "a1"]).exits(125);
    let left = fs::read_dir(&agents).expect("readable").count();
    drop(full);
    said.complains_about(&["space"]);
    assert_eq!(left, 0, "nothing half made stays");
    world.end();
}
