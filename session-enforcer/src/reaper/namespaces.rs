//! Finds the network namespaces of the host and opens the socket table of each.

use std::{
    cell::RefCell,
    collections::HashSet,
    fs::{self, File},
    io,
    os::{
        fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd},
        unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    },
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use nix::sched::{CloneFlags, setns};
use nix::sys::statfs;
use thiserror::Error;

use super::{
    diag::{DiagSocket, SockDiagError},
    inspect::{Missed, inspect_each},
    processes::open_namespaces,
    protocol::Search,
};
use crate::host::{
    cgroup::{mountinfo, unescape},
    clock::monotonic_ns,
    sockets::has_tcp_sockets,
};

/// The network namespace of the calling thread.
const HOME: &str = "/proc/thread-self/ns/net";

/// The reasons why a namespace could not be entered.
#[derive(Debug, Error)]
pub enum NetnsError {
    /// The namespace's file could not be opened.
    #[error("opening network namespace {path}: {source}")]
    Open {
        /// The file.
        path: PathBuf,
        /// The error.
        source: io::Error,
    },
    /// The kernel refused to enter the namespace.
    #[error("entering network namespace {path}: {source} (CAP_SYS_ADMIN is needed)")]
    Enter {
        /// The file.
        path: PathBuf,
        /// The error.
        source: nix::Error,
    },
    /// The namespace's socket table could not be opened.
    #[error("network namespace {path}: {source}")]
    Diag {
        /// The file.
        path: PathBuf,
        /// The error.
        source: SockDiagError,
    },
    /// No file on the host refers to the namespace.
    #[error("network namespace {0} is not found in /proc or among the mounts")]
    NotFound(u64),
}

/// A network namespace that was found.
#[derive(Debug)]
pub struct FoundNamespace {
    /// Its socket table.
    pub diag: DiagSocket,
    /// The file that referred to it.
    pub path: PathBuf,
    /// A descriptor of the namespace, which keeps it alive.
    pub handle: OwnedFd,
}

impl FoundNamespace {
    /// Whether it has TCP sockets. A dump of an empty namespace still costs about 2 ms, because the kernel
    /// walks one hash table that all namespaces of the host share. True if the namespace cannot be entered.
    pub fn has_tcp_sockets(&self) -> bool {
        within(self.handle.as_fd(), &self.path, has_tcp_sockets).unwrap_or(true)
    }
}

/// Opens the socket table of the namespace that a descriptor refers to.
///
/// # Errors
///
/// Fails if the namespace cannot be entered.
pub fn enter_handle(handle: BorrowedFd) -> Result<DiagSocket, NetnsError> {
    open_diag(handle, Path::new("a descriptor of it"))
}

/// Finds the namespace with this cookie: first at the file where it was last seen, then where `search`
/// permits. A search goes to its end and passes the other namespaces to `met`, so that many namespaces take one search
/// and not one each.
///
/// # Errors
///
/// Fails if the namespace is not found.
pub fn find(
    cookie: u64,
    seen_at: Option<&Path>,
    search: Search,
    mut met: impl FnMut(u64, &Path),
) -> Result<FoundNamespace, NetnsError> {
    let mut search_in = |files: Vec<PathBuf>| {
        let wanted = RefCell::new(None);
        let take = |path: PathBuf, opened| match enter(opened, &path) {
            Ok((seen, found)) if seen == cookie => *wanted.borrow_mut() = Some(found),
            Ok((other, _)) => met(other, &path),
            Err(_) => {}
        };
        open_each(files, take, || wanted.borrow().is_none());
        wanted.into_inner()
    };
    let there = search_in(seen_at.map(Path::to_owned).into_iter().collect());
    let found = there.or_else(|| match search {
        Search::Nowhere => None,
        Search::Processes => search_in(files(false)),
        Search::Everywhere => search_in(files(true)),
    });
    found.ok_or(NetnsError::NotFound(cookie))
}

/// Enters the namespaces of these files, each once and one after the other, and passes each with its cookie
/// to `visit`. Returns the errors of those that could not be entered, and the files that were not opened.
pub fn visit_all(
    files: Vec<PathBuf>,
    mut visit: impl FnMut(u64, FoundNamespace),
) -> (Vec<NetnsError>, Missed<PathBuf>) {
    let mut errors = Vec::new();
    let take = |path: PathBuf, opened| match enter(opened, &path) {
        Ok((cookie, found)) => visit(cookie, found),
        Err(error) => errors.push(error),
    };
    let missed = open_each(files, take, || true);
    (errors, missed)
}

/// Opens the files of namespaces on another thread, each namespace once, and passes each to `take`. A file that is gone is
/// skipped: another one may lead to the same namespace. Returns the files that were not opened.
fn open_each(
    files: Vec<PathBuf>,
    mut take: impl FnMut(PathBuf, io::Result<File>),
    is_wanted: impl Fn() -> bool,
) -> Missed<PathBuf> {
    let mut files = files;
    // Another one comes first each time: there may be threads for a part of them only.
    let first = monotonic_ns() as usize % files.len().max(1);
    files.rotate_left(first);
    let seen = Seen::none();
    let open_new = move |path: &PathBuf| Some((path.clone(), seen.open_new(path)?));
    inspect_each(
        files,
        1,
        open_new,
        |(path, opened)| take(path, opened),
        is_wanted,
    )
}

