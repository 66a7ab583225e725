//! A test's own child cgroup: a test's daemon is never attached to another one.

use std::{
    fs::{self, File},
    io,
    os::{fd::AsRawFd as _, unix::fs::MetadataExt as _},
    path::{Path, PathBuf},
    sync::Once,
    time::Duration,
};

use anyhow::{Context as _, Result};

use crate::{
    bpf_calls::attached_programs, clock::eventually, names, pace::scaled, process::require_root,
};

/// The maximum wait for the processes of a cgroup to die. After it the cgroup is left behind.
const DYING: Duration = Duration::from_secs(10);

/// The number of programs that a daemon attaches if no rule names owners. With owners there is one more.
pub const PROGRAMS: u32 = 3;

/// A new child of the cgroup-v2 root. Dropping it kills its processes and removes it.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// Creates a cgroup.
    ///
    /// # Errors
    ///
    /// Fails without root's privileges, or if cgroup v2 is not mounted.
    pub fn new() -> Result<Self> {
        static SWEEP: Once = Once::new();
        require_root()?;
        let mount = mount_point()?;
        SWEEP.call_once(|| sweep(&mount));
        Self::make(&mount)
    }

    /// Creates a child of this cgroup, which must outlive it.
    ///
    /// # Errors
    ///
    /// Fails if the kernel refuses.
    pub fn child(&self) -> Result<Self> {
        Self::make(&self.path)
    }

    fn make(parent: &Path) -> Result<Self> {
        let path = parent.join(names::unique());
        fs::create_dir(&path).with_context(|| format!("making the cgroup {}", path.display()))?;
        Ok(Self { path })
    }

    /// Creates a chain of cgroups with this name below this one and opens the innermost.
    ///
    /// # Errors
    ///
    /// Fails if the kernel refuses.
    pub fn chain(&self, name: &str, levels: usize) -> Result<File> {
        let mut innermost = File::open(&self.path)?;
        for _ in 0..levels {
            let next = path_of(&innermost).join(name);
            fs::create_dir(&next)?;
            innermost = File::open(next)?;
        }
        Ok(innermost)
    }

    /// The path from the root of the hierarchy, as in the configuration.
    ///
    /// # Errors
    ///
    /// Fails if cgroup v2 is not mounted.
    pub fn name(&self) -> Result<String> {
        let below = self.path.strip_prefix(mount_point()?)?;
        Ok(format!("/{}", below.display()))
    }

    /// The cgroup ID.
    ///
    /// # Errors
    ///
    /// Fails if the cgroup was removed.
    pub fn id(&self) -> Result<u64> {
        Ok(fs::metadata(&self.path)?.ino())
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The number of attached eBPF programs of the kinds that the daemon uses.
    ///
    /// # Errors
    ///
    /// Fails if the kernel does not report them.
    pub fn attached_programs(&self) -> Result<u32> {
        Ok(u32::try_from(self.program_ids()?.len())?)
    }

    /// The IDs of these programs.
    ///
    /// # Errors
    ///
    /// Fails if the kernel does not report them.
    pub fn program_ids(&self) -> Result<Vec<u32>> {
        let directory = File::open(&self.path)?;
        let mut ids = Vec::new();
        // BPF_CGROUP_INET_INGRESS, BPF_CGROUP_INET_EGRESS, BPF_CGROUP_INET_SOCK_CREATE and
        // BPF_CGROUP_SOCK_OPS.
        for kind in [0, 1, 2, 3] {
            let attached = attached_programs(&directory, kind);
            ids.extend(attached.context("asking for the cgroup's programs")?);
        }
        Ok(ids)
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        if let Err(error) = remove(&self.path) {
            eprintln!(
                "the cgroup {} is left behind: {error:#}",
                self.path.display()
            );
        }
    }
}

/// A path to an open directory, for every process. It is short even if the directory is nested deeper than a path can
/// express.
pub fn path_of(directory: &File) -> PathBuf {
    let fd = directory.as_raw_fd();
    format!("/proc/{}/fd/{fd}", std::process::id()).into()
}

/// Kills the processes of the cgroup and removes it with its children. A killed process leaves the cgroup
/// only when its teardown is complete, which takes a moment.
fn remove(path: &Path) -> Result<()> {
    let directory = File::open(path)?;
    let opened = path_of(&directory);
    fs::write(opened.join("cgroup.kill"), "1")?;
    for entry in fs::read_dir(opened)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove(&entry.path())?;
        }
    }
    eventually(
        "the cgroup is empty",
        scaled(DYING),
        || match fs::remove_dir(path) {
            Ok(()) => Ok(Some(())),
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => Ok(None),
            Err(error) => Err(error.into()),
        },
    )
}

fn sweep(mount: &Path) {
    for name in names::left_behind(mount) {
        // Another run may sweep at the same time, so a failure does not matter.
        let _ = remove(&mount.join(name));
    }
}

/// The mount of cgroup v2. On a hybrid hierarchy it is not `/sys/fs/cgroup`. The format is described in
/// proc(5).
fn mount_point() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    let is_cgroup2 = |line: &&str| line.contains(" - cgroup2 ");
    let line = mounts
        .lines()
        .find(is_cgroup2)
        .context("no cgroup2 file system is mounted")?;
    let path = line
        .split(' ')
        .nth(4)
        .context("a line of mountinfo has too few fields")?;
    Ok(path.into())
}
