//! Many rounds of fork, exec and delete end with the host as it began.

use std::fs;

use ark_tests::World;

/// Rounds when `ARK_SOAK_ROUNDS` names none.
const ROUNDS: usize = 25;

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

#[test]
fn rounds_of_fork_exec_and_delete_leave_the_host_as_it_was() {
    let rounds = std::env::var("ARK_SOAK_ROUNDS").ok().and_then(|n| n.parse().ok()).unwrap_or(ROUNDS);
    let world = World::new();
    world.create("a1");
    let round = |i: usize| {
        let fork = world.fork("a1", 1).remove(0);
        assert_eq!(world.sh(&fork, &format!("echo {i}")).ok().stdout, format!("{i}\n"));
        let _ = world.ark(["rm", &fork]).ok();
    };
    // The first rounds fill what stays filled: heaps, caches, logs.
    (0..5).for_each(round);
    let before = (world.processes().len(), daemon_descriptors(&world), files(&world));
    let memory = daemon_anonymous_kib(&world);
    (0..rounds).for_each(round);
    assert_eq!((world.processes().len(), daemon_descriptors(&world), files(&world)), before);
    let grown = daemon_anonymous_kib(&world).saturating_sub(memory);
    assert!(grown < 4096, "arkd grew by {grown} KiB in {rounds} rounds");
    world.end();
}