/// The namespaces that one search has visited, so that each is entered once.
#[derive(Debug)]
struct Seen {
    /// The device number of all namespace files (nsfs).
    device: Option<u64>,
    inodes: Mutex<HashSet<u64>>,
}

impl Seen {
    fn none() -> Self {
        Self {
            device: fs::metadata("/proc/self/ns/net")
                .map(|file| file.dev())
                .ok(),
            inodes: Mutex::default(),
        }
    }

    /// Opens the file if it is a namespace that was not visited before, and notes that it is visited now.
    fn open_new(&self, path: &Path) -> Option<io::Result<File>> {
        let inode = self.unseen(path)?;
        let opened = open(path);
        // The process may have ended since it was listed.
        if matches!(&opened, Err(error) if is_gone(error)) {
            return None;
        }
        // Another thread may have opened it meanwhile. Noted after the opening, at which the kernel may hang.
        self.with_inodes(|inodes| inodes.insert(inode))
            .then_some(opened)
    }

    /// Returns the inode number of the namespace that the file refers to, or `None` if it was visited before.
    /// Inode numbers are unique among existing namespaces. Also `None` if the file is no longer a namespace:
    /// a descriptor may have been reused since it was listed.
    fn unseen(&self, path: &Path) -> Option<u64> {
        let file = fs::metadata(path).ok()?;
        let is_namespace = Some(file.dev()) == self.device;
        let is_unseen = is_namespace && !self.with_inodes(|inodes| inodes.contains(&file.ino()));
        is_unseen.then(|| file.ino())
    }

    fn with_inodes<T>(&self, act: impl FnOnce(&mut HashSet<u64>) -> T) -> T {
        act(&mut self.inodes.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH))
}

/// Enters the namespace of an opened file. Returns its cookie and its data.
fn enter(opened: io::Result<File>, path: &Path) -> Result<(u64, FoundNamespace), NetnsError> {
    let file = opened.map_err(|source| NetnsError::Open {
        path: path.to_owned(),
        source,
    })?;
    let diag = open_diag(file.as_fd(), path)?;
    let cookie = diag.netns_cookie().map_err(|source| NetnsError::Diag {
        path: path.to_owned(),
        source,
    })?;
    let found = FoundNamespace {
        diag,
        path: path.to_owned(),
        handle: file.into(),
    };
    Ok((cookie, found))
}

/// Opens the socket table of a namespace.
fn open_diag(namespace: BorrowedFd, path: &Path) -> Result<DiagSocket, NetnsError> {
    within(namespace, path, DiagSocket::open)?.map_err(|source| NetnsError::Diag {
        path: path.to_owned(),
        source,
    })
}

/// Acts within the namespace, and returns to the namespace of before.
///
/// # Panics
///
/// Panics if the namespace of before cannot be entered, because every later answer would be of the wrong namespace. The
/// engine starts another reaper then.
fn within<T>(namespace: BorrowedFd, path: &Path, act: impl FnOnce() -> T) -> Result<T, NetnsError> {
    let home = File::open(HOME).map_err(|source| NetnsError::Open {
        path: HOME.into(),
        source,
    })?;
    setns(namespace, CloneFlags::CLONE_NEWNET).map_err(|source| NetnsError::Enter {
        path: path.to_owned(),
        source,
    })?;
    let done = act();
    setns(&home, CloneFlags::CLONE_NEWNET).expect("the reaper's own network namespace is there");
    Ok(done)
}

/// Opens the file only if it is a namespace. The owner of a process can change its descriptors at any time.
/// Opening a FIFO would block until somebody opens its other end, and opening a terminal could make it the
/// daemon's controlling terminal, with its ^C. So the file is opened with `O_PATH` and checked first.
fn open(path: &Path) -> io::Result<File> {
    let found = fs::OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_PATH)
        .open(path)?;
    if statfs::fstatfs(&found)?.filesystem_type() != statfs::NSFS_MAGIC {
        return Err(io::Error::other("is not a namespace"));
    }
    File::open(format!("/proc/self/fd/{}", found.as_raw_fd()))
}

/// Lists the files of the network namespaces that processes are in or that are mounted. With `thorough`, also
/// those of single threads and those that processes hold open.
pub fn files(thorough: bool) -> Vec<PathBuf> {
    if !thorough {
        let of_processes = processes()
            .into_iter()
            .map(|process| process.join("ns/net"));
        return of_processes.chain(mounted_namespaces()).collect();
    }
    let mut files = unopened_files();
    files.extend(open_namespaces());
    files
}

/// The same thorough list, but without namespaces that are only held open: to find those, every descriptor of
/// the host must be read.
pub fn unopened_files() -> Vec<PathBuf> {
    let of_process = |process: PathBuf| {
        let threads = namespaces_of_threads(&process);
        std::iter::once(process.join("ns/net")).chain(threads)
    };
    let of_processes = processes().into_iter().flat_map(of_process);
    of_processes.chain(mounted_namespaces()).collect()
}

