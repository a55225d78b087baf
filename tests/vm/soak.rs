//! Many rounds of fork, exec and delete end with the host as it began.

use std::fs;

use ark_tests::{Rest, World};

/// Rounds, half of them in each of two threads, unless `ARK_SOAK_ROUNDS` says another number.
const ROUNDS: usize = 500;
/// Rounds before the host is looked at first: they fill what stays filled, such as heaps, caches and logs.
const FIRST: usize = 20;

fn daemon_descriptors(world: &World) -> usize {
    let pid = world.daemon_pid().expect("arkd runs");
    fs::read_dir(format!("/proc/{pid}/fd")).expect("its descriptors").count()
}

/// Resident anonymous memory of `arkd`, KiB.
fn daemon_anonymous_kib(world: &World) -> u64 {
    let pid = world.daemon_pid().expect("arkd runs");
    let text = fs::read_to_string(format!("/proc/{pid}/status")).expect("its status");
    let line = text.lines().find_map(|l| l.strip_prefix("RssAnon:")).expect("RssAnon");
    line.trim().trim_end_matches(" kB").trim().parse().expect("KiB")
}

fn files(world: &World) -> Vec<String> {
    let mut all = Vec::new();
    let mut open = vec![world.path().to_owned()];
    while let Some(dir) = open.pop() {
        for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.is_dir() && !path.is_symlink() {
                open.push(path.clone());
            }
            all.push(path.display().to_string());
        }
    }
    all.sort();
    all
}

/// Does `count` rounds, two at a time.
fn rounds(world: &World, count: usize) {
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let mut rest = Rest::connect(world);
                for _ in 0..count / 2 {
                    let (forked, _) = rest.call("POST", "/v1/agents/a1/fork", "{}");
                    let fork = forked["agents"][0]["id"].as_str().expect("an id").to_owned();
                    rest.exec_true(&fork);
                    rest.delete(&fork);
                }
            });
        }
    });
}

#[test]
fn five_hundred_rounds_of_fork_exec_and_delete_leave_the_host_as_it_was() {
    let count =
        std::env::var("ARK_SOAK_ROUNDS").map_or(ROUNDS, |text| text.parse().expect("a number of rounds"));
    let world = World::new();
    world.create("a1");
    rounds(&world, FIRST);
    let before = (world.processes().len(), daemon_descriptors(&world), files(&world));
    let memory = daemon_anonymous_kib(&world);
    rounds(&world, count);
    assert_eq!((world.processes().len(), daemon_descriptors(&world), files(&world)), before);
    let grown = daemon_anonymous_kib(&world).saturating_sub(memory);
    assert!(grown < 4096, "arkd grew by {grown} KiB in {count} rounds");
    world.end();
}
