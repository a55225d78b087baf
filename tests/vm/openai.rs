//! `OpenAI`'s own client for Python, from within agents that have no network.
//!
//! It is in an image that only tests have: `make test-images` builds it, `tests/on-kvm.sh` says where it is.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use ark_tests::{World, assets, require_kvm};
use ark_types::layout::Assets;

/// What the client is to check, the same as on the host.
const CLIENT: &str = include_str!("../openai/client.py");

/// The assets under test, and the image `openai` with them, all of them links in `dir`.
fn with_client(dir: &Path) -> Assets {
    let tree = std::env::var_os("ARK_TEST_TREE").map(PathBuf::from);
    let tree = tree.expect("ARK_TEST_TREE names the images for tests; run `make test-images`");
    let all = Assets(dir.to_owned());
    fs::create_dir(all.images()).expect("a directory");
    for part in ["bin", "kernel", "models"] {
        symlink(assets().0.join(part), dir.join(part)).expect("a link");
    }
    for from in [assets().images(), tree] {
        for entry in fs::read_dir(&from).expect("a directory of images") {
            let entry = entry.expect("an image");
            symlink(entry.path(), all.images().join(entry.file_name())).expect("a link");
        }
    }
    all
}

#[test]
fn its_client_works_in_an_agent_without_a_network_if_that_is_allowed() {
    require_kvm();
    let dir = tempfile::tempdir().expect("a directory");
    let world = World::with_assets(with_client(dir.path()));
    // Imported once for both: that takes a while where the processor is emulated.
    let build = ["template", "build", "warm", "--image", "openai", "--warm", "import openai"];
    let _ = world.ark(build).ok();
    for (name, allow) in [("a1", &["--allow", "inference"][..]), ("a2", &[])] {
        let create = ["create", "--template", "warm", "--name", name];
        let _ = world.ark(create.into_iter().chain(allow.iter().copied())).ok();
    }
    let client = |name, arguments| {
        let code = format!("import sys; sys.argv = {arguments}\n{CLIENT}");
        world.ark(["eval", "--agent", name, &code]).ok().stdout
    };
    let agrees = client("a1", "['client.py']");
    assert!(agrees.starts_with("openai ") && agrees.ends_with(" agrees\n"), "{agrees}");
    assert_eq!(client("a2", "['client.py', 'refused']"), agrees);
    assert_eq!(world.sh("a1", "ls /sys/class/net").ok().stdout, "lo\n", "nothing but loopback");
    world.end();
}
