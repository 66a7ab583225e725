//! The RPM, compared with the Debian package. `cargo xtask dist --test` runs these tests.

use std::{collections::BTreeMap, env, path::PathBuf, process::Command};

use anyhow::{Context as _, Result, ensure};
use session_enforcer_tests::{patience, run_to_end, scaled};

fn package(variable: &str) -> Result<PathBuf> {
    let value = env::var_os(variable);
    value.map(PathBuf::from).with_context(|| {
        format!("{variable} is not set: `cargo xtask dist --test` makes what this test needs")
    })
}

fn ask(program: &str, args: &[&str], variable: &str) -> Result<String> {
    let mut command = Command::new(program);
    command.args(args).arg(package(variable)?);
    run_to_end(command, scaled(patience()))?.output(program)
}

fn query(format: &str) -> Result<String> {
    ask(
        "rpm",
        &["--query", "--queryformat", format, "--package"],
        "SESSION_ENFORCER_RPM",
    )
}

/// The files of the package and their modes.
fn files_of_rpm() -> Result<BTreeMap<String, String>> {
    let listed = query("[%{FILENAMES} %{FILEMODES:perms} %{FILEUSERNAME}:%{FILEGROUPNAME}\n]")?;
    let files = listed.lines().map(|line| {
        let mut words = line.split(' ');
        let (name, mode, owner) = (words.next(), words.next(), words.next());
        ensure!(owner == Some("root:root"), "{line}");
        Ok((
            name.context("no name")?.to_owned(),
            mode.context("no mode")?.to_owned(),
        ))
    });
    files.collect()
}

fn files_of_deb() -> Result<BTreeMap<String, String>> {
    let listed = ask("dpkg-deb", &["--contents"], "SESSION_ENFORCER_DEB")?;
    let files = listed.lines().filter(|line| !line.ends_with('/'));
    let files = files.map(|line| {
        let mut words = line.split_whitespace();
        let (mode, name) = (words.next(), words.nth(4));
        let name = name.context("no name")?.trim_start_matches('.');
        Ok((name.to_owned(), mode.context("no mode")?.to_owned()))
    });
    files.collect()
}

/// The path of a file in other distributions, from its path in Debian.
fn path_in_other_distributions(name: &str) -> String {
    name.replace("/zsh/vendor-completions/", "/zsh/site-functions/")
}

#[test]
fn the_rpm_has_the_files_and_modes_of_the_debian_package() -> Result<()> {
    let rpm = files_of_rpm()?;
    // Debian's copyright and changelog files.
    let is_kept = |name: &String| !name.starts_with("/usr/share/doc/");
    let deb = files_of_deb()?
        .into_iter()
        .filter(|(name, _)| is_kept(name));
    let deb: BTreeMap<String, String> = deb
        .map(|(name, mode)| (path_in_other_distributions(&name), mode))
        .collect();
    ensure!(deb.len() > 10, "{deb:#?}");
    let is_licence = |name: &String| name.starts_with("/usr/share/licenses/");
    let both = rpm
        .clone()
        .into_iter()
        .filter(|(name, _)| !is_licence(name));
    assert_eq!(both.collect::<BTreeMap<_, _>>(), deb);
    assert_eq!(rpm.keys().filter(|name| is_licence(name)).count(), 2);
    assert_eq!(rpm["/usr/bin/session-enforcer"], "-rwxr-xr-x");
    Ok(())
}

#[test]
fn an_upgrade_keeps_the_administrator_s_files() -> Result<()> {
    let listed = query("[%{FILENAMES} %{FILEFLAGS:fflags}\n]")?;
    let kept = listed.lines().filter_map(|line| line.strip_suffix(" cn"));
    let kept: Vec<&str> = kept.collect();
    let expected = [
        "/etc/logrotate.d/session-enforcer",
        "/etc/session-enforcer/config.toml",
    ];
    assert_eq!(kept, expected, "{listed}");
    Ok(())
}

#[test]
fn the_rpm_has_its_metadata_and_needs_no_library() -> Result<()> {
    let version = env!("CARGO_PKG_VERSION");
    let arch = env::consts::ARCH;
    let said = query("%{NAME} %{VERSION} %{RELEASE} %{ARCH} %{OS} %{LICENSE}")?;
    assert_eq!(
        said,
        format!("session-enforcer {version} 1 {arch} linux MIT OR Apache-2.0")
    );
    let needs = query("[%{REQUIRENAME}\n]")?;
    let of_others: Vec<&str> = needs
        .lines()
        .filter(|name| !name.starts_with("rpmlib("))
        .filter(|name| !["/bin/sh", "config(session-enforcer)"].contains(name))
        .collect();
    assert_eq!(of_others, ["systemd"], "{needs}");
    let checked = ask(
        "rpm",
        &["--checksig", "--nosignature"],
        "SESSION_ENFORCER_RPM",
    )?;
    ensure!(checked.contains("digests OK"), "{checked}");
    Ok(())
}

#[test]
fn the_scripts_parse_and_a_removal_detaches_the_programs() -> Result<()> {
    for (tag, words) in [
        ("POSTIN", "systemd-sysusers session-enforcer.conf"),
        ("PREUN", "session-enforcer detach"),
        ("POSTUN", "systemctl daemon-reload"),
    ] {
        let script = query(&format!("%{{{tag}}}"))?;
        ensure!(script.contains(words), "{tag}: {script}");
        let mut shell = Command::new("sh");
        shell.args(["-n", "-c", &script]);
        let parsed = run_to_end(shell, patience())?;
        assert_eq!(parsed.code, 0, "{tag}: {parsed:?}");
    }
    Ok(())
}
