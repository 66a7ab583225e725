//! Builds the eBPF programs into `OUT_DIR`, from where `bpf` includes them.

use anyhow::{Context as _, Result};

fn main() -> Result<()> {
    let root_dir = concat!(env!("CARGO_MANIFEST_DIR"), "/../session-enforcer-ebpf");
    let common = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../session-enforcer-common/src"
    );
    println!("cargo:rerun-if-changed={common}");
    println!("cargo:rerun-if-env-changed=PATH");
    // The toolchain that builds the daemon also builds the programs; `-Z build-std` is asked of a
    // stable compiler (see ARCHITECTURE.md, "The eBPF build").
    let toolchain = std::env::var("RUSTUP_TOOLCHAIN").unwrap_or_else(|_| "stable".to_owned());
    // SAFETY: a build script's main thread, before any other thread exists.
    unsafe { std::env::set_var("RUSTC_BOOTSTRAP", "1") };
    aya_build::build_ebpf(
        [aya_build::Package {
            name: "session-enforcer-ebpf",
            root_dir,
            ..Default::default()
        }],
        aya_build::Toolchain::Custom(&toolchain),
    )
    .context("the eBPF programs cannot be built; `cargo xtask build` sets up what they need")
}
