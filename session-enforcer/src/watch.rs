//! Tells when cgroups come and go that rules name (inotify).

use std::{
    io,
    os::fd::{AsFd as _, AsRawFd, RawFd},
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    sys::inotify::{AddWatchFlags, InitFlags, Inotify, WatchDescriptor},
};
use tokio::io::{Interest, unix::AsyncFd};

/// A watch on the parents of directories.
pub struct Watch {
    inotify: AsyncFd<Instance>,
    watched: Vec<WatchDescriptor>,
}

/// What tokio asks for, which nix does not give.
struct Instance(Inotify);

impl AsRawFd for Instance {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

impl Watch {
    /// A watch of nothing yet.
    ///
    /// # Errors
    ///
    /// Where the system gives no more of them (`fs.inotify.max_user_instances`).
    pub fn new() -> io::Result<Self> {
        let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?;
        // SAFETY: the instance owns its descriptor and gives the same one until it is dropped.
        let inotify =
            unsafe { AsyncFd::register_with_interest(Instance(inotify), Interest::READABLE) };
        Ok(Self {
            inotify: inotify?,
            watched: Vec::new(),
        })
    }

    /// Watches for these directories to come and go, and for nothing else any more. A directory
    /// whose parent is not there either is waited for from further up.
    ///
    /// # Errors
    ///
    /// Where the system refuses a watch (`fs.inotify.max_user_watches`).
    pub fn set(&mut self, directories: &[PathBuf]) -> io::Result<()> {
        let mut watched = self.nearest(directories)?;
        // A parent may have come while this looked.
        loop {
            let again = self.nearest(directories)?;
            if again == watched {
                break;
            }
            self.watched.extend(watched);
            watched = again;
        }
        for old in std::mem::replace(&mut self.watched, watched) {
            if !self.watched.contains(&old) {
                // Of a directory that has gone, the watch has too.
                let _ = self.inotify.get_ref().0.rm_watch(old);
            }
        }
        Ok(())
    }

    fn nearest(&self, directories: &[PathBuf]) -> nix::Result<Vec<WatchDescriptor>> {
        let nearest = |directory: &PathBuf| {
            let mut parents = directory.ancestors().skip(1);
            parents.find_map(|parent| match self.add(parent) {
                Err(Errno::ENOENT) => None,
                other => Some(other),
            })
        };
        directories.iter().filter_map(nearest).collect()
    }

    fn add(&self, directory: &Path) -> nix::Result<WatchDescriptor> {
        let flags = AddWatchFlags::IN_CREATE
            | AddWatchFlags::IN_DELETE
            | AddWatchFlags::IN_DELETE_SELF
            | AddWatchFlags::IN_ONLYDIR;
        self.inotify.get_ref().0.add_watch(directory, flags)
    }

    /// Waits until something has come or gone beside one of the directories.
    ///
    /// # Errors
    ///
    /// Where the watch cannot be read any more.
    pub async fn changed(&mut self) -> io::Result<()> {
        loop {
            let mut guard = self.inotify.readable_mut().await?;
            // What it was does not matter: the directories are looked at.
            let read = guard.try_io(|inotify| Ok(inotify.get_ref().0.read_events()?));
            match read {
                Ok(events) => return events.map(drop),
                Err(_would_block) => {}
            }
        }
    }
}
