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

/// A watch on the parents of directories. Without any directory it takes nothing from the system.
#[derive(Default)]
pub struct Watch {
    inotify: Option<AsyncFd<Instance>>,
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
    /// Watches for these directories to come and go, and for nothing else any more. A directory
    /// whose parent is not there either is waited for from further up.
    ///
    /// # Errors
    ///
    /// Where the system gives no more watches (`fs.inotify.max_user_instances` and
    /// `fs.inotify.max_user_watches`). The watch is as it was then, or a part of what was asked for.
    pub fn set(&mut self, directories: &[PathBuf]) -> io::Result<()> {
        if directories.is_empty() {
            *self = Self::default();
            return Ok(());
        }
        let inotify = match self.inotify.take() {
            Some(inotify) => inotify,
            None => open()?,
        };
        let Instance(instance) = self.inotify.insert(inotify).get_ref();
        let mut watched = nearest(instance, directories)?;
        // A parent may have come while this looked.
        loop {
            let again = nearest(instance, directories)?;
            if again == watched {
                break;
            }
            self.watched.extend(watched);
            watched = again;
        }
        for old in std::mem::replace(&mut self.watched, watched) {
            if !self.watched.contains(&old) {
                // Of a directory that has gone, the watch has too.
                let _ = instance.rm_watch(old);
            }
        }
        Ok(())
    }

    /// Waits until something has come or gone beside one of the directories.
    ///
    /// # Errors
    ///
    /// Where the watch cannot be read any more.
    pub async fn changed(&mut self) -> io::Result<()> {
        let Some(inotify) = &mut self.inotify else {
            return std::future::pending().await;
        };
        loop {
            let mut guard = inotify.readable_mut().await?;
            // What it was does not matter: the directories are looked at.
            let read = guard.try_io(|inotify| Ok(inotify.get_ref().0.read_events()?));
            match read {
                Ok(events) => return events.map(drop),
                Err(_would_block) => {}
            }
        }
    }
}

fn open() -> io::Result<AsyncFd<Instance>> {
    let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?;
    // SAFETY: the instance owns its descriptor and gives the same one until it is dropped.
    let registered =
        unsafe { AsyncFd::register_with_interest(Instance(inotify), Interest::READABLE) };
    Ok(registered?)
}

/// Watches, for each directory, the one next above it that is there, and the one above that: cgroupfs does
/// not tell of a directory itself that it has gone (no `IN_DELETE_SELF`), only to its parent.
fn nearest(inotify: &Inotify, directories: &[PathBuf]) -> nix::Result<Vec<WatchDescriptor>> {
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

    /// An empty directory below one that nobody else makes anything in: that is watched too.
    fn directory() -> (tempfile::TempDir, PathBuf) {
        let above = tempfile::tempdir().unwrap();
        let top = above.path().join("top");
        fs::create_dir(&top).unwrap();
        (above, top)
    }

    async fn has_changed(watch: &mut Watch, within: Duration) -> bool {
        timeout(within, watch.changed()).await.is_ok()
    }

    #[tokio::test]
    async fn directories_are_waited_for_from_wherever_their_path_ends() {
        let (_above, top) = directory();
        let wanted = [top.join("a/b/c")];
        let mut watch = Watch::default();
        watch.set(&wanted).unwrap();
        assert!(!has_changed(&mut watch, NEVER).await);
        for part in ["a", "a/b", "a/b/c"] {
            fs::create_dir(top.join(part)).unwrap();
            assert!(has_changed(&mut watch, SOON).await, "{part}");
            watch.set(&wanted).unwrap();
        }
        fs::remove_dir(top.join("a/b/c")).unwrap();
        assert!(has_changed(&mut watch, SOON).await);
    }

    #[tokio::test]
    async fn what_is_not_asked_for_any_more_is_not_watched() {
        let (_above, top) = directory();
        let mut watch = Watch::default();
        watch.set(&[top.join("a")]).unwrap();
        watch.set(&[]).unwrap();
        fs::create_dir(top.join("a")).unwrap();
        assert!(!has_changed(&mut watch, NEVER).await);
    }
}
