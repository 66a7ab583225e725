//! Observing: the daemon resets nothing and records each deadline once.

use std::{
    io::{Read as _, Write as _},
    net::{Ipv4Addr, Shutdown},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result};
use nix::errno::Errno;
use session_enforcer_tests::{
    Call, Daemon, Fate, Lab, Moment, Pair, TrackedPair, idle_rule, longer_than_a_start, unhurried,
};

const AGENT: &str = env!("CARGO_BIN_EXE_session-enforcer-test-agent");

fn limit() -> Duration {
    unhurried(Duration::from_secs(1))
}

fn rule() -> String {
    idle_rule(limit())
}

fn observed_lifetime() -> String {
    format!(
        "[daemon]\nmode = \"observe\"\n[[rule]]\nname = \"old\"\nmax_lifetime = \"{}s\"\n",
        limit().as_secs()
    )
}

/// Lets two deadlines pass, the first counted from the establishment and the second from payload.
/// Both are recorded, and the connection still exists.
fn assert_observed(daemon: &Daemon, pair: &Pair) -> Result<()> {
    daemon.wait_for_termination_of(pair)?;
    pair.opened.wait(3 * limit());
    let again = pair.to_server(b"again")?;
    again.wait(3 * limit());
    let records = daemon.terminations_of(pair)?;
    assert_eq!(records.len(), 2, "{records:#?}");
    for (record, since) in records.iter().zip([&pair.opened, &again]) {
        assert_would_end(record, "idle_timeout", since, limit());
    }
    Ok(())
}

fn assert_would_end(
    record: &session_enforcer_tests::Record,
    reason: &str,
    since: &Moment,
    limit: Duration,
) {
    assert_eq!(record.text("event.action"), "session-would-terminate");
    assert_eq!(record.text("session_enforcer.mode"), "observe");
    record.assert_due(reason, since, limit);
}

#[test]
fn a_daemon_that_observes_resets_nothing_and_records_each_deadline_once() -> Result<()> {
    let case = TrackedPair::open(AGENT, &format!("[daemon]\nmode = \"observe\"\n{}", rule()))?;
    assert_observed(&case.daemon, &case.pair)?;
    let labels = [
        ("mode", "observe"),
        ("rule", "idle"),
        ("reason", "idle_timeout"),
    ];
    assert_eq!(
        case.daemon
            .metric("session_enforcer_terminations_total", &labels)?,
        2.0
    );
    assert_eq!(
        case.daemon
            .metric("session_enforcer_terminations_total", &[])?,
        2.0
    );
    assert_eq!(case.daemon.metric("session_enforcer_sessions", &[])?, 1.0);
    case.pair.round_trip()?;
    Ok(())
}

#[test]
fn the_flag_makes_a_daemon_observe() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let older = Pair::open(&lab.outside, &listener)?;
    let daemon = lab.launch().config(&rule()).args(&["--observe"]).start()?;
    assert_observed(&daemon, &older)?;
    older.round_trip()?;
    Ok(())
}

#[test]
fn an_observing_rule_and_an_enforcing_rule_work_side_by_side() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listen = || lab.inside.listen((Ipv4Addr::LOCALHOST, 0));
    let [observed, enforced] = [listen()?, listen()?];
    let daemon = lab.daemon(&format!(
        "[[rule]]\nname = \"observed\"\nlocal_ports = [{}]\naction = \"observe\"\n\
         idle_timeout = \"{}s\"\n{}",
        observed.port(),
        limit().as_secs(),
        rule(),
    ))?;
    let pairs = [
        Pair::open(&lab.outside, &observed)?,
        Pair::open(&lab.outside, &enforced)?,
    ];
    pairs[1].ends()?[0].assert_reset(Errno::ECONNRESET, &pairs[1].opened, limit());
    daemon.wait_for_termination_of(&pairs[1])?.assert_reset(
        "idle_timeout",
        &pairs[1].opened,
        limit(),
    );
    assert_observed(&daemon, &pairs[0])?;
    pairs[0].round_trip()?;
    Ok(())
}

