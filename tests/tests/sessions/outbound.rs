//! The `direction` of a rule: a session is outbound if this host dialled.

use std::{os::fd::AsRawFd as _, time::Duration};

use anyhow::Result;
use nix::{
    errno::Errno,
    sys::socket::{SockaddrIn, bind, connect, getsockname},
};
use session_enforcer_tests::{Lab, Moment, Pair, unhurried};

const AGENT: &str = env!("CARGO_BIN_EXE_session-enforcer-test-agent");

/// Long enough to open a connection and read its addresses.
fn limit() -> Duration {
    unhurried(Duration::from_secs(1))
}

#[test]
fn an_outbound_rule_resets_only_connections_dialled_to_its_remote_ports() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listen = || lab.outside.listen(([127, 0, 0, 1], 0));
    let [named, other] = [listen()?, listen()?];
    let accepting = lab.inside.listen(([127, 0, 0, 1], 0))?;
    let daemon = lab.daemon(&format!(
        "[[rule]]\nname = \"out\"\ndirection = \"outbound\"\nremote_ports = [{}]\n\
         idle_timeout = \"{}s\"\n",
        named.port(),
        limit().as_secs(),
    ))?;
    let matching = Pair::open(&lab.inside, &named)?;
    let elsewhere = Pair::open(&lab.inside, &other)?;
    let inbound = Pair::open(&lab.outside, &accepting)?;
    let [client, server] = matching.ends()?;
    client.assert_reset(Errno::ECONNABORTED, &matching.opened, limit());
    server.assert_reset(Errno::ECONNRESET, &matching.opened, limit());
    let record = daemon.wait_for_termination_of(&matching)?;
    record.assert_reset("idle_timeout", &matching.opened, limit());
    assert_eq!(record.text("network.direction"), "outbound");
    inbound.opened.wait(2 * limit());
    elsewhere.round_trip()?;
    inbound.round_trip()?;
    assert_eq!(daemon.terminations()?.len(), 1);
    assert_eq!(
        daemon.metric("session_enforcer_sessions_opened_total", &[])?,
        1.0
    );
    Ok(())
}

/// With a simultaneous open, the kernel reports an accepted connection at both ends.
#[test]
fn a_socket_that_connects_to_itself_is_outbound() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let daemon = lab.daemon(&format!(
        "[[rule]]\nname = \"out\"\ndirection = \"outbound\"\nidle_timeout = \"{}s\"\n",
        limit().as_secs(),
    ))?;
    let socket = lab.inside.tcp(([127, 0, 0, 1], 0).into())?;
    bind(socket.as_raw_fd(), &SockaddrIn::new(127, 0, 0, 1, 0))?;
    let own: SockaddrIn = getsockname(socket.as_raw_fd())?;
    let (opened, ()) = Moment::of(|| Ok(connect(socket.as_raw_fd(), &own)?))?;
    let record = daemon.wait_for_termination()?;
    record.assert_reset("idle_timeout", &opened, limit());
    assert_eq!(record.text("network.direction"), "outbound");
    assert_eq!(record.ports(), [own.port(), own.port()]);
    assert_eq!(record.bytes(), [0, 0]);
    Ok(())
}

#[test]
fn an_inbound_rule_leaves_the_end_that_dialled_alone() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let [outside, inside] = [
        lab.outside.listen(([127, 0, 0, 1], 0))?,
        lab.inside.listen(([127, 0, 0, 1], 0))?,
    ];
    let daemon = lab.daemon(&format!(
        "[[rule]]\nname = \"in\"\ndirection = \"inbound\"\nidle_timeout = \"{}s\"\n",
        limit().as_secs(),
    ))?;
    let dialled = Pair::open(&lab.inside, &outside)?;
    let both = Pair::open(&lab.inside, &inside)?;
    // Both ends are in the cgroup. Only the end that accepted is a session of this rule.
    let [client, server] = both.ends()?;
    client.assert_reset(Errno::ECONNRESET, &both.opened, limit());
    server.assert_reset(Errno::ECONNABORTED, &both.opened, limit());
    dialled.opened.wait(2 * limit());
    dialled.round_trip()?;
    daemon
        .wait_for_termination()?
        .assert_reset("idle_timeout", &both.opened, limit());
    Ok(())
}
