//! `cargo xtask bench`: measures the daemon and its peers.

use std::env;
use std::ffi::OsString;
use std::fs::{self, File};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result};
use session_enforcer_tests::BINARY;

use crate::build::{Profile, daemon};
use crate::packages::{self, Missing};
use crate::process::{as_root, is_root, run, say};
use crate::setup::setup;
use crate::workspace::Workspace;

/// The benchmark program, and the agent that starts programs in a cgroup and a namespace.
const PROGRAMS: [&str; 2] = ["session-enforcer-bench", "session-enforcer-test-agent"];

/// Arguments of `bench`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Run fewer and shorter rounds: less than 3 minutes instead of about 12, with more noise.
    #[arg(long)]
    quick: bool,
    /// List the benchmarks and run none.
    #[arg(long)]
    list: bool,
    /// Do not install packages. The table names the missing programs.
    #[arg(long)]
    no_install: bool,
    /// Benchmarks to run, by a part of their names [default: all].
    #[arg(value_name = "NAME")]
    names: Vec<String>,
}

/// Builds the programs, then replaces this process with the benchmarks.
pub(crate) fn bench(workspace: &Workspace, args: &Args) -> Result<()> {
    if args.list {
        let bench = programs(workspace)?;
        return Err(std::process::Command::new(&bench)
            .arg("--list")
            .args(&args.names)
            .exec())
        .with_context(|| format!("cannot start {}", bench.display()));
    }
    peers(args.no_install)?;
    setup(workspace)?;
    say!("building the daemon");
    let daemon = daemon(workspace, Profile::Release)?;
    let bench = programs(workspace)?;
    let report = report(workspace)?;
    if !is_root()? {
        say!("continuing as root, with sudo: namespaces, cgroups and eBPF require it");
    }
    let mut command = as_root("env")?;
    command.args(environment(&daemon)).arg(&bench);
    command.arg("--json").arg(report);
    if args.quick {
        command.arg("--quick");
    }
    let error = command.args(&args.names).exec();
    Err(error).with_context(|| format!("cannot start {}", bench.display()))
}

fn peers(no_install: bool) -> Result<()> {
    if no_install {
        return packages::ensure(&packages::BENCH, Missing::Refuse);
    }
    packages::ensure(&packages::BENCH, Missing::Install)?;
    packages::ensure(&packages::PEERS, Missing::Install)
}

/// Builds the programs and returns the path of the first.
fn programs(workspace: &Workspace) -> Result<PathBuf> {
    let mut cargo = workspace.cargo();
    cargo.args(["build", "--release", "--package", "session-enforcer-tests"]);
    for program in PROGRAMS {
        cargo.args(["--bin", program]);
    }
    run(&mut cargo)?;
    Ok(workspace.target().join("release").join(PROGRAMS[0]))
}

/// Creates the report file as the calling user, so that it does not belong to root.
fn report(workspace: &Workspace) -> Result<PathBuf> {
    let folder = workspace.target().join("bench");
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
    let path = folder.join(format!("{now}.json"));
    fs::create_dir_all(&folder)
        .and_then(|()| File::create(&path))
        .with_context(|| format!("cannot make {}", path.display()))?;
    Ok(path)
}

/// The variables that the benchmarks need and that sudo would drop, as arguments of env(1).
fn environment(daemon: &Path) -> [OsString; 2] {
    let word = |name: &str, value: OsString| {
        let mut word = OsString::from(format!("{name}="));
        word.push(value);
        word
    };
    [
        word(BINARY, daemon.into()),
        word("PATH", env::var_os("PATH").unwrap_or_default()),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_benchmarks_are_told_which_daemon_to_measure() {
        let [daemon, path] = environment(Path::new("/t/release/daemon"));
        assert_eq!(daemon, "SESSION_ENFORCER_BIN=/t/release/daemon");
        assert!(path.to_string_lossy().starts_with("PATH="));
    }
}
