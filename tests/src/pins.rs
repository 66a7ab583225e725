//! A pin directory of the test.

use std::{
    ffi::CString,
    fs, io,
    os::unix::{ffi::OsStrExt as _, process::CommandExt as _},
    path::{Path, PathBuf},
    process::Command,
    sync::Once,
};

use anyhow::{Context as _, Result};
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, unshare},
};

use crate::{
    bpf_calls::{bpf, number, open},
    names,
};

/// The mount point at which the daemon mounts bpffs.
const BPFFS: &str = "/sys/fs/bpf";

/// A directory in which a daemon creates its pins. Dropping it removes it with its content, which detaches
/// the pinned programs. So it must outlive the daemon.
#[derive(Debug)]
pub struct Pins {
    path: PathBuf,
}

impl Pins {
    /// Chooses a path without creating anything.
    pub fn new() -> Self {
        static SWEEP: Once = Once::new();
        let bpffs = Path::new(BPFFS);
        SWEEP.call_once(|| {
            for name in names::left_behind(bpffs) {
                // Another run may sweep at the same time, so a failure does not matter.
                let _ = remove(&bpffs.join(name));
            }
        });
        Self {
            path: bpffs.join(names::unique()),
        }
    }

    /// The path, which exists once a daemon has created it.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The directories of the pin sets.
    ///
    /// # Errors
    ///
    /// Fails if the directory cannot be read.
    pub fn sets(&self) -> Result<Vec<PathBuf>> {
        let mut sets = list(&self.path)?;
        sets.sort();
        Ok(sets)
    }

    /// The names of the pins in every set.
    ///
    /// # Errors
    ///
    /// Fails if the directory cannot be read.
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

/// Removes a directory with its content.
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

/// Gives the command a mount namespace without bpffs.
pub fn without_bpffs(command: &mut Command) {
    let prepare = || {
        unshare(CloneFlags::CLONE_NEWNS)?;
        let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
        mount(None::<&str>, "/", None::<&str>, private, None::<&str>)?;
        // Unmount every mount that is stacked there.
        while umount2(BPFFS, MntFlags::MNT_DETACH).is_ok() {}
        Ok(())
    };
    // SAFETY: the closure makes only system calls between fork and exec and allocates nothing.
    unsafe { command.pre_exec(prepare) };
}

/// The start of `union bpf_attr` for `BPF_OBJ_PIN` (`linux/bpf.h`).
#[repr(C)]
struct ObjectPin {
    path: u64,
    fd: u32,
    flags: u32,
}

/// Pins a new map with this `enum bpf_map_type` and these sizes.
///
/// # Errors
///
/// Fails if the kernel refuses.
pub fn plant_map(path: &Path, map_type: u32, key: u32, value: u32, entries: u32) -> Result<()> {
    const BPF_MAP_CREATE: libc::c_long = 0;
    const BPF_OBJ_PIN: libc::c_long = 6;
    let mut create = [map_type, key, value, entries];
    let map = open(BPF_MAP_CREATE, &mut create).context("making a map")?;
    let name = CString::new(path.as_os_str().as_bytes())?;
    let mut pin = ObjectPin {
        path: name.as_ptr() as u64,
        fd: number(&map),
        flags: 0,
    };
    bpf(BPF_OBJ_PIN, &mut pin).with_context(|| format!("pinning {}", path.display()))?;
    Ok(())
}
