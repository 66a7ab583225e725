//! Files that another user could change: the daemon does not start, and its message names the file
//! and the remedy.

use std::{
    fs::{self, Permissions},
    os::unix::fs::{PermissionsExt as _, chown, symlink},
    path::Path,
};

use anyhow::Result;
use session_enforcer_tests::{Finished, Lab, daemon_command, eventually, patience, run_to_end};

const AGENT: &str = env!("CARGO_BIN_EXE_session-enforcer-test-agent");
const RULE: &str = "[[rule]]\nname = \"idle\"\nidle_timeout = \"1m\"\n";

/// A user id that no test machine uses.
const STRANGER: u32 = 61_234;

fn set_mode(path: &Path, mode: u32) -> Result<()> {
    Ok(fs::set_permissions(path, Permissions::from_mode(mode))?)
}

/// Asserts that the daemon refuses this part of a path and names the remedy.
#[track_caller]
fn assert_refused(lab: &Lab, refused: &Finished, part: &Path, remedy: &str) {
    assert_eq!(refused.code, 78, "{}", refused.stderr);
    assert_eq!(refused.stderr.lines().count(), 1, "{}", refused.stderr);
    let remedy = format!("{remedy} {}", part.display());
    assert!(refused.stderr.contains(&remedy), "{}", refused.stderr);
    assert_eq!(lab.cgroup.attached_programs().unwrap_or(u32::MAX), 0);
}

#[test]
fn a_configuration_that_others_may_change_is_refused() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let top = tempfile::tempdir()?;
    let directory = top.path().join("etc");
    fs::create_dir(&directory)?;
    set_mode(&directory, 0o755)?;
    let file = directory.join("config.toml");
    fs::write(&file, RULE)?;
    let link = top.path().join("link.toml");
    symlink(&file, &link)?;
    let run = |path: &Path| {
        let path = path.display().to_string();
        lab.launch().args(&["--config", &path]).refused()
    };
    set_mode(&file, 0o666)?;
    assert_refused(&lab, &run(&file)?, &file, "chmod go-w");
    assert_refused(&lab, &run(&link)?, &file, "chmod go-w");
    set_mode(&file, 0o644)?;
    set_mode(&directory, 0o775)?;
    assert_refused(&lab, &run(&link)?, &directory, "chmod g-w");
    set_mode(&directory, 0o755)?;
    chown(&file, Some(STRANGER), None)?;
    assert_refused(&lab, &run(&file)?, &file, "chown root");
    // `check` warns about the mode and accepts the contents.
    let mut check = daemon_command()?;
    check.arg("check").arg("--config").arg(&file);
    let checked = run_to_end(check, patience())?;
    assert_eq!(checked.code, 0, "{}", checked.stderr);
    let warning = format!(
        "warning: run refuses this on this host: {}: ",
        file.display()
    );
    assert!(checked.stdout.contains(&warning), "{}", checked.stdout);
    Ok(())
}

#[test]
fn a_configuration_that_others_may_change_is_refused_at_a_reload() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let top = tempfile::tempdir()?;
    let file = top.path().join("config.toml");
    fs::write(&file, RULE)?;
    let path = file.display().to_string();
    let daemon = lab.launch().args(&["--config", &path]).start()?;
    set_mode(&file, 0o646)?;
    daemon.signal(nix::sys::signal::Signal::SIGHUP)?;
    daemon.wait_for_log("in force stays")?;
    let log = daemon.log();
    assert!(log.contains(&format!("chmod go-w {path}")), "{log}");
    let name = "session_enforcer_config_last_reload_successful";
    daemon.wait_for_metric(name, &[], 0.0)
}

#[test]
fn an_audit_file_that_others_may_change_is_refused_and_not_created() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let top = tempfile::tempdir()?;
    let file = top.path().join("audit.json");
    let run = || {
        let path = file.display().to_string();
        lab.launch()
            .config(RULE)
            .args(&["--audit", &path])
            .refused()
    };
    set_mode(top.path(), 0o777)?;
    let refused = run()?;
    assert_refused(&lab, &refused, top.path(), "chmod go-w");
    assert!(
        refused.stderr.contains("audit.path: "),
        "{}",
        refused.stderr
    );
    assert!(!file.exists());
    set_mode(top.path(), 0o755)?;
    fs::write(&file, "")?;
    set_mode(&file, 0o660)?;
    assert_refused(&lab, &run()?, &file, "chmod g-w");
    // In a directory where everybody may create files, another user has created this one first.
    set_mode(&file, 0o640)?;
    set_mode(top.path(), 0o1777)?;
    chown(&file, Some(STRANGER), None)?;
    assert_refused(&lab, &run()?, &file, "chown root");
    assert_eq!(fs::read_to_string(&file)?, "");
    Ok(())
}

#[test]
fn an_audit_file_that_now_belongs_to_another_user_is_not_opened() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let top = tempfile::tempdir()?;
    let file = top.path().join("audit.json");
    let path = file.display().to_string();
    let daemon = lab
        .launch()
        .config(RULE)
        .args(&["--audit", &path])
        .start()?;
    let rotated = top.path().join("audit.json.1");
    fs::rename(&file, &rotated)?;
    fs::write(&file, "")?;
    chown(&file, Some(STRANGER), None)?;
    daemon.reload(RULE)?;
    daemon.wait_for_log("the file that was open goes on")?;
    eventually("records in the old file", patience(), || {
        let records = fs::read_to_string(&rotated)?
            .matches("policy-loaded")
            .count();
        Ok((records >= 2).then_some(()))
    })?;
    assert_eq!(fs::read_to_string(&file)?, "");
    Ok(())
}

#[test]
fn a_pin_directory_that_others_could_replace_is_refused() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    lab.pinned_daemon(RULE)?.stop()?;
    let above = lab.pins.path();
    let pins = above.join("below");
    let path = pins.display().to_string();
    let launch = lab.launch().config(RULE);
    let args = ["--pin-dir", path.as_str()];
    let launch = launch.args(&args);
    set_mode(above, 0o770)?;
    assert_refused(&lab, &launch.refused()?, above, "chmod g-w");
    assert!(!pins.exists());
    set_mode(above, 0o700)?;
    launch.start()?.stop()
}
