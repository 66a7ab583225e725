//! Which process holds which socket.

use std::{
    cell::LazyCell,
    collections::HashMap,
    ffi::OsStr,
    fs::{self, File},
    io,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd},
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

impl Sockets {
    /// Looks at the descriptors of every process. What cannot be looked at has no holders.
    pub fn of_all_processes() -> Self {
        let mut sockets = HashMap::new();
        let Ok(processes) = fs::read_dir("/proc") else {
            return Self::default();
        };
        let mut pids: Vec<u32> = processes
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
            .collect();
        // Of several holders the first one, as a rule the one that the others are children of.
        pids.sort_unstable();
        for pid in pids {
            // A process may end while it is looked at.
            let path = format!("/proc/{pid}/fd");
            let (Ok(directory), Ok(descriptors)) = (File::open(&path), fs::read_dir(&path)) else {
                continue;
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
                    sockets.entry(inode).or_insert_with(|| Holder {
                        pid,
                        fd,
                        comm: *name,
                    });
                }
            }
        }
        Self(sockets)
    }

    /// A process that held the socket with this inode number.
    pub fn holder(&self, inode: u32) -> Option<Holder> {
        self.0.get(&inode).copied()
    }
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
