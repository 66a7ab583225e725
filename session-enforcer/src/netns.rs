//! Finds the network namespaces of the host, and opens the socket table of each.
//!
//! A namespace is entered on a thread of its own, which ends at once: the daemon's own thread
//! never leaves its namespace.

use std::{
    collections::{HashMap, HashSet},
    fs, io,
    os::{
        fd::AsRawFd as _,
        unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    },
    path::{Path, PathBuf},
    thread,
};

use nix::sched::{CloneFlags, setns};
use thiserror::Error;

use crate::{
    cgroup::{mountinfo, unescape},
    clock::monotonic_ns,
    sock_diag::{DiagSocket, SockDiagError},
};

/// For how long a namespace that was not found is not searched for again: a session there is tried as often
/// as that.
const SEARCH_AGAIN_NS: u64 = 10_000_000_000;

/// `NSFS_MAGIC` of `linux/magic.h`.
const NSFS_MAGIC: libc::__fsword_t = 0x6e73_6673;

/// Why a namespace could not be entered.
#[derive(Debug, Error)]
pub enum NetnsError {
    /// The file that stands for it could not be opened.
    #[error("opening network namespace {path}: {source}")]
    Open {
        /// The file.
        path: PathBuf,
        /// What went wrong.
        source: io::Error,
    },
    /// The kernel refused.
    #[error("entering network namespace {path}: {source} (CAP_SYS_ADMIN is needed)")]
    Enter {
        /// The file.
        path: PathBuf,
        /// What went wrong.
        source: nix::Error,
    },
    /// The thread could not be made.
    #[error("starting a thread to enter a network namespace: {0}")]
    Thread(io::Error),
    /// Its socket table could not be opened.
    #[error("network namespace {path}: {source}")]
    Diag {
        /// The file.
        path: PathBuf,
        /// What went wrong.
        source: SockDiagError,
    },
    /// No file on the host stands for it.
    #[error("network namespace {0} is not found in /proc or among the mounts")]
    NotFound(u64),
}

/// The socket tables of the namespaces that the daemon has sessions in.
///
/// A table that is open keeps its namespace alive, so it is closed with [`close`](Self::close)
/// when the last session of the namespace has gone.
#[derive(Debug)]
pub struct Namespaces {
    own: u64,
    open: HashMap<u64, DiagSocket>,
    /// Where each namespace was last seen: a hint, checked at each use.
    seen_at: HashMap<u64, PathBuf>,
    /// When the last search began, where it has come to every namespace that can be found.
    searched_ns: Option<u64>,
}

impl Namespaces {
    /// Opens the socket table of the daemon's own namespace.
    ///
    /// # Errors
    ///
    /// Where the kernel gives no `sock_diag` socket or knows no namespace cookies.
    pub fn new() -> Result<Self, SockDiagError> {
        let diag = DiagSocket::open()?;
        let own = diag.netns_cookie()?;
        Ok(Self {
            own,
            open: HashMap::from([(own, diag)]),
            seen_at: HashMap::new(),
            searched_ns: None,
        })
    }

    /// Cookie of the daemon's own namespace.
    pub fn own(&self) -> u64 {
        self.own
    }

    /// The socket table of the namespace with this cookie.
    ///
    /// # Errors
    ///
    /// Where the namespace is not found or cannot be entered.
    pub fn get(&mut self, cookie: u64) -> Result<&mut DiagSocket, NetnsError> {
        self.get_existing(cookie, u64::MAX)
    }

    /// The socket table of the namespace with this cookie, which existed at `existed_ns`. A search of the
    /// whole host is a matter of 0.1 s, and anybody can make namespaces that none finds: one that has begun
    /// after that time is not repeated for a while.
    ///
    /// # Errors
    ///
    /// As above.
    pub fn get_existing(
        &mut self,
        cookie: u64,
        existed_ns: u64,
    ) -> Result<&mut DiagSocket, NetnsError> {
        if !self.open.contains_key(&cookie) {
            let diag = if cookie == self.own {
                open_own()?
            } else {
                self.find(cookie, existed_ns)?
            };
            self.open.insert(cookie, diag);
        }
        self.open
            .get_mut(&cookie)
            .ok_or(NetnsError::NotFound(cookie))
    }

