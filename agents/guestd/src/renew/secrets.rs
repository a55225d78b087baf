//! `/run/secrets`: what an agent was trusted with. It is not the forks' to have.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// The directory, below the root.
const PLACE: &str = "run/secrets";
/// Deepest directory below it that is emptied: whoever nests deeper hears about it, and a thread's stack is small.
const MAX_DEPTH: usize = 16;

/// Makes the directory below `root` for root alone, where it is missing.
pub(crate) fn make_dir(root: &Path) -> io::Result<()> {
    match DirBuilder::new().mode(0o700).create(root.join(PLACE)) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => Err(e),
        _ => Ok(()),
    }
}

/// Removes everything below the directory, which stays; how many files that were. Symbolic links are removed like files, and
/// never followed, whoever changes the directory meanwhile.
///
/// # Errors
/// When something could not be removed, or directories are nested deeper than 16.
pub(super) fn drop_all(root: &Path) -> io::Result<u64> {
    let place = root.join(PLACE);
    let dropped = match fs::symlink_metadata(&place) {
        Ok(found) if found.is_dir() => empty(&open_dir(&place)?, MAX_DEPTH)?,
        // Something else took its name.
        Ok(_) => fs::remove_file(&place).map(|()| 1)?,
        Err(e) if e.kind() == io::ErrorKind::NotFound => 0,
        Err(e) => return Err(e),
    };
    make_dir(root)?;
    Ok(dropped)
}

fn open_dir(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).custom_flags(libc::O_DIRECTORY | libc::O_NOFOLLOW).open(path)
}

/// Removes everything in the directory that `dir` has open; how many files that were. Names are looked up from the
/// descriptor, so that no part of a path can become a link.
fn empty(dir: &File, depth: usize) -> io::Result<u64> {
    let base = PathBuf::from(format!("/proc/self/fd/{}", dir.as_raw_fd()));
    let mut dropped = 0;
    for entry in fs::read_dir(&base)? {
        let entry = entry?;
        let path = base.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            let deeper =
                depth.checked_sub(1).ok_or_else(|| io::Error::other("directories are nested too deep"))?;
            dropped += empty(&open_dir(&path)?, deeper)?;
            fs::remove_dir(&path)?;
        } else {
            match fs::remove_file(&path) {
                Ok(()) => dropped += 1,
                // Programs run meanwhile, and one that renews its tokens renames files here.
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                Err(e) => return Err(e),
            }
        }
    }
    Ok(dropped)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    #[test]
    fn all_files_go_and_links_are_not_followed() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        fs::create_dir(root.join("run")).unwrap();
        assert_eq!(drop_all(root).unwrap(), 0, "there is none yet");
        let place = root.join(PLACE);
        assert_eq!(fs::metadata(&place).unwrap().permissions().mode() & 0o777, 0o700);
        fs::create_dir_all(root.join("kept/inner")).unwrap();
        fs::write(root.join("kept/file"), "stays").unwrap();
        for round in 1..=2 {
            fs::create_dir_all(place.join("a/b")).unwrap();
            for at in 0..300 {
                fs::write(place.join(format!("a/b/{at}")), "secret").unwrap();
            }
            fs::write(place.join("key"), "secret").unwrap();
            symlink(root.join("kept"), place.join("a/dir-link")).unwrap();
            symlink(root.join("kept/file"), place.join("file-link")).unwrap();
            assert_eq!(drop_all(root).unwrap(), 303, "round {round}");
            assert_eq!(fs::read_dir(&place).unwrap().count(), 0);
        }
        assert_eq!(fs::read_to_string(root.join("kept/file")).unwrap(), "stays");
        assert!(root.join("kept/inner").is_dir());
    }

    #[test]
    fn a_link_in_place_of_the_directory_is_removed_itself() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("run")).unwrap();
        fs::write(root.path().join("file"), "stays").unwrap();
        symlink(root.path(), root.path().join(PLACE)).unwrap();
        assert_eq!(drop_all(root.path()).unwrap(), 1);
        assert!(fs::symlink_metadata(root.path().join(PLACE)).unwrap().is_dir());
        assert!(root.path().join("file").exists());
    }

    #[test]
    fn nesting_is_bounded() {
        let root = tempfile::tempdir().unwrap();
        let mut deep = root.path().join(PLACE);
        for _ in 0..=MAX_DEPTH {
            deep.push("d");
        }
        fs::create_dir_all(&deep).unwrap();
        assert!(drop_all(root.path()).is_err());
    }
}
