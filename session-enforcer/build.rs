//! Builds the eBPF programs into `OUT_DIR`, from where `datapath` includes them.

use std::{
    env,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};

fn main() -> Result<()> {
    let root_dir = concat!(env!("CARGO_MANIFEST_DIR"), "/../session-enforcer-ebpf");
    let common = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../session-enforcer-common/src"
    );
    println!("cargo:rerun-if-changed={common}");
    // The toolchain of the daemon also builds the programs. A stable compiler accepts `-Z build-std` with
    // `RUSTC_BOOTSTRAP` (see docs/design/ebpf-build.md).
    let toolchain = env::var("RUSTUP_TOOLCHAIN").unwrap_or_else(|_| "stable".to_owned());
    // SAFETY: a build script's main thread, before any other thread exists.
    unsafe {
        env::set_var("RUSTC_BOOTSTRAP", "1");
        // `aya-build` turns each line of the inner cargo into a warning.
        env::set_var("CARGO_TERM_QUIET", "true");
        env::set_var("PATH", search_path()?);
        // Version 3 of the instruction set has atomic operations that return the previous value; Linux has
        // it since 5.12. `aya-build` sets RUSTFLAGS itself, so the flag goes into the profile.
        env::set_var("CARGO_UNSTABLE_PROFILE_RUSTFLAGS", "true");
        env::set_var("CARGO_PROFILE_RELEASE_RUSTFLAGS", "-Ctarget-cpu=v3");
        // The programs are the same in each profile of the daemon, and whatever CARGO_INCREMENTAL is: the verifier
        // refused what an incremental build made ("R5 !read_ok").
        env::set_var("CARGO_INCREMENTAL", "0");
        env::set_var("CARGO_PROFILE_RELEASE_LTO", "thin");
        // The debug information of the programs names the same paths on every machine, so that a release can
        // be reproduced.
        env::set_var("CARGO_UNSTABLE_TRIM_PATHS", "true");
        env::set_var("CARGO_PROFILE_RELEASE_TRIM_PATHS", "all");
        env::set_var(
            "CARGO_PROFILE_RELEASE_BUILD_OVERRIDE_RUSTFLAGS",
            "-Cdebuginfo=0",
        );
    }
    aya_build::build_ebpf(
        [aya_build::Package {
            name: "session-enforcer-ebpf",
            root_dir,
            ..Default::default()
        }],
        aya_build::Toolchain::Custom(&toolchain),
    )
    .context("the eBPF programs cannot be built; `cargo xtask setup` prepares what they need")
}

/// `PATH` with the linker that `cargo xtask setup` put into the target directory, if it did.
fn search_path() -> Result<std::ffi::OsString> {
    let out_dir = PathBuf::from(env::var_os("OUT_DIR").context("cargo sets OUT_DIR")?);
    let set_up = out_dir
        .ancestors()
        .map(|ancestor| ancestor.join("ebpf-toolchain/bin"))
        .find(|bin| bin.join("bpf-linker").exists());
    let path = env::var_os("PATH").unwrap_or_default();
    let before: Vec<PathBuf> = set_up.into_iter().collect();
    if let Some(bin) = before.first() {
        println!(
            "cargo:rerun-if-changed={}",
            Path::new(bin).join("bpf-linker").display()
        );
    }
    Ok(env::join_paths(
        before.into_iter().chain(env::split_paths(&path)),
    )?)
}
