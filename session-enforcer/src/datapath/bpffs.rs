//! bpffs, the file system of pins: its location, and its mount if it is missing.

use std::{
    fs::{self, DirBuilder, File},
    io,
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _},
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
    mount::{MsFlags, mount},
    sys::statfs,
    unistd::geteuid,
};

use super::pin_error::PinError;

/// The kernel's directory for the mount.
const MOUNT_POINT: &str = "/sys/fs/bpf";

/// Whether a directory is on bpffs.
pub(super) fn is_bpffs(path: &Path) -> io::Result<bool> {
    let found = statfs::statfs(path)?;
    Ok(found.filesystem_type() == statfs::BPF_FS_MAGIC)
}

/// Creates the directory with its parents. Mounts bpffs at its usual place if it is missing.
pub(super) fn make_directory(path: &Path) -> Result<(), PinError> {
    if !can_be_on_bpffs(path)? {
        mount_bpffs()?;
    }
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(|source| match path.to_string_lossy().contains('.') {
            // The kernel reserves names with dots on bpffs (`bpf_lookup`, EPERM).
            true => PinError::Dot(path.to_owned()),
            false => PinError::io("making", path)(source),
        })
}

/// Returns true if the directory is on bpffs, and false if bpffs has to be mounted for it.
pub(super) fn can_be_on_bpffs(path: &Path) -> Result<bool, PinError> {
    if on_bpffs(path)? {
        return Ok(true);
    }
    if !path.starts_with(MOUNT_POINT) || path == Path::new(MOUNT_POINT) {
        return Err(PinError::NotOnBpffs(path.to_owned()));
    }
    Ok(false)
}

/// Refuses a directory that other users own or may write to: they could place maps there that the daemon would trust.
/// This can happen if bpffs was mounted writable for everybody. `owners` are trusted besides this process's user.
pub(super) fn check_owner(path: &Path, owners: &[u32]) -> Result<(), PinError> {
    let found = fs::symlink_metadata(path).map_err(PinError::io("looking at", path))?;
    let is_own = found.uid() == geteuid().as_raw() || owners.contains(&found.uid());
    if !found.is_dir() || !is_own || found.mode() & 0o022 != 0 {
        return Err(PinError::NotOwn(path.to_owned()));
    }
    Ok(())
}

/// Whether the path, or its nearest existing ancestor, is on bpffs.
fn on_bpffs(path: &Path) -> Result<bool, PinError> {
    for ancestor in path.ancestors() {
        match is_bpffs(ancestor) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            found => return found.map_err(PinError::io("looking at", ancestor)),
        }
    }
    Ok(false)
}

fn mount_bpffs() -> Result<(), PinError> {
    let place = Path::new(MOUNT_POINT);
    // If two daemons start at once, only one may mount: a second mount would hide the pins of the first.
    let below = File::open(place).map_err(|_| PinError::Unsupported)?;
    let _one = Flock::lock(below, FlockArg::LockExclusive)
        .map_err(|(_, error)| PinError::io("locking", place)(error.into()))?;
    if is_bpffs(place).map_err(PinError::io("looking at", place))? {
        return Ok(());
    }
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC | MsFlags::MS_RELATIME;
    mount(Some("bpf"), place, Some("bpf"), flags, Some("mode=0700")).map_err(PinError::Mount)?;
    tracing::info!(
        "bpffs is mounted at {MOUNT_POINT}; where this process has a mount namespace of its own, \
         the mount and all pins go with it, so mount it for the whole host then"
    );
    Ok(())
}

/// State of bpffs at the daemon's mount point.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Bpffs {
    /// It is mounted.
    Mounted(PathBuf),
    /// It is not mounted, but can be.
    Mountable(PathBuf),
    /// It cannot be mounted.
    Refused(Errno),
}

/// Determines the state without mounting.
pub fn find() -> Bpffs {
    let place = PathBuf::from(MOUNT_POINT);
    match is_bpffs(&place) {
        Ok(true) => Bpffs::Mounted(place),
        Ok(false) => match try_mount() {
            Ok(()) => Bpffs::Mountable(place),
            Err(error) => Bpffs::Refused(error),
        },
        Err(error) => Bpffs::Refused(Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO))),
    }
}

/// Opens the file system as a mount would, and closes it again.
fn try_mount() -> Result<(), Errno> {
    // SAFETY: the name is a C string, and no other pointers are passed.
    let opened = unsafe { libc::syscall(libc::SYS_fsopen, c"bpf".as_ptr(), 1) };
    let opened = i32::try_from(Errno::result(opened)?).map_err(|_| Errno::EBADF)?;
    // SAFETY: the kernel has just created this descriptor, and nothing else uses it.
    unsafe { libc::close(opened) };
    Ok(())
}