fn processes() -> Vec<PathBuf> {
    let is_pid = |name: &str| name.bytes().all(|b| b.is_ascii_digit());
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries
        .filter(|entry| entry.file_name().to_str().is_some_and(is_pid))
        .map(|entry| entry.path())
        .collect()
}

fn namespaces_of_threads(process: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(process.join("task"));
    let entries = entries.into_iter().flatten().flatten();
    // The main thread's namespace is that of the process.
    let others = entries.filter(|entry| Some(&*entry.file_name()) != process.file_name());
    others.map(|entry| entry.path().join("ns/net")).collect()
}

/// Lists namespaces that are bound to a file (as `ip netns add` does) in the daemon's mount namespace.
fn mounted_namespaces() -> Vec<PathBuf> {
    let mounts = mountinfo();
    if let Err(error) = &mounts {
        tracing::warn!("looking for mounted network namespaces: /proc/self/mountinfo: {error}");
    }
    parse_mounted(&mounts.unwrap_or_default())
}

fn parse_mounted(mountinfo: &str) -> Vec<PathBuf> {
    let parse = |line: &str| {
        let (before, after) = line.split_once(" - ")?;
        let mut fields = before.split(' ').skip(3);
        let (root, mount_point) = (fields.next()?, fields.next()?);
        let is_netns = after.starts_with("nsfs ") && root.starts_with("net:[");
        is_netns.then(|| unescape(mount_point).into())
    };
    mountinfo.lines().filter_map(parse).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounted_network_namespaces_are_told_from_other_mounts() {
        let mountinfo = "\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
90 23 0:4 net:[4026532300] /run/netns/blue rw shared:5 - nsfs nsfs rw
91 23 0:4 mnt:[4026532301] /run/mnt rw - nsfs nsfs rw
";
        assert_eq!(parse_mounted(mountinfo), [PathBuf::from("/run/netns/blue")]);
    }

    #[test]
    fn a_path_that_is_no_namespace_is_refused_without_waiting() {
        let dir = tempfile::tempdir().unwrap();
        let fifo = dir.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert_eq!(open(&fifo).unwrap_err().to_string(), "is not a namespace");
        assert!(open(Path::new("/proc/self/ns/net")).is_ok());
    }

    #[test]
    fn a_namespace_is_new_once_and_what_a_descriptor_has_come_to_stand_for_never() {
        let seen = Seen::none();
        let own = Path::new("/proc/self/ns/net");
        assert!(seen.open_new(own).unwrap().is_ok());
        assert_eq!(seen.unseen(own), None);
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&socket));
        assert_eq!(seen.unseen(Path::new(&path)), None);
    }

    #[test]
    fn a_namespace_that_only_a_thread_is_in_is_found_where_it_is_looked_for_thoroughly() {
        let (process, thread) = (std::process::id(), nix::unistd::gettid());
        let own = PathBuf::from(format!("/proc/{process}/task/{thread}/ns/net"));
        assert!(files(true).contains(&own));
        assert!(!files(false).contains(&own));
    }

    fn own_cookie() -> u64 {
        DiagSocket::open().unwrap().netns_cookie().unwrap()
    }

    #[test]
    fn a_namespace_is_found_by_its_cookie_and_entered_by_its_descriptor() {
        let own = Path::new("/proc/self/ns/net");
        let found = find(own_cookie(), Some(own), Search::Nowhere, |_, _| {}).unwrap();
        assert_eq!(found.diag.netns_cookie().unwrap(), own_cookie());
        assert_eq!(found.path, own);
        let again = enter_handle(found.handle.as_fd()).unwrap();
        assert_eq!(again.netns_cookie().unwrap(), own_cookie());
        for search in [Search::Processes, Search::Everywhere] {
            assert!(find(own_cookie(), None, search, |_, _| {}).is_ok());
        }
    }

    #[test]
    fn a_namespace_that_is_not_there_is_not_found() {
        let own = Path::new("/proc/self/ns/net");
        for (seen_at, search, meets) in [
            (None, Search::Nowhere, false),
            (Some(own), Search::Nowhere, true),
            (None, Search::Everywhere, true),
        ] {
            let mut met = Vec::new();
            let found = find(u64::MAX, seen_at, search, |cookie, _| met.push(cookie));
            assert!(matches!(found, Err(NetnsError::NotFound(u64::MAX))));
            assert_eq!(met.contains(&own_cookie()), meets);
        }
    }

    #[test]
    fn a_path_that_is_no_namespace_is_not_opened() {
        // The writer's non-blocking open would succeed if the FIFO had a reader.
        let directory = tempfile::tempdir().unwrap();
        let fifo = directory.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let writer = || {
            fs::OpenOptions::new()
                .write(true)
                .custom_flags(libc::O_NONBLOCK)
                .open(&fifo)
        };
        assert!(open(&fifo).is_err());
        assert_eq!(writer().unwrap_err().raw_os_error(), Some(libc::ENXIO));
        assert!(open(Path::new("/proc/self/ns/net")).is_ok());
    }
}
