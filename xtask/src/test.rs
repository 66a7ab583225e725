//! `cargo xtask test`: runs every test.

use std::env;
use std::ffi::OsString;
use std::path::Path;

use anyhow::{Result, bail};
use session_enforcer_tests::BINARY;

use crate::build::daemon_of_tests;
use crate::node;
use crate::packages::{self, Missing};
use crate::process::{is_root, run, say};
use crate::rustc::Rustc;
use crate::setup::setup;
use crate::workspace::Workspace;

/// Prefixes of the variables that sudo would drop and that tests or debugging need.
const PASSED_ON: [&str; 3] = ["PATH", "RUST_", "SESSION_ENFORCER_"];

/// Arguments of `test`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Do not install packages. If any are missing, print their names and fail.
    #[arg(long)]
    no_install: bool,
    /// Arguments for the test programs, such as a part of the names of the tests to run.
    #[arg(last = true, value_name = "FILTER")]
    filter: Vec<OsString>,
}

/// Runs the tests that need no privileges, then the others as root. Runs all of them, then fails if one
/// failed.
pub(crate) fn test(workspace: &Workspace, args: &Args) -> Result<()> {
    packages::ensure(&packages::TESTS, Missing::unless(args.no_install))?;
    node::ensure(workspace, Missing::unless(args.no_install))?;
    setup(workspace)?;
    let mut failed = Vec::new();
    let mut record = |name: &'static str, result: Result<()>| {
        if let Err(error) = result {
            say!("{error:#}");
            failed.push(name);
        }
    };
    say!("running the tests that need no privileges");
    record("the unprivileged tests", unprivileged(workspace, args));
    say!("building the daemon for the privileged tests");
    match daemon_of_tests(workspace) {
        Ok(binary) => {
            say!("running the tests that need root");
            record("the privileged tests", privileged(workspace, args, &binary));
        }
        Err(error) => record(
            "the build of the daemon, so the privileged tests did not run",
            Err(error),
        ),
    }
    if !failed.is_empty() {
        bail!("failed: {}", failed.join("; "));
    }
    Ok(())
}

fn unprivileged(workspace: &Workspace, args: &Args) -> Result<()> {
    let mut cargo = workspace.cargo();
    cargo
        .args(["test", "--no-fail-fast", "--"])
        .args(&args.filter);
    run(&mut cargo)
}

fn privileged(workspace: &Workspace, args: &Args, binary: &Path) -> Result<()> {
    let mut cargo = workspace.cargo();
    cargo.args([
        "test",
        "--no-fail-fast",
        "--package",
        "session-enforcer-tests",
    ]);
    cargo.env(BINARY, binary);
    if !is_root()? {
        let passed_on = env::vars().filter(|(name, _)| is_passed_on(name));
        let own = (BINARY.to_owned(), binary.display().to_string());
        let host = Rustc::find()?.host;
        cargo
            .arg("--config")
            .arg(sudo_runner(&host, passed_on.chain([own])));
    }
    // The tests mostly wait for deadlines, so run more of them than there are processors.
    cargo.args(["--", "--test-threads=6"]).args(&args.filter);
    run(&mut cargo)
}

fn is_passed_on(name: &str) -> bool {
    PASSED_ON
        .iter()
        .any(|beginning| name.starts_with(beginning))
}

/// cargo's setting that starts test programs through sudo with these variables.
fn sudo_runner(host: &str, variables: impl Iterator<Item = (String, String)>) -> String {
    let words = ["sudo", "--", "env"].map(str::to_owned).into_iter();
    let words = words.chain(variables.map(|(name, value)| format!("{name}={value}")));
    // Rust's string escapes equal TOML's for the characters that paths and settings contain.
    let quoted: Vec<_> = words.map(|word| format!("{word:?}")).collect();
    format!("target.{host}.runner = [{}]", quoted.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_runner_passes_each_variable_as_one_word() {
        let variables = [("RUST_BACKTRACE", "1"), ("PATH", "/usr/bin:/a \"b\"")];
        let variables = variables.map(|(name, value)| (name.to_owned(), value.to_owned()));
        assert_eq!(
            sudo_runner("x86_64-unknown-linux-gnu", variables.into_iter()),
            r#"target.x86_64-unknown-linux-gnu.runner = ["sudo", "--", "env", "RUST_BACKTRACE=1", "PATH=/usr/bin:/a \"b\""]"#
        );
    }

    #[test]
    fn secrets_of_the_caller_stay_with_the_caller() {
        assert!(is_passed_on("SESSION_ENFORCER_BIN"));
        assert!(is_passed_on("RUST_TEST_THREADS"));
        assert!(!is_passed_on("SSH_AUTH_SOCK"));
        assert!(!is_passed_on("LD_PRELOAD"));
    }
}
