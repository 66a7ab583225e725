//! A new connection with the addresses and ports of a closed one is a new session: it is never
//! reset for the old one's deadline.

use std::{
    net::{Ipv4Addr, SocketAddr},
    os::fd::AsRawFd as _,
    time::Duration,
};

use anyhow::Result;
use nix::sys::{
    signal::Signal,
    socket::{SockaddrStorage, bind},
};
use session_enforcer_tests::{
    Agent, Daemon, Lab, Listener, Moment, Pair, disconnect, eventually, idle_rule,
    longer_than_a_start as limit, patience, reset_on_close, set_option,
};

const AGENT: &str = env!("CARGO_BIN_EXE_session-enforcer-test-agent");

fn rule() -> String {
    idle_rule(limit())
}

/// A connection from this local port. With 0 the kernel chooses the port.
fn open_from(port: u16, agent: &Agent, listener: &Listener) -> Result<Pair> {
    let from = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let socket = agent.tcp(from)?;
    set_option(&socket, libc::SOL_SOCKET, libc::SO_REUSEADDR, 1)?;
    bind(socket.as_raw_fd(), &SockaddrStorage::from(from))?;
    Pair::dial(socket, listener, listener.address)
}

/// Resets a connection so that its tuple is free. A child that another test has just forked may
/// hold a copy of the socket until its exec, so the close may come a moment later.
fn end(pair: Pair) -> Result<()> {
    reset_on_close(&pair.client)?;
    let Pair { client, server, .. } = pair;
    drop(client);
    let gone = || {
        let error = server.take_error()?;
        Ok(error.is_some().then_some(()))
    };
    eventually("the reset arrives", patience(), gone)
}

/// The new connection has its own clock, and the old one has no record.
fn assert_own_clock(daemon: &Daemon, old: &Moment, new: &Pair) -> Result<()> {
    assert!(new.opened.earliest.at - old.earliest.at > Duration::from_secs(1));
    for end in new.ends()? {
        end.assert_not_early(&new.opened, limit());
    }
    daemon
        .wait_for_termination()?
        .assert_reset("idle_timeout", &new.opened, limit());
    Ok(())
}

fn reuse(lab: &Lab, client: &Agent, server: &Agent) -> Result<()> {
    let listener = server.listen((Ipv4Addr::LOCALHOST, 0))?;
    let daemon = lab.daemon(&rule())?;
    let old = open_from(0, client, &listener)?;
    let (opened, port) = (old.opened, old.client_address.port());
    opened.wait(Duration::from_millis(1200));
    end(old)?;
    let new = open_from(port, client, &listener)?;
    assert_own_clock(&daemon, &opened, &new)
}

#[test]
fn a_new_connection_to_a_tracked_server_is_not_the_old_one() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    reuse(&lab, &lab.outside, &lab.inside)
}

#[test]
fn a_new_connection_of_a_tracked_client_is_not_the_old_one() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    reuse(&lab, &lab.inside, &lab.outside)
}

#[test]
fn a_new_connection_is_not_the_adopted_one_of_the_same_tuple() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let old = open_from(0, &lab.outside, &listener)?;
    let (opened, port) = (old.opened, old.client_address.port());
    let daemon = lab.daemon(&rule())?;
    opened.wait(Duration::from_millis(1200));
    end(old)?;
    let new = open_from(port, &lab.outside, &listener)?;
    assert_own_clock(&daemon, &opened, &new)
}

#[test]
fn a_new_connection_is_not_the_old_one_for_a_daemon_that_stalled_past_its_deadline() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let daemon = lab.daemon(&rule())?;
    let old = open_from(0, &lab.outside, &listener)?;
    let (opened, port) = (old.opened, old.client_address.port());
    daemon.wait_for_metric("session_enforcer_sessions", &[], 1.0)?;
    daemon.signal(Signal::SIGSTOP)?;
    opened.wait(limit() + Duration::from_millis(200));
    end(old)?;
    let new = open_from(port, &lab.outside, &listener)?;
    daemon.signal(Signal::SIGCONT)?;
    assert_own_clock(&daemon, &opened, &new)
}

#[test]
fn a_socket_that_connects_again_begins_another_session() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.outside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let daemon = lab.daemon(&rule())?;
    let old = Pair::open(&lab.inside, &listener)?;
    let opened = old.opened;
    opened.wait(Duration::from_millis(1200));
    // It is the same socket with the same cookie.
    let new = Pair::dial(disconnect(old.client)?, &listener, listener.address)?;
    assert_own_clock(&daemon, &opened, &new)?;
    assert_eq!(
        daemon.metric("session_enforcer_sessions_opened_total", &[])?,
        2.0
    );
    assert_eq!(
        daemon.metric("session_enforcer_sessions_closed_total", &[])?,
        2.0
    );
    Ok(())
}

#[test]
fn an_adopted_socket_that_connects_again_leaves_one_session_in_the_map() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.outside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let old = Pair::open(&lab.inside, &listener)?;
    let daemon = lab.daemon("[[rule]]\nname = \"idle\"\nidle_timeout = \"1h\"\n")?;
    // No event reports the end of an adopted connection.
    let new = Pair::dial(disconnect(old.client)?, &listener, listener.address)?;
    daemon.wait_for_metric("session_enforcer_sessions_opened_total", &[], 1.0)?;
    for name in ["sessions_adopted_total", "map_entries", "sessions"] {
        let name = format!("session_enforcer_{name}");
        assert_eq!(daemon.metric(&name, &[])?, 1.0, "{name}");
    }
    new.round_trip()?;
    end(new)?;
    daemon.wait_for_metric("session_enforcer_sessions_closed_total", &[], 2.0)?;
    assert_eq!(daemon.metric("session_enforcer_map_entries", &[])?, 0.0);
    Ok(())
}
