//! IPv4 and IPv6 in all forms of sockets and packets: payload counts, and the reset finds the
//! socket.

use std::{
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::{AsRawFd as _, OwnedFd},
    time::Duration,
};

use anyhow::Result;
use nix::{
    errno::Errno,
    fcntl::{FcntlArg, OFlag, fcntl},
    sys::socket::{SockaddrIn, SockaddrStorage, bind, connect},
};
use session_enforcer_tests::{
    Agent, Daemon, Lab, Listener, Netns, Pair, Sniffer, Veth, bind_to_device, cookie, eventually,
    idle_rule, longer_than_a_start, patience, set_bytes_option, set_option, unhurried,
};

const AGENT: &str = env!("CARGO_BIN_EXE_session-enforcer-test-agent");

fn limit() -> Duration {
    unhurried(Duration::from_secs(2))
}

fn rule() -> String {
    idle_rule(limit())
}

/// Sends payload half a limit after the establishment. Each session is reset one limit after that
/// payload.
fn assert_enforced(daemon: &Daemon, pairs: &[Pair], kind: &str) -> Result<()> {
    for pair in pairs {
        pair.opened.wait(limit() / 2);
    }
    let last: Result<Vec<_>> = pairs.iter().map(Pair::round_trip).collect();
    for (pair, last) in pairs.iter().zip(last?) {
        let ends = pair.ends()?;
        let mut errors = ends.map(|end| end.error);
        errors.sort_by_key(|error| error.map(|error| error as i32));
        assert_eq!(errors, [Some(Errno::ECONNABORTED), Some(Errno::ECONNRESET)]);
        ends[0].assert_not_early(&last, limit());
        let record = daemon.wait_for_termination_of(pair)?;
        record.assert_reset("idle_timeout", &last, limit());
        assert_eq!(record.text("network.type"), kind);
        assert_eq!(record.bytes(), [4, 4]);
        let addresses = [pair.client_address, pair.server_address];
        let plain = addresses.map(|address| address.ip().to_canonical().to_string());
        assert_eq!(
            ["source.ip", "destination.ip"].map(|ip| record.text(ip)),
            plain
        );
    }
    Ok(())
}

/// Two connections to this address: the tracked end dials the first and accepts the second.
fn either_end(lab: &Lab, address: SocketAddr) -> Result<[Pair; 2]> {
    let [outside, inside] = [lab.outside.listen(address)?, lab.inside.listen(address)?];
    Ok([
        Pair::open(&lab.inside, &outside)?,
        Pair::open(&lab.outside, &inside)?,
    ])
}

#[test]
fn ipv4_sessions_are_enforced() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let daemon = lab.daemon(&rule())?;
    let pairs = either_end(&lab, (Ipv4Addr::LOCALHOST, 0).into())?;
    assert_enforced(&daemon, &pairs, "ipv4")
}

#[test]
fn ipv6_sessions_are_enforced() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let daemon = lab.daemon(&rule())?;
    let pairs = either_end(&lab, (Ipv6Addr::LOCALHOST, 0).into())?;
    assert_enforced(&daemon, &pairs, "ipv6")
}

#[test]
fn ipv4_sessions_of_ipv6_sockets_are_enforced() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let plain = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let mapped = SocketAddr::from((Ipv4Addr::LOCALHOST.to_ipv6_mapped(), 0));
    let daemon = lab.daemon(&rule())?;
    let mut pairs = Vec::from(either_end(&lab, mapped)?);
    // One IPv6 socket and one IPv4 socket; the IPv6 socket is tracked.
    let listener = lab.outside.listen(plain)?;
    let to = SocketAddr::from((Ipv4Addr::LOCALHOST.to_ipv6_mapped(), listener.port()));
    pairs.push(Pair::dial(lab.inside.tcp(to)?, &listener, to)?);
    let listener = lab.inside.listen(mapped)?;
    let to = SocketAddr::from((Ipv4Addr::LOCALHOST, listener.port()));
    pairs.push(Pair::dial(lab.outside.tcp(to)?, &listener, to)?);
    assert_enforced(&daemon, &pairs, "ipv4")
}

#[test]
fn a_rule_for_an_ipv4_prefix_applies_to_ipv6_sockets_with_such_an_address() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let rule = format!("{}local = [\"127.0.0.0/8\"]\n", rule());
    let daemon = lab.daemon(&rule)?;
    let mapped = (Ipv4Addr::LOCALHOST.to_ipv6_mapped(), 0).into();
    let untouched = either_end(&lab, (Ipv6Addr::LOCALHOST, 0).into())?;
    assert_enforced(&daemon, &either_end(&lab, mapped)?, "ipv4")?;
    for pair in untouched {
        pair.round_trip()?;
        assert_eq!(daemon.terminations_of(&pair)?.len(), 0);
    }
    Ok(())
}

