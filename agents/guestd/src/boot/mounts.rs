//! The guest's file systems.
//!
//! ```text
//!   /dev/vda ── erofs, read-only ──┐
//!   tmpfs (half of memory) ────────┴─ overlay ──► /        what programs write lives in memory and goes with the guest
//!                  └── bound to /tmp, /run, /dev/shm too: one limit for everything that is written
//!   devtmpfs /dev, devpts /dev/pts, proc /proc, sysfs /sys, cgroup2 /sys/fs/cgroup
//! ```

use std::fs::{self, File, Permissions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::unistd::{chdir, chroot};

use super::{BootError, at};

/// The image: the first disk.
const ROOT_DISK: &str = "/dev/vda";
/// Where the pieces of the root are put together, in the initramfs. They stay mounted out of sight.
const LOWER: &str = "/lower";
const UPPER: &str = "/upper";
const NEW_ROOT: &str = "/newroot";

/// One file system to mount: type, place, flags, options.
struct Mount(&'static str, &'static str, MsFlags, Option<&'static str>);

const NO_PROGRAMS: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV).union(MsFlags::MS_NOEXEC);
const NO_SUID: MsFlags = MsFlags::MS_NOSUID;

/// What the kernel has to show, mounted once the root is in place.
const VIEWS: [Mount; 3] = [
    Mount("proc", "/proc", NO_PROGRAMS, None),
    Mount("sysfs", "/sys", NO_PROGRAMS, None),
    // gid 5 is tty in Debian, mode 620 what grantpt(3) would set.
    Mount(
        "devpts",
        "/dev/pts",
        NO_PROGRAMS.difference(MsFlags::MS_NODEV),
        Some("gid=5,mode=620,ptmxmode=666"),
    ),
];

/// Directories for what does not last: name in the tmpfs, place, mode.
const SCRATCH: [(&str, &str, u32); 3] =
    [("tmp", "/tmp", 0o1777), ("run", "/run", 0o755), ("shm", "/dev/shm", 0o1777)];

/// Links that programs expect in /dev and devtmpfs does not make.
const DEVICE_LINKS: [(&str, &str); 4] = [
    ("/proc/self/fd", "/dev/fd"),
    ("/proc/self/fd/0", "/dev/stdin"),
    ("/proc/self/fd/1", "/dev/stdout"),
    ("/proc/self/fd/2", "/dev/stderr"),
];

/// Mounts `what` from `source`, making the directory where it is missing.
fn put(
    source: &str,
    target: &str,
    kind: &str,
    flags: MsFlags,
    options: Option<&str>,
) -> Result<(), BootError> {
    let step = || format!("mounting {kind} at {target}");
    make_dir(target).map_err(at(step()))?;
    mount(Some(source), target, Some(kind), flags, options).map_err(at(step()))
}

fn make_dir(path: &str) -> io::Result<()> {
    match fs::create_dir(path) {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        other => other,
    }
}

/// Puts the root together from the image and memory, and enters it: `/` is what programs will see, with /dev.
/// Returns the tmpfs, which has no path from then on.
pub(super) fn root() -> Result<File, BootError> {
    put("dev", "/dev", "devtmpfs", NO_SUID, Some("mode=755,size=1m"))?;
    if !Path::new(ROOT_DISK).exists() {
        let missing = io::Error::new(
            io::ErrorKind::NotFound,
            "there is no such disk; the VM needs the image as its first",
        );
        return Err(at::<io::Error>(format!("opening the image {ROOT_DISK}"))(missing));
    }
    put(ROOT_DISK, LOWER, "erofs", MsFlags::MS_RDONLY, None).map_err(|e| BootError {
        step: format!("{} (is the image an erofs file system, and whole?)", e.step),
        source: e.source,
    })?;
    put("upper", UPPER, "tmpfs", MsFlags::empty(), Some("mode=755,size=50%"))?;
    for dir in ["/upper/data", "/upper/work"] {
        fs::create_dir(dir).map_err(at(format!("making {dir}")))?;
    }
    let scratch = File::open(UPPER).map_err(at(format!("opening {UPPER}")))?;
    let layers = "lowerdir=/lower,upperdir=/upper/data,workdir=/upper/work";
    put("root", NEW_ROOT, "overlay", MsFlags::empty(), Some(layers))?;
    make_dir("/newroot/dev").map_err(at("making /dev"))?;
    move_mount("/dev", "/newroot/dev").map_err(at("moving /dev into the root"))?;
    let enter = || -> nix::Result<()> {
        chdir(NEW_ROOT)?;
        move_mount(".", "/")?;
        chroot(".")?;
        chdir("/")
    };
    enter().map_err(at("entering the root"))?;
    Ok(scratch)
}

fn move_mount(from: &str, to: &str) -> nix::Result<()> {
    mount(Some(from), to, None::<&str>, MsFlags::MS_MOVE, None::<&str>)
}

/// Mounts everything else; `scratch` is what [`root`] returned.
pub(super) fn rest(scratch: &File) -> Result<(), BootError> {
    for Mount(kind, target, flags, options) in VIEWS {
        put(kind, target, kind, flags, options)?;
    }
    for (name, target, mode) in SCRATCH {
        let source = format!("/proc/self/fd/{}/{name}", scratch.as_raw_fd());
        let step = || format!("making {target}");
        fs::create_dir(&source).map_err(at(step()))?;
        fs::set_permissions(&source, Permissions::from_mode(mode)).map_err(at(step()))?;
        make_dir(target).map_err(at(step()))?;
        mount(Some(source.as_str()), target, None::<&str>, MsFlags::MS_BIND, None::<&str>)
            .map_err(at(step()))?;
    }
    match mount(Some("cgroup2"), "/sys/fs/cgroup", Some("cgroup2"), NO_PROGRAMS, None::<&str>) {
        // A kernel without cgroups is a choice of its build; programs that need them say so themselves.
        Ok(()) | Err(Errno::ENODEV | Errno::ENOENT) => {}
        Err(e) => return Err(at("mounting cgroup2 at /sys/fs/cgroup")(e)),
    }
    for (target, link) in DEVICE_LINKS {
        symlink(target, link).map_err(at(format!("linking {link}")))?;
    }
    Ok(())
}

/// Shows the file of this program, opened before the root was entered, at `place`, for programs to run.
pub(super) fn show_program(program: &File, place: &Path) -> Result<(), BootError> {
    let step = || format!("showing this program at {}", place.display());
    let dir = place.parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(dir).and_then(|()| File::create(place)).map_err(at(step()))?;
    let source = format!("/proc/self/fd/{}", program.as_raw_fd());
    mount(Some(source.as_str()), place, None::<&str>, MsFlags::MS_BIND, None::<&str>).map_err(at(step()))
}
