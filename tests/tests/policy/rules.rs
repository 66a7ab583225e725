//! Which rule applies to a connection, and which connections no rule applies to.

use std::time::Duration;

use anyhow::Result;
use nix::errno::Errno;
use session_enforcer_tests::{Lab, Pair, idle_rule, unhurried};

const AGENT: &str = env!("CARGO_BIN_EXE_session-enforcer-test-agent");

/// Long enough to open a connection and read its addresses.
fn limit() -> Duration {
    unhurried(Duration::from_secs(1))
}

#[test]
fn connections_of_no_rule_and_of_an_exempt_rule_are_untouched() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listen = || lab.inside.listen(([127, 0, 0, 1], 0));
    let [exempt, enforced, none] = [listen()?, listen()?, listen()?];
    let daemon = lab.daemon(&format!(
        "[[rule]]\nname = \"exempt\"\nlocal_ports = [{}]\naction = \"exempt\"\n\
         [[rule]]\nname = \"enforced\"\nlocal_ports = [{}, {}]\nidle_timeout = \"{}s\"\n",
        exempt.port(),
        exempt.port(),
        enforced.port(),
        limit().as_secs(),
    ))?;
    let untouched = [
        Pair::open(&lab.outside, &exempt)?,
        Pair::open(&lab.outside, &none)?,
    ];
    assert_eq!(daemon.metric("session_enforcer_sessions", &[])?, 0.0);
    let reset = Pair::open(&lab.outside, &enforced)?;
    reset.ends()?[0].assert_reset(Errno::ECONNRESET, &reset.opened, limit());
    reset.opened.wait(2 * limit());
    for pair in &untouched {
        pair.round_trip()?;
    }
    assert_eq!(daemon.wait_for_termination()?.text("rule.name"), "enforced");
    assert_eq!(
        daemon.metric("session_enforcer_sessions_opened_total", &[])?,
        1.0
    );
    Ok(())
}

#[test]
fn the_first_rule_that_matches_decides() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listen = || lab.inside.listen(([127, 0, 0, 1], 0));
    let [first, second] = [listen()?, listen()?];
    let daemon = lab.daemon(&format!(
        "[[rule]]\nname = \"patient\"\nlocal_ports = [{}]\nidle_timeout = \"{}s\"\n\
         [[rule]]\nname = \"strict\"\nlocal = [\"127.0.0.0/8\"]\nidle_timeout = \"{}s\"\n",
        first.port(),
        3 * limit().as_secs(),
        limit().as_secs(),
    ))?;
    let patient = Pair::open(&lab.outside, &first)?;
    let strict = Pair::open(&lab.outside, &second)?;
    patient.ends()?[0].assert_reset(Errno::ECONNRESET, &patient.opened, 3 * limit());
    for (pair, rule, limit) in [
        (&patient, "patient", 3 * limit()),
        (&strict, "strict", limit()),
    ] {
        let record = daemon.wait_for_termination_of(pair)?;
        record.assert_reset("idle_timeout", &pair.opened, limit);
        assert_eq!(record.text("rule.name"), rule);
    }
    Ok(())
}

#[test]
fn a_connection_outside_of_the_cgroup_is_untouched() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let [inside, outside] = [
        lab.inside.listen(([127, 0, 0, 1], 0))?,
        lab.outside.listen(([127, 0, 0, 1], 0))?,
    ];
    let daemon = lab.daemon(&idle_rule(limit()))?;
    let untouched = Pair::open(&lab.outside, &outside)?;
    let reset = Pair::open(&lab.outside, &inside)?;
    reset.ends()?[0].assert_reset(Errno::ECONNRESET, &reset.opened, limit());
    untouched.opened.wait(2 * limit());
    untouched.round_trip()?;
    daemon.wait_for_termination()?;
    Ok(())
}

#[test]
fn the_quick_form_is_one_inbound_rule() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen(([127, 0, 0, 1], 0))?;
    let port = listener.port().to_string();
    let idle_timeout = format!("{}s", limit().as_secs());
    let args = [
        "--port",
        &port,
        "--idle-timeout",
        &idle_timeout,
        "--max-lifetime",
        "1h",
    ];
    let daemon = lab.launch().args(&args).start()?;
    let pair = Pair::open(&lab.outside, &listener)?;
    pair.ends()?[0].assert_reset(Errno::ECONNRESET, &pair.opened, limit());
    let record = daemon.wait_for_termination_of(&pair)?;
    assert_eq!(record.text("rule.name"), "cli");
    Ok(())
}
