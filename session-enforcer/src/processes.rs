//! Which process holds which socket, and which network namespaces are held open.

use std::{
    cell::LazyCell,
    collections::HashMap,
    ffi::OsStr,
    fs::{self, File},
    io,
    num::NonZero,
    os::{
        fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd},
        unix::ffi::OsStrExt as _,
    },
    path::PathBuf,
    sync::atomic::{AtomicUsize, Ordering},
    thread::{self, JoinHandle},
};

use nix::fcntl::readlinkat;

use crate::threads::together;

/// A process that holds a socket, and its descriptor of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Holder {
    /// Number of the process, in the daemon's process namespace.
    pub pid: u32,
    fd: RawFd,
    /// Its name, cut and filled with zeroes as the kernel keeps it; empty where it has ended.
    pub comm: [u8; 16],
}

/// What the descriptors of all processes stood for at one time.
#[derive(Debug, Default)]
pub struct Descriptors {
    sockets: HashMap<u32, Holder>,
    namespaces: Vec<PathBuf>,
}

/// Threads that look, at most: each link of `/proc` takes some microseconds of a processor.
const MAX_LOOKERS: usize = 4;

impl Descriptors {
    /// Looks at the descriptors of every process. What cannot be looked at has no holders.
    pub fn of_all_processes() -> Self {
        let pids = all_processes();
        let next = AtomicUsize::new(0);
        let processors = thread::available_parallelism().map_or(1, NonZero::get);
        let others = processors.min(MAX_LOOKERS) - 1;
        let found = together("processes", others, || {
            Self::of_some_processes(&pids, &next)
        });
        let mut all = Self::default();
        found.into_iter().for_each(|some| all.merge(some));
        all
    }

    /// The same, while the calling thread does something else.
    ///
    /// # Errors
    ///
    /// Where there can be no thread.
    pub fn meanwhile() -> io::Result<JoinHandle<Self>> {
        thread::Builder::new()
            .name("processes".to_owned())
            .spawn(Self::of_all_processes)
    }

    /// The sockets of those processes that no other thread looks at. `next` is the first of them.
    fn of_some_processes(pids: &[u32], next: &AtomicUsize) -> Self {
        let mut sockets = Self::default();
        while let Some(pid) = pids.get(next.fetch_add(1, Ordering::Relaxed)) {
            sockets.add_process(*pid);
        }
        sockets
    }

    fn add_process(&mut self, pid: u32) {
        // A process may end while it is looked at.
        let path = format!("/proc/{pid}/fd");
        let (Ok(directory), Ok(descriptors)) = (File::open(&path), fs::read_dir(&path)) else {
            return;
        };
        // Read once, and only of a process that has sockets: a server has thousands.
        let name = LazyCell::new(|| comm(pid));
        for entry in descriptors.flatten() {
            let name_of_fd = entry.file_name();
            let Some(fd) = number(&name_of_fd.to_string_lossy()) else {
                continue;
            };
            // From the directory on: the way to it is longer than what is asked.
            let link = readlinkat(&directory, name_of_fd.as_os_str());
            let Ok(link) = link else {
                continue;
            };
            if let Some(inode) = inode(&link) {
                let comm = *name;
                self.add(inode, Holder { pid, fd, comm });
            } else if is_netns(&link) {
                self.namespaces.push(entry.path());
            }
        }
    }

    /// Of several holders the one with the lowest number, as a rule the one that the others are
    /// children of.
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

    /// A process that held the socket with this inode number.
    pub fn holder(&self, inode: u32) -> Option<Holder> {
        self.sockets.get(&inode).copied()
    }

    /// Files of network namespaces that processes held open.
    pub fn namespaces(&self) -> &[PathBuf] {
        &self.namespaces
    }
}

