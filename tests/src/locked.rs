//! Sockets that their process keeps locked in the kernel: a send from memory whose page fault nobody answers.

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
    /// While it is open, faults in the page wait for it.
    faults: Option<OwnedFd>,
    page: NonNull<libc::c_void>,
    sender: Option<JoinHandle<()>>,
}

// SAFETY: the page is only touched by the sender, and unmapped by whoever drops this.
unsafe impl Send for Locked {}

impl Locked {
    /// Locks a socket, which stays open meanwhile: a thread sends from a page that is never there.
    ///
    /// # Errors
    ///
    /// Where the kernel has no `userfaultfd`, or gives none.
    pub fn new(socket: &impl AsRawFd) -> Result<Self> {
        // SAFETY: a call without pointers.
        let faults = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) };
        let faults = Errno::result(faults).context("userfaultfd(2)")?;
        // SAFETY: the kernel has just made this descriptor for this process.
        let faults = unsafe { OwnedFd::from_raw_fd(faults as RawFd) };
        control(&faults, UFFDIO_API, &mut [UFFD_API, 0, 0])?;
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at no given place.
        let page = unsafe { mmap_anonymous(None, PAGE, access, MapFlags::MAP_PRIVATE) }?;
        let at = page.as_ptr() as u64;
        let range = [at, PAGE.get() as u64, UFFDIO_REGISTER_MODE_MISSING, 0];
        control(&faults, UFFDIO_REGISTER, &mut { range })?;
        let socket = socket.as_raw_fd();
        let sender = thread::spawn(move || {
            // SAFETY: the page is mapped until this thread has ended. What is sent does not matter.
            unsafe { libc::send(socket, at as *const libc::c_void, 1, libc::MSG_NOSIGNAL) };
        });
        let locked = Self {
            faults: Some(faults),
            page,
            sender: Some(sender),
        };
        locked.wait()?;
        Ok(locked)
    }

    /// Whether a lock keeps the kernel's socket tables from answering anybody, as before Linux 6.9.
    ///
    /// # Errors
    ///
    /// Where the kernel tells no release.
    pub fn blocks_socket_tables() -> Result<bool> {
        is_kernel_before(6, 9)
    }

    /// Waits for the fault: `tcp_sendmsg()` takes the lock before it copies. Where there is nothing to send on,
    /// there is none.
    fn wait(&self) -> Result<()> {
        use std::os::fd::AsFd as _;
        let faults = self.faults.as_ref().context("it is open until the drop")?;
        eventually("the send waits for its page", patience(), || {
            let has_ended = self.sender.as_ref().is_none_or(JoinHandle::is_finished);
            let mut fds = [PollFd::new(faults.as_fd(), PollFlags::POLLIN)];
            let ready = poll(&mut fds, PollTimeout::from(10_u16))?;
            anyhow::ensure!(ready == 1 || !has_ended, "the socket sends nothing");
            Ok((ready == 1).then_some(()))
        })
    }
}

impl Drop for Locked {
    fn drop(&mut self) {
        // The fault is answered as any other then.
        self.faults = None;
        if let Some(sender) = self.sender.take() {
            let _ = sender.join();
        }
        // SAFETY: the mapping of `new`, which nobody uses any more.
        let _ = unsafe { munmap(self.page, PAGE.get()) };
    }
}

/// Whether the kernel is older than this.
///
/// # Errors
///
/// Where it tells no release.
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
    // C libraries give it different types.
    let request = request as libc::Ioctl;
    // SAFETY: the kernel reads and writes a structure of so many numbers.
    let status = unsafe { libc::ioctl(faults.as_raw_fd(), request, argument.as_mut_ptr()) };
    if status < 0 {
        return Err(io::Error::last_os_error()).context("ioctl of a userfaultfd");
    }
    Ok(())
}