    /// A second socket table of the namespace with this cookie, for another thread; none where the
    /// namespace is not where it was last seen. It is not searched for: whoever asks has the first.
    pub fn another(&self, cookie: u64) -> Option<DiagSocket> {
        if cookie == self.own {
            return open_own().ok();
        }
        self.find_where_seen(cookie)
    }

    /// That socket table, to list its sockets elsewhere; it comes back by [`take_back`](Self::take_back).
    ///
    /// # Errors
    ///
    /// As above.
    pub fn lend(&mut self, cookie: u64) -> Result<DiagSocket, NetnsError> {
        self.get(cookie)?;
        self.open
            .remove(&cookie)
            .ok_or(NetnsError::NotFound(cookie))
    }

    /// Takes back what was lent.
    pub fn take_back(&mut self, cookie: u64, diag: DiagSocket) {
        self.open.insert(cookie, diag);
    }

    /// Closes the socket table of a namespace without sessions; the own one stays open.
    pub fn close(&mut self, cookie: u64) {
        if cookie != self.own {
            self.open.remove(&cookie);
        }
    }

    /// Opens the socket table of a namespace again, after an exchange broke off.
    pub fn reopen(&mut self, cookie: u64) {
        if cookie != self.own {
            self.open.remove(&cookie);
        } else if let Ok(diag) = DiagSocket::open() {
            self.open.insert(cookie, diag);
        }
    }

    /// Opens the socket tables of the namespaces that these files stand for, those that were not
    /// seen in this search before, and returns the cookies of those that were not open. What cannot
    /// be entered is returned beside.
    pub fn open_each(&mut self, files: &[PathBuf], seen: &mut Seen) -> (Vec<u64>, Vec<NetnsError>) {
        let mut opened = Vec::new();
        let errors = visit_each(files, seen, |cookie, path, diag| {
            self.seen_at.insert(cookie, path.to_owned());
            self.open.entry(cookie).or_insert_with(|| {
                opened.push(cookie);
                diag
            });
        });
        (opened, errors)
    }

    /// The cookies of the namespaces whose socket tables are open.
    pub fn open(&self) -> Vec<u64> {
        self.open.keys().copied().collect()
    }

    /// Notes where a namespace was seen.
    pub fn note(&mut self, cookie: u64, path: PathBuf) {
        self.seen_at.insert(cookie, path);
    }

    fn find(&mut self, cookie: u64, existed_ns: u64) -> Result<DiagSocket, NetnsError> {
        if let Some(diag) = self.find_where_seen(cookie) {
            return Ok(diag);
        }
        if self.was_missed(cookie, existed_ns) {
            return Err(NetnsError::NotFound(cookie));
        }
        let began_ns = monotonic_ns();
        (self.searched_ns, self.seen_at) = (None, HashMap::new());
        // Threads and open files last: there are many, and few namespaces are held by nothing else.
        for thorough in [false, true] {
            if let Some(diag) = self.search(cookie, thorough) {
                return Ok(diag);
            }
        }
        self.searched_ns = Some(began_ns);
        Err(NetnsError::NotFound(cookie))
    }

    /// Whether the last search would have come to the namespace. What it came to is noted.
    fn was_missed(&self, cookie: u64, existed_ns: u64) -> bool {
        let is_recent = |began_ns: u64| {
            existed_ns < began_ns && monotonic_ns().saturating_sub(began_ns) < SEARCH_AGAIN_NS
        };
        self.searched_ns.is_some_and(is_recent) && !self.seen_at.contains_key(&cookie)
    }

    fn find_where_seen(&self, cookie: u64) -> Option<DiagSocket> {
        let path = self.seen_at.get(&cookie)?;
        let (found, diag) = enter(path).and_then(|diag| cookie_of(diag, path)).ok()?;
        (found == cookie).then_some(diag)
    }

    fn search(&mut self, cookie: u64, thorough: bool) -> Option<DiagSocket> {
        let mut seen = Seen::none();
        for path in files(thorough) {
            let Some(inode) = seen.unseen(&path) else {
                continue;
            };
            let Ok((found, diag)) = enter(&path).and_then(|diag| cookie_of(diag, &path)) else {
                continue;
            };
            seen.inodes.insert(inode);
            self.seen_at.insert(found, path);
            if found == cookie {
                return Some(diag);
            }
        }
        None
    }
}

