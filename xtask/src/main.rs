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

/// Build, run, show and test session-enforcer.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", version)]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Prepare the eBPF toolchain: the sources of Rust's `core`, and bpf-linker.
    ///
    /// The toolchain is kept in the target directory, and only missing parts are prepared. The other
    /// commands run this step by themselves.
    Setup,
    /// Build the daemon with its eBPF programs, and print the path of the binary.
    Build(build::Args),
    /// Build the daemon and run it as root, with sudo if necessary.
    Run(run::Args),
    /// Show session-enforcer at work, in its own network namespaces and cgroup.
    ///
    /// The daemon enforces limits of a few seconds on real connections. The demo shows which
    /// connections are reset and when, and which are not. After the build it takes less than 30
    /// seconds. It removes everything it has created.
    Demo(demo::Args),
    /// Redraw the pictures in the documentation: the demo in a terminal, the panels of the dashboard.
    Picture(picture::Args),
    /// Run every test: first those that need no privileges, then the others as root.
    Test(test::Args),
    /// Measure the cost and the precision of session-enforcer and of similar programs, as root.
    ///
    /// The benchmarks run in their own cgroup and namespaces. The results are a table on the terminal
    /// and a JSON file in the target directory. The table shows whether each budget is met; a missed
    /// budget does not fail the command.
    Bench(bench::Args),
    /// Run each fuzz target for some time, starting from its seeds; fail if one finds a bug.
    ///
    /// Needs a C++ compiler, but no privileges. cargo-fuzz is built in the target directory, and the
    /// inputs that fail are written there.
    Fuzz(fuzz::Args),
    /// Run the privileged tests on other kernels, in virtual machines.
    ///
    /// Debian's cloud kernels are downloaded into the target directory, and the results are written
    /// there. Without KVM, and for another architecture (`--arch`), QEMU emulates the processor, which
    /// is slow.
    Vm(vm::Args),
    /// Run the tests inside a virtual machine that `vm` has started.
    #[command(hide = true)]
    VmGuest,
    /// Build a release in the target directory: static binaries, packages, images, tarballs, checksums.
    ///
    /// Builds for 64-bit x86 and ARM, on either of them. The same sources give the same bytes.
    Dist(dist::Args),
    /// Check whether this checkout can be released, and print a remedy for each failed check.
    ReleaseCheck(release_check::Args),
    /// Check formatting, documentation and dependencies; run clippy on all crates, also on the eBPF programs.
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
