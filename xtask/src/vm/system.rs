//! The root of a machine for another architecture: a small Debian, unpacked from its packages without
//! installation. It contains this machine's project folders.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};

use crate::apt::PrivateApt;
use crate::arch::Arch;
use crate::process::{run, say};

/// A code name, so that a kept root does not change with a Debian release.
const SUITE: &str = "trixie";

/// The packages that the guest and its tests need.
const PACKAGES: [&str; 10] = [
    "base-files",
    "base-passwd",
    "bash",
    "busybox-static",
    "coreutils",
    "iproute2",
    "kmod",
    "mount",
    "procps",
    "util-linux",
];

/// The `PATH` of its programs.
pub(super) const PATH: &str = "/usr/sbin:/usr/bin:/sbin:/bin";

/// The path of its busybox, for the initramfs.
pub(super) const BUSYBOX: &str = "usr/bin/busybox";

/// Returns the root for an architecture below its machines' folder. Creates it if it is missing.
pub(super) fn ensure(base: &Path, arch: Arch) -> Result<PathBuf> {
    let root = base.join("root");
    if root.is_dir() {
        return Ok(root);
    }
    say!(
        "fetching a Debian {SUITE} for {}, to unpack it into {}",
        arch.name(),
        root.display()
    );
    let half = base.join("root.partial");
    if half.exists() {
        fs::remove_dir_all(&half).with_context(|| format!("cannot remove {}", half.display()))?;
    }
    let apt = PrivateApt::of(base.join("apt"), arch)?;
    let made = unpack(&apt, &half);
    apt.remove();
    made.context("making a Debian for the virtual machines")?;
    // Rename the root only when it is complete; the next run looks for this name.
    fs::rename(&half, &root).with_context(|| format!("cannot rename to {}", root.display()))?;
    Ok(root)
}

fn unpack(apt: &PrivateApt, root: &Path) -> Result<()> {
    apt.open(SUITE)?;
    let packages = apt.fetch_whole(&PACKAGES)?;
    fs::create_dir_all(root).with_context(|| format!("cannot create {}", root.display()))?;
    let is_base = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        name.starts_with("base-files_")
    };
    // Unpack this package first: it has the links from /bin to /usr/bin and the like.
    let (base, others): (Vec<_>, Vec<_>) = packages.iter().partition(|path| is_base(path));
    for package in base.into_iter().chain(others) {
        run(Command::new("dpkg-deb")
            .arg("--extract")
            .arg(package)
            .arg(root))?;
    }
    // Create the needed files that the packages' scripts would create.
    symlink("bash", root.join("usr/bin/sh")).context("cannot make a link to the shell")?;
    for (from, to) in [
        ("usr/share/base-passwd/passwd.master", "etc/passwd"),
        ("usr/share/base-passwd/group.master", "etc/group"),
    ] {
        fs::copy(root.join(from), root.join(to))
            .with_context(|| format!("cannot copy {from} to {to} in {}", root.display()))?;
    }
    Ok(())
}
