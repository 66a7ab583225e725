//! The processor architectures of releases and virtual machines.

use std::process::Command;

use anyhow::{Result, bail};

use crate::process::{find_program, output_of, say};
use crate::rustc::Rustc;

/// A processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Arch {
    /// 64-bit x86.
    #[value(name = "x86_64")]
    X86_64,
    /// 64-bit ARM.
    #[value(name = "aarch64")]
    Aarch64,
}

impl Arch {
    /// All architectures.
    pub(crate) const ALL: [Self; 2] = [Self::X86_64, Self::Aarch64];

    /// The architecture of this machine.
    pub(crate) const HOST: Self = if cfg!(target_arch = "aarch64") {
        Self::Aarch64
    } else {
        Self::X86_64
    };

    /// The name that the kernel and RPM use.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::X86_64 => "x86_64",
            Self::Aarch64 => "aarch64",
        }
    }

    /// The name that Debian uses.
    pub(crate) const fn debian(self) -> &'static str {
        match self {
            Self::X86_64 => "amd64",
            Self::Aarch64 => "arm64",
        }
    }

    /// The target triple of static binaries, which need no C library.
    pub(crate) fn triple(self) -> String {
        format!("{}-unknown-linux-musl", self.name())
    }

    /// Adds the standard library for the triple to the toolchain.
    pub(crate) fn ensure_target(self) -> Result<()> {
        let rustc = Rustc::find()?;
        let library = rustc.sysroot.join("lib/rustlib").join(self.triple());
        if library.is_dir() {
            return Ok(());
        }
        if find_program("rustup", &[]).is_none() {
            bail!(
                "{} has no standard library for {}; remedy: install it for this toolchain",
                rustc.sysroot.display(),
                self.triple()
            );
        }
        say!("adding rustup's target {}", self.triple());
        let mut rustup = Command::new("rustup");
        output_of(rustup.args(["target", "add"]).arg(self.triple())).map(drop)
    }

    /// The name and value of the variable that sets cargo's linker for the triple. It is the toolchain's own
    /// linker, so no compiler for the architecture is needed.
    pub(crate) fn linker(self) -> (String, &'static str) {
        let triple = self.triple().to_uppercase().replace('-', "_");
        (format!("CARGO_TARGET_{triple}_LINKER"), "rust-lld")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_linkers_variable_is_one_that_cargo_reads() {
        assert_eq!(
            Arch::Aarch64.linker().0,
            "CARGO_TARGET_AARCH64_UNKNOWN_LINUX_MUSL_LINKER"
        );
    }
}
