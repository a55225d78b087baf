//! Who a program runs as: users and groups from `/etc/passwd` and `/etc/group` (passwd(5), group(5)).
//!
//! The files are read directly: the C library's look-up loads plug-ins, which a static program cannot. Docker's habits
//! hold: an unknown number is a user with group 0 and home `/`; a group named with the user is the only one.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use ark_types::guest::{ErrorCode, GuestError};

use crate::failure::failure;

/// Most bytes read of either file.
const MAX_FILE: u64 = 1 << 20;
/// Most supplementary groups (`NGROUPS_MAX`, linux/limits.h).
const MAX_GROUPS: usize = 65_536;

/// A user to run as.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct User {
    /// User id.
    pub(crate) uid: u32,
    /// Primary group.
    pub(crate) gid: u32,
    /// Supplementary groups.
    pub(crate) groups: Vec<u32>,
    /// Name, if the number has one.
    pub(crate) name: Option<String>,
    /// Home directory.
    pub(crate) home: String,
}

/// A line of passwd(5).
struct Passwd<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

fn passwd_line(line: &str) -> Option<Passwd<'_>> {
    let mut fields = line.split(':');
    let (name, _password) = (fields.next()?, fields.next()?);
    let (uid, gid) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
    let (_full_name, home) = (fields.next()?, fields.next()?);
    Some(Passwd { name, uid, gid, home })
}

/// A line of group(5): name, number, members.
fn group_line(line: &str) -> Option<(&str, u32, &str)> {
    let mut fields = line.split(':');
    let (name, _password) = (fields.next()?, fields.next()?);
    Some((name, fields.next()?.parse().ok()?, fields.next().unwrap_or("")))
}

fn read(path: &Path) -> String {
    let mut bytes = Vec::new();
    // A file that cannot be read has no users; numbers go on working.
    if let Ok(file) = File::open(path) {
        let _ = file.take(MAX_FILE).read_to_end(&mut bytes);
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Looks up `spec` (`user`, `user:group`, names or numbers) in the files below `root`.
pub(crate) fn look_up(root: &Path, spec: &str) -> Result<User, GuestError> {
    resolve(spec, &read(&root.join("etc/passwd")), || read(&root.join("etc/group")))
}

/// [`look_up`] with the files' texts.
fn resolve(spec: &str, passwd: &str, group: impl FnOnce() -> String) -> Result<User, GuestError> {
    let unknown = |what: &str, name: &str, file: &str| {
        let why =
            format!("there is no {what} {name:?} in the agent's {file}; use a name from there or a number");
        failure(ErrorCode::UnknownUser, why)
    };
    let (user, wanted_group) = spec.split_once(':').map_or((spec, None), |(u, g)| (u, Some(g)));
    let number = user.parse::<u32>().ok();
    let mut entries = passwd.lines().filter_map(passwd_line);
    let entry = entries.find(|e| e.name == user || Some(e.uid) == number);
    let mut found = match (entry, number) {
        (Some(e), _) => User {
            uid: e.uid,
            gid: e.gid,
            groups: Vec::new(),
            name: Some(e.name.to_owned()),
            home: if e.home.is_empty() { "/".to_owned() } else { e.home.to_owned() },
        },
        // u32::MAX means "unchanged" to setresuid(2).
        (None, Some(uid)) if uid != u32::MAX => {
            User { uid, gid: 0, groups: Vec::new(), name: None, home: "/".to_owned() }
        }
        (None, _) => return Err(unknown("user", user, "/etc/passwd")),
    };
    let text = group();
    if let Some(wanted) = wanted_group {
        let number = wanted.parse::<u32>().ok().filter(|&gid| gid != u32::MAX);
        let by_name =
            text.lines().filter_map(group_line).find(|(name, ..)| *name == wanted).map(|(_, gid, _)| gid);
        found.gid = by_name.or(number).ok_or_else(|| unknown("group", wanted, "/etc/group"))?;
    } else if let Some(name) = &found.name {
        let member = |members: &str| members.split(',').any(|m| m.trim() == name);
        let groups = text.lines().filter_map(group_line).filter(|(.., members)| member(members));
        found.groups = groups.map(|(_, gid, _)| gid).take(MAX_GROUPS).collect();
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str =
        "root:x:0:0:root:/root:/bin/sh\nbroken line\nann:x:1000:1001:Ann,,,:/home/ann:/bin/sh\n";
    const GROUP: &str = "root:x:0:\nann:x:1001:\naudio:x:29:bob,ann\nvideo:x:44:ann\ndisk:x:6:anna\n";

    fn user(spec: &str) -> Result<User, GuestError> {
        resolve(spec, PASSWD, || GROUP.to_owned())
    }

    fn ids(spec: &str) -> (u32, u32, Vec<u32>) {
        let u = user(spec).unwrap();
        (u.uid, u.gid, u.groups)
    }

    #[test]
    fn names_and_numbers_find_the_same_user() {
        for spec in ["ann", "1000"] {
            let ann = user(spec).unwrap();
            assert_eq!((ann.uid, ann.gid, ann.groups), (1000, 1001, vec![29, 44]));
            assert_eq!((ann.name.as_deref(), ann.home.as_str()), (Some("ann"), "/home/ann"));
        }
    }

    #[test]
    fn a_named_group_is_the_only_one() {
        assert_eq!(ids("ann:video"), (1000, 44, vec![]));
        assert_eq!(ids("ann:77"), (1000, 77, vec![]));
        assert_eq!(ids("4242:disk"), (4242, 6, vec![]));
    }

    #[test]
    fn an_unknown_number_is_a_user_and_an_unknown_name_is_not() {
        assert_eq!(ids("4242"), (4242, 0, vec![]));
        for spec in ["bob", "", "ann:nobody", "-1", "4294967295", "ann:", "0:4294967295"] {
            assert_eq!(user(spec).unwrap_err().code, ErrorCode::UnknownUser, "{spec}");
        }
    }
}
