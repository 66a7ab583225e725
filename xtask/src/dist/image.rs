//! Builds the container image with buildah: the static binary and a configuration. No registry is used.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};

use super::{NAME, renew};
use crate::arch::Arch;
use crate::packages::{self, Missing};
use crate::process::{output_of, run};

/// The parts of an image.
pub(super) struct Image<'a> {
    pub(super) arch: Arch,
    pub(super) version: &'a str,
    /// The time stamp of its files, in seconds since 1970.
    pub(super) epoch: &'a str,
    pub(super) binary: &'a Path,
    /// The folder of the Containerfile.
    pub(super) source: &'a Path,
    /// A folder for intermediate files.
    pub(super) stage: &'a Path,
}

impl Image<'_> {
    /// Writes an archive of the image in the OCI layout, which podman and containerd load.
    pub(super) fn archive(&self, archive: &Path) -> Result<()> {
        packages::ensure(&packages::IMAGES, Missing::Install)?;
        let context = self.stage.join("context");
        let storage = self.stage.join("storage");
        for folder in [&context, &storage] {
            renew(folder)?;
        }
        for name in ["Containerfile", "config.toml"] {
            copy(&self.source.join(name), &context.join(name))?;
        }
        copy(self.binary, &context.join(NAME))?;
        // Everybody may read the files, independent of the build's umask.
        run(Command::new("chmod")
            .arg("-R")
            .arg("u=rwX,go=rX")
            .arg(&context))?;
        let tag = format!("{NAME}:{}", self.version);
        let mut build = buildah(&storage);
        build.args([
            "build",
            "--quiet",
            "--isolation",
            "chroot",
            "--format",
            "oci",
        ]);
        build.args(["--arch", self.arch.debian(), "--timestamp", self.epoch]);
        build.args(["--tag", &tag]).arg(&context);
        output_of(&mut build)?;
        let layout = self.stage.join("layout");
        let mut push = buildah(&storage);
        push.args(["push", "--quiet", &tag]);
        output_of(push.arg(format!("oci:{}:{tag}", layout.display())))?;
        self.pack(&layout, archive)
    }

    /// Packs the layout with tar, because buildah's own archive contains the build time.
    fn pack(&self, layout: &Path, archive: &Path) -> Result<()> {
        let mut tar = Command::new("tar");
        tar.args(["--create", "--sort=name", "--owner=0", "--group=0"]);
        tar.args(["--numeric-owner", "--mode=u=rwX,go=rX"]);
        tar.arg(format!("--mtime=@{}", self.epoch));
        tar.arg("--file").arg(archive);
        run(tar.arg("--directory").arg(layout).arg("."))
    }
}

/// A buildah with private storage.
fn buildah(storage: &Path) -> Command {
    let mut buildah = Command::new("buildah");
    let folder = |name: &str| -> PathBuf { storage.join(name) };
    buildah.arg("--root").arg(folder("root"));
    buildah.arg("--runroot").arg(folder("run"));
    buildah.args(["--storage-driver", "vfs"]);
    buildah
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::copy(from, to)
        .map(drop)
        .with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))
}
