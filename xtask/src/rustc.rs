//! Identifies the compiler, which the whole eBPF toolchain must match.

use std::env;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context as _, Result};

use crate::process::output_of;

/// The compiler in use.
pub(crate) struct Rustc {
    /// The output of `rustc -vV`. Compilers with the same output are identical.
    pub(crate) identity: String,
    /// The version, such as `1.95.0`.
    pub(crate) release: String,
    /// The target triple of the host.
    pub(crate) host: String,
    /// The major version of its LLVM.
    pub(crate) llvm_major: u32,
    /// The folder of the toolchain.
    pub(crate) sysroot: PathBuf,
}

impl Rustc {
    pub(crate) fn find() -> Result<Self> {
        let program = env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
        let identity = output_of(Command::new(&program).arg("-vV"))?;
        let sysroot = output_of(Command::new(&program).args(["--print", "sysroot"]))?;
        Self::parse(identity, sysroot.trim().into())
    }

    fn parse(identity: String, sysroot: PathBuf) -> Result<Self> {
        let field = |name: &str| {
            identity
                .lines()
                .find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
                .with_context(|| format!("`rustc -vV` says no {name}: {identity:?}"))
        };
        let llvm = field("LLVM version")?;
        let llvm_major = llvm
            .split('.')
            .next()
            .and_then(|major| major.parse().ok())
            .with_context(|| format!("`rustc -vV` names an odd LLVM version: {llvm:?}"))?;
        Ok(Self {
            release: field("release")?.to_owned(),
            host: field("host")?.to_owned(),
            llvm_major,
            sysroot,
            identity,
        })
    }
}

/// `rustup component add` for the toolchain in use.
pub(crate) fn add_component(component: &str) -> Command {
    let mut rustup = Command::new("rustup");
    // Without a backtrace the reason of a failure is a single line.
    rustup
        .args(["component", "add", component])
        .env("RUST_BACKTRACE", "0");
    rustup
}

#[cfg(test)]
mod tests {
    use super::*;

    const STABLE: &str = "\
rustc 1.95.0 (59807616e 2026-04-14)
binary: rustc
commit-hash: 59807616e1fa2540724bfbac14d7976d7e4a3860
commit-date: 2026-04-14
host: x86_64-unknown-linux-gnu
release: 1.95.0
LLVM version: 22.1.2
";

    fn parse(identity: &str) -> Result<Rustc> {
        Rustc::parse(identity.to_owned(), PathBuf::from("/toolchain"))
    }

    #[test]
    fn the_fields_that_matter_are_read() {
        let rustc = parse(STABLE).expect("a compiler's own words");
        assert_eq!(rustc.release, "1.95.0");
        assert_eq!(rustc.host, "x86_64-unknown-linux-gnu");
        assert_eq!(rustc.llvm_major, 22);
        assert_eq!(rustc.identity, STABLE);
    }

    #[test]
    fn a_missing_field_is_named() {
        let without = STABLE.replace("LLVM version: 22.1.2\n", "");
        let error = parse(&without).err().expect("no LLVM version").to_string();
        assert!(error.contains("says no LLVM version"), "{error}");
    }

    #[test]
    fn an_odd_llvm_version_is_refused() {
        let odd = STABLE.replace("22.1.2", "twenty-two");
        let error = parse(&odd).err().expect("no number").to_string();
        assert!(error.contains("\"twenty-two\""), "{error}");
    }

    #[test]
    fn the_compiler_in_use_can_be_asked() {
        let rustc = Rustc::find().expect("it has just built this test");
        assert!(rustc.sysroot.join("lib").is_dir());
    }
}
