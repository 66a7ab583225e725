//! The port filter: packets whose ports no rule names pass without a look at the session table, and
//! all others are tracked.

use std::{net::SocketAddr, os::fd::AsFd, time::Duration};

use anyhow::{Context as _, Result};
use aya::maps::{Map, MapData, MapError, SkStorage};
use session_enforcer::{
    datapath::{Datapath, Options},
    host::cgroup::Cgroup,
};
use session_enforcer_common::{Direction, Limits, MatchEntry, Owner, PortRange, Session};
use session_enforcer_tests::{
    Agent, Daemon, Lab, Listener, Pair, cookie, eventually, patience, reset_on_close, unhurried,
};

const AGENT: &str = env!("CARGO_BIN_EXE_session-enforcer-test-agent");

fn limit() -> Duration {
    unhurried(Duration::from_secs(2))
}

/// The limit as text for the configuration.
fn text() -> String {
    format!("{}s", limit().as_secs())
}

/// IPv4, IPv6, and IPv4 over IPv6 sockets.
const ADDRESSES: [&str; 3] = ["127.0.0.1:0", "[::1]:0", "[::ffff:127.0.0.1]:0"];

fn rule(name: &str, conditions: &str, timeout: &str) -> String {
    format!("[[rule]]\nname = \"{name}\"\n{conditions}\nidle_timeout = \"{timeout}\"\n")
}

fn local(listener: &Listener, timeout: &str) -> String {
    let conditions = format!(
        "direction = \"inbound\"\nlocal_ports = [{}]",
        listener.port()
    );
    rule(&format!("local-{}", listener.port()), &conditions, timeout)
}

fn remote(listener: &Listener, timeout: &str) -> String {
    let port = listener.port();
    // A range that contains a single port.
    let conditions = format!("direction = \"outbound\"\nremote_ports = [\"{port}-{port}\"]");
    rule(&format!("remote-{port}"), &conditions, timeout)
}

fn listen(agent: &Agent) -> Result<Listener> {
    agent.listen(([127, 0, 0, 1], 0))
}

/// Activity counts in both directions, and the session is reset one limit after it.
#[test]
fn a_port_of_either_end_is_enough_in_every_family_and_other_ports_are_untouched() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let (mut listeners, mut config) = (Vec::new(), String::new());
    for address in ADDRESSES {
        let address: SocketAddr = address.parse()?;
        let [accepts, dialled] = [lab.inside.listen(address)?, lab.outside.listen(address)?];
        config += &local(&accepts, &text());
        config += &remote(&dialled, &text());
        let others = [lab.inside.listen(address)?, lab.outside.listen(address)?];
        listeners.push(([accepts, dialled], others));
    }
    let daemon = lab.daemon(&config)?;
    let (mut enforced, mut untouched) = (Vec::new(), Vec::new());
    let open = |[accepts, dialled]: &[Listener; 2]| -> Result<[Pair; 2]> {
        let inbound = Pair::open(&lab.outside, accepts)?;
        Ok([inbound, Pair::open(&lab.inside, dialled)?])
    };
    for (of_rules, others) in &listeners {
        enforced.extend(open(of_rules)?);
        untouched.extend(open(others)?);
    }
    for pair in &enforced {
        pair.opened.wait(limit() / 2);
    }
    let last: Result<Vec<_>> = enforced.iter().map(Pair::round_trip).collect();
    for (pair, last) in enforced.iter().zip(last?) {
        for end in pair.ends()? {
            end.assert_not_early(&last, limit());
        }
        let record = daemon.wait_for_termination_of(pair)?;
        record.assert_reset("idle_timeout", &last, limit());
        assert_eq!(record.bytes(), [4, 4]);
    }
    for pair in &untouched {
        pair.opened.wait(2 * limit());
        pair.round_trip()?;
    }
    let opened = daemon.metric("session_enforcer_sessions_opened_total", &[])?;
    assert_eq!(opened, enforced.len() as f64);
    assert_eq!(daemon.terminations()?.len(), enforced.len());
    Ok(())
}

/// Payload that passes while no rule names the ports is still known to the next policy, from the
/// socket.
#[test]
fn payload_that_passed_while_no_rule_named_the_ports_counts() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let [here, there] = [listen(&lab.inside)?, listen(&lab.outside)?];
    let about = local(&here, &text()) + &remote(&there, &text());
    let daemon = lab.daemon(&about)?;
    let pairs = [
        Pair::open(&lab.outside, &here)?,
        Pair::open(&lab.inside, &there)?,
    ];
    daemon.wait_for_metric("session_enforcer_sessions", &[], 2.0)?;
    daemon.reload(&rule("other", "local_ports = [1]", "1s"))?;
    daemon.wait_for_metric("session_enforcer_map_entries", &[], 0.0)?;
    pairs[0].opened.wait(limit() + limit() / 2);
    let last = [pairs[0].round_trip()?, pairs[1].round_trip()?];
    daemon.reload(&about)?;
    for (pair, last) in pairs.iter().zip(last) {
        let record = daemon.wait_for_termination_of(pair)?;
        record.assert_reset("idle_timeout", &last, limit());
    }
    Ok(())
}

