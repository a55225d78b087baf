//! Booting: one agent, several processors, many agents, both images.

use ark_tests::World;

#[test]
fn a_python_program_runs_and_its_exit_code_comes_back() {
    let world = World::new();
    let said = world.ark(["run", "--image", "python", "--", "python3", "-c", "print(6*7)"]).ok();
    assert_eq!(said.stdout, "42\n");
    let said = world.ark(["run", "--image", "python", "--", "python3", "-c", "raise SystemExit(7)"]);
    let _ = said.exits(7);
    world.end();
}

#[test]
fn the_python_image_has_numpy_and_pip() {
    let world = World::new();
    let program =
        "import numpy, sys, ssl, sqlite3, json, pip; print(int(numpy.arange(4).sum()), sys.version_info[:2])";
    let said = world.ark(["run", "--image", "python", "--", "python3", "-c", program]).ok();
    assert_eq!(said.stdout, "6 (3, 11)\n");
    world.end();
}

#[test]
fn a_guest_sees_the_processors_and_memory_it_was_given() {
    let world = World::new();
    let _ = world.ark(["create", "--image", "base", "--name", "a4", "--vcpus", "4", "--memory", "300"]).ok();
    assert_eq!(world.sh("a4", "nproc").ok().stdout, "4\n");
    let online = world.sh("a4", "cat /sys/devices/system/cpu/online").ok().stdout;
    assert_eq!(online, "0-3\n");
    let total = world.sh("a4", "sed -n 's/^MemTotal: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo").ok().stdout;
    let kib: u64 = total.trim().parse().expect("a number");
    assert!((200 * 1024..=300 * 1024).contains(&kib), "{kib} KiB of 300 MiB");
    world.end();
}

#[test]
fn the_guest_is_a_tidy_linux() {
    let world = World::new();
    world.create("a1");
    let facts = world
        .sh("a1", "id -u; hostname; cat /proc/1/comm; touch /root/x && echo rw; ls /dev/pts >/dev/null && echo pts; echo $PATH; ping -c1 127.0.0.1 >/dev/null && echo lo")
        .ok()
        .stdout;
    let lines: Vec<_> = facts.lines().collect();
    let path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    assert_eq!(lines, ["0", "a1", "ark-guestd", "rw", "pts", path, "lo"]);
    world.end();
}

#[test]
fn the_guests_clock_is_the_hosts() {
    let world = World::new();
    world.create("a1");
    let host =
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970").as_secs();
    let guest: u64 = world.sh("a1", "date +%s").ok().stdout.trim().parse().expect("seconds");
    assert!(guest.abs_diff(host) <= 5, "guest {guest}, host {host}");
    world.end();
}

#[test]
fn twenty_agents_created_at_once_all_come_up() {
    let world = World::new();
    // The first command starts the daemon; twenty at once must not have to.
    let _ = world.ark(["ps"]).ok();
    let names: Vec<String> = (0..20).map(|i| format!("many-{i}")).collect();
    let creating: Vec<_> = names
        .iter()
        .map(|name| world.start(["create", "--image", "base", "--name", name, "--memory", "128"]))
        .collect();
    for one in creating {
        let _ = one.wait().ok();
    }
    assert_eq!(world.vmms().len(), 20);
    let executing: Vec<_> = names.iter().map(|name| world.start(["exec", name, "--", "hostname"])).collect();
    for (name, one) in names.iter().zip(executing) {
        assert_eq!(one.wait().ok().stdout.trim(), name);
    }
    let all = ["rm"].into_iter().chain(names.iter().map(String::as_str));
    let _ = world.ark(all).ok();
    assert_eq!(world.vmms(), []);
    world.end();
}
