//! The pin directory: who holds it, which sets of pins are in it, and their removal.
//!
//! Each layout of the records has its set, a directory named after it. A set is built beside the
//! one in use, under a name of its own, and takes its place in one step.

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

/// Begins the name of each set.
const PREFIX: &str = "layout-";

/// Ends the name of a set that is being built. A dot would be against the rules of bpffs.
const STAGED: &str = "-next";

/// The directory, which this process alone works with.
#[derive(Debug)]
pub struct PinDir {
    path: PathBuf,
    /// Of the directory itself. The kernel lets go of it however the process ends.
    lock: Flock<File>,
}

impl PinDir {
    /// Makes the directory where it is missing, on bpffs that is mounted where that is missing, and
    /// holds it.
    ///
    /// # Errors
    ///
    /// Where it cannot be made, others could replace it, or another process holds it, whose id the error has.
    pub fn hold(path: &Path) -> Result<Self, PinError> {
        check_above(path)?;
        loop {
            bpffs::make_directory(path)?;
            // `detach` may remove it between the two.
            if let Some(held) = Self::hold_as(path, &[])? {
                return Ok(held);
            }
        }
    }

    /// Whether a daemon could work with the directory, which is not made where it is not there.
    ///
    /// # Errors
    ///
    /// Where [`Self::hold`] would refuse the path, whoever holds it.
    pub fn check(path: &Path) -> Result<(), PinError> {
        check_above(path)?;
        bpffs::can_be_on_bpffs(path)?;
        match bpffs::check_owner(path, &trust::trusted_by_root()) {
            Err(PinError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(()),
            checked => checked,
        }
    }

    /// Holds the directory if it is there, to remove what is in it. Root may do that for the
    /// service's user too.
    ///
    /// # Errors
    ///
    /// As above, where it is not on bpffs, and where others may write to it or replace it.
    pub fn hold_existing(path: &Path) -> Result<Option<Self>, PinError> {
        Self::hold_as(path, &trust::trusted_by_root())
    }

    /// Holds the directory if it is there and belongs to this user, or to one of these.
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
        // Another process may have removed it, and a third made it anew, before it was held.
        let there = fs::metadata(path).map(|there| (there.dev(), there.ino()));
        if there.ok() != Some(opened) {
            return Ok(None);
        }
        Ok(Some(Self {
            path: path.to_owned(),
            lock,
        }))
    }

    /// Where the directory is found. /sys/fs/bpf lets only root pass, and the engine of a service that is
    /// not root gives up the capability to pass after the start: it goes by the open directory.
    fn place(&self) -> PathBuf {
        if geteuid().is_root() {
            return self.path.clone();
        }
        format!("/proc/self/fd/{}", self.lock.as_raw_fd()).into()
    }

    /// Where the set of this version is.
    pub(super) fn current(&self) -> PathBuf {
        self.place().join(format!("{PREFIX}{LAYOUT:08x}"))
    }

    /// The directory of a new set.
    pub(super) fn staged(&self) -> PathBuf {
        self.place().join(format!("{PREFIX}{LAYOUT:08x}{STAGED}"))
    }

    /// Makes it.
    pub(super) fn stage(&self) -> Result<PathBuf, PinError> {
        let path = self.staged();
        // Of a start that was cut short.
        remove_set(&path)?;
        fs::create_dir(&path).map_err(PinError::io("making", &path))?;
        Ok(path)
    }

    /// Puts a new set in the place of the one in use, which is removed with what it attaches.
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

    /// The sets of other versions, and what was being built when a start was cut short.
    ///
    /// # Errors
    ///
    /// Where the directory cannot be read.
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
            // A link could lead to what others have pinned.
            let is_directory = entry.file_type().is_ok_and(|found| found.is_dir());
            if is_directory && entry.file_name().to_str().is_some_and(is_set) {
                sets.push(entry.path());
            }
        }
        Ok(sets)
    }

    /// Removes the sets of other versions, with what they attach.
    pub(super) fn remove_others(&self) -> Result<(), PinError> {
        self.others()?.iter().try_for_each(|set| remove_set(set))
    }

    /// Removes every set, with what it attaches, and the directory, where nothing else is in it;
    /// the number of sets.
    ///
    /// # Errors
    ///
    /// Where the kernel refuses.
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

/// Refuses a directory that somebody else could replace. Who may write to the directory itself is another
/// question, with a stricter answer.
fn check_above(path: &Path) -> Result<(), PinError> {
    Ok(path.parent().map_or(Ok(()), trust::check)?)
}

/// Whether the name is that of a set, of whatever version.
fn is_set(name: &str) -> bool {
    let layout = name.strip_prefix(PREFIX);
    let layout = layout.map(|rest| rest.strip_suffix(STAGED).unwrap_or(rest));
    layout.is_some_and(|hex| hex.len() == 8 && hex.bytes().all(|b| b.is_ascii_hexdigit()))
}

/// Removes a set, if it is there. What it attaches is detached.
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

/// Removes a pin, and detaches a link: the kernel itself does that some time after the last one has
/// let go of it.
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

/// Format: proc(5), `/proc/locks`. A line of somebody who waits has an arrow in its second field.
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
    fn what_is_not_on_bpffs_is_refused_and_left_alone() {
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
