//! Who dialled decides whether a rule of one direction applies.

use std::time::Duration;

use anyhow::Result;
use nix::errno::Errno;
use session_enforcer_tests::{Lab, Pair};

const AGENT: &str = env!("CARGO_BIN_EXE_session-enforcer-test-agent");
const LIMIT: Duration = Duration::from_secs(1);

#[test]
fn an_outbound_rule_resets_what_was_dialled_to_its_remote_ports_and_nothing_else() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listen = || lab.outside.listen(([127, 0, 0, 1], 0));
    let [named, other] = [listen()?, listen()?];
    let accepting = lab.inside.listen(([127, 0, 0, 1], 0))?;
    let daemon = lab.daemon(&format!(
        "[[rule]]\nname = \"out\"\ndirection = \"outbound\"\nremote_ports = [{}]\n\
         idle_timeout = \"1s\"\n",
        named.port(),
    ))?;
    let matching = Pair::open(&lab.inside, &named)?;
    let elsewhere = Pair::open(&lab.inside, &other)?;
    let inbound = Pair::open(&lab.outside, &accepting)?;
    let [client, server] = matching.ends()?;
    client.assert_reset(Errno::ECONNABORTED, &matching.opened, LIMIT);
    server.assert_reset(Errno::ECONNRESET, &matching.opened, LIMIT);
    let record = daemon.wait_for_termination_of(&matching)?;
    record.assert_reset("idle_timeout", &matching.opened, LIMIT);
    assert_eq!(record.text("network.direction"), "outbound");
    inbound.opened.wait(2 * LIMIT);
    elsewhere.round_trip()?;
    inbound.round_trip()?;
    assert_eq!(daemon.terminations()?.len(), 1);
    assert_eq!(
        daemon.metric("session_enforcer_sessions_opened_total", &[])?,
        1.0
    );
    Ok(())
}

#[test]
fn an_inbound_rule_leaves_the_end_that_dialled_alone() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let [outside, inside] = [
        lab.outside.listen(([127, 0, 0, 1], 0))?,
        lab.inside.listen(([127, 0, 0, 1], 0))?,
    ];
    let daemon =
        lab.daemon("[[rule]]\nname = \"in\"\ndirection = \"inbound\"\nidle_timeout = \"1s\"\n")?;
    let dialled = Pair::open(&lab.inside, &outside)?;
    let both = Pair::open(&lab.inside, &inside)?;
    // Of the connection within the cgroup, the end that accepted is the session.
    let [client, server] = both.ends()?;
    client.assert_reset(Errno::ECONNRESET, &both.opened, LIMIT);
    server.assert_reset(Errno::ECONNABORTED, &both.opened, LIMIT);
    dialled.opened.wait(2 * LIMIT);
    dialled.round_trip()?;
    daemon
        .wait_for_termination()?
        .assert_reset("idle_timeout", &both.opened, LIMIT);
    Ok(())
}
