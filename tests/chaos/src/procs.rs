//! Processes of this host, from `/proc`.

use std::fs;

/// One process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Proc {
    /// Process id.
    pub pid: i32,
    /// Arguments, joined by spaces.
    pub command: String,
}

/// Processes whose arguments or environment contain `text`, zombies and this process left out.
#[must_use]
pub fn processes_mentioning(text: &str) -> Vec<Proc> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    let own = i32::try_from(std::process::id()).ok();
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok())
        .filter(|pid| Some(*pid) != own)
        .filter_map(|pid| {
            let read = |file: &str| {
                let raw = fs::read(format!("/proc/{pid}/{file}")).ok()?;
                Some(String::from_utf8_lossy(&raw).replace('\0', " ").trim().to_owned())
            };
            let command = read("cmdline")?;
            let found = command.contains(text) || read("environ").is_some_and(|e| e.contains(text));
            found.then_some(Proc { pid, command })
        })
        .collect()
}