/// Opens the socket tables of the namespaces that can be found, one after the other, and hands over
/// each with its cookie and where it was found. What cannot be entered is returned. To be thorough
/// is to look at every thread and descriptor of the host too.
pub fn visit_all(thorough: bool, visit: impl FnMut(u64, &Path, DiagSocket)) -> Vec<NetnsError> {
    visit_each(&files(thorough), &mut Seen::none(), visit)
}

fn visit_each(
    files: &[PathBuf],
    seen: &mut Seen,
    mut visit: impl FnMut(u64, &Path, DiagSocket),
) -> Vec<NetnsError> {
    let mut errors = Vec::new();
    for path in files {
        let Some(inode) = seen.unseen(path) else {
            continue;
        };
        let entered = enter(path).and_then(|diag| cookie_of(diag, path));
        // The process may have ended since it was listed; another file may lead there.
        if matches!(&entered, Err(NetnsError::Open { source, .. }) if is_gone(source)) {
            continue;
        }
        seen.inodes.insert(inode);
        match entered {
            Ok((cookie, diag)) => visit(cookie, path, diag),
            Err(error) => errors.push(error),
        }
    }
    errors
}

/// The namespaces that one search has come to, so that each is entered once.
#[derive(Debug)]
pub struct Seen {
    /// That of all namespaces' files.
    device: Option<u64>,
    inodes: HashSet<u64>,
}

impl Seen {
    /// None yet.
    pub fn none() -> Self {
        Self {
            device: fs::metadata("/proc/self/ns/net")
                .map(|file| file.dev())
                .ok(),
            inodes: HashSet::new(),
        }
    }

    /// The inode number of the namespace that the file stands for, which tells it from others while they
    /// exist; none where that was seen. A descriptor may have come to stand for something else since
    /// it was found.
    fn unseen(&self, path: &Path) -> Option<u64> {
        let file = fs::metadata(path).ok()?;
        let is_unseen = Some(file.dev()) == self.device && !self.inodes.contains(&file.ino());
        is_unseen.then(|| file.ino())
    }
}

/// Opens the socket table of the daemon's own namespace, for which it need not enter one.
fn open_own() -> Result<DiagSocket, NetnsError> {
    DiagSocket::open().map_err(|source| NetnsError::Diag {
        path: PathBuf::from("/proc/self/ns/net"),
        source,
    })
}

fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH))
}

fn cookie_of(diag: DiagSocket, path: &Path) -> Result<(u64, DiagSocket), NetnsError> {
    let cookie = diag.netns_cookie().map_err(|source| NetnsError::Diag {
        path: path.to_owned(),
        source,
    })?;
    Ok((cookie, diag))
}

/// Opens the socket table of the namespace that a file stands for.
fn enter(path: &Path) -> Result<DiagSocket, NetnsError> {
    let file = open(path).map_err(|source| NetnsError::Open {
        path: path.to_owned(),
        source,
    })?;
    let inside = move || -> Result<DiagSocket, EnterError> {
        setns(&file, CloneFlags::CLONE_NEWNET).map_err(EnterError::Setns)?;
        DiagSocket::open().map_err(EnterError::Diag)
    };
    let result = thread::Builder::new()
        .name("enter-netns".to_owned())
        .spawn(inside)
        .map_err(NetnsError::Thread)?
        .join()
        .map_err(|_| NetnsError::Thread(io::Error::other("the thread panicked")))?;
    result.map_err(|error| match error {
        EnterError::Setns(source) => NetnsError::Enter {
            path: path.to_owned(),
            source,
        },
        EnterError::Diag(source) => NetnsError::Diag {
            path: path.to_owned(),
            source,
        },
    })
}

/// Opens a file of a namespace, and nothing else. Who owns a process may change what its
/// descriptors stand for at any time: the opening of a FIFO would wait for its other end, and that of a
/// terminal could make it the daemon's own, with its ^C. So nothing is opened before it is known.
fn open(path: &Path) -> io::Result<fs::File> {
    let found = fs::OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_PATH)
        .open(path)?;
    let kind = nix::sys::statfs::fstatfs(&found)?.filesystem_type().0;
    if kind != NSFS_MAGIC {
        return Err(io::Error::other("is not a namespace"));
    }
    fs::File::open(format!("/proc/self/fd/{}", found.as_raw_fd()))
}

