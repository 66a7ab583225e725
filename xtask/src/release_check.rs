//! `cargo xtask release-check`: checks whether this checkout can be released.

use std::fmt::Display;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};

use crate::process::output_of;
use crate::workspace::Workspace;
use crate::{dist, lint};

/// The changes of each version.
const CHANGELOG: &str = "CHANGELOG.md";

/// The lock files of both workspaces.
const LOCKS: [&str; 2] = ["Cargo.lock", "tests/fuzz/Cargo.lock"];

/// Arguments of `release-check`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Skip lint and the build of the release, which take minutes.
    #[arg(long)]
    quick: bool,
}

/// Runs all checks and fails if one has failed.
pub(crate) fn release_check(workspace: &Workspace, args: &Args) -> Result<()> {
    let root = workspace.root();
    let version = dist::version(workspace)?;
    let mut list = List::default();
    list.add("tree", clean_tree(root));
    list.add("version", one_version(root, &version));
    list.add("changelog", changelog(root, &version));
    list.add("tag", no_tag(root, &version));
    if !args.quick {
        let linted = lint::lint(workspace, &lint::Args::default());
        list.add("lint", linted.map(|()| "no findings".to_owned()));
        let built = dist::dist(workspace, &dist::Args::default());
        list.add("dist", built.map(|()| "packages in target/dist".to_owned()));
    }
    // Check the lock files last, because earlier checks may have changed them.
    list.add("locks", locks(workspace));
    ensure!(
        list.failed == 0,
        "this checkout cannot be released as {version}: {} of {} checks failed",
        list.failed,
        list.made
    );
    println!(
        "all {} checks passed; the next steps are in CONTRIBUTING.md, section \"A release\"",
        list.made
    );
    Ok(())
}

/// The results of the checks; prints one line for each.
#[derive(Default)]
struct List {
    made: u32,
    failed: u32,
}

impl List {
    fn add(&mut self, name: &str, outcome: Result<impl Display>) {
        self.made += 1;
        self.failed += u32::from(outcome.is_err());
        println!("{}", line(name, outcome));
    }
}

fn line(name: &str, outcome: Result<impl Display>) -> String {
    match outcome {
        Ok(found) => format!("ok      {name:<9}  {found}"),
        Err(error) => format!("FAILED  {name:<9}  {error:#}"),
    }
}

fn git(root: &Path, args: &[&str]) -> Result<String> {
    output_of(Command::new("git").args(args).current_dir(root))
}

fn clean_tree(root: &Path) -> Result<String> {
    let changed = git(root, &["status", "--porcelain"])?;
    let files: Vec<_> = changed.lines().filter_map(|line| line.get(3..)).collect();
    ensure!(
        files.is_empty(),
        "not committed: {}; remedy: commit or remove them",
        some(&files)
    );
    Ok(format!(
        "clean, at {}",
        git(root, &["rev-parse", "--short", "HEAD"])?.trim()
    ))
}

/// The first names of a list.
fn some(names: &[&str]) -> String {
    const SHOWN: usize = 5;
    let shown = names[..names.len().min(SHOWN)].join(", ");
    match names.len().saturating_sub(SHOWN) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}

/// Checks that every file that names a version of the project names this one.
fn one_version(root: &Path, version: &str) -> Result<String> {
    let fuzz = fs::read_to_string(root.join("tests/fuzz/Cargo.toml"))
        .context("cannot read tests/fuzz/Cargo.toml")?;
    ensure!(
        fuzz.lines()
            .any(|line| line == format!("version = \"{version}\"")),
        "tests/fuzz/Cargo.toml has another version than Cargo.toml, which has {version}; \
         remedy: write `version = \"{version}\"` there"
    );
    let files = git(root, &["ls-files", "-z"])?;
    let mut named = 0;
    // The changelog names every version, and the tests below need other ones.
    let is_checked = |file: &&str| ![CHANGELOG, file!()].contains(file);
    for file in files.split_terminator('\0').filter(is_checked) {
        // A binary file names no version. A removed, uncommitted file is reported by another check.
        let Ok(text) = fs::read_to_string(root.join(file)) else {
            continue;
        };
        for (number, line) in (1..).zip(text.lines()) {
            for other in versions_in(line) {
                ensure!(
                    other == version,
                    "{file}:{number} names version {other}, Cargo.toml has {version}; remedy: write {version} there"
                );
                named += 1;
            }
        }
    }
    Ok(format!("{version}, and in {named} other places"))
}

/// The versions of session-enforcer in a line: `session-enforcer:1.2.3`, also after `-`, `_` or a space, and
/// the `newTag` of a manifest.
fn versions_in(line: &str) -> Vec<&str> {
    let mut versions = Vec::new();
    for name in ["session-enforcer", "newTag:"] {
        for rest in line.split(name).skip(1) {
            let rest = rest.strip_prefix(['-', '_', ':', ' ']).unwrap_or_default();
            let end = rest.find(|c: char| !(c.is_ascii_digit() || c == '.'));
            let version = rest[..end.unwrap_or(rest.len())].trim_end_matches('.');
            if version.split('.').count() == 3 {
                versions.push(version);
            }
        }
    }
    versions
}

