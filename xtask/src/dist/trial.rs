//! Tests the built files as root: the Debian package in machines with systemd, the image in podman, and the
//! RPM by its contents.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use super::{Arch, list};
use crate::build::Profile;
use crate::packages::{self, Missing};
use crate::process::{is_root, run, say};
use crate::workspace::Workspace;

/// The Debian releases for the tests, the newest first.
const SUITES: [&str; 2] = ["trixie", "bookworm"];

/// Packages that the tests need in the machine besides the base system.
const INCLUDED: &str =
    "curl,dbus,logrotate,openssh-client,openssh-server,procps,systemd,systemd-sysv";

/// Fails before the build if the packages of these architectures cannot be tested on this machine.
pub(super) fn prepare(archs: &[Arch]) -> Result<()> {
    ensure!(
        is_root()?,
        "the test of the packages needs root: run `cargo xtask dist --test` as root"
    );
    includes(archs, own_arch()?)?;
    packages::ensure(&packages::MACHINES, Missing::Install)
}

fn includes(archs: &[Arch], own: Arch) -> Result<()> {
    ensure!(
        archs.contains(&own),
        "only the package for this machine's architecture can be tested here: omit --arch, or use --arch {}",
        own.name()
    );
    Ok(())
}

/// The architecture of this machine.
fn own_arch() -> Result<Arch> {
    let own = Arch::ALL
        .into_iter()
        .find(|arch| arch.name() == std::env::consts::ARCH);
    own.context("--test cannot be used here: no packages are built for this machine's architecture")
}

/// Checks the package and runs its tests in each release.
pub(super) fn run_in_machines(workspace: &Workspace, out: &Path, profile: Profile) -> Result<()> {
    let own = own_arch()?;
    let package = published(out, &format!("_{}.deb", own.debian()))?;
    let tarball = published(out, &format!("-{}.tar.gz", own.name()))?;
    say!("lintian");
    let mut lintian = Command::new("lintian");
    lintian.args(["--allow-root", "--fail-on", "error"]);
    run(lintian.arg(&package))?;
    if let Profile::Release = profile {
        say!("the RPM");
        let rpm = published(out, &format!("-1.{}.rpm", own.name()))?;
        run(tests(workspace, "rpm")
            .env("SESSION_ENFORCER_RPM", &rpm)
            .env("SESSION_ENFORCER_DEB", &package))?;
    }
    say!("testing the image in podman");
    let image = published(out, &format!("-{}.oci.tar", own.name()))?;
    run(tests(workspace, "image").env("SESSION_ENFORCER_IMAGE", &image))?;
    let suites = match profile {
        Profile::Release => &SUITES[..],
        Profile::Debug => &SUITES[..1],
    };
    for suite in suites {
        let root = debian(workspace, suite)?;
        say!("testing the package in Debian {suite}");
        run(tests(workspace, "package")
            .env("SESSION_ENFORCER_MACHINE", &root)
            .env("SESSION_ENFORCER_DEB", &package)
            .env("SESSION_ENFORCER_TARBALL", &tarball))?;
    }
    Ok(())
}

/// The command that runs a test file.
fn tests(workspace: &Workspace, name: &str) -> Command {
    let mut cargo = workspace.cargo();
    cargo
        .args(["test", "--package", "session-enforcer-tests"])
        .args(["--test", name, "--", "--test-threads=3"]);
    cargo
}

/// The file whose name ends with `end`.
fn published(out: &Path, end: &str) -> Result<PathBuf> {
    let mut files = list(out)?.into_iter();
    let file = files.find(|path| path.to_string_lossy().ends_with(end));
    file.with_context(|| format!("{} has no *{end}", out.display()))
}

/// A Debian root file system, which is created once and kept.
fn debian(workspace: &Workspace, suite: &str) -> Result<PathBuf> {
    let folder = workspace.target().join("machines");
    let root = folder.join(suite);
    if root.is_dir() {
        return Ok(root);
    }
    say!("creating a Debian {suite} root file system (about a minute, once)");
    fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
    // An incomplete root must not be taken for a complete one.
    let unfinished = folder.join(format!("{suite}.unfinished"));
    let _ = fs::remove_dir_all(&unfinished);
    let mut debootstrap = Command::new("mmdebstrap");
    debootstrap.args(["--quiet", "--variant=minbase"]);
    debootstrap.arg(format!("--include={INCLUDED}"));
    run(debootstrap.arg(suite).arg(&unfinished))?;
    fs::rename(&unfinished, &root)
        .with_context(|| format!("cannot rename {}", unfinished.display()))?;
    Ok(root)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_build_for_another_processor_cannot_be_tried() {
        includes(&Arch::ALL, Arch::X86_64).expect("it is among all");
        let error = includes(&[Arch::Aarch64], Arch::X86_64).expect_err("another one");
        assert!(
            error.to_string().ends_with("or use --arch x86_64"),
            "{error}"
        );
    }
}
