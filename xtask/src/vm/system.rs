//! The root of a machine whose processor is not this machine's: a small Debian, unpacked from its packages and not
//! installed. Only the folders of the project come from this machine.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};

use crate::apt::PrivateApt;
use crate::arch::Arch;
use crate::process::{run, say};

/// By its code name, so that a root that is kept does not change.
const SUITE: &str = "trixie";

/// What the guest and the tests that are run there start.
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

/// Where its programs are.
pub(super) const PATH: &str = "/usr/sbin:/usr/bin:/sbin:/bin";

/// Where its busybox is, for the archive that the kernel starts from.
pub(super) const BUSYBOX: &str = "usr/bin/busybox";

/// The root for a processor, below its machines' folder; made where it is not there yet.
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
    // Only what is whole gets the name that the next run looks for.
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
    // It has the links from /bin to /usr/bin and the like, which the others are unpacked through.
    let (base, others): (Vec<_>, Vec<_>) = packages.iter().partition(|path| is_base(path));
    for package in base.into_iter().chain(others) {
        run(Command::new("dpkg-deb")
            .arg("--extract")
            .arg(package)
            .arg(root))?;
    }
    // What the packages' scripts would make, as far as it is needed here.
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
