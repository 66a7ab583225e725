//! Provides the sources of `core` in exactly the compiler's version.
//!
//! There is no prebuilt `core` for the bpf target, so cargo builds it (`-Z build-std=core`). cargo expects
//! its sources in the toolchain, where rustup's component `rust-src` installs them.

use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};

use crate::apt::PrivateApt;
use crate::process::{find_program, output_of, say};
use crate::rustc::{Rustc, add_component};
use crate::workspace::Workspace;

/// The name prefix of folders with unpacked sources.
const KEPT: &str = "rust-src-";

/// The missing sources and their destination.
struct Missing<'a> {
    rustc: &'a Rustc,
    place: PathBuf,
}

/// Ensures that the toolchain has the sources of `core`.
pub(crate) fn ensure(workspace: &Workspace, rustc: &Rustc) -> Result<()> {
    let missing = Missing {
        rustc,
        place: rustc.sysroot.join("lib/rustlib/src/rust"),
    };
    missing.remove_stale_link()?;
    if missing.arrived() {
        return Ok(());
    }
    let Err(by_rustup) = missing.ask_rustup() else {
        return Ok(());
    };
    say!("rustup cannot provide them ({by_rustup:#})");
    let kept = missing.ask_distribution(workspace).with_context(|| {
        format!(
            "the eBPF programs need the sources of Rust's `core`, and neither rustup nor the \
             distribution provides those of rustc {}; remedy: `rustup component add rust-src` with \
             a connection to the internet, or put a copy of the folder `library` of exactly that \
             version at {}/library",
            rustc.release,
            missing.place.display()
        )
    })?;
    missing.link(&kept)?;
    if !missing.arrived() {
        bail!("{} lacks core or library/Cargo.lock", kept.display());
    }
    Ok(())
}

impl Missing<'_> {
    fn arrived(&self) -> bool {
        // cargo resolves the standard library with its own lock file and refuses to build without it.
        has_core(&self.place.join("library")) && self.place.join("library/Cargo.lock").is_file()
    }

    /// Removes the link of an earlier setup if its target directory was deleted or its toolchain was updated.
    fn remove_stale_link(&self) -> Result<()> {
        let Ok(target) = fs::read_link(&self.place) else {
            return Ok(());
        };
        if self.place.exists() && !is_of_another_release(&target, &self.rustc.release) {
            return Ok(());
        }
        fs::remove_file(&self.place)
            .with_context(|| format!("cannot remove the stale link {}", self.place.display()))
    }

    fn ask_rustup(&self) -> Result<()> {
        if find_program("rustup", &[]).is_none() {
            bail!("it is not installed");
        }
        say!(
            "adding rustup's component rust-src: the eBPF programs need `core` built for BPF, from \
             the sources of rustc {}",
            self.rustc.release
        );
        output_of(&mut add_component("rust-src"))?;
        if !self.arrived() {
            bail!(
                "the component is there, but not in {}",
                self.place.display()
            );
        }
        Ok(())
    }

    /// Unpacks the distribution's package `rust-src` without installing it. Returns the folder.
    fn ask_distribution(&self, workspace: &Workspace) -> Result<PathBuf> {
        let release = &self.rustc.release;
        let kept = workspace.toolchain().join(kept_name(release));
        if !has_core(&kept.join("library")) {
            say!(
                "fetching the distribution's package rust-src {release}, to unpack it into {}",
                kept.display()
            );
            let apt = PrivateApt::new(workspace.toolchain().join("apt"))?;
            let package = apt.download("rust-src", release)?;
            unpack(&package, &kept)?;
            apt.remove();
        }
        Ok(kept)
    }

    fn link(&self, kept: &Path) -> Result<()> {
        say!(
            "linking {} to {} (remove the link before you add rustup's own component)",
            self.place.display(),
            kept.display()
        );
        let parent = self.place.parent().unwrap_or(&self.place);
        fs::create_dir_all(parent)
            .and_then(|()| symlink(kept, &self.place))
            .with_context(|| {
                format!(
                    "cannot make the link {place}, where cargo looks for the sources; remedy: as \
                     somebody who may write there, `mkdir -p {parent} && ln -s {kept} {place}`",
                    place = self.place.display(),
                    parent = parent.display(),
                    kept = kept.display()
                )
            })
    }
}

/// The folder name of unpacked sources.
fn kept_name(release: &str) -> String {
    format!("{KEPT}{release}")
}

/// Whether a link leads to sources that a setup unpacked for another compiler.
fn is_of_another_release(target: &Path, release: &str) -> bool {
    let name = target.file_name().unwrap_or_default().to_string_lossy();
    name.starts_with(KEPT) && name != kept_name(release)
}

fn has_core(library: &Path) -> bool {
    library.join("core/src/lib.rs").is_file()
}

/// Unpacks the folder `library` of a rust-src package (a sixth of the package) to `kept/library`.
fn unpack(package: &Path, kept: &Path) -> Result<()> {
    let half = kept.with_extension("partial");
    remove(&half)?;
    remove(kept)?;
    fs::create_dir_all(&half).with_context(|| format!("cannot create {}", half.display()))?;
    let mut reader = Command::new("dpkg-deb")
        .arg("--fsys-tarfile")
        .arg(package)
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start dpkg-deb")?;
    let archive = reader.stdout.take().context("dpkg-deb has no output")?;
    // Strip the first four components of ./usr/src/rustc-1.95.0/library/core/...
    let unpacked = Command::new("tar")
        .args([
            "--extract",
            "--wildcards",
            "--strip-components=4",
            "--directory",
        ])
        .arg(&half)
        .arg("./usr/src/*/library")
        .stdin(archive)
        .status()
        .context("cannot start tar")?;
    let read = reader.wait().context("cannot wait for dpkg-deb")?;
    if !unpacked.success() || !read.success() {
        bail!(
            "cannot unpack {}: dpkg-deb {read}, tar {unpacked}",
            package.display()
        );
    }
    // Rename the folder only when it is complete; the next setup looks for this name.
    fs::rename(&half, kept).with_context(|| format!("cannot rename to {}", kept.display()))
}

fn remove(folder: &Path) -> Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", folder.display()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_link_of_ours_to_another_release_is_stale() {
        let stale = |target| is_of_another_release(Path::new(target), "1.95.0");
        assert!(stale("/checkout/target/ebpf-toolchain/rust-src-1.94.1"));
        assert!(!stale("/checkout/target/ebpf-toolchain/rust-src-1.95.0"));
        assert!(
            !stale("../../../src/rustc-1.94.1"),
            "the distribution's own link"
        );
    }
}
