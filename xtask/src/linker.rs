//! Builds bpf-linker against the compiler's own LLVM.
//!
//! bpf-linker reads rustc's bitcode, so it needs rustc's LLVM. It is linked with the library in the
//! toolchain; no LLVM package is needed.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};

use crate::process::{find_program, output_of, run, say};
use crate::rustc::Rustc;
use crate::workspace::{Workspace, cargo_install};

const VERSION: &str = "0.13.0";

/// Ensures that a working linker of the pinned version exists that was built for this compiler.
pub(crate) fn ensure(workspace: &Workspace, rustc: &Rustc) -> Result<()> {
    let stamp = workspace.toolchain().join("bpf-linker.stamp");
    let wanted = format!("bpf-linker {VERSION}\n{}", rustc.identity);
    // The linker does not start after the toolchain or the target directory was moved.
    let stands = fs::read_to_string(&stamp).is_ok_and(|made| made == wanted)
        && starts(&workspace.linker()).is_ok();
    if stands {
        return Ok(());
    }
    install(workspace, rustc)?;
    starts(&workspace.linker()).context("bpf-linker was built but does not start")?;
    fs::write(&stamp, wanted).with_context(|| format!("cannot write {}", stamp.display()))
}

fn starts(linker: &Path) -> Result<String> {
    output_of(Command::new(linker).arg("--version"))
}

fn install(workspace: &Workspace, rustc: &Rustc) -> Result<()> {
    say!(
        "building bpf-linker {VERSION}, which links the eBPF programs, against the LLVM {} of \
         rustc {} (a minute or two)",
        rustc.llvm_major,
        rustc.release
    );
    let prefix = llvm_prefix(workspace, rustc)?;
    let scratch = workspace.toolchain().join("build");
    run(&mut install_command(workspace, rustc, &prefix, &scratch)).with_context(|| {
        let compiler = match find_program("cc", &[]) {
            Some(_) => "",
            None => "; there is no C compiler (`cc`): install one, on Debian the package gcc",
        };
        format!("cannot build bpf-linker, which comes from the crates registry{compiler}")
    })?;
    // The scratch folder has about 300 MB and is not used again.
    fs::remove_dir_all(&scratch).with_context(|| format!("cannot remove {}", scratch.display()))
}

fn install_command(workspace: &Workspace, rustc: &Rustc, prefix: &Path, scratch: &Path) -> Command {
    let mut command = cargo_install("bpf-linker", VERSION, &workspace.toolchain(), scratch);
    command
        .args([
            "--no-default-features",
            "--features",
            &format!("llvm-{}", rustc.llvm_major),
        ])
        .env("LLVM_PREFIX", prefix)
        // LLVM does the work.
        .env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "0");
    command
}

/// Creates a folder with the layout of an installed LLVM, whose library is the toolchain's.
///
/// The folder must stay, because it is the linker's run path.
fn llvm_prefix(workspace: &Workspace, rustc: &Rustc) -> Result<PathBuf> {
    let libraries = rustc.sysroot.join("lib");
    let library = libllvm(&libraries)?;
    let name = library.file_name().context("a library has a name")?;
    let prefix = workspace.toolchain().join("llvm");
    let make = || -> io::Result<()> {
        if prefix.exists() {
            fs::remove_dir_all(&prefix)?;
        }
        fs::create_dir_all(prefix.join("lib"))?;
        // The first name is used at link time, the second one at run time.
        for link in [OsStr::new("libLLVM.so"), name] {
            symlink(&library, prefix.join("lib").join(link))?;
        }
        Ok(())
    };
    make().with_context(|| format!("cannot lay out {}", prefix.display()))?;
    Ok(prefix)
}

/// The path of the toolchain's LLVM.
fn libllvm(folder: &Path) -> Result<PathBuf> {
    let entries =
        fs::read_dir(folder).with_context(|| format!("cannot list {}", folder.display()))?;
    let mut found = Vec::new();
    for entry in entries {
        let path = entry
            .with_context(|| format!("cannot list {}", folder.display()))?
            .path();
        if is_named_libllvm(&path) && is_elf(&path)? {
            found.push(path);
        }
    }
    // If there are several, the name with the soname is the one that is loaded.
    found.sort_by_key(|path| !has_soname(path));
    found.into_iter().next().with_context(|| {
        format!(
            "there is no libLLVM in {}: this toolchain's LLVM cannot be linked; remedy: use one \
             that rustup installed (`rustup default stable`)",
            folder.display()
        )
    })
}

fn is_named_libllvm(path: &Path) -> bool {
    let name = path.file_name().and_then(OsStr::to_str).unwrap_or_default();
    name.starts_with("libLLVM") && name.contains(".so")
}

fn has_soname(path: &Path) -> bool {
    let name = path.file_name().and_then(OsStr::to_str).unwrap_or_default();
    name.starts_with("libLLVM.so.")
}

/// Whether a file is an ELF library. A linker script with a similar name lies beside it.
fn is_elf(path: &Path) -> Result<bool> {
    let mut magic = [0; 4];
    let mut file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    Ok(file.read_exact(&mut magic).is_ok() && magic == *b"\x7fELF")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A folder of small files that is removed when dropped.
    struct Folder(PathBuf);

    impl Folder {
        fn with(test: &str, files: &[(&str, &[u8])]) -> Self {
            let name = format!("xtask-linker-{test}-{}", std::process::id());
            let folder = std::env::temp_dir().join(name);
            fs::create_dir_all(&folder).expect("the temporary directory can be written to");
            for (name, content) in files {
                fs::write(folder.join(name), content).expect("so can this folder");
            }
            Self(folder)
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn the_library_is_taken_and_not_the_script_beside_it() {
        let folder = Folder::with(
            "script",
            &[
                (
                    "libLLVM-22-rust-1.95.0-stable.so",
                    b"INPUT(libLLVM.so.22.1-rust-1.95.0-stable)",
                ),
                ("libLLVM.so.22.1-rust-1.95.0-stable", b"\x7fELF..."),
                ("librustc_driver-6108105cd7e839cf.so", b"\x7fELF..."),
            ],
        );
        let library = libllvm(&folder.0).expect("there is one");
        assert!(
            library.ends_with("libLLVM.so.22.1-rust-1.95.0-stable"),
            "{library:?}"
        );
    }

    #[test]
    fn an_older_layout_has_the_library_under_the_other_name() {
        let folder = Folder::with(
            "older",
            &[("libLLVM-17-rust-1.75.0-stable.so", b"\x7fELF...")],
        );
        let library = libllvm(&folder.0).expect("there is one");
        assert!(
            library.ends_with("libLLVM-17-rust-1.75.0-stable.so"),
            "{library:?}"
        );
    }

    #[test]
    fn a_toolchain_without_it_is_refused_with_the_remedy() {
        let folder = Folder::with(
            "none",
            &[("librustc_driver-1.so", b"\x7fELF..."), ("libLLVM.so", b"")],
        );
        let error = libllvm(&folder.0).expect_err("there is none").to_string();
        assert!(error.contains("remedy"), "{error}");
    }
}
