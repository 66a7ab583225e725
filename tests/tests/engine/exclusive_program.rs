//! Another program is attached without `BPF_F_ALLOW_MULTI`, so the kernel attaches no further one:
//! the daemon refuses to start and names that program, or refuses the reload.

use std::net::Ipv4Addr;

use anyhow::Result;
use session_enforcer_tests::{Allow, Lab, Launch, Pair, Passing, attach_other};

const AGENT: &str = env!("CARGO_BIN_EXE_session-enforcer-test-agent");
const RULE: &str = "[[rule]]\nname = \"idle\"\nidle_timeout = \"1m\"\n";

#[test]
fn a_program_that_forbids_others_is_named_in_the_error() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let below = lab.cgroup.child()?;
    for (watched, allow) in [
        (&lab.cgroup, Allow::Nothing),
        (&lab.cgroup, Allow::Override),
        (&below, Allow::Nothing),
    ] {
        let other = attach_other(&lab.cgroup, Passing::Packets, allow)?;
        let refused = Launch::on(watched.path()).config(RULE).refused()?;
        assert_eq!(refused.code, 1, "{}", refused.stderr);
        assert_eq!(refused.stderr.lines().count(), 1, "{}", refused.stderr);
        let directory = lab.cgroup.path().display();
        for part in [
            format!(
                "another program (\"other\", id {}) is attached to {directory}",
                other.id
            ),
            "BPF_F_ALLOW_MULTI".to_owned(),
            format!(
                "bpftool cgroup detach {directory} cgroup_inet_ingress id {}",
                other.id
            ),
        ] {
            assert!(refused.stderr.contains(&part), "{part}: {}", refused.stderr);
        }
        // The programs that the daemon had attached before the failure are detached again.
        assert_eq!(lab.cgroup.program_ids()?, [other.id]);
        assert_eq!(below.attached_programs()?, 0);
    }
    Ok(())
}

#[test]
fn programs_that_allow_others_are_no_obstacle() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let below = lab.cgroup.child()?;
    for (watched, allow) in [
        (&lab.cgroup, Allow::Multi),
        (&below, Allow::Override),
        (&below, Allow::Multi),
    ] {
        let _other = attach_other(&lab.cgroup, Passing::Packets, allow)?;
        Launch::on(watched.path()).config(RULE).start()?.stop()?;
    }
    Ok(())
}

/// The program for new sockets is attached as soon as a rule names an owner.
#[test]
fn a_reload_that_needs_a_program_where_another_forbids_it_is_refused() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let daemon = lab.daemon("[[rule]]\nname = \"idle\"\nidle_timeout = \"2s\"\n")?;
    let _other = attach_other(&lab.cgroup, Passing::Sockets, Allow::Nothing)?;
    let log = daemon.reload(&RULE.replace("idle_timeout", "users = [0]\nidle_timeout"))?;
    for part in ["in force stays", "BPF_F_ALLOW_MULTI"] {
        assert!(log.contains(part), "{part}: {log}");
    }
    let last_reload = "session_enforcer_config_last_reload_successful";
    daemon.wait_for_metric(last_reload, &[], 0.0)?;
    // The earlier rules are still enforced.
    let listener = lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let pair = Pair::open(&lab.outside, &listener)?;
    let record = daemon.wait_for_termination_of(&pair)?;
    assert_eq!(record.text("rule.name"), "idle");
    Ok(())
}