/// Two namespaces that a veth pair connects. One end of each connection between them is tracked.
struct Cabled {
    lab: Lab,
    left: Netns,
    right: Netns,
    veth: Veth,
}

impl Cabled {
    fn new() -> Result<Self> {
        let lab = Lab::new(AGENT)?;
        let [left, right] = [Netns::new()?, Netns::new()?];
        let veth = Veth::between(&left, &right)?;
        Ok(Self {
            lab,
            left,
            right,
            veth,
        })
    }

    /// Pairs of agents, left and right: first with the left one tracked, then with the right one
    /// tracked.
    fn agents(&self) -> Result<[[Agent; 2]; 2]> {
        let (lab, left, right) = (&self.lab, &self.left, &self.right);
        Ok([
            [lab.inside_in(left)?, lab.outside_in(right)?],
            [lab.outside_in(left)?, lab.inside_in(right)?],
        ])
    }
}

/// An options header (hop-by-hop or destination) that holds only padding (RFC 8200 section 4.2).
/// The kernel sets the number of the next header.
const PADDING: [u8; 8] = [0, 0, 1, 4, 0, 0, 0, 0];
const HOP_BY_HOP: u8 = 0;
const DESTINATION: u8 = 60;

#[test]
fn payload_behind_ipv6_extension_headers_is_activity() -> Result<()> {
    let cabled = Cabled::new()?;
    let daemon = cabled.lab.daemon(&rule())?;
    let mut pairs = Vec::new();
    let sniffer = Sniffer::new(&cabled.lab.outside_in(&cabled.right)?)?;
    for [left, right] in cabled.agents()? {
        for options in [
            &[libc::IPV6_DSTOPTS][..],
            &[libc::IPV6_HOPOPTS, libc::IPV6_DSTOPTS],
        ] {
            let listener = right.listen((Veth::RIGHT_V6, 0))?;
            let socket = left.tcp(listener.address)?;
            for option in options {
                set_bytes_option(&socket, libc::IPPROTO_IPV6, *option, &PADDING)?;
            }
            pairs.push(Pair::dial(socket, &listener, listener.address)?);
        }
    }
    assert_enforced(&daemon, &pairs, "ipv6")?;
    let seen: Vec<u8> = sniffer
        .packets()?
        .iter()
        .map(|packet| packet.start[6])
        .collect();
    assert!(
        seen.contains(&HOP_BY_HOP) && seen.contains(&DESTINATION),
        "{seen:?}"
    );
    assert_eq!(
        daemon.metric("session_enforcer_kernel_errors_total", &[])?,
        0.0
    );
    Ok(())
}

#[test]
fn encapsulated_payload_is_activity() -> Result<()> {
    for (address, kind, depth) in [
        (Veth::BEYOND, "ipv4", 1),
        (Veth::BEYOND_V6, "ipv6", 1),
        // More headers than the programs parse.
        (Veth::BEYOND_V6, "ipv6", 5),
    ] {
        let cabled = Cabled::new()?;
        let daemon = cabled.lab.daemon(&rule())?;
        Veth::lay_on(&cabled.left, &cabled.right)?;
        Veth::encapsulate(&cabled.left, &cabled.right, depth)?;
        let mut pairs = Vec::new();
        for [left, right] in cabled.agents()? {
            let listener = right.listen((address, 0))?;
            pairs.push(Pair::open(&left, &listener)?);
        }
        assert_enforced(&daemon, &pairs, kind)?;
        let errors = daemon.metric("session_enforcer_kernel_errors_total", &[])?;
        assert_eq!(errors > 0.0, depth == 5, "{errors}");
    }
    Ok(())
}

#[test]
fn sessions_of_link_local_addresses_are_enforced() -> Result<()> {
    let cabled = Cabled::new()?;
    let daemon = cabled.lab.daemon(&rule())?;
    let mut pairs = Vec::new();
    for [left, right] in cabled.agents()? {
        let listener = right.listen((Ipv6Addr::UNSPECIFIED, 0))?;
        let to = cabled.veth.right_link_local(listener.port());
        pairs.push(Pair::dial(left.tcp(to)?, &listener, to)?);
    }
    assert_enforced(&daemon, &pairs, "ipv6")
}

fn bound(socket: OwnedFd) -> Result<OwnedFd> {
    bind_to_device(&socket, Veth::INTERFACE)?;
    Ok(socket)
}

