//! What the ports of a connection tell before anything else is asked: packets that no rule is about
//! pass unseen, and all others are seen.

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

/// The limit as a rule has it.
fn text() -> String {
    format!("{}s", limit().as_secs())
}

/// IPv4, IPv6, and IPv4 by sockets of IPv6.
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
    // A range: from the port to itself.
    let conditions = format!("direction = \"outbound\"\nremote_ports = [\"{port}-{port}\"]");
    rule(&format!("remote-{port}"), &conditions, timeout)
}

fn listen(agent: &Agent) -> Result<Listener> {
    agent.listen(([127, 0, 0, 1], 0))
}

/// Stamped in both directions, reset after that, and at no other time.
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

/// Of what passes under a policy that is not about the connection, the next policy knows.
#[test]
fn a_connection_that_no_rule_was_about_for_a_while_is_not_ended_early() -> Result<()> {
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

/// A socket that closes gives its port back before its RST leaves it, and of an adopted session the
/// RST is all that tells of the end.
#[test]
fn the_reset_with_which_an_adopted_session_closes_is_seen() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = listen(&lab.inside)?;
    let pair = Pair::open(&lab.outside, &listener)?;
    let unread = Pair::open(&lab.outside, &listener)?;
    let daemon = lab.daemon(&local(&listener, "1h"))?;
    daemon.wait_for_metric("session_enforcer_sessions", &[], 2.0)?;
    reset_on_close(&pair.server)?;
    drop(pair.server);
    daemon.wait_for_metric("session_enforcer_sessions", &[], 1.0)?;
    // What was never read is another reason for a reset.
    std::io::Write::write_all(&mut &unread.client, b"unread")?;
    eventually("it has come", patience(), || {
        let mut byte = [0];
        Ok((unread.server.peek(&mut byte)? == 1).then_some(()))
    })?;
    drop(unread.server);
    daemon.wait_for_metric("session_enforcer_sessions", &[], 0.0)
}

/// The owners that a daemon with pins has noted.
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
fn what_was_kept_of_an_owner_goes_with_the_establishment_whatever_the_ports() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let tracked = listen(&lab.outside)?;
    // Owners are noted only where a rule names some.
    let named =
        "[[rule]]\nname = \"named\"\nusers = [4711]\nlocal_ports = [1]\nidle_timeout = \"1h\"\n";
    let daemon: Daemon = lab.pinned_daemon(&(remote(&tracked, "1h") + named))?;
    let owners = owners(&lab)?;
    for listener in [tracked, listen(&lab.inside)?] {
        let socket = lab.inside.tcp(listener.address)?;
        assert!(has_owner(&owners, &socket)?);
        let pair = Pair::dial(socket, &listener, listener.address)?;
        assert!(!has_owner(&owners, &pair.client)?);
        // Inherited where it was accepted in the cgroup.
        assert!(!has_owner(&owners, &pair.server)?);
    }
    assert_eq!(
        daemon.metric("session_enforcer_sessions_opened_total", &[])?,
        1.0
    );
    Ok(())
}

/// Received and sent, as the kernel has it.
fn bytes(kernel: &Datapath, cookie: u64) -> Result<[u64; 2]> {
    let session = kernel.session(cookie)?.context("a session")?;
    Ok([session.bytes_received, session.bytes_sent])
}

/// As the daemon does it when it has decided about every session.
fn narrow(kernel: &mut Datapath) -> Result<()> {
    let mut narrowing = kernel.begin_narrowing();
    kernel.keep_ports(&mut narrowing, &kernel.cookies()?)?;
    Ok(kernel.narrow_ports(&narrowing)?)
}

/// The two ways in which a session can be beside the rules' ports: put there afterwards, as no daemon
/// does, it shows that such packets pass unseen; one that is there when the filter is narrowed, since
/// nobody could decide about it, is seen.
#[test]
fn packets_that_no_rule_is_about_pass_unseen_unless_there_is_a_session() -> Result<()> {
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
