//! Connections that move to another socket without a packet to the peer (`TCP_REPAIR`). CRIU does
//! this; root of a container could do it to restart the clocks of a session.

use std::{
    fs,
    io::Write as _,
    net::{Ipv4Addr, TcpStream},
    os::fd::AsRawFd as _,
    time::Duration,
};

use anyhow::{Context as _, Result};
use nix::{
    errno::Errno,
    sys::socket::{SockaddrStorage, bind},
};
use session_enforcer_tests::{
    Daemon, End, Lab, Netns, Pair, Saved, TrackedPair, ends_of, set_option, unhurried,
};

const AGENT: &str = env!("CARGO_BIN_EXE_session-enforcer-test-agent");

fn limit() -> Duration {
    unhurried(Duration::from_secs(3))
}

fn rule(direction: &str, limits: &str) -> String {
    format!("[[rule]]\nname = \"{direction}\"\ndirection = \"{direction}\"\n{limits}\n")
}

fn seconds(key: &str, limit: Duration) -> String {
    format!("{key} = \"{}s\"", limit.as_secs())
}

#[test]
fn a_lifetime_goes_on_however_often_the_connection_is_re_created() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.outside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let daemon = lab.daemon(&rule("outbound", &seconds("max_lifetime", limit())))?;
    let pair = Pair::open(&lab.inside, &listener)?;
    let Pair {
        mut client,
        server,
        opened,
        ..
    } = pair;
    for part in 1..4 {
        opened.wait(limit() * part / 4);
        client = Saved::of(client)?.restore(&lab.inside)?;
    }
    client.write_all(b"ten bytes.")?;
    let record = daemon.wait_for_termination()?;
    record.assert_reset("max_lifetime", &opened, limit());
    assert_eq!(record.text("network.direction"), "outbound");
    // The last socket has sent them, and no SYN.
    assert_eq!(record.number("source.bytes"), 10.0);
    assert_both_reset(&client, &server)
}

#[test]
fn an_accepted_connection_that_is_restored_is_still_accepted_and_as_idle_as_it_was() -> Result<()> {
    let case = TrackedPair::open(AGENT, &rule("inbound", &seconds("idle_timeout", limit())))?;
    let last = case.pair.round_trip()?;
    last.wait(limit() / 2);
    let Pair { client, server, .. } = case.pair;
    let server = Saved::of(server)?.restore(&case.lab.inside)?;
    let record = case.daemon.wait_for_termination()?;
    record.assert_reset("idle_timeout", &last, limit());
    assert_eq!(record.text("network.direction"), "inbound");
    assert_both_reset(&client, &server)
}

/// Any user can make a network namespace of his own, and a connection with these addresses and ports in it.
#[test]
fn a_socket_of_another_namespace_takes_no_clocks_away() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let [netns, other] = [Netns::new()?, Netns::new()?];
    let (inside, outside) = (lab.inside_in(&netns)?, lab.outside_in(&netns)?);
    let listener = inside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let daemon = lab.daemon(&rule("inbound", &seconds("idle_timeout", limit())))?;
    let pair = Pair::open(&outside, &listener)?;
    let last = pair.round_trip()?;
    last.wait(limit() / 3);
    let Pair { client, server, .. } = pair;
    let saved = Saved::of(server)?;
    // In repair mode it sends nothing, so no RST ends it.
    let _copy = saved.establish(&lab.inside_in(&other)?)?;
    let server = saved.restore(&inside)?;
    for record in daemon.wait_for_terminations(2)? {
        record.assert_reset("idle_timeout", &last, limit());
    }
    assert_both_reset(&client, &server)
}

/// If the programs have lost the clocks of a connection, restoring it gains no time.
#[test]
fn a_restored_connection_without_stored_clocks_is_past_its_limits() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let Pair { client, server, .. } = Pair::open(&lab.outside, &listener)?;
    let saved = Saved::of(server)?;
    // The restored session gets the boot as its establishment, and the host may have booted a
    // moment ago.
    let idle = seconds(
        "idle_timeout",
        uptime()?.min(Duration::from_secs(7_200)) / 2,
    );
    let daemon = lab.daemon(&(rule("inbound", &idle) + &rule("outbound", &idle)))?;
    // The session is late once it exists, and the daemon must not reset it before it is fully
    // restored.
    daemon.freeze()?;
    let server = saved.restore(&lab.inside)?;
    daemon.thaw()?;
    let record = daemon.wait_for_termination()?;
    assert_eq!(record.text("session_enforcer.result"), "reset");
    assert_both_reset(&client, &server)
}

/// The uptime of the host.
fn uptime() -> Result<Duration> {
    let text = fs::read_to_string("/proc/uptime")?;
    let seconds = text.split(' ').next().context("a number")?;
    Ok(Duration::from_secs_f64(seconds.parse()?))
}

fn assert_both_reset(client: &TcpStream, server: &TcpStream) -> Result<()> {
    let ends: Vec<End> = ends_of(&[client, server])?;
    let mut errors: Vec<_> = ends.iter().filter_map(|end| end.error).collect();
    errors.sort_by_key(|error| *error as i32);
    assert_eq!(errors, [Errno::ECONNABORTED, Errno::ECONNRESET]);
    Ok(())
}

/// A socket that closes without a FIN for another reason leaves no clocks to a new connection of
/// the same ports.
#[test]
fn a_new_connection_of_the_same_ports_has_clocks_of_its_own() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    // Its own namespace, so that no other process takes the port.
    let netns = Netns::new()?;
    let (inside, outside) = (lab.inside_in(&netns)?, lab.outside_in(&netns)?);
    let listener = outside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let daemon: Daemon = lab.daemon(&rule("outbound", &seconds("max_lifetime", limit())))?;
    let first = Pair::open(&inside, &listener)?;
    first.opened.wait(limit() / 2);
    let from = first.client_address;
    session_enforcer_tests::reset_on_close(&first.client)?;
    drop(first);
    let socket = inside.tcp(from)?;
    set_option(&socket, libc::SOL_SOCKET, libc::SO_REUSEADDR, 1)?;
    bind(socket.as_raw_fd(), &SockaddrStorage::from(from))?;
    let second = Pair::dial(socket, &listener, listener.address)?;
    let record = daemon.wait_for_termination_of(&second)?;
    record.assert_reset("max_lifetime", &second.opened, limit());
    Ok(())
}