#[test]
fn sessions_of_sockets_bound_to_a_device_are_enforced() -> Result<()> {
    for (address, kind) in [(Veth::RIGHT, "ipv4"), (Veth::RIGHT_V6, "ipv6")] {
        let cabled = Cabled::new()?;
        let daemon = cabled.lab.daemon(&rule())?;
        let mut pairs = Vec::new();
        for [left, right] in cabled.agents()? {
            let address = SocketAddr::from((address, 0));
            let listener = Listener::on(bound(right.tcp(address)?)?, address)?;
            let socket = bound(left.tcp(address)?)?;
            pairs.push(Pair::dial(socket, &listener, listener.address)?);
        }
        assert_enforced(&daemon, &pairs, kind)?;
    }
    Ok(())
}

/// The kernel permits `SO_BINDTODEVICE` in every state and without privileges.
#[test]
fn sessions_of_sockets_bound_to_a_device_later_are_enforced() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let daemon = lab.daemon(&rule())?;
    for (address, kind) in [
        (SocketAddr::from((Ipv4Addr::LOCALHOST, 0)), "ipv4"),
        (SocketAddr::from((Ipv6Addr::LOCALHOST, 0)), "ipv6"),
    ] {
        let pairs = either_end(&lab, address)?;
        bind_to_device(&pairs[0].client, "lo")?;
        bind_to_device(&pairs[1].server, "lo")?;
        assert_enforced(&daemon, &pairs, kind)?;
    }
    let repaired = "session_enforcer_reconcile_repaired_total";
    assert_eq!(daemon.metric(repaired, &[("kind", "stale")])?, 0.0);
    Ok(())
}

/// No event reports the close of an adopted socket. So a lookup that does not find the socket could
/// mean that it has closed.
#[test]
fn sessions_of_older_sockets_bound_to_a_device_later_are_enforced() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    for (address, kind) in [
        (SocketAddr::from((Ipv4Addr::LOCALHOST, 0)), "ipv4"),
        (SocketAddr::from((Ipv6Addr::LOCALHOST, 0)), "ipv6"),
    ] {
        let [outside, inside] = [lab.outside.listen(address)?, lab.inside.listen(address)?];
        let pairs = [
            Pair::open(&lab.inside, &outside)?,
            Pair::open(&lab.outside, &inside)?,
        ];
        let daemon = lab.daemon(&idle_rule(longer_than_a_start()))?;
        bind_to_device(&pairs[0].client, "lo")?;
        bind_to_device(&pairs[1].server, "lo")?;
        let last = [pairs[0].round_trip()?, pairs[1].round_trip()?];
        for (pair, last) in pairs.iter().zip(last) {
            let record = daemon.wait_for_termination_of(pair)?;
            record.assert_reset("idle_timeout", &last, longer_than_a_start());
            assert_eq!(record.text("network.type"), kind);
        }
        let repaired = "session_enforcer_reconcile_repaired_total";
        assert_eq!(daemon.metric(repaired, &[("kind", "stale")])?, 0.0);
    }
    Ok(())
}

/// A socket that is bound to no interface may connect with the same addresses and ports. The kernel then finds the newer
/// socket under the older one's name, so it does not reset the older one by that name.
#[test]
fn a_session_whose_socket_another_one_hides_is_reset_in_time() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    // Other tests use the same ports.
    let netns = Netns::new()?;
    let (inside, outside) = (lab.inside_in(&netns)?, lab.outside_in(&netns)?);
    let listener = outside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let daemon = lab.daemon(&rule())?;
    let older = inside.tcp(listener.address)?;
    set_option(&older, libc::SOL_SOCKET, libc::SO_REUSEADDR, 1)?;
    bind_to_device(&older, "lo")?;
    let pair = Pair::dial(older, &listener, listener.address)?;
    let SocketAddr::V4(name) = pair.client_address else {
        anyhow::bail!("IPv4")
    };
    let newer = inside.tcp(listener.address)?;
    set_option(&newer, libc::SOL_SOCKET, libc::SO_REUSEADDR, 1)?;
    bind(newer.as_raw_fd(), &SockaddrIn::from(name))?;
    fcntl(&newer, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    let dialled = connect(newer.as_raw_fd(), &SockaddrStorage::from(listener.address));
    assert_eq!(dialled, Err(Errno::EINPROGRESS));
    // The newer one may be established too, and is then reset under the same name.
    let older = cookie(&pair.client)? as f64;
    let of_older = || {
        let mut records = daemon.terminations_of(&pair)?;
        records.retain(|record| record.number("session_enforcer.id") == older);
        Ok((!records.is_empty()).then_some(records))
    };
    let records = eventually("the reset of the older one", patience(), of_older)?;
    assert_eq!(records.len(), 1, "{records:#?}");
    records[0].assert_reset("idle_timeout", &pair.opened, limit());
    Ok(())
}
