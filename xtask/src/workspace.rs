//! The paths of the project, and the cargo commands.

use std::env;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};

use crate::arch::Arch;
use crate::build::Profile;
use crate::process::{output_of, run};

/// The checkout and its target directory.
pub(crate) struct Workspace {
    root: PathBuf,
    target: PathBuf,
}

impl Workspace {
    pub(crate) fn find() -> Result<Self> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"))
            .parent()
            .context("xtask lies in a folder of the workspace")?
            .to_owned();
        let asked =
            env::var_os("CARGO_TARGET_DIR").or_else(|| env::var_os("CARGO_BUILD_TARGET_DIR"));
        let target = match asked {
            Some(dir) if !dir.is_empty() => std::path::absolute(&dir)
                .with_context(|| format!("CARGO_TARGET_DIR={} is no path", dir.display()))?,
            _ => root.join("target"),
        };
        Ok(Self { root, target })
    }

    /// The root of the checkout.
    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// Copies the files that git tracks or would track into a folder. Builds there use this workspace's eBPF
    /// toolchain.
    pub(crate) fn copy_sources(&self, folder: &Path) -> Result<Self> {
        let mut list = Command::new("git");
        list.args([
            "ls-files",
            "--cached",
            "--others",
            "--exclude-standard",
            "-z",
        ]);
        let files = output_of(list.current_dir(&self.root))?;
        let copy = Self {
            root: folder.join("sources"),
            target: folder.join("target"),
        };
        for file in files.split_terminator('\0') {
            let (from, to) = (self.root.join(file), copy.root.join(file));
            let parent = to.parent().context("a file lies in a folder")?;
            fs::create_dir_all(parent)
                .and_then(|()| fs::copy(&from, &to))
                .with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))?;
        }
        fs::create_dir_all(&copy.target)
            .and_then(|()| symlink(self.toolchain(), copy.toolchain()))
            .with_context(|| format!("cannot lay out {}", copy.target.display()))?;
        Ok(copy)
    }

    /// cargo's target directory.
    pub(crate) fn target(&self) -> &Path {
        &self.target
    }

    /// The folder of `cargo xtask setup`.
    pub(crate) fn toolchain(&self) -> PathBuf {
        self.target.join("ebpf-toolchain")
    }

    /// The linker of the eBPF programs.
    pub(crate) fn linker(&self) -> PathBuf {
        self.toolchain().join("bin").join("bpf-linker")
    }

    /// The crate of the fuzz targets, which is a separate workspace.
    pub(crate) fn fuzz_crate(&self) -> PathBuf {
        self.root.join("tests").join("fuzz")
    }

    /// A `cargo` command of the toolchain that built xtask, in the checkout.
    ///
    /// It need not name the linker: the build script of `session-enforcer` finds the linker in the target
    /// directory, also for a plain `cargo build`.
    pub(crate) fn cargo(&self) -> Command {
        let mut cargo = cargo();
        cargo
            .current_dir(&self.root)
            .env("CARGO_TARGET_DIR", &self.target)
            // The daemon is built for this machine, and `build` expects its binary there.
            .env_remove("CARGO_BUILD_TARGET");
        cargo
    }

    /// The same for static programs of an architecture.
    pub(crate) fn cargo_for(&self, arch: Arch) -> Result<Command> {
        arch.ensure_target()?;
        let (variable, linker) = arch.linker();
        let mut cargo = self.cargo();
        cargo
            .env("CARGO_BUILD_TARGET", arch.triple())
            .env(variable, linker);
        Ok(cargo)
    }

    /// The target folder of those programs.
    pub(crate) fn target_for(&self, arch: Arch) -> PathBuf {
        self.target.join(arch.triple())
    }
}

/// The command that builds one version of a crate from the registry into `folder`.
///
/// It runs outside the checkout, whose cargo configuration is not for it.
pub(crate) fn cargo_install(name: &str, version: &str, folder: &Path, scratch: &Path) -> Command {
    let mut command = cargo();
    command
        .args(["install", name, "--version", version])
        .args(["--locked", "--force", "--quiet", "--root"])
        .arg(folder)
        .current_dir(folder)
        .env("CARGO_TARGET_DIR", scratch);
    without_flags(&mut command);
    command
}

/// Builds such a program and removes the build files.
pub(crate) fn install(name: &str, version: &str, folder: &Path, profile: Profile) -> Result<()> {
    fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
    let scratch = folder.join("build");
    let mut install = cargo_install(name, version, folder, &scratch);
    run(install.args(["--profile", profile.name()]))
        .with_context(|| format!("cannot build {name}, which comes from the crates registry"))?;
    fs::remove_dir_all(&scratch).with_context(|| format!("cannot remove {}", scratch.display()))
}

/// Removes the caller's compiler flags, which are for other builds.
pub(crate) fn without_flags(command: &mut Command) {
    for flag in [
        "RUSTFLAGS",
        "CARGO_ENCODED_RUSTFLAGS",
        "CARGO_BUILD_RUSTFLAGS",
        "CARGO_BUILD_TARGET",
    ] {
        command.env_remove(flag);
    }
}

/// A `cargo` command of the toolchain that built xtask.
pub(crate) fn cargo() -> Command {
    let program = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    Command::new(program)
}
