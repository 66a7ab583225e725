//! Runs other programs, reports their failures, and requests root privileges.

use std::env;
use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};

/// Prints progress to stderr.
macro_rules! say {
    ($($text:tt)*) => { eprintln!("xtask: {}", format_args!($($text)*)) };
}
pub(crate) use say;

/// Runs a program with the terminal.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let status = command
        .status()
        .with_context(|| format!("cannot start {}", shown(command)))?;
    if !status.success() {
        bail!("{} failed ({status})", shown(command));
    }
    Ok(())
}

/// Runs a program and returns its output. Its stderr becomes part of the error.
pub(crate) fn output_of(command: &mut Command) -> Result<String> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot start {}", shown(command)))?;
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        bail!(
            "{} failed ({}): {}",
            shown(command),
            output.status,
            gist(&stderr)
        );
    }
    String::from_utf8(output.stdout)
        .with_context(|| format!("the output of {} is not UTF-8", shown(command)))
}

/// The lines that cargo, rustup or apt mark as errors. All lines if none is marked.
fn gist(stderr: &str) -> String {
    let is_error = |line: &&str| line.starts_with("error") || line.starts_with("E: ");
    let errors: Vec<_> = stderr.lines().filter(is_error).collect();
    if errors.is_empty() {
        return stderr.trim().to_owned();
    }
    errors.join("; ")
}

/// A command that runs as root, through sudo if this process is not root.
///
/// sudo resets the environment, so pass variables with `env`.
pub(crate) fn as_root(program: impl AsRef<Path>) -> Result<Command> {
    let program = program.as_ref();
    if is_root()? {
        return Ok(Command::new(program));
    }
    if find_program("sudo", &[]).is_none() {
        bail!(
            "{} must run as root, and sudo is missing: run this command as root",
            program.display()
        );
    }
    let mut sudo = Command::new("sudo");
    sudo.arg("--").arg(program);
    Ok(sudo)
}

/// Whether this process runs as root.
pub(crate) fn is_root() -> Result<bool> {
    // The owner of a process's folder in /proc is its effective user.
    let own = fs::metadata("/proc/self").context("cannot read /proc/self: is /proc mounted?")?;
    Ok(own.uid() == 0)
}

/// Finds a program in `PATH`, in the system folders and in the given folders.
pub(crate) fn find_program(name: &str, more: &[PathBuf]) -> Option<PathBuf> {
    // An ordinary user's PATH often lacks the sbin folders. Root's PATH, which applies when the program runs,
    // has them.
    let system = ["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from);
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(system)
        .chain(more.iter().cloned())
        .map(|folder| folder.join(name))
        .find(|candidate| is_executable(candidate))
}

fn is_executable(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o111 != 0)
}

/// The command line as a user would type it.
fn shown(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    let words: Vec<_> = words.map(|word| word.to_string_lossy()).collect();
    format!("`{}`", words.join(" "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_names_the_command_and_its_words() {
        let error = output_of(Command::new("sh").args(["-c", "echo no space left >&2; exit 3"]))
            .expect_err("exit status 3");
        let text = error.to_string();
        assert!(
            text.contains("`sh -c echo no space left >&2; exit 3`"),
            "{text}"
        );
        assert!(text.ends_with("(exit status: 3): no space left"), "{text}");
    }

    #[test]
    fn the_gist_is_what_the_program_calls_an_error() {
        let rustup = "info: downloading component\nerror: component download failed\n";
        assert_eq!(gist(rustup), "error: component download failed");
        let apt = "E: Failed to fetch x\nE: Some index files failed\n";
        assert_eq!(
            gist(apt),
            "E: Failed to fetch x; E: Some index files failed"
        );
        assert_eq!(gist(" no space left\n"), "no space left");
    }

    #[test]
    fn a_program_that_is_not_there_is_named() {
        let error = run(&mut Command::new("/nonexistent/tool")).expect_err("there is no such file");
        assert_eq!(error.to_string(), "cannot start `/nonexistent/tool`");
    }

    #[test]
    fn programs_are_found_in_path_and_in_the_given_folders_only_if_executable() {
        assert!(find_program("sh", &[]).is_some());
        assert!(find_program("Cargo.toml", &[env!("CARGO_MANIFEST_DIR").into()]).is_none());
        assert!(find_program("no-such-program", &[]).is_none());
    }
}
