//! A pin directory of the test's own.

use std::{
    ffi::CString,
    fs, io,
    os::{
        fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
        unix::{ffi::OsStrExt as _, process::CommandExt as _},
    },
    path::{Path, PathBuf},
    process::Command,
    sync::Once,
};

use anyhow::{Context as _, Result};
use nix::{
    errno::Errno,
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, unshare},
};

use crate::names;

/// Where the daemon mounts bpffs.
const BPFFS: &str = "/sys/fs/bpf";

/// A directory that a daemon makes for its pins. On drop it is removed with all that is in it, and
/// what that kept attached is detached: it must outlive the daemon.
#[derive(Debug)]
pub struct Pins {
    path: PathBuf,
}

impl Pins {
    /// Chooses one; nothing is made.
    pub fn new() -> Self {
        static SWEEP: Once = Once::new();
        let bpffs = Path::new(BPFFS);
        SWEEP.call_once(|| {
            for name in names::left_behind(bpffs) {
                // Another run may sweep too: who comes second finds nothing.
                let _ = remove(&bpffs.join(name));
            }
        });
        Self {
            path: bpffs.join(names::unique()),
        }
    }

    /// Where it is, once a daemon has made it.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The directories of sets of pins in it.
    ///
    /// # Errors
    ///
    /// Where it cannot be read.
    pub fn sets(&self) -> Result<Vec<PathBuf>> {
        let mut sets = list(&self.path)?;
        sets.sort();
        Ok(sets)
    }

    /// The names of the pins in every set.
    ///
    /// # Errors
    ///
    /// Where it cannot be read.
    pub fn names(&self) -> Result<Vec<String>> {
        let mut names = Vec::new();
        for set in self.sets()? {
            let of_set = list(&set)?;
            let name = |pin: &PathBuf| pin.file_name().map(|name| name.to_string_lossy().into());
            names.extend(of_set.iter().filter_map(name));
        }
        names.sort();
        Ok(names)
    }
}

impl Default for Pins {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Pins {
    fn drop(&mut self) {
        match remove(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                eprintln!("pins are left behind in {}: {error}", self.path.display());
            }
            _ => {}
        }
    }
}

fn list(directory: &Path) -> io::Result<Vec<PathBuf>> {
    match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        entries => entries?.map(|entry| Ok(entry?.path())).collect(),
    }
}

/// Removes a directory with all below it.
fn remove(directory: &Path) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove(&entry.path())?;
        } else {
            fs::remove_file(entry.path())?;
        }
    }
    fs::remove_dir(directory)
}

/// Gives the command a mount namespace of its own, in which bpffs is not mounted.
pub fn without_bpffs(command: &mut Command) {
    let prepare = || {
        unshare(CloneFlags::CLONE_NEWNS)?;
        let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
        mount(None::<&str>, "/", None::<&str>, private, None::<&str>)?;
        // Every mount that lies there, one over the other.
        while umount2(BPFFS, MntFlags::MNT_DETACH).is_ok() {}
        Ok(())
    };
    // SAFETY: between fork and exec only system calls are made, and nothing is allocated.
    unsafe { command.pre_exec(prepare) };
}

/// The start of `union bpf_attr` for `BPF_MAP_CREATE` (`linux/bpf.h`).
#[repr(C)]
struct MapCreate {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
}

/// The same for `BPF_OBJ_PIN`.
#[repr(C)]
struct ObjectPin {
    path: u64,
    fd: u32,
    flags: u32,
}

/// Pins a new map of this `enum bpf_map_type` and these sizes.
///
/// # Errors
///
/// Where the kernel refuses.
pub fn plant_map(path: &Path, map_type: u32, key: u32, value: u32, entries: u32) -> Result<()> {
    const BPF_MAP_CREATE: libc::c_long = 0;
    const BPF_OBJ_PIN: libc::c_long = 6;
    let mut create = MapCreate {
        map_type,
        key_size: key,
        value_size: value,
        max_entries: entries,
    };
    let fd = bpf(BPF_MAP_CREATE, &mut create).context("making a map")?;
    // SAFETY: the kernel has just made this descriptor for this process.
    let map = unsafe { OwnedFd::from_raw_fd(i32::try_from(fd)?) };
    let name = CString::new(path.as_os_str().as_bytes())?;
    let mut pin = ObjectPin {
        path: name.as_ptr() as u64,
        fd: u32::try_from(map.as_raw_fd())?,
        flags: 0,
    };
    bpf(BPF_OBJ_PIN, &mut pin).with_context(|| format!("pinning {}", path.display()))?;
    Ok(())
}

/// A call of bpf(2).
pub(crate) fn bpf<T>(command: libc::c_long, attributes: &mut T) -> Result<libc::c_long, Errno> {
    let attributes = std::ptr::from_mut(attributes);
    // SAFETY: the kernel reads and writes at most the given length of a value of that size.
    Errno::result(unsafe { libc::syscall(libc::SYS_bpf, command, attributes, size_of::<T>()) })
}
