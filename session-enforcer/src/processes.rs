//! Which process holds which socket.

use std::{
    cell::LazyCell,
    collections::HashMap,
    ffi::OsStr,
    fs::{self, File},
    io,
    num::NonZero,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd},
    sync::atomic::{AtomicUsize, Ordering},
    thread::{self, JoinHandle},
};

use nix::fcntl::readlinkat;

/// A process that holds a socket, and its descriptor of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Holder {
    /// Number of the process, in the daemon's process namespace.
    pub pid: u32,
    fd: RawFd,
    /// Its name, cut and filled with zeroes as the kernel keeps it; empty where it has ended.
    pub comm: [u8; 16],
}

/// The sockets of all processes, as they were at one time.
#[derive(Debug, Default)]
pub struct Sockets(HashMap<u32, Holder>);

/// Threads that look, at most: each link of `/proc` takes some microseconds of a processor.
const MAX_LOOKERS: usize = 4;

impl Sockets {
    /// Looks at the descriptors of every process. What cannot be looked at has no holders.
    pub fn of_all_processes() -> Self {
        let pids = all_processes();
        let next = AtomicUsize::new(0);
        let look = || Self::of_some_processes(&pids, &next);
        thread::scope(|scope| {
            let others = thread::available_parallelism().map_or(1, NonZero::get);
            let others = 1..others.min(MAX_LOOKERS);
            let spawn = |_| {
                thread::Builder::new()
                    .name("processes".to_owned())
                    .spawn_scoped(scope, look)
            };
            // Where there can be no thread, this one does it.
            let others: Vec<_> = others.filter_map(|n| spawn(n).ok()).collect();
            let mut all = look();
            for other in others.into_iter().filter_map(|other| other.join().ok()) {
                all.merge(other);
            }
            all
        })
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
            if let Some(inode) = link.ok().as_deref().and_then(inode) {
                let comm = *name;
                self.add(inode, Holder { pid, fd, comm });
            }
        }
    }

    /// Of several holders the one with the lowest number, as a rule the one that the others are
    /// children of.
    fn add(&mut self, inode: u32, holder: Holder) {
        let known = self.0.entry(inode).or_insert(holder);
        if holder.pid < known.pid {
            *known = holder;
        }
    }

    fn merge(&mut self, other: Self) {
        if self.0.is_empty() {
            *self = other;
            return;
        }
        for (inode, holder) in other.0 {
            self.add(inode, holder);
        }
    }

    /// A process that held the socket with this inode number.
    pub fn holder(&self, inode: u32) -> Option<Holder> {
        self.0.get(&inode).copied()
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
        let path = format!("/proc/self/fd/{}", listener.as_raw_fd());
        let inode = u32::try_from(fs::metadata(path).unwrap().ino()).unwrap();
        let holder = Sockets::of_all_processes().holder(inode).unwrap();
        assert_eq!(
            (holder.pid, holder.fd),
            (std::process::id(), listener.as_raw_fd())
        );
        let name = fs::read("/proc/self/comm").unwrap();
        assert_eq!(&holder.comm[..name.len() - 1], &name[..name.len() - 1]);
        let same = TcpListener::from(holder.duplicate().unwrap());
        assert_eq!(same.local_addr().unwrap(), listener.local_addr().unwrap());
    }

    #[test]
    fn of_several_holders_the_lowest_number_is_told_whoever_looked_first() {
        let holder = |pid| Holder {
            pid,
            fd: 3,
            comm: [0; 16],
        };
        let sockets = |pids: &[u32]| {
            let mut sockets = Sockets::default();
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
