//! Templates, agents forked from them, and their warm interpreters.

use std::time::Duration;

use ark_tests::{World, eventually};
use nix::sys::signal::Signal;

#[test]
fn a_warm_template_gives_agents_whose_interpreter_has_imported() {
    let world = World::new();
    let build =
        ["template", "build", "py", "--image", "python", "--warm", "import numpy, json; ready = [1, 2]"];
    let _ = world.ark(build).ok();
    let said = world.ark(["run", "--template", "py", "--", "python3", "-c", "print(1)"]).ok();
    assert_eq!(said.stdout, "1\n");
    let said = world.ark(["eval", "--template", "py", "import numpy; numpy.arange(3).sum() + ready[1]"]).ok();
    assert!(said.stdout.trim() == "5" || said.stdout.contains("(5)"), "{said:?}");
    let _ = world.ark(["create", "--template", "py", "--name", "a1"]).ok();
    let _ = world.ark(["create", "--template", "py", "--name", "a2"]).ok();
    assert_eq!(world.inspect("a1")["origin"]["from"], "template");
    let _ = world.ark(["eval", "--agent", "a1", "ready.append(3)"]).ok();
    assert_eq!(world.ark(["eval", "--agent", "a1", "ready"]).ok().stdout, "[1, 2, 3]\n");
    assert_eq!(world.ark(["eval", "--agent", "a2", "ready"]).ok().stdout, "[1, 2]\n");
    world.ark(["template", "rm", "py"]).exits(125).complains_about(&["py", "agents"]);
    for name in ["a1", "a2"] {
        let _ = world.ark(["rm", name]).ok();
    }
    let again = world.ark(build).ok();
    assert_eq!(
        world.ark(["templates", "--json"]).ok().json()["templates"].as_array().map(Vec::len),
        Some(1),
        "{again:?}"
    );
    let _ = world.ark(["template", "rm", "py"]).ok();
    assert_eq!(world.stored("templates").len(), 0);
    world.end();
}

#[test]
fn eval_tells_output_value_and_exception_apart() {
    let world = World::new();
    world.create_fork("python", "a1");
    let said = world
        .ark(["eval", "--agent", "a1", "import sys; print('out'); print('err', file=sys.stderr); 6*7"])
        .ok();
    assert_eq!((said.stdout.as_str(), said.stderr.as_str()), ("out\n42\n", "err\n"));
    let said = world.ark(["eval", "--agent", "a1", "1/0"]).exits(1);
    assert!(said.stderr.contains("ZeroDivisionError"), "{said:?}");
    let said = world.ark(["eval", "--agent", "a1", "--timeout", "1", "x = 5\nwhile True: pass"]);
    assert_ne!(said.code, 0);
    assert_eq!(world.ark(["eval", "--agent", "a1", "x"]).ok().stdout, "5\n");
    world.create("a2");
    world.ark(["eval", "--agent", "a2", "1"]).exits(125).complains_about(&["python"]);
    world.end();
}

#[test]
fn a_warm_up_that_fails_or_never_ends_leaves_no_template() {
    let world = World::new();
    let build = |warm: &str| {
        world
            .ark(["template", "build", "bad", "--image", "python", "--timeout", "5", "--warm", warm])
            .exits(125)
    };
    build("import nothing_of_that_name").complains_about(&["warm-up", "ModuleNotFoundError"]);
    build("while True: pass").complains_about(&["warm-up", "5 s"]);
    build("import os; os._exit(3)").complains_about(&["warm-up"]);
    let said = world.ark(["template", "build", "bad", "--image", "base", "--warm", "1"]).exits(125);
    said.complains_about(&["base", "evaluator"]);
    world.ark(["template", "build", "bad", "--image", "nothing"]).exits(125).complains_about(&["nothing"]);
    world
        .ark(["run", "--template", "bad", "--", "true"])
        .exits(125)
        .complains_about(&["bad", "ark template"]);
    assert_eq!(world.vmms(), []);
    assert_eq!(world.stored("templates").len(), 0);
    world.end();
}

#[test]
fn an_image_has_a_default_template_and_cold_agents_do_without() {
    let world = World::new();
    world.create_fork("base", "a1");
    assert_eq!(world.inspect("a1")["origin"]["from"], "template");
    assert_eq!(world.inspect("a1")["origin"]["name"], "default-base");
    let _ = world.ark(["create", "--image", "base", "--name", "a2", "--cold"]).ok();
    assert_eq!(world.inspect("a2")["origin"]["from"], "boot");
    world.ark(["receipt", "a2"]).exits(125).complains_about(&["a2", "boot"]);
    world.end();
}

#[test]
fn a_daemon_killed_while_a_template_is_built_leaves_nothing_of_it() {
    let world = World::new();
    let _ = world.ark(["ps"]).ok();
    let building = world.start(["template", "build", "py", "--image", "python", "--warm", "import numpy"]);
    eventually("its guest boots", Duration::from_secs(60), || !world.vmms().is_empty());
    world.end_daemon(Signal::SIGKILL);
    building.wait().exits(125).complains_about(&["arkd"]);
    let templates = world.ark(["templates", "--json"]).ok().json();
    assert_eq!(templates["templates"].as_array().map(Vec::len), Some(0));
    eventually("no VMM is left", Duration::from_secs(20), || world.vmms().is_empty());
    assert_eq!(world.stored("templates").len(), 0);
    world.end();
}

#[test]
fn the_pool_gives_agents_that_passed_every_check_under_their_own_names() {
    let world = World::new().with_pool(1, 2);
    world.create_fork("base", "a1");
    for i in 2..6 {
        std::thread::sleep(Duration::from_secs(3));
        let name = format!("a{i}");
        world.create_fork("base", &name);
        assert_eq!(world.sh(&name, "hostname").ok().stdout, format!("{name}\n"));
        let receipt = world.receipt(&name);
        assert_eq!(receipt["name"], name.as_str());
        assert!(
            receipt["checks"].as_array().expect("checks").iter().all(|c| c["passed"] == true),
            "{receipt}"
        );
    }
    world.end();
}
