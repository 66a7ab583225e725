//! Patterns in `cgroups`: `*` stands for any characters of one name, so a rule can name cgroups
//! that do not exist yet.

use std::{fs, net::Ipv4Addr, time::Duration};

use anyhow::{Result, ensure};
use nix::sys::signal::Signal;
use session_enforcer_tests::{
    Cgroup, Lab, Listener, Pair, Place, eventually, longer_than_a_start, patience,
};

use crate::turn;

const AGENT: &str = env!("CARGO_BIN_EXE_session-enforcer-test-agent");

fn idle(name: &str, cgroups: &str, limit: Duration) -> String {
    let seconds = limit.as_secs();
    format!("[[rule]]\nname = \"{name}\"\ncgroups = [{cgroups}]\nidle_timeout = \"{seconds}s\"\n")
}

/// A connection to a listener in this cgroup, which is created if missing. The caller keeps the
/// listener open, because the daemon may derive owner and direction of an adopted connection from
/// it.
fn pair_in(lab: &Lab, above: &Cgroup, path: &str) -> Result<(Pair, Listener)> {
    let directory = above.path().join(path);
    fs::create_dir_all(&directory)?;
    let agent = lab.at(&Place::here().in_directory(&directory))?;
    let listener = agent.listen((Ipv4Addr::LOCALHOST, 0))?;
    Ok((Pair::open(&lab.outside, &listener)?, listener))
}

#[test]
fn a_pattern_matches_existing_cgroups_and_later_ones() -> Result<()> {
    let _turn = turn(module_path!());
    let lab = Lab::new(AGENT)?;
    let slice = lab.cgroup.child()?;
    let name = slice.name()?;
    let limit = longer_than_a_start();
    let rules = idle(
        "owned",
        &format!("\"{name}/docker-*.scope\", \"{name}/pods/*/box-*\""),
        limit,
    );
    let mut pairs = vec![pair_in(&lab, &slice, "docker-0.scope")?];
    let daemon = lab.daemon(&rules)?;
    let beside = [
        pair_in(&lab, &slice, "docker-1.service")?,
        pair_in(&lab, &slice, "other/docker-1.scope")?,
        pair_in(&lab, &slice, "pods/a/inner")?,
    ];
    for path in [
        "docker-1.scope",
        "docker-.scope/deeper/still",
        "pods/a/box-1",
        "pods/b/box-1/deeper",
        "pods/b/box-2",
    ] {
        pairs.push(pair_in(&lab, &slice, path)?);
    }
    for (pair, _) in &pairs {
        // A connection that was opened before the daemon knew the cgroup is adopted with the idle
        // time of its socket.
        let record = daemon.wait_for_termination_of(pair)?;
        record.assert_reset("idle_timeout", &pair.opened, limit);
        assert_eq!(record.text("rule.name"), "owned");
    }
    for (pair, _) in &beside {
        pair.round_trip()?;
    }
    assert_eq!(daemon.terminations()?.len(), pairs.len());
    Ok(())
}

#[test]
fn a_rule_applies_to_a_removed_cgroup_and_to_the_next_of_the_same_name() -> Result<()> {
    let _turn = turn(module_path!());
    let lab = Lab::new(AGENT)?;
    let slice = lab.cgroup.child()?;
    let limit = 2 * longer_than_a_start();
    let rules = idle("owned", &format!("\"{}/*\"", slice.name()?), limit);
    let daemon = lab.daemon(&rules)?;
    let mut pairs = Vec::new();
    for is_late in [false, true, true, false] {
        if is_late {
            // The cgroup is removed and created again before the daemon looks.
            daemon.signal(Signal::SIGSTOP)?;
        }
        pairs.push(pair_in(&lab, &slice, "box")?);
        daemon.signal(Signal::SIGCONT)?;
        daemon.wait_for_metric("session_enforcer_sessions", &[], pairs.len() as f64)?;
        eventually("the cgroup is removed", patience(), || {
            Ok(fs::remove_dir(slice.path().join("box"))
                .is_ok()
                .then_some(()))
        })?;
    }
    for (pair, _) in &pairs {
        let record = daemon.wait_for_termination_of(pair)?;
        record.assert_reset("idle_timeout", &pair.opened, limit);
    }
    Ok(())
}

#[test]
fn more_cgroups_than_the_match_table_holds_are_reported_and_stop_nothing() -> Result<()> {
    let _turn = turn(module_path!());
    let lab = Lab::new(AGENT)?;
    let [slice, named] = [lab.cgroup.child()?, lab.cgroup.child()?];
    let limit = longer_than_a_start();
    // About 1,300 prefixes for each cgroup, so three cgroups fill the match table.
    let prefixes: Vec<_> = (0..1_300)
        .map(|n| format!("\"127.{}.{}.0/32\"", n / 250, n % 250))
        .collect();
    let many = idle(
        "many",
        &format!("\"{}/*\"", slice.name()?),
        Duration::from_secs(3_600),
    );
    let rules = format!(
        "{many}remote = [{}]\n{}",
        prefixes.join(","),
        idle("named", &format!("\"{}\"", named.name()?), limit)
    );
    let daemon = lab.daemon(&rules)?;
    let (pair, _listener) = pair_in(&lab, &named, "")?;
    for number in 0..6 {
        fs::create_dir(slice.path().join(format!("box-{number}")))?;
    }
    daemon.wait_for_log("cgroups that match a pattern are ignored")?;
    daemon.wait_for_degraded("untracked", true)?;
    let (_, said) = daemon.get("/readyz")?;
    ensure!(
        said.contains(
            "the match table is full, so sessions of some cgroups that match a pattern are not tracked: name a \
             cgroup above them"
        ),
        "{said}"
    );
    // A later rule is still in the table.
    let record = daemon.wait_for_termination_of(&pair)?;
    record.assert_reset("idle_timeout", &pair.opened, limit);
    assert_eq!(record.text("rule.name"), "named");
    let (newer, _listener) = pair_in(&lab, &named, "")?;
    daemon
        .wait_for_termination_of(&newer)?
        .assert_reset("idle_timeout", &newer.opened, limit);
    for number in 2..6 {
        fs::remove_dir(slice.path().join(format!("box-{number}")))?;
    }
    daemon.wait_for_degraded("untracked", false)
}
