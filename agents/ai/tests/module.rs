//! The Python module `ark` of image python, by its own tests.

use std::path::Path;
use std::process::Command;

#[test]
fn the_python_module_passes_its_tests() {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let ran = Command::new("python3")
        .args(["-B", "-W", "error"])
        .arg(here.join("tests/module.py"))
        .arg(here.join("../../guest-images/python"))
        .output()
        .unwrap();
    assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
}
