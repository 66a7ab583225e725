//! Many sessions that are due at the same time.

use std::{
    collections::BTreeSet,
    io::{self, Write as _},
    net::Ipv4Addr,
    thread,
    time::Duration,
};

use anyhow::Result;
use session_enforcer_tests::{Lab, Moment, Netns, Pair, assert_all_reset, scaled};

use crate::turn;

const AGENT: &str = env!("CARGO_BIN_EXE_session-enforcer-test-agent");
const LIMIT: Duration = Duration::from_secs(3);
const RULE: &str = "[[rule]]\nname = \"idle\"\nidle_timeout = \"3s\"\n";
const SESSIONS: usize = 2_000;
const TOGETHER: usize = 300;

/// The bound of the 99th percentile of the lateness, on a machine with other load.
const P99_BOUND: Duration = Duration::from_secs(1);

#[test]
fn two_thousand_sessions_at_once_are_reset_and_none_early() -> Result<()> {
    let _turn = turn(module_path!());
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let daemon = lab.daemon(RULE)?;
    let open = || Pair::open(&lab.outside, &listener);
    let (opening, pairs) =
        Moment::of(|| (0..SESSIONS).map(|_| open()).collect::<Result<Vec<_>>>())?;
    assert_all_reset(&pairs, LIMIT)?;
    let records = daemon.wait_for_terminations(SESSIONS)?;
    assert_eq!(records.len(), SESSIONS);
    for record in &records {
        record.assert_reset("idle_timeout", &opening, LIMIT);
    }
    let late = |record: &session_enforcer_tests::Record| {
        record.number("session_enforcer.lateness_seconds")
    };
    let mut lateness: Vec<f64> = records.iter().map(late).collect();
    lateness.sort_by(f64::total_cmp);
    print_distribution(&lateness)?;
    assert!(lateness[0] >= 0.0, "{} s early", -lateness[0]);
    assert!(at(&lateness, 99) < scaled(P99_BOUND).as_secs_f64());
    daemon.wait_for_metric("session_enforcer_sessions", &[], 0.0)
}

/// More sessions in each of two namespaces than one netlink exchange resets.
#[test]
fn sessions_of_two_namespaces_due_at_once_are_reset_and_recorded_once_each() -> Result<()> {
    let _turn = turn(module_path!());
    let lab = Lab::new(AGENT)?;
    let netns = Netns::new()?;
    let daemon = lab.daemon(RULE)?;
    let places = [
        (&lab.outside, &lab.inside),
        (&lab.outside_in(&netns)?, &lab.inside_in(&netns)?),
    ];
    let listeners = places.map(|(_, inside)| inside.listen((Ipv4Addr::LOCALHOST, 0)));
    let listeners = listeners.into_iter().collect::<Result<Vec<_>>>()?;
    let mut pairs = Vec::new();
    let (opening, ()) = Moment::of(|| {
        for _ in 0..TOGETHER {
            for ((outside, _), listener) in places.iter().zip(&listeners) {
                pairs.push(Pair::open(outside, listener)?);
            }
        }
        Ok(())
    })?;
    daemon.freeze()?;
    thread::sleep(LIMIT + scaled(Duration::from_millis(100)));
    daemon.thaw()?;
    assert_all_reset(&pairs, LIMIT)?;
    let records = daemon.wait_for_terminations(pairs.len())?;
    let ids: BTreeSet<_> = records
        .iter()
        .map(|r| r.number("session_enforcer.id") as u64)
        .collect();
    assert_eq!(ids.len(), pairs.len());
    for record in &records {
        record.assert_reset("idle_timeout", &opening, LIMIT);
    }
    daemon.wait_for_metric("session_enforcer_sessions", &[], 0.0)?;
    let resets = [("result", "reset")];
    assert_eq!(
        daemon.metric("session_enforcer_terminations_total", &resets)?,
        pairs.len() as f64
    );
    Ok(())
}

/// A percentile of the lateness.
fn at(lateness: &[f64], percent: usize) -> f64 {
    lateness[(lateness.len() * percent).div_ceil(100) - 1]
}

/// Writes past the output capture, because the numbers matter when the test passes, too.
fn print_distribution(lateness: &[f64]) -> Result<()> {
    let ms = |percent| at(lateness, percent) * 1_000.0;
    writeln!(
        io::stderr(),
        "lateness of {} sessions in ms: p50 {:.3}, p90 {:.3}, p99 {:.3}, max {:.3}",
        lateness.len(),
        ms(50),
        ms(90),
        ms(99),
        ms(100),
    )?;
    Ok(())
}