#[test]
fn a_busy_session_is_observed_once_when_it_is_too_old() -> Result<()> {
    let case = TrackedPair::open(AGENT, &observed_lifetime())?;
    case.pair.keep_busy(3 * limit())?;
    let record = case.daemon.wait_for_termination()?;
    assert_would_end(&record, "max_lifetime", &case.pair.opened, limit());
    Ok(())
}

/// The socket of a connection that is older than the daemon is asked before it is recorded.
#[test]
fn an_older_session_that_a_reload_makes_late_is_observed_at_once() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let pair = Pair::open(&lab.outside, &listener)?;
    let observing = "[daemon]\nmode = \"observe\"\n";
    let hour = Duration::from_secs(3_600);
    let daemon = lab.daemon(&format!("{observing}{}", idle_rule(hour)))?;
    pair.opened.wait(2 * limit());
    daemon.reload(&format!("{observing}{}", rule()))?;
    let record = daemon.wait_for_termination_of(&pair)?;
    assert_eq!(record.text("event.action"), "session-would-terminate");
    assert_eq!(record.text("event.reason"), "policy");
    Ok(())
}

#[test]
fn the_record_of_a_session_with_constant_traffic_has_no_negative_idle_time() -> Result<()> {
    let case = TrackedPair::open(AGENT, &observed_lifetime())?;
    // More sessions to judge at one moment make that moment longer.
    let open = |_| Pair::open(&case.lab.outside, &case.listener);
    let others = (0..100).map(open).collect::<Result<Vec<_>>>()?;
    case.daemon.freeze()?;
    let (mut client, mut server) = (&case.pair.client, &case.pair.server);
    let record = thread::scope(|scope| -> Result<_> {
        scope.spawn(move || while client.write_all(&[7; 512]).is_ok() {});
        scope.spawn(move || {
            let mut payload = [0; 65_536];
            while server.read(&mut payload).is_ok_and(|read| read > 0) {}
        });
        others.last().context("the last")?.opened.wait(limit());
        let thawed = case.daemon.thaw();
        let record = thawed.and_then(|()| case.daemon.wait_for_termination_of(&case.pair));
        case.pair.client.shutdown(Shutdown::Both)?;
        record
    })?;
    assert_would_end(&record, "max_lifetime", &case.pair.opened, limit());
    assert!(
        record.number("session_enforcer.idle_seconds") >= 0.0,
        "{record:?}"
    );
    Ok(())
}

#[test]
fn after_an_observed_idle_timeout_the_lifetime_is_recorded_once_the_session_is_active_again()
-> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let daemon = lab.daemon(&format!(
        "[daemon]\nmode = \"observe\"\n{}max_lifetime = \"{}s\"\n",
        rule(),
        2 * limit().as_secs(),
    ))?;
    let pair = Pair::open(&lab.outside, &listener)?;
    pair.opened.wait(2 * limit() + limit() / 2);
    assert_eq!(daemon.terminations_of(&pair)?.len(), 1);
    pair.round_trip()?;
    let records = daemon.wait_for_terminations(2)?;
    let causes = [("idle_timeout", limit()), ("max_lifetime", 2 * limit())];
    for (record, (reason, limit)) in records.iter().zip(causes) {
        assert_would_end(record, reason, &pair.opened, limit);
    }
    Ok(())
}

#[test]
fn a_record_has_the_bytes_of_the_moment_of_the_decision() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?;
    // Before the daemon records an adopted session, it queries the socket.
    let pair = Pair::open(&lab.outside, &listener)?;
    let limit = longer_than_a_start() + Duration::from_secs(2);
    let rule = idle_rule(limit);
    let launch = lab.launch().config(&rule).args(&["--observe"]);
    let (daemon, interposer) = launch.start_interposed()?;
    // By then the comparison after the start, which queries sockets too, is over.
    pair.opened.wait(limit * 3 / 4);
    interposer.set(Call::Answer, Fate::Wait);
    interposer.wait_for(Call::Answer, 1)?;
    thread::sleep(Duration::from_millis(300));
    let late = pair.to_server(b"late")?;
    interposer.set(Call::Answer, Fate::Pass);
    let record = daemon.wait_for_termination_of(&pair)?;
    assert_eq!(record.bytes(), [0, 0]);
    assert!(record.time("@timestamp") < late.earliest.wall, "{record:?}");
    Ok(())
}
