//! Locks sockets in the kernel: a thread sends from memory whose page fault nobody answers.

use std::{
    fs, io,
    num::NonZeroUsize,
    os::fd::{AsRawFd, FromRawFd as _, OwnedFd, RawFd},
    ptr::NonNull,
    thread::{self, JoinHandle},
};

use anyhow::{Context as _, Result};
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::mman::{MapFlags, ProtFlags, mmap_anonymous, munmap},
};

use crate::{clock::eventually, pace::patience};

const PAGE: NonZeroUsize = NonZeroUsize::new(4096).unwrap();

// Of `linux/userfaultfd.h`.
const UFFD_API: u64 = 0xaa;
const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
const UFFDIO_REGISTER: libc::c_ulong = 0xc020_aa00;
const UFFDIO_REGISTER_MODE_MISSING: u64 = 1;

/// Keeps a socket locked until it is dropped.
#[derive(Debug)]
pub struct Locked {
    /// While this descriptor is open, page faults wait for it.
    faults: Option<OwnedFd>,
    page: NonNull<libc::c_void>,
    /// Returns the error of its send.
    sender: Option<JoinHandle<Option<Errno>>>,
}

// SAFETY: only the sender's thread accesses the page, and only `drop` unmaps it.
unsafe impl Send for Locked {}

impl Locked {
    /// Locks a socket, which must stay open meanwhile: a thread sends from a page that never becomes present.
    ///
    /// # Errors
    ///
    /// Fails if the kernel has no `userfaultfd` or refuses it. Fails with the [`Errno`] of the send if the socket has no
    /// connection to send on; the send has then taken the error from the socket.
    pub fn new(socket: &impl AsRawFd) -> Result<Self> {
        // poll(2) reports an error, and no page fault, for a descriptor that is not `O_NONBLOCK`.
        let options = libc::O_CLOEXEC | libc::O_NONBLOCK;
        // SAFETY: the system call takes no pointers.
        let faults = unsafe { libc::syscall(libc::SYS_userfaultfd, options) };
        let faults = Errno::result(faults).context("userfaultfd(2)")?;
        // SAFETY: the kernel has just opened this descriptor for this process.
        let faults = unsafe { OwnedFd::from_raw_fd(faults as RawFd) };
        control(&faults, UFFDIO_API, &mut [UFFD_API, 0, 0])?;
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: this is a new mapping at an address that the kernel chooses.
        let page = unsafe { mmap_anonymous(None, PAGE, access, MapFlags::MAP_PRIVATE) }?;
        let at = page.as_ptr() as u64;
        let range = [at, PAGE.get() as u64, UFFDIO_REGISTER_MODE_MISSING, 0];
        control(&faults, UFFDIO_REGISTER, &mut { range })?;
        let socket = socket.as_raw_fd();
        let sender = thread::spawn(move || {
            // SAFETY: the page stays mapped until this thread has ended. The content does not matter.
            let sent =
                unsafe { libc::send(socket, at as *const libc::c_void, 1, libc::MSG_NOSIGNAL) };
            Errno::result(sent).err()
        });
        let mut locked = Self {
            faults: Some(faults),
            page,
            sender: Some(sender),
        };
        locked.wait()?;
        Ok(locked)
    }

    /// Whether a socket lock blocks the kernel's socket tables for everybody, as before Linux 6.9.
    ///
    /// # Errors
    ///
    /// Fails if the kernel's release is unknown.
    pub fn blocks_socket_tables() -> Result<bool> {
        is_kernel_before(6, 9)
    }

    /// Waits for the page fault, because `tcp_sendmsg()` takes the lock before it copies. Without a
    /// connection to send on there is no fault.
    fn wait(&mut self) -> Result<()> {
        use std::os::fd::AsFd as _;
        let faults = self.faults.as_ref().context("it is open until the drop")?;
        eventually("the send waits for its page", patience(), || {
            let ended = self.sender.take_if(|sender| sender.is_finished());
            if let Some(Ok(Some(error))) = ended.map(JoinHandle::join) {
                return Err(error).context("sending on the socket to lock");
            }
            let mut fds = [PollFd::new(faults.as_fd(), PollFlags::POLLIN)];
            poll(&mut fds, PollTimeout::from(10_u16))?;
            let is_there = fds[0].revents() == Some(PollFlags::POLLIN);
            Ok(is_there.then_some(()))
        })
    }
}

impl Drop for Locked {
    fn drop(&mut self) {
        // Without the descriptor the kernel resolves the fault normally.
        self.faults = None;
        if let Some(sender) = self.sender.take() {
            let _ = sender.join();
        }
        // SAFETY: this is the mapping of `new`, which nobody uses any more.
        let _ = unsafe { munmap(self.page, PAGE.get()) };
    }
}

/// Whether the kernel is older than this version.
///
/// # Errors
///
/// Fails if the kernel's release is unknown.
pub fn is_kernel_before(major: u32, minor: u32) -> Result<bool> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    let mut next = || numbers.next().context("a release")?.context("its number");
    Ok((next()?, next()?) < (major, minor))
}

fn control<const N: usize>(
    faults: &OwnedFd,
    request: libc::c_ulong,
    argument: &mut [u64; N],
) -> Result<()> {
    // The type of a request differs between C libraries.
    let request = request as libc::Ioctl;
    // SAFETY: the kernel reads and writes a structure of `N` numbers.
    let status = unsafe { libc::ioctl(faults.as_raw_fd(), request, argument.as_mut_ptr()) };
    if status < 0 {
        return Err(io::Error::last_os_error()).context("ioctl of a userfaultfd");
    }
    Ok(())
}