/// The descriptors of all processes, for an adoption: looked at when somebody asks, or ahead.
#[derive(Debug, Default)]
pub struct Processes {
    found: Option<Descriptors>,
    /// A look that is under way.
    looking: Option<JoinHandle<Descriptors>>,
    /// Whether what is asked about may be younger than the look.
    is_ahead: bool,
}

impl Processes {
    /// Looks at them while the calling thread finds out what to ask. Where there can be no thread,
    /// they are looked at when it asks.
    pub fn ahead() -> Self {
        let looking = Descriptors::meanwhile().ok();
        Self {
            found: None,
            is_ahead: looking.is_some(),
            looking,
        }
    }

    /// What was found.
    pub fn descriptors(&mut self) -> &Descriptors {
        let looking = self.looking.take();
        self.found.get_or_insert_with(|| {
            let found = looking.and_then(|looking| looking.join().ok());
            found.unwrap_or_else(Descriptors::of_all_processes)
        })
    }

    /// A process that holds the socket with this inode number, which is 0 where none does.
    pub fn holder(&mut self, inode: u32) -> Option<Holder> {
        if inode == 0 {
            return None;
        }
        let found = self.descriptors().holder(inode);
        if found.is_some() || !std::mem::take(&mut self.is_ahead) {
            return found;
        }
        // Its process may have it only since it was looked at.
        self.found = None;
        self.descriptors().holder(inode)
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

fn number(name: &str) -> Option<RawFd> {
    name.parse().ok()
}

/// Reads `socket:[4711]`.
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

impl Holder {
    /// A descriptor of the same socket for this process (`pidfd_getfd`, Linux 5.6).
    ///
    /// # Errors
    ///
    /// Where the process has ended or closed it, or may not be looked into.
    pub fn duplicate(&self) -> io::Result<OwnedFd> {
        // SAFETY: numbers only.
        let process = unsafe { libc::syscall(libc::SYS_pidfd_open, self.pid, 0) };
        let process = owned(process)?;
        // SAFETY: numbers only, and an open descriptor.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), self.fd, 0) };
        owned(fd)
    }
}

/// The descriptor that a system call has opened for this process.
fn owned(result: libc::c_long) -> io::Result<OwnedFd> {
    match RawFd::try_from(result) {
        // SAFETY: as the caller says.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use std::{net::TcpListener, os::unix::fs::MetadataExt as _};

    use super::*;

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
        let same = TcpListener::from(holder.duplicate().unwrap());
        assert_eq!(same.local_addr().unwrap(), listener.local_addr().unwrap());
    }

    fn inode_of(listener: &TcpListener) -> u32 {
        let path = format!("/proc/self/fd/{}", listener.as_raw_fd());
        u32::try_from(fs::metadata(path).unwrap().ino()).unwrap()
    }

    #[test]
    fn what_is_younger_than_a_look_ahead_is_looked_for_once_more() {
        let listen = || TcpListener::bind("127.0.0.1:0").unwrap();
        let mut processes = Processes::ahead();
        processes.descriptors();
        let [one, other] = [listen(), listen()];
        let me = std::process::id();
        for listener in [&one, &other] {
            let holder = processes.holder(inode_of(listener)).unwrap();
            assert_eq!((holder.pid, holder.fd), (me, listener.as_raw_fd()));
        }
        // A host on which sockets come all the time is not looked at for each.
        assert_eq!(processes.holder(inode_of(&listen())), None);
    }

    #[test]
    fn processes_that_are_looked_at_when_somebody_asks_are_looked_at_once() {
        let listen = || TcpListener::bind("127.0.0.1:0").unwrap();
        let mut processes = Processes::default();
        let listener = listen();
        assert_eq!(processes.holder(0), None);
        assert!(processes.found.is_none());
        assert!(processes.holder(inode_of(&listener)).is_some());
        assert_eq!(processes.holder(inode_of(&listen())), None);
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
            fd: 0,
            comm: comm(pid),
        };
        assert!(gone.duplicate().is_err());
    }
}
