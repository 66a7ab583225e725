//! A pin directory of the test's own.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Once,
};

use anyhow::Result;

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
