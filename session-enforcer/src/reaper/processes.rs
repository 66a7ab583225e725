//! Finds the processes that hold sockets, and the network namespaces that processes hold open. It reads no
//! file that waits for the `mmap_lock` of the inspected process (`cmdline`, `environ` and `maps`). A process at which
//! the kernel hangs all the same is passed over (`inspect_each`).
//!
//! Any user can have millions of descriptors. So a scan keeps what is wanted and nothing else, and a search
//! for sockets ends when it has used its processor time.

use std::{
    cell::LazyCell,
    collections::{HashMap, HashSet},
    ffi::OsStr,
    fs::{self, File},
    iter, mem,
    num::NonZero,
    os::fd::RawFd,
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use nix::fcntl::readlinkat;

use super::{
    disconnect::{cookie, duplicate},
    inspect::inspect_each,
    protocol::{Holder, SearchScope, SocketKey},
};
use crate::host::{
    cgroup::Tree,
    clock::{monotonic_ns, processor_ns},
};

/// The sockets and namespaces that the descriptors of processes referred to at one time.
#[derive(Debug, Default)]
pub struct Descriptors {
    sockets: HashMap<SocketKey, Holder>,
    /// A file for each namespace, by inode number.
    namespaces: HashMap<u32, PathBuf>,
}

/// What a scan keeps.
#[derive(Debug)]
enum Wanted {
    /// All sockets and network namespaces.
    All,
    /// The network namespaces.
    Namespaces,
    /// These sockets. The scan ends when it has found all of them.
    Sockets {
        keys: HashSet<SocketKey>,
        has_cookies: bool,
    },
}

/// The maximum number of threads that scan: each link of `/proc` takes some microseconds of processor time.
const MAX_LOOKERS: usize = 4;

/// The maximum processor time of a scan of every process. It suffices for more than a million descriptors.
const BUDGET_OF_ALL: Duration = Duration::from_secs(5);

/// The processor time is read after this number of descriptors.
const CHECKED_EVERY: usize = 64;

/// The result of a scan.
#[derive(Debug, Default)]
pub struct Scanned {
    /// What was found.
    pub found: Descriptors,
    /// The first process that was not scanned, because the processor time or the threads were used up, or all was found.
    pub next: Option<u32>,
    /// The processes that were passed over, because the kernel hangs at them.
    pub hung: Vec<u32>,
}

impl Descriptors {
    /// Scans the descriptors of every process. A process that cannot be inspected is skipped.
    pub fn of_all_processes() -> Scanned {
        Self::kept(Wanted::All)
    }

    fn kept(wanted: Wanted) -> Scanned {
        let mut pids = all_processes();
        // Another one comes first each time, so that several scans together reach all of them.
        let first = monotonic_ns() as usize % pids.len().max(1);
        pids.rotate_left(first);
        scan(&pids, wanted, until_ns(BUDGET_OF_ALL), true)
    }

    /// Returns a process that held the socket with this inode number.
    pub fn holder(&self, inode: u32) -> Option<Holder> {
        self.sockets.get(&SocketKey::Inode(inode)).copied()
    }

    /// A file for each network namespace that processes held open.
    pub fn namespaces(&self) -> impl Iterator<Item = PathBuf> {
        self.namespaces.values().cloned()
    }

    /// If several processes hold a socket, the lowest PID is kept: it is usually the parent of the others.
    fn add(&mut self, key: SocketKey, holder: Holder) {
        let known = self.sockets.entry(key).or_insert(holder);
        if holder.pid < known.pid {
            *known = holder;
        }
    }
}

/// Scans the descriptors of every process; returns a file for each network namespace that is held open, as far as the
/// processor time sufficed.
pub fn open_namespaces() -> impl Iterator<Item = PathBuf> {
    let scanned = Descriptors::kept(Wanted::Namespaces);
    scanned.found.namespaces.into_values()
}

/// The processor time of this process when it has used this much more.
fn until_ns(budget: Duration) -> u64 {
    let budget_ns = u64::try_from(budget.as_nanos()).unwrap_or(u64::MAX);
    processor_ns().saturating_add(budget_ns)
}

/// Searches for the processes that hold these sockets, until all are found or the processor time is used up.
/// Also returns the process at which a search of the whole host must go on, unless it has seen the last one.
pub fn find_holders(
    keys: Vec<SocketKey>,
    scope: &SearchScope,
    budget: Duration,
) -> (HashMap<SocketKey, Holder>, Option<u32>) {
    let until_ns = until_ns(budget);
    let pids = match scope {
        SearchScope::Cgroup(id) => processes_of_cgroup(*id),
        SearchScope::Host { from } => {
            let mut pids = all_processes();
            pids.retain(|pid| pid >= from);
            pids
        }
    };
    let wanted = Wanted::Sockets {
        has_cookies: keys.iter().any(|key| matches!(key, SocketKey::Cookie(_))),
        keys: keys.into_iter().collect(),
    };
    let scanned = scan(&pids, wanted, until_ns, false);
    (scanned.found.sockets, scanned.next)
}

/// A process that takes the whole processor time alone is passed over, so that the next scan reaches the others. A patient
/// scan waits until it is certain that the kernel hangs at a process.
fn scan(pids: &[u32], wanted: Wanted, until_ns: u64, is_patient: bool) -> Scanned {
    let processors = thread::available_parallelism().map_or(1, NonZero::get);
    let threads = processors.min(MAX_LOOKERS).min(pids.len());
    let scan = Arc::new(Scan {
        wanted,
        until_ns,
        not_scanned: AtomicUsize::new(usize::MAX),
        found: Mutex::default(),
    });
    let shared = Arc::clone(&scan);
    let scan_one = move |(index, pid): &(usize, u32)| {
        shared.scan_unless_over(*index, *pid);
        None::<()>
    };
    let numbered = pids.iter().copied().enumerate().collect();
    let missed = inspect_each(numbered, threads, scan_one, |()| {}, || is_patient);
    let first = scan.not_scanned.load(Ordering::Relaxed);
    let first = missed
        .rest
        .first()
        .map_or(first, |(index, _)| first.min(*index));
    Scanned {
        found: scan.with_found(mem::take),
        next: pids.get(first.max(1)).copied(),
        hung: missed.hung.into_iter().map(|(_, pid)| pid).collect(),
    }
}

/// A scan in progress, shared by its threads.
struct Scan {
    wanted: Wanted,
    /// The processor time of this process at which the scan ends.
    until_ns: u64,
    /// The lowest index of a process that was not scanned to its end.
    not_scanned: AtomicUsize,
    found: Mutex<Descriptors>,
}

impl Scan {
    /// Scans a process unless the scan is over. A process that was begun is scanned to its end even if all sockets are
    /// found: it may have a lower PID.
    fn scan_unless_over(&self, index: usize, pid: u32) {
        let is_begun = !self.has_all() && !self.is_over();
        if is_begun {
            self.scan_process(pid);
        }
        if !is_begun || self.is_over() {
            self.not_scanned.fetch_min(index, Ordering::Relaxed);
        }
    }

    fn has_all(&self) -> bool {
        let Wanted::Sockets { keys, .. } = &self.wanted else {
            return false;
        };
        self.with_found(|found| found.sockets.len() == keys.len())
    }

    fn is_over(&self) -> bool {
        processor_ns() >= self.until_ns
    }

    fn with_found<T>(&self, act: impl FnOnce(&mut Descriptors) -> T) -> T {
        act(&mut self.found.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Scans the descriptors of a process and of those of its threads that have a table of their own.
    fn scan_process(&self, pid: u32) {
        // The name is read once, and only for a process with such a socket: a server has thousands of them.
        let name = LazyCell::new(|| comm(pid));
        let tables = iter::once(pid).chain(threads_apart(pid));
        for thread in tables.take_while(|_| !self.is_over()) {
            self.scan_table(pid, thread, &name);
        }
    }

    fn scan_table(
        &self,
        pid: u32,
        thread: u32,
        name: &LazyCell<[u8; 16], impl FnOnce() -> [u8; 16]>,
    ) {
        // The process may end during the scan.
        let path = if thread == pid {
            format!("/proc/{pid}/fd")
        } else {
            format!("/proc/{pid}/task/{thread}/fd")
        };
        let (Ok(directory), Ok(descriptors)) = (File::open(&path), fs::read_dir(&path)) else {
            return;
        };
        for (count, entry) in descriptors.flatten().enumerate() {
            if count % CHECKED_EVERY == CHECKED_EVERY - 1 && self.is_over() {
                return;
            }
            let name_of_fd = entry.file_name();
            let Some(fd) = number(&name_of_fd.to_string_lossy()) else {
                continue;
            };
            // A path relative to the open directory is faster to resolve.
            let Ok(link) = readlinkat(&directory, name_of_fd.as_os_str()) else {
                continue;
            };
            if let Some(inode) = inode(&link, "socket:[") {
                let holder = Holder {
                    pid,
                    thread,
                    fd,
                    comm: [0; 16],
                };
                if let Some(key) = self.wanted.key(inode, &holder) {
                    let comm = **name;
                    self.with_found(|found| found.add(key, Holder { comm, ..holder }));
                }
            } else if let Some(inode) = inode(&link, "net:[")
                && !matches!(self.wanted, Wanted::Sockets { .. })
            {
                self.with_found(|found| {
                    let path = || entry.path();
                    found.namespaces.entry(inode).or_insert_with(path);
                });
            }
        }
    }
}

impl Wanted {
    /// The key of a socket that is wanted.
    fn key(&self, inode: u32, holder: &Holder) -> Option<SocketKey> {
        let key = SocketKey::Inode(inode);
        match self {
            Self::All => Some(key),
            Self::Namespaces => None,
            Self::Sockets { keys, .. } if keys.contains(&key) => Some(key),
            Self::Sockets { keys, has_cookies } if *has_cookies => {
                let key = SocketKey::Cookie(cookie(&duplicate(holder).ok()?).ok()?);
                keys.contains(&key).then_some(key)
            }
            Self::Sockets { .. } => None,
        }
    }
}

/// Lists the processes of the host in ascending order.
fn all_processes() -> Vec<u32> {
    let processes = fs::read_dir("/proc").into_iter().flatten();
    let mut pids: Vec<u32> = processes
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .collect();
    pids.sort_unstable();
    pids
}

/// Lists the processes of a cgroup in ascending order, without those of its child cgroups. A removed cgroup has none.
fn processes_of_cgroup(id: u64) -> Vec<u32> {
    let tree = Tree::open().ok();
    let text = tree.and_then(|tree| tree.processes(id).ok());
    let text = text.unwrap_or_default();
    // A process of another PID namespace is shown as 0.
    let pids = text.lines().filter_map(|line| line.parse().ok());
    let mut pids: Vec<u32> = pids.filter(|pid| *pid != 0).collect();
    pids.sort_unstable();
    pids
}

/// Lists the threads of a process that do not share its main thread's descriptor table (`CLONE_FILES`). The
/// main thread may have ended before them.
fn threads_apart(pid: u32) -> Vec<u32> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task"));
    let names = tasks.into_iter().flatten().flatten();
    let threads = names.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    threads
        .filter(|thread| *thread != pid && !shares_descriptors(pid, *thread))
        .collect()
}

/// `KCMP_FILES` of `linux/kcmp.h`.
const KCMP_FILES: libc::c_int = 2;

/// Whether two threads share one descriptor table. Returns true if the kernel does not report it.
fn shares_descriptors(one: u32, other: u32) -> bool {
    // SAFETY: the system call takes no pointers.
    let order = unsafe { libc::syscall(libc::SYS_kcmp, one, other, KCMP_FILES, 0, 0) };
    order <= 0
}

fn number(name: &str) -> Option<RawFd> {
    name.parse().ok()
}

/// Parses the inode number of `socket:[4711]`, where `kind` is `socket:[`.
fn inode(link: &OsStr, kind: &str) -> Option<u32> {
    let number = link.to_str()?.strip_prefix(kind)?.strip_suffix(']')?;
    number.parse().ok()
}

/// The name of a process.
fn comm(pid: u32) -> [u8; 16] {
    let name = fs::read(format!("/proc/{pid}/comm")).unwrap_or_default();
    let mut comm = [0; 16];
    for (place, byte) in comm[..15].iter_mut().zip(name) {
        if byte != b'\n' {
            *place = byte;
        }
    }
    comm
}

#[cfg(test)]
mod tests {
    use std::{
        net::TcpListener,
        os::{fd::AsRawFd as _, unix::fs::MetadataExt as _},
    };

    use super::*;

    #[test]
    fn a_socket_leads_to_its_process_and_its_descriptor() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let found = Descriptors::of_all_processes().found;
        let holder = found.holder(inode_of(&listener)).unwrap();
        assert_eq!(
            (holder.pid, holder.fd),
            (std::process::id(), listener.as_raw_fd())
        );
        let name = fs::read("/proc/self/comm").unwrap();
        assert_eq!(&holder.comm[..name.len() - 1], &name[..name.len() - 1]);
        let same = TcpListener::from(duplicate(&holder).unwrap());
        assert_eq!(same.local_addr().unwrap(), listener.local_addr().unwrap());
    }

    /// The thread unshares its descriptor table, so only that table has the socket.
    #[test]
    fn a_socket_in_the_table_of_a_single_thread_is_found() {
        let (tell, told) = std::sync::mpsc::channel();
        let (end, ended) = std::sync::mpsc::channel::<()>();
        let thread = thread::spawn(move || {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_FILES).unwrap();
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let path = format!("/proc/thread-self/fd/{}", listener.as_raw_fd());
            let inode = u32::try_from(fs::metadata(path).unwrap().ino()).unwrap();
            tell.send((inode, listener.local_addr().unwrap())).unwrap();
            let _ = ended.recv();
        });
        let (inode, address) = told.recv().unwrap();
        let found = Descriptors::of_all_processes().found;
        let holder = found.holder(inode).unwrap();
        assert_eq!(holder.pid, std::process::id());
        assert_ne!(holder.thread, holder.pid);
        // Before Linux 6.9, `pidfd_getfd` cannot reach the table of a single thread.
        if let Ok(same) = duplicate(&holder) {
            assert_eq!(TcpListener::from(same).local_addr().unwrap(), address);
        }
        drop(end);
        thread.join().unwrap();
    }

    fn inode_of(listener: &TcpListener) -> u32 {
        let path = format!("/proc/self/fd/{}", listener.as_raw_fd());
        u32::try_from(fs::metadata(path).unwrap().ino()).unwrap()
    }

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn one_of_many_descriptors_of_a_namespace_is_kept() {
        let netns = File::open("/proc/self/ns/net").unwrap();
        let _others: Vec<File> = (0..100).map(|_| netns.try_clone().unwrap()).collect();
        let path = format!("/proc/self/fd/{}", netns.as_raw_fd());
        let own = inode(fs::read_link(path).unwrap().as_os_str(), "net:[").unwrap();
        let found = Descriptors::of_all_processes().found;
        let file = fs::read_link(&found.namespaces[&own]).unwrap();
        assert_eq!(inode(file.as_os_str(), "net:["), Some(own));
        assert!(open_namespaces().any(|file| {
            fs::read_link(file).is_ok_and(|link| inode(link.as_os_str(), "net:[") == Some(own))
        }));
    }

    #[test]
    fn a_search_finds_what_it_is_asked_for_and_nothing_else() {
        let [one, other] = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
        let by_inode = SocketKey::Inode(inode_of(&one));
        let by_cookie = SocketKey::Cookie(cookie(&other).unwrap());
        let keys = vec![by_inode, by_cookie, SocketKey::Cookie(u64::MAX)];
        let own = fs::read_to_string("/proc/self/cgroup").unwrap();
        let own = own.lines().find_map(|line| line.strip_prefix("0::"));
        let cgroup = Tree::open().unwrap().id(own.unwrap()).unwrap();
        let (found, next) = find_holders(keys, &SearchScope::Cgroup(cgroup), LONG);
        assert_eq!((found.len(), next), (2, None));
        assert_eq!(found[&by_inode].fd, one.as_raw_fd());
        assert_eq!(found[&by_cookie].fd, other.as_raw_fd());
        assert_ne!(found[&by_inode].comm, [0; 16]);
    }

    #[test]
    fn a_search_that_has_used_its_time_goes_on_at_the_next_process() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let key = SocketKey::Inode(inode_of(&listener));
        let (mut from, mut parts) = (0, 0);
        let search = |from, budget| find_holders(vec![key], &SearchScope::Host { from }, budget);
        while let (found, Some(next)) = search(from, Duration::ZERO) {
            assert!(found.is_empty() && next > from);
            (from, parts) = (next, parts + 1);
        }
        // Each passes over a process.
        assert!(parts > 0);
        let (found, _) = search(0, LONG);
        assert_eq!(found[&key].pid, std::process::id());
        let (found, next) = search(std::process::id() + 1, LONG);
        assert!(found.is_empty() && next.is_none());
    }

    #[test]
    fn the_holder_with_the_lowest_pid_is_reported() {
        let holder = |pid| Holder {
            pid,
            thread: pid,
            fd: 3,
            comm: [0; 16],
        };
        for pids in [[7, 5, 6], [6, 5, 7], [5, 6, 7]] {
            let mut all = Descriptors::default();
            let key = SocketKey::Inode(4711);
            pids.into_iter().for_each(|pid| all.add(key, holder(pid)));
            assert_eq!(all.holder(4711), Some(holder(5)));
        }
    }

    #[test]
    fn a_descriptor_that_is_no_socket_is_skipped() {
        let of = |link, kind| inode(OsStr::new(link), kind);
        assert_eq!(of("net:[4026532300]", "net:["), Some(4_026_532_300));
        assert_eq!(of("mnt:[4026532301]", "net:["), None);
        assert_eq!(of("socket:[4711]", "socket:["), Some(4711));
        for other in ["socket:4711", "socket:[]", "pipe:[4711]", "/dev/null"] {
            assert_eq!(of(other, "socket:["), None);
        }
    }

    #[test]
    fn a_process_that_has_ended_has_no_socket_to_give() {
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let pid = child.id();
        child.wait().unwrap();
        assert_eq!(comm(pid), [0; 16]);
        let gone = Holder {
            pid,
            thread: pid,
            fd: 0,
            comm: comm(pid),
        };
        assert!(duplicate(&gone).is_err());
    }
}
