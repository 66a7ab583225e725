//! The pin directory: its lock, its sets of pins, and their removal.
//!
//! Each layout of the records has its own set, a directory named after the layout. A new set is built under a temporary
//! name and then replaces the one in use in one step.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::{
        fd::AsRawFd as _,
        unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    },
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
    unistd::geteuid,
};
use session_enforcer_common::LAYOUT;

use super::{
    bpffs,
    pin_error::PinError,
    sys::{self, Kind},
};
use crate::host::trust;

/// Prefix of the name of each set.
const PREFIX: &str = "layout-";

/// Suffix of a set that is being built. bpffs does not allow a dot in a name.
const STAGED: &str = "-next";

/// The pin directory, locked by this process.
#[derive(Debug)]
pub struct PinDir {
    path: PathBuf,
    /// A lock on the directory itself. The kernel releases it however the process ends.
    lock: Flock<File>,
    /// Whether this process has made the directory.
    is_new: bool,
}

/// A start that fails leaves no directory that it has made. One with pins is not empty, so it stays.
impl Drop for PinDir {
    fn drop(&mut self) {
        if self.is_new {
            let _ = fs::remove_dir(&self.path);
        }
    }
}

impl PinDir {
    /// Locks the directory. Creates it if it is missing, and mounts bpffs if that is missing.
    ///
    /// # Errors
    ///
    /// Fails if the directory cannot be created, if others could replace it, or if another process holds the lock. The
    /// error then has that process's id.
    pub fn hold(path: &Path) -> Result<Self, PinError> {
        check_above(path)?;
        loop {
            let found = fs::symlink_metadata(path);
            bpffs::make_directory(path)?;
            // `detach` may remove the directory between the two calls.
            if let Some(mut held) = Self::hold_as(path, &[])? {
                held.is_new = found.is_err_and(|error| error.kind() == io::ErrorKind::NotFound);
                return Ok(held);
            }
        }
    }

    /// Checks whether a daemon could use the directory, without creating it.
    ///
    /// # Errors
    ///
    /// Fails if [`Self::hold`] would refuse the path for another reason than the lock.
    pub fn check(path: &Path) -> Result<(), PinError> {
        check_above(path)?;
        bpffs::can_be_on_bpffs(path)?;
        match bpffs::check_owner(path, &trust::trusted_by_root()) {
            Err(PinError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(()),
            checked => checked,
        }
    }

    /// Locks an existing directory to remove its contents. Root may also do so for the service's user.
    ///
    /// # Errors
    ///
    /// Fails if another process holds the lock, if the directory is not on bpffs, and if others may write to it or
    /// replace it.
    pub fn hold_existing(path: &Path) -> Result<Option<Self>, PinError> {
        Self::hold_as(path, &trust::trusted_by_root())
    }

    /// Locks the directory if it exists and belongs to this user or one of `owners`.
    fn hold_as(path: &Path, owners: &[u32]) -> Result<Option<Self>, PinError> {
        let directory = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_DIRECTORY | libc::O_NOFOLLOW)
            .open(path);
        let directory = match directory {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            opened => opened.map_err(PinError::io("opening", path))?,
        };
        if !bpffs::is_bpffs(path).map_err(PinError::io("looking at", path))? {
            return Err(PinError::NotOnBpffs(path.to_owned()));
        }
        bpffs::check_owner(path, owners)?;
        check_above(path)?;
        let opened = identity(&directory).map_err(PinError::io("looking at", path))?;
        let lock = match Flock::lock(directory, FlockArg::LockExclusiveNonblock) {
            Err((_, Errno::EWOULDBLOCK)) => {
                let path = path.to_owned();
                let pid = holder(opened);
                return Err(PinError::Held { path, pid });
            }
            locked => locked.map_err(|(_, e)| PinError::io("locking", path)(e.into()))?,
        };
        // Before the lock was taken, another process may have removed the directory and a third one created it again.
        let there = fs::metadata(path).map(|there| (there.dev(), there.ino()));
        if there.ok() != Some(opened) {
            return Ok(None);
        }
        Ok(Some(Self {
            path: path.to_owned(),
            lock,
            is_new: false,
        }))
    }

    /// The path by which the directory is accessed. `/sys/fs/bpf` can only be traversed by root. The engine of a
    /// service without root gives up the capability for that after the start and uses the open descriptor.
    fn place(&self) -> PathBuf {
        if geteuid().is_root() {
            return self.path.clone();
        }
        format!("/proc/self/fd/{}", self.lock.as_raw_fd()).into()
    }

    /// The path of the set of this version.
    pub(super) fn current(&self) -> PathBuf {
        self.place().join(format!("{PREFIX}{LAYOUT:08x}"))
    }

    /// The path of a set that is being built.
    pub(super) fn staged(&self) -> PathBuf {
        self.place().join(format!("{PREFIX}{LAYOUT:08x}{STAGED}"))
    }

    /// Creates the directory of a new set.
    pub(super) fn stage(&self) -> Result<PathBuf, PinError> {
        let path = self.staged();
        // May be left from a start that was interrupted.
        remove_set(&path)?;
        fs::create_dir(&path).map_err(PinError::io("making", &path))?;
        Ok(path)
    }

    /// Replaces the set in use with a new one. The old set is removed and its links are detached.
    pub(super) fn commit(&self, staged: &Path) -> Result<(), PinError> {
        let current = self.current();
        let moved = if current.exists() {
            sys::exchange(staged, &current)
        } else {
            fs::rename(staged, &current)
        };
        moved.map_err(PinError::io("putting into place", &current))?;
        remove_set(staged)
    }

