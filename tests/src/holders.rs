//! A crowded host: many descriptors, cgroups and network namespaces that no test uses.

use std::{
    fs::{self, File},
    io,
    os::unix::process::CommandExt as _,
    path::PathBuf,
    process::{Child, Command},
};

use anyhow::{Context as _, Result};

use crate::{cgroup::Cgroup, process::die_with_parent};

/// The number of descriptors of each process. A process may have 20,000.
const DESCRIPTORS: usize = 15_000;

/// Processes that hold descriptors or namespaces. Dropping this kills them.
#[derive(Debug, Default)]
pub struct Holders(Vec<Child>);

impl Holders {
    /// Starts processes with 15,000 descriptors each.
    ///
    /// # Errors
    ///
    /// Fails if the host's limit of processes or descriptors is reached.
    pub fn of_descriptors(processes: usize) -> Result<Self> {
        Self::of_descriptors_to("/dev/null", processes)
    }

    /// The same, but the descriptors refer to this file.
    ///
    /// # Errors
    ///
    /// Fails if the file cannot be opened, or as above.
    pub fn of_descriptors_to(file: &str, processes: usize) -> Result<Self> {
        let fill = || {
            close_sockets();
            for _ in 0..DESCRIPTORS {
                // SAFETY: the system call takes no pointers; it runs between fork and exec.
                if unsafe { libc::dup(0) } < 0 {
                    return Err(io::Error::last_os_error());
                }
            }
            Ok(())
        };
        Self::start(file, processes, fill)
    }

    /// Starts processes with a network namespace each.
    ///
    /// # Errors
    ///
    /// Fails if the host's limit of processes or namespaces is reached.
    pub fn of_namespaces(processes: usize) -> Result<Self> {
        let unshare = || {
            // SAFETY: the system call takes no pointers; it runs between fork and exec.
            if unsafe { libc::unshare(libc::CLONE_NEWNET) } < 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(())
        };
        Self::start("/dev/null", processes, unshare)
    }

    /// Moves the processes to a cgroup, which must outlive them.
    ///
    /// # Errors
    ///
    /// Fails if the kernel refuses.
    pub fn enter(&self, cgroup: &Cgroup) -> Result<()> {
        for child in &self.0 {
            let pid = child.id().to_string();
            fs::write(cgroup.path().join("cgroup.procs"), pid).context("entering a cgroup")?;
        }
        Ok(())
    }

    fn start(
        file: &str,
        processes: usize,
        prepare: impl FnMut() -> io::Result<()> + Send + Sync + Clone + 'static,
    ) -> Result<Self> {
        let mut holders = Self::default();
        for _ in 0..processes {
            let mut command = Command::new("sleep");
            command
                .arg("3600")
                .stdin(File::open(file).context(file.to_owned())?);
            // SAFETY: the closure makes only system calls between fork and exec.
            unsafe { command.pre_exec(prepare.clone()) };
            let child = die_with_parent(&mut command).spawn();
            holders.0.push(child.context("a process that holds")?);
        }
        Ok(holders)
    }
}

/// No test has more descriptors open.
const MAX_OPEN: i32 = 20_000;

/// Closes the sockets that a child has from its parent before it executes its program. Other tests of the process may
/// have so many that there would be no room for its own descriptors.
fn close_sockets() {
    for fd in 3..MAX_OPEN {
        let mut found = std::mem::MaybeUninit::<libc::stat>::uninit();
        // SAFETY: the system call writes the value before it returns 0; nothing uses these sockets in the child.
        unsafe {
            if libc::fstat(fd, found.as_mut_ptr()) == 0
                && found.assume_init().st_mode & libc::S_IFMT == libc::S_IFSOCK
            {
                libc::close(fd);
            }
        }
    }
}

impl Drop for Holders {
    fn drop(&mut self) {
        for child in &mut self.0 {
            // The process may have ended.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Many empty cgroups below one cgroup. Dropping this removes them.
#[derive(Debug)]
pub struct Cgroups(Vec<PathBuf>);

impl Cgroups {
    /// Creates the cgroups.
    ///
    /// # Errors
    ///
    /// Fails if the kernel refuses.
    pub fn below(parent: &Cgroup, count: usize) -> Result<Self> {
        let mut made = Self(Vec::new());
        for number in 0..count {
            let path = parent.path().join(format!("c{number}"));
            fs::create_dir(&path).with_context(|| path.display().to_string())?;
            made.0.push(path);
        }
        Ok(made)
    }
}

impl Drop for Cgroups {
    fn drop(&mut self) {
        for path in &self.0 {
            let _ = fs::remove_dir(path);
        }
    }
}
