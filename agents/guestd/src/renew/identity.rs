//! Names a guest is known by: host name, machine-id, boot id.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

use nix::mount::{MsFlags, mount};

/// Hexadecimal digits of a machine-id (machine-id(5)).
pub(crate) const MACHINE_ID_DIGITS: usize = 32;
/// Longest host name, `HOST_NAME_MAX` of Linux.
const MAX_HOSTNAME: usize = 64;
/// Most bytes read of a file that holds one name.
const MAX_NAME_FILE: u64 = 256;
/// Where the kernel shows the boot id. It draws one as it starts and has no way to be told another, so a file is mounted
/// over this one.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
/// That file and its directory.
const OWN_DIR: &str = "/run/ark";
const OWN_BOOT_ID: &str = "/run/ark/boot_id";

/// Whether `text` is so many hexadecimal digits, in small letters as machine-id(5) wants them.
pub(crate) fn is_hex(text: &str, digits: usize) -> bool {
    text.len() == digits && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

/// Whether `name` can be a host name (hostname(7)).
pub(super) fn is_hostname(name: &str) -> bool {
    (1..=MAX_HOSTNAME).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_'))
}

/// Writes `/etc/hostname` below `root`. An image without /etc has nobody who reads it.
pub(crate) fn write_hostname(root: &Path, name: &str) -> io::Result<()> {
    let etc = root.join("etc");
    if etc.is_dir() { replace(&etc, "hostname", name, 0o644) } else { Ok(()) }
}

/// Writes `/etc/machine-id` below `root`, and D-Bus' copy of it where the image has one that is a file of its own.
pub(crate) fn write_machine_id(root: &Path, id: &str) -> io::Result<()> {
    replace(&root.join("etc"), "machine-id", id, 0o444)?;
    let dbus = root.join("var/lib/dbus");
    if fs::symlink_metadata(dbus.join("machine-id")).is_ok_and(|m| m.is_file()) {
        replace(&dbus, "machine-id", id, 0o444)?;
    }
    Ok(())
}

/// The machine-id that `/etc/machine-id` below `root` shows.
pub(super) fn machine_id(root: &Path) -> io::Result<String> {
    read_name(&root.join("etc/machine-id"))
}

/// The boot id that programs see.
pub(super) fn boot_id() -> io::Result<String> {
    read_name(Path::new(BOOT_ID))
}

/// Makes the file that [`show_boot_id`] writes to, with what the kernel shows anyway. Programs may fill the guest's memory
/// later, and then no file can be made any more, but one that is there can be written.
pub(crate) fn make_boot_id() -> io::Result<()> {
    write_boot_id(&boot_id()?)
}

/// Has programs see `id` as the boot id. The first time the file is mounted; from then on its content changes in place, which
/// shows through the mount where another file of the same name would not.
pub(super) fn show_boot_id(id: &str) -> io::Result<()> {
    write_boot_id(id)?;
    if boot_id()? != id {
        mount_boot_id()?;
    }
    if boot_id()? == id { Ok(()) } else { Err(io::Error::other("the kernel still shows another")) }
}

fn write_boot_id(id: &str) -> io::Result<()> {
    match DirBuilder::new().mode(0o755).create(OWN_DIR) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
        _ => {}
    }
    let mut open = OpenOptions::new();
    write_over(open.create(true).mode(0o444), Path::new(OWN_BOOT_ID), &format!("{id}\n"))
}

fn mount_boot_id() -> io::Result<()> {
    let none = None::<&str>;
    mount(Some(OWN_BOOT_ID), BOOT_ID, none, MsFlags::MS_BIND, none)?;
    // As little to be written to as what it covers.
    let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
    let flags = flags | MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    Ok(mount(none, BOOT_ID, none, flags, none)?)
}

/// The first line of a small file.
fn read_name(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    File::open(path)?.take(MAX_NAME_FILE).read_to_string(&mut text)?;
    Ok(text.lines().next().unwrap_or_default().to_owned())
}

/// Puts a file with one line in the place of `dir`/`name`: whoever opens it finds the old content or the new, never part of
/// one, as long as there is room for both. A symbolic link of that name is replaced, not followed.
fn replace(dir: &Path, name: &str, line: &str, mode: u32) -> io::Result<()> {
    let (new, place) = (dir.join(format!(".{name}.ark-new")), dir.join(name));
    match fs::remove_file(&new) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let content = format!("{line}\n");
    let mut open = OpenOptions::new();
    let open = open.write(true).create_new(true).mode(mode);
    let made = open.open(&new).and_then(|mut file| file.write_all(content.as_bytes()));
    let replaced = made.and_then(|()| fs::rename(&new, &place)).inspect_err(|_| {
        // What stood in the way stays the error that counts.
        let _ = fs::remove_file(&new);
    });
    match replaced {
        // An agent that has filled its disk can be forked all the same.
        Err(e) if is_full(&e) => write_over(&mut OpenOptions::new(), &place, &content).map_err(|_| e),
        other => other,
    }
}

fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// Makes `content` that of the file at `path`, where it is: what it has already needs no more room. Links are not followed,
/// and what is no regular file is left alone.
fn write_over(open: &mut OpenOptions, path: &Path, content: &str) -> io::Result<()> {
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_NOCTTY;
    let mut file = open.write(true).custom_flags(flags).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::other(format!("{} is no regular file", path.display())));
    }
    file.write_all(content.as_bytes())?;
    file.set_len(content.len() as u64)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    const ID: &str = "0123456789abcdef0123456789abcdef";
    const OTHER: &str = "ffffffffffffffffffffffffffffffff";

    #[test]
    fn the_machine_id_is_replaced_again_and_again_and_links_are_not_followed() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        assert!(write_machine_id(root, ID).is_err(), "there is no /etc");
        fs::create_dir_all(root.join("etc")).unwrap();
        fs::create_dir_all(root.join("var/lib/dbus")).unwrap();
        fs::write(root.join("elsewhere"), "stays").unwrap();
        symlink(root.join("elsewhere"), root.join("etc/machine-id")).unwrap();
        symlink("/etc/machine-id", root.join("var/lib/dbus/machine-id")).unwrap();
        for id in [ID, OTHER] {
            write_machine_id(root, id).unwrap();
            assert_eq!(machine_id(root).unwrap(), id);
            assert_eq!(fs::read_to_string(root.join("etc/machine-id")).unwrap(), format!("{id}\n"));
        }
        let mode = fs::symlink_metadata(root.join("etc/machine-id")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o444);
        assert_eq!(fs::read_to_string(root.join("elsewhere")).unwrap(), "stays");
        assert!(fs::symlink_metadata(root.join("var/lib/dbus/machine-id")).unwrap().is_symlink());
        assert_eq!(fs::read_dir(root.join("etc")).unwrap().count(), 1, "nothing is left behind");
    }

    #[test]
    fn a_dbus_file_of_its_own_gets_the_machine_id_too() {
        let root = tempfile::tempdir().unwrap();
        let dbus = root.path().join("var/lib/dbus");
        fs::create_dir_all(root.path().join("etc")).unwrap();
        fs::create_dir_all(&dbus).unwrap();
        fs::write(dbus.join("machine-id"), OTHER).unwrap();
        write_machine_id(root.path(), ID).unwrap();
        assert_eq!(fs::read_to_string(dbus.join("machine-id")).unwrap(), format!("{ID}\n"));
    }

    #[test]
    fn the_host_name_is_written_where_there_is_an_etc() {
        let root = tempfile::tempdir().unwrap();
        write_hostname(root.path(), "fork").unwrap();
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
        fs::create_dir(root.path().join("etc")).unwrap();
        for name in ["fork", "another-fork"] {
            write_hostname(root.path(), name).unwrap();
            assert_eq!(fs::read_to_string(root.path().join("etc/hostname")).unwrap(), format!("{name}\n"));
        }
    }

    #[test]
    fn what_is_there_is_written_over_where_nothing_can_be_made() {
        let root = tempfile::tempdir().unwrap();
        let (file, link) = (root.path().join("file"), root.path().join("link"));
        let over = |path: &Path, text: &str| write_over(&mut OpenOptions::new(), path, text);
        assert!(over(&file, "x").is_err(), "it makes none");
        fs::write(&file, "long before\n").unwrap();
        for text in ["short\n", "longer than ever before\n"] {
            over(&file, text).unwrap();
            assert_eq!(fs::read_to_string(&file).unwrap(), text);
        }
        symlink(&file, &link).unwrap();
        assert!(over(&link, "x").is_err(), "links are not followed");
        assert!(over(Path::new("/dev/null"), "x").is_err(), "no regular file");
    }

    /// A disk with room for nothing more, when this test may mount one.
    #[test]
    fn a_full_disk_takes_new_names() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        if let Err(e) =
            mount(Some("test"), root, Some("tmpfs"), MsFlags::empty(), Some("size=64k,nr_inodes=16"))
        {
            eprintln!("not tested here: {e}");
            return;
        }
        fs::create_dir(root.join("etc")).unwrap();
        write_hostname(root, "a-name-that-is-longer").unwrap();
        write_machine_id(root, ID).unwrap();
        let full = fs::write(root.join("filler"), vec![1; 1 << 20]).unwrap_err();
        assert!(is_full(&full), "{full}");
        let named = write_hostname(root, "fork").and_then(|()| write_machine_id(root, OTHER));
        let seen =
            ["hostname", "machine-id"].map(|name| fs::read_to_string(root.join("etc").join(name)).unwrap());
        let files = fs::read_dir(root.join("etc")).unwrap().count();
        nix::mount::umount2(root, nix::mount::MntFlags::MNT_DETACH).unwrap();
        named.unwrap();
        assert_eq!(seen, ["fork\n".to_owned(), format!("{OTHER}\n")]);
        assert_eq!(files, 2, "nothing is left behind");
    }

    #[test]
    fn names_are_checked() {
        assert!(is_hex(ID, 32) && !is_hex(ID, 31) && !is_hex(&ID.to_uppercase(), 32));
        assert!(is_hostname("a-1.b") && is_hostname(&"a".repeat(64)));
        for bad in ["", "a b", "a/b", "ü", &"a".repeat(65)] {
            assert!(!is_hostname(bad), "{bad:?}");
        }
    }
}
