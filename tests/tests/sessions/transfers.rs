//! Large transfers in aggregates of all sizes: every byte is counted once.

use std::{
    io::{Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, TcpStream},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use session_enforcer_tests::{
    Daemon, Lab, Moment, Netns, Pair, Sniffer, Veth, allow_big_tcp, has_ipv4_big_tcp,
};

const AGENT: &str = env!("CARGO_BIN_EXE_session-enforcer-test-agent");
const LIMIT: Duration = Duration::from_secs(2);
const RULE: &str = "[[rule]]\nname = \"idle\"\nidle_timeout = \"2s\"\n";

/// Odd sizes, so that no packet size divides them.
const TO_SERVER: usize = 9_000_001;
const TO_CLIENT: usize = 7_000_003;

fn send(mut stream: &TcpStream, mut count: usize) -> Result<()> {
    let chunk = vec![7; 1 << 20];
    while count > 0 {
        let now = count.min(chunk.len());
        stream.write_all(&chunk[..now])?;
        count -= now;
    }
    Ok(())
}

fn receive(mut stream: &TcpStream, mut count: usize) -> Result<()> {
    let mut chunk = vec![0; 1 << 20];
    while count > 0 {
        let room = count.min(chunk.len());
        let now = stream.read(&mut chunk[..room])?;
        ensure!(now > 0, "{count} bytes are missing");
        count -= now;
    }
    Ok(())
}

/// Several megabytes in both directions at the same time.
fn transfer(pair: &Pair) -> Result<Moment> {
    let (client, server) = (&pair.client, &pair.server);
    let (moment, ()) = Moment::of(|| {
        thread::scope(|scope| {
            let threads = [
                scope.spawn(|| send(client, TO_SERVER)),
                scope.spawn(|| receive(server, TO_SERVER)),
                scope.spawn(|| send(server, TO_CLIENT)),
                scope.spawn(|| receive(client, TO_CLIENT)),
            ];
            threads
                .into_iter()
                .try_for_each(|t| t.join().ok().context("a thread panicked")?)
        })
    })?;
    Ok(moment)
}

/// Transfers over each connection. The audit has the exact number of bytes for both directions.
fn assert_exact(daemon: &Daemon, pairs: &[Pair]) -> Result<()> {
    for pair in pairs {
        let last = transfer(pair)?;
        pair.ends()?;
        let record = daemon.wait_for_termination_of(pair)?;
        record.assert_reset("idle_timeout", &last, LIMIT);
        assert_eq!(record.bytes(), [TO_SERVER as u64, TO_CLIENT as u64]);
    }
    assert_eq!(
        daemon.metric("session_enforcer_kernel_errors_total", &[])?,
        0.0
    );
    Ok(())
}

#[test]
fn every_byte_of_a_big_transfer_over_loopback_is_counted_once() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let [inside, outside] = [
        lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?,
        lab.outside.listen((Ipv4Addr::LOCALHOST, 0))?,
    ];
    let daemon = lab.daemon(RULE)?;
    let pair = Pair::open(&lab.outside, &inside)?;
    assert_exact(&daemon, &[pair])?;
    let pair = Pair::open(&lab.inside, &outside)?;
    assert_exact(&daemon, &[pair])
}

/// Transfers over a veth pair with packets of more than 64 KiB (BIG TCP), whose headers do not
/// contain the length. Older kernels have them only for IPv6.
fn big_tcp(address: IpAddr) -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let [left, right] = [Netns::new()?, Netns::new()?];
    Veth::between(&left, &right)?;
    for (netns, agent) in [
        (&left, lab.outside_in(&left)?),
        (&right, lab.outside_in(&right)?),
    ] {
        allow_big_tcp(netns, &agent)?;
    }
    let sniffer = Sniffer::new(&lab.outside_in(&right)?)?;
    let daemon = lab.daemon(RULE)?;
    let listener = lab.inside_in(&right)?.listen((address, 0))?;
    assert_exact(&daemon, &[Pair::open(&lab.outside_in(&left)?, &listener)?])?;
    let listener = lab.outside_in(&right)?.listen((address, 0))?;
    assert_exact(&daemon, &[Pair::open(&lab.inside_in(&left)?, &listener)?])?;
    let longest = sniffer.packets()?.iter().map(|packet| packet.length).max();
    let known = address.is_ipv6() || has_ipv4_big_tcp(&right, &lab.outside_in(&right)?)?;
    assert_eq!(
        longest > Some(66_000),
        known,
        "the longest packet had {longest:?} bytes"
    );
    Ok(())
}

#[test]
fn every_byte_of_ipv6_packets_of_more_than_64_kib_is_counted_once() -> Result<()> {
    big_tcp(Veth::RIGHT_V6)
}

#[test]
fn every_byte_of_ipv4_packets_of_more_than_64_kib_is_counted_once() -> Result<()> {
    big_tcp(Veth::RIGHT)
}
