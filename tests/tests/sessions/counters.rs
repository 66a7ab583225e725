//! Metrics and audit records agree with the sessions that were opened, closed and reset.

use std::{collections::BTreeMap, net::Ipv4Addr, time::Duration};

use anyhow::Result;
use session_enforcer_tests::{
    Daemon, Lab, Pair, ends_of, idle_rule, longer_than_a_start, reset_on_close, unhurried,
};

const AGENT: &str = env!("CARGO_BIN_EXE_session-enforcer-test-agent");

/// The counter of terminations has the same numbers as the audit records, for each set of labels
/// and in all.
fn assert_audit_is_counted(daemon: &Daemon, count: f64) -> Result<()> {
    let mut by_labels = BTreeMap::<_, f64>::new();
    let records = daemon.terminations()?;
    for record in &records {
        *by_labels.entry(record.labels()).or_default() += 1.0;
    }
    let metrics = daemon.metrics()?;
    for ([rule, reason, mode, result], count) in by_labels {
        let labels = [
            ("rule", rule),
            ("reason", reason),
            ("mode", mode),
            ("result", result),
        ];
        assert_eq!(
            metrics.get("session_enforcer_terminations_total", &labels)?,
            count
        );
    }
    assert_eq!(records.len() as f64, count);
    assert_eq!(
        metrics.get("session_enforcer_terminations_total", &[])?,
        count
    );
    Ok(())
}

#[test]
fn opened_closed_terminated_and_recorded_sessions_agree_to_the_last_one() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listen = || lab.inside.listen((Ipv4Addr::LOCALHOST, 0));
    let [idle, old, none] = [listen()?, listen()?, listen()?];
    let limit = unhurried(Duration::from_secs(2)).as_secs();
    let daemon = lab.daemon(&format!(
        "[[rule]]\nname = \"idle\"\nlocal_ports = [{}]\nidle_timeout = \"{limit}s\"\n\
         [[rule]]\nname = \"old\"\nlocal_ports = [{}]\nmax_lifetime = \"{limit}s\"\n",
        idle.port(),
        old.port(),
    ))?;
    let open = |listener| Pair::open(&lab.outside, listener);
    let mut kept = Vec::new();
    for number in 0..20 {
        kept.extend([open(&idle)?, open(&old)?]);
        let (closed, reset) = (open(&idle)?, open(&old)?);
        reset_on_close(if number % 2 == 0 {
            &reset.client
        } else {
            &reset.server
        })?;
        drop((closed, reset, open(&none)?));
    }
    let clients: Vec<_> = kept.iter().map(|pair| &pair.client).collect();
    ends_of(&clients)?;
    daemon.wait_for_terminations(40)?;
    daemon.wait_for_metric("session_enforcer_sessions", &[], 0.0)?;
    assert_audit_is_counted(&daemon, 40.0)?;
    for rule in ["idle", "old"] {
        for name in ["opened_total", "closed_total"] {
            let name = format!("session_enforcer_sessions_{name}");
            assert_eq!(
                daemon.metric(&name, &[("rule", rule)])?,
                40.0,
                "{name} of {rule}"
            );
        }
    }
    let lateness = "session_enforcer_termination_lateness_seconds_count";
    assert_eq!(daemon.metric(lateness, &[])?, 40.0);
    Ok(())
}

#[test]
fn sessions_in_both_directions_of_one_connection_are_two() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let daemon = lab.daemon(&idle_rule(longer_than_a_start()))?;
    let pairs: Result<Vec<_>> = (0..50)
        .map(|_| Pair::open(&lab.inside, &listener))
        .collect();
    let pairs = pairs?;
    daemon.wait_for_metric("session_enforcer_sessions", &[("rule", "idle")], 100.0)?;
    for pair in &pairs {
        pair.ends()?;
    }
    daemon.wait_for_metric("session_enforcer_sessions_closed_total", &[], 100.0)?;
    // The reset of one end closes the other. The daemon may find the other end gone, or forget it
    // before its reset. In both cases audit and counter agree.
    std::thread::sleep(Duration::from_millis(500));
    let count = daemon.terminations()?.len();
    assert!((50..=100).contains(&count), "{count}");
    assert_audit_is_counted(&daemon, count as f64)?;
    assert_eq!(
        daemon.metric("session_enforcer_events_lost_total", &[])?,
        0.0
    );
    Ok(())
}