enum EnterError {
    Setns(nix::Error),
    Diag(SockDiagError),
}

/// The files of the network namespaces that a process is in or that are mounted somewhere, and
/// also, where it is to be thorough, that a single thread is in or that a process holds open.
fn files(thorough: bool) -> Vec<PathBuf> {
    if !thorough {
        let of_processes = processes()
            .into_iter()
            .map(|process| process.join("ns/net"));
        return of_processes.chain(mounted_namespaces()).collect();
    }
    let mut files = unopened_files();
    files.extend(
        processes()
            .iter()
            .flat_map(|process| open_namespaces(process)),
    );
    files
}

/// The same without those that are only held open: for these each descriptor of the host has to be
/// looked at, and [`Descriptors`](crate::processes::Descriptors) does so anyway.
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
    entries.map(|entry| entry.path().join("ns/net")).collect()
}

fn open_namespaces(process: &Path) -> Vec<PathBuf> {
    let is_netns = |path: &PathBuf| {
        fs::read_link(path).is_ok_and(|to| to.to_string_lossy().starts_with("net:["))
    };
    let entries = fs::read_dir(process.join("fd"))
        .into_iter()
        .flatten()
        .flatten();
    entries.map(|entry| entry.path()).filter(is_netns).collect()
}

/// Namespaces bound to a file (`ip netns add` does so), as the daemon's mount namespace sees them.
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
    fn what_is_no_namespace_is_refused_without_waiting() {
        let dir = tempfile::tempdir().unwrap();
        let fifo = dir.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert_eq!(open(&fifo).unwrap_err().to_string(), "is not a namespace");
        assert!(open(Path::new("/proc/self/ns/net")).is_ok());
    }

    #[test]
    fn a_namespace_is_new_once_and_what_a_descriptor_has_come_to_stand_for_never() {
        let mut seen = Seen::none();
        let own = Path::new("/proc/self/ns/net");
        let inode = seen.unseen(own).unwrap();
        assert_eq!(seen.unseen(own), Some(inode));
        seen.inodes.insert(inode);
        assert_eq!(seen.unseen(own), None);
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&socket));
        assert_eq!(seen.unseen(Path::new(&path)), None);
    }

    #[test]
    fn a_namespace_that_only_a_thread_is_in_is_found_where_it_is_looked_for_thoroughly() {
        let found = files(true);
        assert!(found.len() >= files(false).len());
        let own = namespaces_of_threads(Path::new("/proc/self"));
        assert!(!own.is_empty() && own.iter().all(|path| path.exists()));
    }

    #[test]
    fn the_own_namespace_is_found_by_its_cookie() {
        let mut namespaces = Namespaces::new().unwrap();
        let own = namespaces.own();
        assert_eq!(namespaces.get(own).unwrap().netns_cookie().unwrap(), own);
        namespaces.close(own);
        namespaces.reopen(own);
        assert!(namespaces.get(own).is_ok());
    }

    #[test]
    fn a_namespace_that_is_not_there_is_not_found() {
        let mut namespaces = Namespaces::new().unwrap();
        assert!(matches!(
            namespaces.get(u64::MAX),
            Err(NetnsError::NotFound(u64::MAX))
        ));
    }

    #[test]
    fn a_search_that_found_nothing_is_not_repeated_for_what_was_there_then() {
        let mut namespaces = Namespaces::new().unwrap();
        let before_ns = monotonic_ns();
        assert!(!namespaces.was_missed(u64::MAX, before_ns));
        assert!(namespaces.get_existing(u64::MAX, before_ns).is_err());
        assert!(namespaces.was_missed(u64::MAX, before_ns));
        // What came after it, and what it has seen.
        assert!(!namespaces.was_missed(u64::MAX, monotonic_ns()));
        namespaces.note(u64::MAX, PathBuf::from("/proc/self/ns/net"));
        assert!(!namespaces.was_missed(u64::MAX, before_ns));
    }

    #[test]
    fn what_is_no_namespace_is_not_opened() {
        // A FIFO's other end would see that.
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
