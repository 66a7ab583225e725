//! The project's own commands: `cargo xtask --help`.
//!
//! Each command has a file. Shared code is in `workspace` (paths), `process` (running programs) and `rustc`
//! (the compiler).

mod apt;
mod arch;
mod bench;
mod build;
mod core_sources;
mod demo;
mod dist;
mod fuzz;
mod linker;
mod lint;
mod node;
mod packages;
mod picture;
mod process;
mod release_check;
mod run;
mod rustc;
mod setup;
mod test;
mod vm;
mod workspace;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

use crate::workspace::Workspace;

/// Builds, runs, shows and tests session-enforcer.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", version)]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Makes ready what the eBPF programs are built with (core's sources, bpf-linker).
    ///
    /// Everything is kept in the target directory, and nothing that is ready is made again. The
    /// other commands do this first, by themselves.
    Setup,
    /// Builds the daemon, eBPF programs included, and prints the path of its binary.
    Build(build::Args),
    /// Builds the daemon and runs it as root, through sudo where that is needed.
    Run(run::Args),
    /// Shows session-enforcer at work, in namespaces and a cgroup of its own.
    ///
    /// Real connections and the real daemon, with limits of a few seconds: who is reset, when, and
    /// who is not. Ends by itself in under 30 seconds once built, and leaves nothing behind.
    Demo(demo::Args),
    /// Makes the pictures in the documentation anew: the demo in a terminal, the dashboard's panels.
    Picture(picture::Args),
    /// Runs every test: first those that need no privilege, then the others as root.
    Test(test::Args),
    /// Measures what session-enforcer costs and how exact it is, beside its peers, as root.
    ///
    /// A table on the terminal, and a JSON file in the target directory. Nothing fails because it is
    /// slow: the table says whether each budget is met. In a cgroup and namespaces of its own.
    Bench(bench::Args),
    /// Runs the fuzz targets, each from its seeds for some time; fails if one finds something.
    ///
    /// Needs a C++ compiler besides; cargo-fuzz is made ready in the target directory, where
    /// everything that is found goes too. Takes no privilege.
    Fuzz(fuzz::Args),
    /// Runs the privileged tests on other kernels, in virtual machines.
    ///
    /// Debian's kernels for clouds are fetched into the target directory, which is where everything
    /// that comes of it is, too. QEMU emulates where there is no KVM, and where the kernels are for another processor
    /// (`--arch`), and then this takes its time.
    Vm(vm::Args),
    /// What `vm` starts inside of the virtual machine.
    #[command(hide = true)]
    VmGuest,
    /// Makes a release: static binaries, packages, an image, a tarball, checksums, in the target directory.
    ///
    /// For 64-bit PCs and ARM, whatever this machine is. The same sources give the same bytes.
    Dist(dist::Args),
    /// Checks that a release can be made of this checkout; a line for each check, with what to do.
    ReleaseCheck(release_check::Args),
    /// Checks formatting, documentation and dependencies, and runs clippy on every crate, the eBPF programs too.
    Lint(lint::Args),
}

fn main() -> ExitCode {
    match perform(Cli::parse().task) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn perform(task: Task) -> Result<()> {
    let workspace = Workspace::find()?;
    match task {
        Task::Setup => setup::setup(&workspace),
        Task::Build(args) => build::build(&workspace, &args),
        Task::Run(args) => run::run(&workspace, &args),
        Task::Demo(args) => demo::run(&workspace, &args),
        Task::Picture(args) => picture::picture(&workspace, &args),
        Task::Test(args) => test::test(&workspace, &args),
        Task::Bench(args) => bench::bench(&workspace, &args),
        Task::Fuzz(args) => fuzz::fuzz(&workspace, &args),
        Task::Vm(args) => vm::vm(&workspace, &args),
        Task::VmGuest => vm::guest(),
        Task::Dist(args) => dist::dist(&workspace, &args),
        Task::ReleaseCheck(args) => release_check::release_check(&workspace, &args),
        Task::Lint(args) => lint::lint(&workspace, &args),
    }
}
