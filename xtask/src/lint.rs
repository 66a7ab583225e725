//! `cargo xtask lint`: the same checks of formatting, clippy, documentation and dependencies as in CI.

mod dependencies;

use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::process::{output_of, run, say};
use crate::rustc::add_component;
use crate::setup::setup;
use crate::workspace::Workspace;

/// Arguments of `lint`.
#[derive(clap::Args, Default)]
pub(crate) struct Args {
    /// Do not build cargo-deny if it is not installed. The dependencies are then not checked.
    #[arg(long)]
    no_install: bool,
}

/// Runs all checks of the workspace, even after one has failed.
pub(crate) fn lint(workspace: &Workspace, args: &Args) -> Result<()> {
    for component in ["rustfmt", "clippy"] {
        ensure_component(workspace, component)?;
    }
    setup(workspace)?;
    let checks = [
        ("formatting", formatting(workspace)),
        ("clippy", clippy(workspace)),
        ("clippy on the tests of whole hosts", clippy_host(workspace)),
        ("clippy on the eBPF programs", clippy_ebpf(workspace)),
        ("formatting of the fuzz targets", formatting_fuzz(workspace)),
        ("documentation", documentation(workspace)),
    ];
    let mut failed = Vec::new();
    for (name, mut check) in checks {
        say!("{name}");
        if let Err(error) = run(&mut check) {
            say!("{error:#}");
            failed.push(name);
        }
    }
    say!("dependencies");
    if let Err(error) = dependencies::check(workspace, args.no_install) {
        say!("{error:#}");
        failed.push("dependencies");
    }
    if !failed.is_empty() {
        bail!("these checks failed: {}", failed.join(", "));
    }
    Ok(())
}

fn formatting(workspace: &Workspace) -> Command {
    let mut cargo = workspace.cargo();
    cargo.args(["fmt", "--all", "--check"]);
    cargo
}

fn clippy(workspace: &Workspace) -> Command {
    let mut cargo = workspace.cargo();
    cargo.args([
        "clippy",
        "--workspace",
        "--exclude",
        "session-enforcer-ebpf",
        "--all-targets",
    ]);
    cargo.args(["--keep-going", "--", "--deny", "warnings"]);
    cargo
}

/// Checks the `host` test, which is not part of all targets because it is not for `cargo test`.
fn clippy_host(workspace: &Workspace) -> Command {
    let mut cargo = workspace.cargo();
    cargo.args(["clippy", "--package", "session-enforcer-tests"]);
    cargo.args([
        "--test", "host", "--test", "package", "--test", "image", "--test", "rpm",
    ]);
    cargo.args(["--", "--deny", "warnings"]);
    cargo
}

/// The eBPF programs have no operating system and compile only for the bpf target.
fn clippy_ebpf(workspace: &Workspace) -> Command {
    let target = if cfg!(target_endian = "big") {
        "bpfeb-unknown-none"
    } else {
        "bpfel-unknown-none"
    };
    let mut cargo = workspace.cargo();
    cargo.args([
        "clippy",
        "--package",
        "session-enforcer-ebpf",
        "--target",
        target,
    ]);
    cargo.args(["-Z", "build-std=core", "--", "--deny", "warnings"]);
    cargo.env("RUSTC_BOOTSTRAP", "1");
    // Use a separate folder: crates that depend on RUSTC_BOOTSTRAP would otherwise be rebuilt each time.
    cargo.env("CARGO_TARGET_DIR", workspace.target().join("ebpf-lint"));
    cargo
}

fn formatting_fuzz(workspace: &Workspace) -> Command {
    let mut cargo = workspace.cargo();
    cargo.args(["fmt", "--check", "--manifest-path"]);
    cargo.arg(workspace.fuzz_crate().join("Cargo.toml"));
    cargo
}

/// Links from public to private items are allowed: rustdoc shows them as text, and editors follow them.
fn documentation(workspace: &Workspace) -> Command {
    let mut cargo = workspace.cargo();
    cargo.args(["doc", "--no-deps", "--workspace"]);
    cargo.args(["--exclude", "session-enforcer-ebpf", "--keep-going"]);
    let flags = "--deny warnings --allow rustdoc::private_intra_doc_links";
    cargo.env("RUSTDOCFLAGS", flags);
    cargo
}

/// Adds a rustup component that cargo lacks.
fn ensure_component(workspace: &Workspace, component: &str) -> Result<()> {
    let subcommand = if component == "rustfmt" {
        "fmt"
    } else {
        "clippy"
    };
    if output_of(workspace.cargo().args([subcommand, "--version"])).is_ok() {
        return Ok(());
    }
    say!("adding the rustup component {component}, because `cargo {subcommand}` is missing");
    output_of(&mut add_component(component)).with_context(|| {
        format!("`cargo {subcommand}` is missing; remedy: install {component} for this toolchain")
    })?;
    Ok(())
}
