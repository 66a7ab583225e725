//! Finds the processes that hold sockets, and the network namespaces that processes hold open. It reads no
//! file whose lock the inspected process can hold for long (`mmap_lock` guards only `cmdline`, `environ` and
//! `maps`).

use std::{
    cell::LazyCell,
    collections::HashMap,
    ffi::OsStr,
    fs::{self, File},
    iter,
    num::NonZero,
    os::{fd::RawFd, unix::ffi::OsStrExt as _},
    path::{Path, PathBuf},
    sync::atomic::{AtomicUsize, Ordering},
    thread,
};

use nix::fcntl::readlinkat;

use super::protocol::Holder;
use crate::host::threads::run_parallel;

/// The sockets and namespaces that the descriptors of all processes referred to at one time.
#[derive(Debug, Default)]
pub struct Descriptors {
    sockets: HashMap<u32, Holder>,
    namespaces: Vec<PathBuf>,
}

/// The maximum number of threads that scan: each link of `/proc` takes some microseconds of processor time.
const MAX_LOOKERS: usize = 4;

impl Descriptors {
    /// Scans the descriptors of every process. A process that cannot be inspected is skipped.
    pub fn of_all_processes() -> Self {
        Self::of(&all_processes())
    }

    /// Scans the descriptors of a cgroup's processes.
    pub fn of_cgroup(directory: &Path) -> Self {
        Self::of(&processes_of_cgroup(directory))
    }

    fn of(pids: &[u32]) -> Self {
        let next = AtomicUsize::new(0);
        let processors = thread::available_parallelism().map_or(1, NonZero::get);
        let others = processors.min(MAX_LOOKERS).min(pids.len().max(1)) - 1;
        let found = run_parallel("processes", others, || Self::of_some(pids, &next));
        let mut all = Self::default();
        found.into_iter().for_each(|some| all.merge(some));
        all
    }

    /// Scans the processes that no other thread has taken. `next` is the index of the next free one.
    fn of_some(pids: &[u32], next: &AtomicUsize) -> Self {
        let mut sockets = Self::default();
        while let Some(pid) = pids.get(next.fetch_add(1, Ordering::Relaxed)) {
            sockets.add_process(*pid);
        }
        sockets
    }

    /// Scans the descriptors of a process and of those of its threads that have a table of their own.
    fn add_process(&mut self, pid: u32) {
        // The name is read once, and only for a process with sockets: a server has thousands of them.
        let name = LazyCell::new(|| comm(pid));
        for thread in iter::once(pid).chain(threads_apart(pid)) {
            self.add_table(pid, thread, &name);
        }
    }

    fn add_table(
        &mut self,
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
        for entry in descriptors.flatten() {
            let name_of_fd = entry.file_name();
            let Some(fd) = number(&name_of_fd.to_string_lossy()) else {
                continue;
            };
            // A path relative to the open directory is faster to resolve.
            let link = readlinkat(&directory, name_of_fd.as_os_str());
            let Ok(link) = link else {
                continue;
            };
            if let Some(inode) = inode(&link) {
                let comm = **name;
                let holder = Holder {
                    pid,
                    thread,
                    fd,
                    comm,
                };
                self.add(inode, holder);
            } else if is_netns(&link) {
                self.namespaces.push(entry.path());
            }
        }
    }

    /// If several processes hold a socket, the lowest PID is kept: it is usually the parent of the others.
    fn add(&mut self, inode: u32, holder: Holder) {
        let known = self.sockets.entry(inode).or_insert(holder);
        if holder.pid < known.pid {
            *known = holder;
        }
    }

    fn merge(&mut self, other: Self) {
        self.namespaces.extend(other.namespaces);
        if self.sockets.is_empty() {
            self.sockets = other.sockets;
            return;
        }
        for (inode, holder) in other.sockets {
            self.add(inode, holder);
        }
    }

    /// Returns a process that held the socket with this inode number.
    pub fn holder(&self, inode: u32) -> Option<Holder> {
        self.sockets.get(&inode).copied()
    }

    /// All sockets that were held.
    pub fn holders(&self) -> impl Iterator<Item = Holder> {
        self.sockets.values().copied()
    }

    /// The files of network namespaces that processes held open.
    pub fn namespaces(&self) -> &[PathBuf] {
        &self.namespaces
    }
}

fn all_processes() -> Vec<u32> {
    let Ok(processes) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    processes
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .collect()
}

/// Lists the processes of a cgroup, without those of its child cgroups. A removed cgroup has none.
fn processes_of_cgroup(directory: &Path) -> Vec<u32> {
    let text = fs::read_to_string(directory.join("cgroup.procs")).unwrap_or_default();
    // A process of another PID namespace is shown as 0.
    let pids = text.lines().filter_map(|line| line.parse().ok());
    pids.filter(|pid| *pid != 0).collect()
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

/// Parses the inode number of `socket:[4711]`.
fn inode(link: &OsStr) -> Option<u32> {
    let number = link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?;
    number.parse().ok()
}

fn is_netns(link: &OsStr) -> bool {
    link.as_bytes().starts_with(b"net:[")
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
    use crate::reaper::disconnect::duplicate;

    #[test]
    fn a_socket_leads_to_its_process_and_its_descriptor() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let found = Descriptors::of_all_processes();
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
        let found = Descriptors::of_all_processes();
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

    #[test]
    fn a_namespace_that_is_held_open_is_found() {
        let netns = File::open("/proc/self/ns/net").unwrap();
        let found = Descriptors::of_all_processes();
        let path = format!("/proc/{}/fd/{}", std::process::id(), netns.as_raw_fd());
        assert!(found.namespaces().contains(&PathBuf::from(path)));
    }

    #[test]
    fn of_several_holders_the_lowest_number_is_told_whoever_looked_first() {
        let holder = |pid| Holder {
            pid,
            thread: pid,
            fd: 3,
            comm: [0; 16],
        };
        let sockets = |pids: &[u32]| {
            let mut sockets = Descriptors::default();
            for pid in pids {
                sockets.add(4711, holder(*pid));
            }
            sockets
        };
        for [one, other] in [[&[7, 5][..], &[6]], [&[6], &[5, 7]], [&[], &[6, 5]]] {
            let mut all = sockets(one);
            all.merge(sockets(other));
            assert_eq!(all.holder(4711), Some(holder(5)));
        }
    }

    #[test]
    fn what_is_no_socket_is_passed_over() {
        assert!(is_netns(OsStr::new("net:[4026532300]")));
        assert!(!is_netns(OsStr::new("mnt:[4026532301]")));
        assert_eq!(inode(OsStr::new("socket:[4711]")), Some(4711));
        for other in ["socket:4711", "socket:[]", "pipe:[4711]", "/dev/null"] {
            assert_eq!(inode(OsStr::new(other)), None);
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