    /// The sets of other versions, and a staged set.
    ///
    /// # Errors
    ///
    /// Fails if the directory cannot be read.
    pub fn others(&self) -> Result<Vec<PathBuf>, PinError> {
        let mut sets = self.sets()?;
        sets.retain(|set| *set != self.current());
        Ok(sets)
    }

    fn sets(&self) -> Result<Vec<PathBuf>, PinError> {
        let place = self.place();
        let entries = fs::read_dir(&place).map_err(PinError::io("listing", &self.path))?;
        let mut sets = Vec::new();
        for entry in entries {
            let entry = entry.map_err(PinError::io("listing", &self.path))?;
            // A symbolic link could lead to pins of others.
            let is_directory = entry.file_type().is_ok_and(|found| found.is_dir());
            if is_directory && entry.file_name().to_str().is_some_and(is_set) {
                sets.push(entry.path());
            }
        }
        Ok(sets)
    }

    /// Removes the sets of other versions and detaches their links.
    pub(super) fn remove_others(&self) -> Result<(), PinError> {
        self.others()?.iter().try_for_each(|set| remove_set(set))
    }

    /// Removes all sets, detaches their links, and removes the directory if it is then empty. Returns the number of
    /// sets.
    ///
    /// # Errors
    ///
    /// Fails if the kernel refuses an operation.
    pub fn remove(self) -> Result<usize, PinError> {
        let sets = self.sets()?;
        sets.iter().try_for_each(|set| remove_set(set))?;
        match fs::remove_dir(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::DirectoryNotEmpty => {
                Err(PinError::io("removing", &self.path)(error))
            }
            _ => Ok(sets.len()),
        }
    }
}

/// Refuses a directory that other users could replace. Write access to the directory itself is checked separately, with
/// stricter rules.
fn check_above(path: &Path) -> Result<(), PinError> {
    Ok(path.parent().map_or(Ok(()), trust::check)?)
}

/// Whether the name is that of a set of any version.
fn is_set(name: &str) -> bool {
    let layout = name.strip_prefix(PREFIX);
    let layout = layout.map(|rest| rest.strip_suffix(STAGED).unwrap_or(rest));
    layout.is_some_and(|hex| hex.len() == 8 && hex.bytes().all(|b| b.is_ascii_hexdigit()))
}

/// Removes a set, if it exists, and detaches its links.
pub(super) fn remove_set(set: &Path) -> Result<(), PinError> {
    let entries = match fs::read_dir(set) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries.map_err(PinError::io("listing", set))?,
    };
    for entry in entries {
        remove_pin(&entry.map_err(PinError::io("listing", set))?.path())?;
    }
    fs::remove_dir(set).map_err(PinError::io("removing", set))
}

/// Removes a pin. A link is detached explicitly, because the kernel detaches it only some time after the last reference
/// is gone.
pub(super) fn remove_pin(path: &Path) -> Result<(), PinError> {
    let object = sys::open_pin(path).map_err(PinError::io("opening", path))?;
    if sys::kind(&object).map_err(PinError::io("looking at", path))? == Kind::Link {
        sys::detach_link(&object).map_err(PinError::io("detaching", path))?;
    }
    fs::remove_file(path).map_err(PinError::io("removing", path))
}

fn identity(file: &File) -> io::Result<(u64, u64)> {
    file.metadata().map(|found| (found.dev(), found.ino()))
}

/// The process that holds the lock of a file.
fn holder((device, inode): (u64, u64)) -> Option<u32> {
    let locks = fs::read_to_string("/proc/locks").ok()?;
    let id = format!(
        "{:02x}:{:02x}:{inode}",
        libc::major(device),
        libc::minor(device)
    );
    parse_holder(&locks, &id)
}

/// Format: proc(5), `/proc/locks`. A line of a waiting process has an arrow as its second field.
fn parse_holder(locks: &str, id: &str) -> Option<u32> {
    locks.lines().find_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        match fields[..] {
            [_, "FLOCK", _, _, pid, file, ..] if file == id => pid.parse().ok(),
            _ => None,
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_are_told_from_what_is_not_the_daemon_s() {
        assert!(is_set("layout-0123abcd") && is_set("layout-0123abcd-next"));
        for name in ["layout-", "layout-123", "layout-0123abcdx", "globals", "tc"] {
            assert!(!is_set(name), "{name}");
        }
    }

    #[test]
    fn the_holder_is_found_among_the_locks() {
        let locks = "\
1: POSIX  ADVISORY  WRITE 11 00:2b:16 0 EOF
2: FLOCK  ADVISORY  WRITE 12 00:2b:17 0 EOF
3: FLOCK  ADVISORY  WRITE 13 00:2b:16 0 EOF
3: -> FLOCK  ADVISORY  WRITE 14 00:2b:18 0 EOF
";
        assert_eq!(parse_holder(locks, "00:2b:16"), Some(13));
        assert_eq!(parse_holder(locks, "00:2b:18"), None);
    }

    #[test]
    fn a_pin_directory_outside_bpffs_is_refused_and_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let set = directory.path().join("layout-0123abcd");
        fs::create_dir(&set).unwrap();
        for refused in [
            PinDir::hold(directory.path()).unwrap_err(),
            PinDir::hold_existing(directory.path()).unwrap_err(),
        ] {
            assert!(matches!(refused, PinError::NotOnBpffs(_)), "{refused}");
        }
        assert!(set.exists());
        let missing = directory.path().join("none");
        assert!(PinDir::hold_existing(&missing).unwrap().is_none());
    }
}