fn changelog(root: &Path, version: &str) -> Result<String> {
    let text = fs::read_to_string(root.join(CHANGELOG))
        .with_context(|| format!("cannot read {CHANGELOG}"))?;
    let today = output_of(Command::new("date").args(["--utc", "+%Y-%m-%d"]))?;
    section_of(&text, version, today.trim())
}

/// The heading of the version's section. The section must be the first, dated, not in the future, and not
/// empty.
fn section_of(changelog: &str, version: &str, today: &str) -> Result<String> {
    let mut sections = changelog.split("\n## ").skip(1);
    let first = sections.next().unwrap_or_default();
    let (head, body) = first.split_once('\n').unwrap_or((first, ""));
    let remedy = format!("remedy: make it `## {version} - {today}`");
    let Some(date) = head.strip_prefix(&format!("{version} - ")) else {
        bail!("the first section of {CHANGELOG} is {head:?}, and not that of {version}; {remedy}");
    };
    ensure!(
        is_date(date),
        "{date:?} in {CHANGELOG} is not a date; {remedy}"
    );
    // Dates of this form sort alphabetically.
    ensure!(
        date <= today,
        "{CHANGELOG} dates {version} {date}, which is in the future; {remedy}"
    );
    let entries = body.lines().filter(|line| line.starts_with("- ")).count();
    ensure!(
        entries > 0,
        "the section of {version} in {CHANGELOG} has no entry; remedy: write what is new"
    );
    Ok(format!("{head}, {entries} entries"))
}

/// Whether the text has the form 2026-01-31.
fn is_date(text: &str) -> bool {
    let shape = text
        .chars()
        .map(|c| if c.is_ascii_digit() { '9' } else { c });
    shape.eq("9999-99-99".chars())
}

fn no_tag(root: &Path, version: &str) -> Result<String> {
    let tag = format!("v{version}");
    let found = git(root, &["tag", "--list", &tag])?;
    ensure!(
        found.is_empty(),
        "the tag {tag} exists: {version} is released; remedy: move the version in Cargo.toml"
    );
    Ok(format!("{tag} is free"))
}

/// Checks that the lock files are up to date and committed.
fn locks(workspace: &Workspace) -> Result<String> {
    for lock in LOCKS {
        fresh_lock(workspace.cargo(), lock)?;
    }
    unchanged_locks(workspace.root())
}

/// Fails if cargo would change this lock file, as every build without `--locked` would.
fn fresh_lock(mut cargo: Command, lock: &str) -> Result<()> {
    let manifest = Path::new(lock).with_extension("toml");
    cargo.args(["metadata", "--locked", "--format-version=1"]);
    let read = output_of(cargo.arg("--manifest-path").arg(&manifest));
    read.map(drop).with_context(|| {
        format!(
            "{lock} is out of date; remedy: `cargo update --workspace --manifest-path {}`, and commit it",
            manifest.display()
        )
    })
}