/// A closing socket gives up its port before it sends the RST. The RST is the only sign that an
/// adopted session has ended.
#[test]
fn the_rst_of_a_closing_adopted_session_is_seen() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = listen(&lab.inside)?;
    let pair = Pair::open(&lab.outside, &listener)?;
    let unread = Pair::open(&lab.outside, &listener)?;
    let daemon = lab.daemon(&local(&listener, "1h"))?;
    daemon.wait_for_metric("session_enforcer_sessions", &[], 2.0)?;
    reset_on_close(&pair.server)?;
    drop(pair.server);
    daemon.wait_for_metric("session_enforcer_sessions", &[], 1.0)?;
    // Closing with unread payload also sends a RST.
    std::io::Write::write_all(&mut &unread.client, b"unread")?;
    eventually("the payload arrives", patience(), || {
        let mut byte = [0];
        Ok((unread.server.peek(&mut byte)? == 1).then_some(()))
    })?;
    drop(unread.server);
    daemon.wait_for_metric("session_enforcer_sessions", &[], 0.0)
}

/// The map of owners, from the pins of the daemon.
fn owners(lab: &Lab) -> Result<SkStorage<MapData, Owner>> {
    let set = lab.pins.sets()?.pop().context("a set of pins")?;
    let map = Map::from_map_data(MapData::from_pin(set.join("OWNERS"))?)?;
    Ok(SkStorage::try_from(map)?)
}

fn has_owner(owners: &SkStorage<MapData, Owner>, socket: &impl AsFd) -> Result<bool> {
    match owners.get(&socket.as_fd(), 0) {
        Ok(_) => Ok(true),
        Err(MapError::KeyNotFound) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

#[test]
fn the_owner_of_a_socket_is_removed_at_its_establishment_whatever_the_ports() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let tracked = listen(&lab.outside)?;
    // The programs record owners only if a rule names some.
    let named =
        "[[rule]]\nname = \"named\"\nusers = [4711]\nlocal_ports = [1]\nidle_timeout = \"1h\"\n";
    let daemon: Daemon = lab.pinned_daemon(&(remote(&tracked, "1h") + named))?;
    let owners = owners(&lab)?;
    for listener in [tracked, listen(&lab.inside)?] {
        let socket = lab.inside.tcp(listener.address)?;
        assert!(has_owner(&owners, &socket)?);
        let pair = Pair::dial(socket, &listener, listener.address)?;
        assert!(!has_owner(&owners, &pair.client)?);
        // An accepted socket inherits the owner of its listener.
        assert!(!has_owner(&owners, &pair.server)?);
    }
    assert_eq!(
        daemon.metric("session_enforcer_sessions_opened_total", &[])?,
        1.0
    );
    Ok(())
}

/// Bytes received and sent, from the session table.
fn bytes(kernel: &Datapath, cookie: u64) -> Result<[u64; 2]> {
    let session = kernel.session(cookie)?.context("a session")?;
    Ok([session.bytes_received, session.bytes_sent])
}

/// Narrows the port filter as the daemon does once it has decided about every session.
fn narrow(kernel: &mut Datapath) -> Result<()> {
    let mut narrowing = kernel.begin_narrowing();
    kernel.keep_ports(&mut narrowing, &kernel.cookies()?)?;
    Ok(kernel.narrow_ports(&narrowing)?)
}

/// A session whose ports no rule names. If the filter does not contain its ports, its payload is
/// not counted; the test inserts such a session, which the daemon never does. If the session exists
/// when the filter is narrowed, its ports are kept and its payload is counted.
#[test]
fn packets_whose_ports_no_rule_names_pass_unseen_unless_the_filter_keeps_a_session() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let options = Options {
        max_sessions: 16,
        only_netns: None,
        notes_owners: true,
        verbose: false,
    };
    let mut kernel = Datapath::load(options, None)?;
    let [of_rule, other] = [listen(&lab.inside)?, listen(&lab.inside)?];
    let entry = MatchEntry {
        local_ports: PortRange {
            first: of_rule.port(),
            last: of_rule.port(),
        },
        directions: Direction::Inbound as u8,
        ..MatchEntry::any(0)
    };
    let policy = Limits {
        generation: 1,
        ..Limits::default()
    };
    kernel.put_policy(1, &[entry], &[policy])?;
    kernel.attach(&Cgroup::open(lab.cgroup.path())?)?;
    narrow(&mut kernel)?;
    let seen = Pair::open(&lab.outside, &of_rule)?;
    seen.round_trip()?;
    let seen = cookie(&seen.server)?;
    assert_eq!(bytes(&kernel, seen)?, [4, 4]);
    let unseen = Pair::open(&lab.outside, &other)?;
    let session = Session {
        local_port: other.port(),
        remote_port: unseen.client_address.port(),
        bytes_received: 0,
        bytes_sent: 0,
        ..kernel.session(seen)?.context("a session")?
    };
    let cookie = cookie(&unseen.server)?;
    kernel.adopt(cookie, &session)?;
    unseen.round_trip()?;
    assert_eq!(bytes(&kernel, cookie)?, [0, 0]);
    narrow(&mut kernel)?;
    unseen.round_trip()?;
    assert_eq!(bytes(&kernel, cookie)?, [8, 8]);
    Ok(())
}
