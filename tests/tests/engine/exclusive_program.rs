//! Another program is attached without `BPF_F_ALLOW_MULTI`, so the kernel attaches no further one:
//! the daemon refuses to start and names that program.

use anyhow::Result;
use session_enforcer_tests::{Allow, Lab, Launch, attach_other};

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
        let other = attach_other(&lab.cgroup, allow)?;
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
        let _other = attach_other(&lab.cgroup, allow)?;
        Launch::on(watched.path()).config(RULE).start()?.stop()?;
    }
    Ok(())
}