fn unchanged_locks(root: &Path) -> Result<String> {
    let changed = git(
        root,
        &[&["status", "--porcelain", "--"], &LOCKS[..]].concat(),
    )?;
    let files: Vec<_> = changed.lines().filter_map(|line| line.get(3..)).collect();
    ensure!(
        files.is_empty(),
        "changed and not committed: {}; remedy: review the change and commit it",
        some(&files)
    );
    Ok("up to date".to_owned())
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::*;

    const TODAY: &str = "2026-03-01";

    fn error_of(outcome: Result<String>) -> String {
        format!("{:#}", outcome.expect_err("a failed check"))
    }

    /// A repository with these files, committed.
    fn repository(files: &[(&str, &str)]) -> TempDir {
        let folder = TempDir::new().expect("a folder");
        for (path, text) in files {
            let path = folder.path().join(path);
            fs::create_dir_all(path.parent().expect("in a folder")).expect("a folder");
            fs::write(path, text).expect("a file");
        }
        for args in [
            &["init", "--quiet"][..],
            &["add", "--all"],
            &[
                "-c",
                "user.name=t",
                "-c",
                "user.email=t@example.com",
                "-c",
                "commit.gpgsign=false",
                "commit",
                "--quiet",
                "--message=t",
            ],
        ] {
            git(folder.path(), args).expect("git");
        }
        folder
    }

    const FUZZ: (&str, &str) = ("tests/fuzz/Cargo.toml", "[package]\nversion = \"1.2.3\"\n");

    #[test]
    fn a_check_is_a_line() {
        assert_eq!(
            line("tag", Ok("v1 is free")),
            "ok      tag        v1 is free"
        );
        let failed: Result<&str> = Err(anyhow::anyhow!("exists")).context("tag v1");
        assert_eq!(line("tag", failed), "FAILED  tag        tag v1: exists");
    }

    #[test]
    fn uncommitted_files_are_named() {
        let folder = repository(&[("a", "1"), ("Cargo.lock", "1")]);
        let root = folder.path();
        assert!(clean_tree(root).expect("clean").starts_with("clean, at "));
        unchanged_locks(root).expect("unchanged");
        fs::write(root.join("new"), "").expect("a file");
        let error = error_of(clean_tree(root));
        assert!(error.contains("not committed: new; remedy"), "{error}");
        unchanged_locks(root).expect("unchanged");
        fs::write(root.join("Cargo.lock"), "2").expect("a file");
        let error = error_of(unchanged_locks(root));
        assert!(
            error.contains("not committed: Cargo.lock; remedy"),
            "{error}"
        );
    }

    #[test]
    fn a_lock_that_cargo_would_change_is_out_of_date() {
        let package = |version: &str| format!("name = \"a\"\nversion = \"{version}\"\n");
        let locked = |version: &str| format!("version = 4\n[[package]]\n{}", package(version));
        let manifest = format!("[workspace]\n[package]\n{}", package("0.2.0"));
        let folder = repository(&[("Cargo.toml", &manifest), ("src/lib.rs", "")]);
        let check = |lock: &str| {
            fs::write(folder.path().join("Cargo.lock"), lock).expect("a file");
            let mut cargo = crate::workspace::cargo();
            cargo.current_dir(folder.path());
            fresh_lock(cargo, "Cargo.lock")
        };
        check(&locked("0.2.0")).expect("up to date");
        let error = check(&locked("0.1.0")).expect_err("out of date");
        assert!(
            error.to_string().contains("--manifest-path Cargo.toml`"),
            "{error}"
        );
    }

    #[test]
    fn a_tag_that_exists_is_a_release() {
        let folder = repository(&[("a", "1")]);
        assert_eq!(
            no_tag(folder.path(), "1.2.3").expect("none"),
            "v1.2.3 is free"
        );
        git(folder.path(), &["tag", "v1.2.3"]).expect("git");
        let error = error_of(no_tag(folder.path(), "1.2.3"));
        assert!(error.contains("v1.2.3 exists"), "{error}");
    }

    #[test]
    fn versions_are_found_where_they_name_the_project() {
        let line =
            "dnf install ./session-enforcer-1.2.3-1.x86_64.rpm; session-enforcer_1.2.4-1_amd64.deb";
        assert_eq!(versions_in(line), ["1.2.3", "1.2.4"]);
        assert_eq!(versions_in("image: session-enforcer:1.2.3"), ["1.2.3"]);
        assert_eq!(versions_in("    newTag: 1.2.3"), ["1.2.3"]);
        assert_eq!(versions_in("It is session-enforcer 1.2.3."), ["1.2.3"]);
        let none = "session-enforcer explain 10.0.0.5:5432; session-enforcer 10; aya 0.14.0";
        assert!(versions_in(none).is_empty());
    }

    #[test]
    fn a_file_with_another_version_is_named() {
        let folder = repository(&[FUZZ, ("docs/a.md", "x\nsession-enforcer:1.2.2\n")]);
        let error = error_of(one_version(folder.path(), "1.2.3"));
        assert!(
            error.starts_with("docs/a.md:2 names version 1.2.2,"),
            "{error}"
        );
        let error = error_of(one_version(folder.path(), "1.3.0"));
        assert!(
            error.starts_with("tests/fuzz/Cargo.toml has another"),
            "{error}"
        );
        let folder = repository(&[
            FUZZ,
            (CHANGELOG, "session-enforcer:1.0.0"),
            ("b", "session-enforcer:1.2.3"),
        ]);
        let found = one_version(folder.path(), "1.2.3").expect("one version");
        assert_eq!(found, "1.2.3, and in 1 other places");
    }

    #[test]
    fn the_first_section_of_the_changelog_is_that_of_the_version() {
        let of = |text: &str| section_of(&format!("# Changelog\n\n{text}"), "1.2.3", TODAY);
        let found =
            of("## 1.2.3 - 2026-02-28\n\n### Added\n\n- a\n- b\n\n## 1.2.2 - 2026-01-01\n\n- c\n");
        assert_eq!(found.expect("a section"), "1.2.3 - 2026-02-28, 2 entries");
        for (text, wrong) in [
            (
                "## Unreleased\n\n- a\n\n## 1.2.3 - 2026-02-28\n\n- b\n",
                "is \"Unreleased\", and not",
            ),
            ("## 1.2.3\n\n- a\n", "is \"1.2.3\", and not"),
            (
                "## 1.2.3 - soon\n\n- a\n",
                "\"soon\" in CHANGELOG.md is not a date",
            ),
            ("## 1.2.3 - 2026-03-02\n\n- a\n", "which is in the future"),
            (
                "## 1.2.3 - 2026-02-28\n\n## 1.2.2 - 2026-01-01\n\n- c\n",
                "has no entry",
            ),
            ("", "is \"\", and not"),
        ] {
            let error = error_of(of(text));
            assert!(error.contains(wrong) && error.contains("remedy"), "{error}");
        }
    }

    #[test]
    fn the_projects_own_files_name_one_version() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        one_version(&root, env!("CARGO_PKG_VERSION")).expect("one version");
    }
}
