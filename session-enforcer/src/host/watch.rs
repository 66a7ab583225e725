//! Reports when cgroups that rules name are created or removed (inotify).

use std::{
    cell::{OnceCell, RefCell},
    collections::BTreeSet,
    io,
    os::fd::{AsFd as _, AsRawFd, RawFd},
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    sys::inotify::{AddWatchFlags, InitFlags, Inotify, InotifyEvent, WatchDescriptor},
};
use tokio::io::{Interest, unix::AsyncFd};

/// An inotify watch on the parents of directories. Before the first directory it uses no inotify instance.
#[derive(Default)]
pub struct Watch {
    inotify: OnceCell<AsyncFd<Instance>>,
    watched: RefCell<BTreeSet<WatchDescriptor>>,
}

/// Gives tokio the raw descriptor, which nix's type does not.
struct Instance(Inotify);

impl AsRawFd for Instance {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

impl Watch {
    /// Watches for the creation and removal of these directories, and stops all other watches. If a
    /// directory's parent does not exist either, the nearest existing ancestor is watched. Returns whether a
    /// directory is watched that was not watched before.
    ///
    /// # Errors
    ///
    /// Fails if the system's limit of watches is reached (`fs.inotify.max_user_instances` and
    /// `fs.inotify.max_user_watches`). The watch is then unchanged or covers only some of the directories.
    pub fn set(&self, directories: &[PathBuf]) -> io::Result<bool> {
        let inotify = match self.inotify.get() {
            Some(inotify) => inotify,
            None if directories.is_empty() => return Ok(false),
            None => {
                let opened = open()?;
                self.inotify.get_or_init(|| opened)
            }
        };
        let Instance(instance) = inotify.get_ref();
        let watched = nearest(instance, directories)?;
        let before = self.watched.replace(watched.clone());
        for old in before.difference(&watched) {
            // The kernel has removed the watch already if its directory was removed.
            let _ = instance.rm_watch(*old);
        }
        Ok(!watched.is_subset(&before))
    }

    /// Waits until an entry beside one of the directories is created or removed.
    ///
    /// # Errors
    ///
    /// Fails if the watch can no longer be read.
    pub async fn changed(&self) -> io::Result<()> {
        let Some(inotify) = self.inotify.get() else {
            return std::future::pending().await;
        };
        loop {
            let mut guard = inotify.readable().await?;
            let read = guard.try_io(|inotify| Ok(inotify.get_ref().0.read_events()?));
            // The caller checks the directories. `IN_IGNORED` is the end of a watch: one that `set` has ended, or one
            // of a removed directory, which its parent reports.
            let is_news = |event: &InotifyEvent| event.mask != AddWatchFlags::IN_IGNORED;
            match read {
                Ok(Ok(events)) if !events.iter().any(is_news) => {}
                Ok(events) => return events.map(drop),
                Err(_would_block) => {}
            }
        }
    }
}

fn open() -> io::Result<AsyncFd<Instance>> {
    let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?;
    // SAFETY: the instance owns its descriptor, which stays the same until it is dropped.
    let registered =
        unsafe { AsyncFd::register_with_interest(Instance(inotify), Interest::READABLE) };
    Ok(registered?)
}

/// Watches, for each directory, its nearest existing ancestor and that one's parent. The parent is needed
/// because cgroupfs reports a removed directory only to its parent (it sends no `IN_DELETE_SELF`).
fn nearest(inotify: &Inotify, directories: &[PathBuf]) -> nix::Result<BTreeSet<WatchDescriptor>> {
    let nearest = |directory: &PathBuf| {
        let there = |parent: &Path| match add(inotify, parent) {
            Err(Errno::ENOENT) => None,
            other => Some(other),
        };
        let parents = directory.ancestors().skip(1);
        parents.filter_map(there).take(2).collect::<Vec<_>>()
    };
    directories.iter().flat_map(nearest).collect()
}

fn add(inotify: &Inotify, directory: &Path) -> nix::Result<WatchDescriptor> {
    let flags = AddWatchFlags::IN_CREATE
        | AddWatchFlags::IN_DELETE
        | AddWatchFlags::IN_DELETE_SELF
        | AddWatchFlags::IN_ONLYDIR;
    inotify.add_watch(directory, flags)
}

#[cfg(test)]
mod tests {
    use std::{fs, time::Duration};

    use tokio::time::timeout;

    use super::*;

    const SOON: Duration = Duration::from_secs(20);
    const NEVER: Duration = Duration::from_millis(50);

    /// An empty directory below a private one: the watch covers that parent too.
    fn directory() -> (tempfile::TempDir, PathBuf) {
        let above = tempfile::tempdir().unwrap();
        let top = above.path().join("top");
        fs::create_dir(&top).unwrap();
        (above, top)
    }

    async fn has_changed(watch: &Watch, within: Duration) -> bool {
        timeout(within, watch.changed()).await.is_ok()
    }

    #[tokio::test]
    async fn directories_are_waited_for_from_wherever_their_path_ends() {
        let (_above, top) = directory();
        let wanted = [top.join("a/b/c")];
        let watch = Watch::default();
        watch.set(&wanted).unwrap();
        assert!(!watch.set(&wanted).unwrap());
        assert!(!has_changed(&watch, NEVER).await);
        for part in ["a", "a/b", "a/b/c"] {
            fs::create_dir(top.join(part)).unwrap();
            assert!(has_changed(&watch, SOON).await, "{part}");
            assert!(watch.set(&wanted).unwrap() || part == "a/b/c");
        }
        fs::remove_dir(top.join("a/b/c")).unwrap();
        assert!(has_changed(&watch, SOON).await);
    }

    #[tokio::test]
    async fn a_directory_that_is_no_longer_requested_is_not_watched() {
        let (_above, top) = directory();
        let watch = Watch::default();
        watch.set(&[top.join("a")]).unwrap();
        watch.set(&[]).unwrap();
        fs::create_dir(top.join("a")).unwrap();
        assert!(!has_changed(&watch, NEVER).await);
    }
}
