//! Only new payload is activity. Keepalives, probes, retransmissions and refused segments are not.

use std::{
    io::{ErrorKind, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    thread,
    time::Duration,
};

use anyhow::Result;
use session_enforcer_common::PacketDirection;
use session_enforcer_tests::{
    Agent, Daemon, Lab, Listener, Moment, Netns, Pair, RawTcp, Sequence, TrackedPair, Veth,
    drop_packets, eventually, idle_rule, keep_alive, patience, set_option, tcp_info, unhurried,
};

const AGENT: &str = env!("CARGO_BIN_EXE_session-enforcer-test-agent");

fn limit() -> Duration {
    unhurried(Duration::from_secs(3))
}

fn rule() -> String {
    idle_rule(limit())
}

/// The number of all segments that a socket has sent, and of those with payload.
fn segments_sent(stream: &TcpStream) -> Result<(u32, u32)> {
    let info = tcp_info(stream)?;
    Ok((info.tcpi_segs_out, info.tcpi_data_segs_out))
}

fn assert_reset_for(daemon: &Daemon, pair: &Pair, last: &Moment) -> Result<()> {
    daemon.assert_reset_of(pair, "idle_timeout", last, limit())
}

#[test]
fn keepalives_of_either_end_do_not_save_an_idle_session() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen(([127, 0, 0, 1], 0))?;
    let daemon = lab.daemon(&rule())?;
    let pairs = [
        Pair::open(&lab.outside, &listener)?,
        Pair::open(&lab.outside, &listener)?,
    ];
    keep_alive(&pairs[0].client, Duration::from_secs(1))?;
    keep_alive(&pairs[1].server, Duration::from_secs(1))?;
    let last = [pairs[0].round_trip()?, pairs[1].round_trip()?];
    let probers = [&pairs[0].client, &pairs[1].server];
    let before = [segments_sent(probers[0])?, segments_sent(probers[1])?];
    last[0].wait(limit() / 2);
    for (prober, before) in probers.into_iter().zip(before) {
        let (all, with_payload) = segments_sent(prober)?;
        assert!(
            all > before.0 && with_payload == before.1,
            "no keepalive was sent"
        );
    }
    assert_reset_for(&daemon, &pairs[0], &last[0])?;
    assert_reset_for(&daemon, &pairs[1], &last[1])
}

/// Sends forged segments to the tracked end, as a peer could, during most of the limit. `forged`
/// makes them.
fn forge(lab: &Lab, pair: &Pair, forged: impl Fn(Sequence) -> (Sequence, Vec<u8>)) -> Result<()> {
    let raw = RawTcp::new(&lab.outside)?;
    let at = Sequence::of(&pair.client)?;
    for _ in 0..8 {
        thread::sleep(Duration::from_millis(250));
        let (at, payload) = forged(at);
        raw.send(&pair.client, at, &payload)?;
    }
    Ok(())
}

#[test]
fn keepalives_with_a_byte_of_old_payload_do_not_save_an_idle_session() -> Result<()> {
    let case = TrackedPair::open(AGENT, &rule())?;
    let last = case.pair.round_trip()?;
    // BSD's keepalive probes carry one old byte (RFC 9293 section 3.8.4).
    let probe = |at: Sequence| {
        (
            Sequence {
                to_send: at.to_send.wrapping_sub(1),
                ..at
            },
            vec![0],
        )
    };
    forge(&case.lab, &case.pair, probe)?;
    assert_reset_for(&case.daemon, &case.pair, &last)
}

#[test]
fn a_duplicate_segment_does_not_save_an_idle_session() -> Result<()> {
    let case = TrackedPair::open(AGENT, &rule())?;
    let last = case.pair.to_server(b"ping")?;
    let duplicate = |at: Sequence| {
        (
            Sequence {
                to_send: at.to_send.wrapping_sub(4),
                ..at
            },
            b"ping".to_vec(),
        )
    };
    forge(&case.lab, &case.pair, duplicate)?;
    assert_reset_for(&case.daemon, &case.pair, &last)
}

/// An attacker who knows only addresses and ports can, with four sequence numbers, hit one that may
/// be ahead of the receiver's.
#[test]
fn segments_that_the_stack_refuses_do_not_save_an_idle_session() -> Result<()> {
    let case = TrackedPair::open(AGENT, &rule())?;
    let last = case.pair.round_trip()?;
    let blind = |number: u32| {
        let at = Sequence {
            to_send: number << 30,
            to_receive: 0,
        };
        RawTcp::new(&case.lab.outside)?.send(&case.pair.client, at, b"x")
    };
    (0..4).try_for_each(blind)?;
    last.wait(limit() / 2);
    (0..4).try_for_each(blind)?;
    assert_reset_for(&case.daemon, &case.pair, &last)?;
    let record = case.daemon.wait_for_termination_of(&case.pair)?;
    assert_eq!(record.bytes(), [4, 4]);
    Ok(())
}

/// A program that was attached later drops the payload, as systemd's firewall does.
#[test]
fn payload_that_another_program_drops_does_not_save_an_idle_session() -> Result<()> {
    for way in PacketDirection::ALL {
        let case = TrackedPair::open(AGENT, &rule())?;
        let last = case.pair.round_trip()?;
        let _other = drop_packets(&case.lab.cgroup, way)?;
        let mut from = match way {
            PacketDirection::Ingress => &case.pair.client,
            PacketDirection::Egress => &case.pair.server,
        };
        let before = segments_sent(from)?;
        from.write_all(b"again")?;
        eventually("three retransmissions", patience(), || {
            Ok((segments_sent(from)?.1 >= before.1 + 3).then_some(()))
        })?;
        let record = case.daemon.wait_for_termination_of(&case.pair)?;
        record.assert_reset("idle_timeout", &last, limit());
        assert_eq!(record.bytes(), [4, 4], "{way:?}");
    }
    Ok(())
}

/// The control of the tests above: forged segments reach the socket, and one that it accepts counts.
#[test]
fn an_accepted_forged_segment_is_activity() -> Result<()> {
    let mut case = TrackedPair::open(AGENT, &rule())?;
    case.pair.round_trip()?.wait(Duration::from_secs(1));
    let at = Sequence::of(&case.pair.client)?;
    let forge = || RawTcp::new(&case.lab.outside)?.send(&case.pair.client, at, b"new");
    let (last, ()) = Moment::of(forge)?;
    let mut received = [0; 3];
    case.pair.server.read_exact(&mut received)?;
    assert_eq!(&received, b"new");
    assert_reset_for(&case.daemon, &case.pair, &last)
}

/// Fills the receiver's window until the sender would block.
fn fill_window(pair: &mut Pair) -> Result<()> {
    pair.client.set_nonblocking(true)?;
    loop {
        match pair.client.write(&[0; 4096]) {
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
}

/// Waits until the socket has sent three segments without payload. Before it probes, the timer may
/// send payload that fits into the rest of the window.
fn wait_for_probes(stream: &TcpStream) -> Result<()> {
    let mut since = segments_sent(stream)?;
    eventually("window probes", patience(), || {
        let now = segments_sent(stream)?;
        if now.1 > since.1 {
            since = now;
        }
        Ok((now.0 >= since.0 + 3).then_some(()))
    })
}

#[test]
fn window_probes_do_not_save_a_session_whose_receiver_does_not_read() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let address = ([127, 0, 0, 1], 0).into();
    let socket = lab.inside.tcp(address)?;
    set_option(&socket, libc::SOL_SOCKET, libc::SO_RCVBUF, 8192)?;
    let listener = Listener::on(socket, address)?;
    let daemon = lab.daemon(&rule())?;
    let mut pair = Pair::open(&lab.outside, &listener)?;
    fill_window(&mut pair)?;
    wait_for_probes(&pair.client)?;
    let info = tcp_info(&pair.client)?;
    // Errors: ticks, and a tail loss probe, which repeats old payload and makes the age look
    // shorter.
    let error = Duration::from_millis(30);
    let age = Duration::from_millis(info.tcpi_last_data_sent.into());
    let last = Moment::before_now(age, error);
    assert_reset_for(&daemon, &pair, &last)
}

#[test]
fn a_window_update_does_not_save_an_idle_session() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let anywhere = SocketAddr::from(([127, 0, 0, 1], 0));
    let socket = lab.inside.tcp(anywhere)?;
    // A fixed size turns off the growth of the receive buffer.
    set_option(&socket, libc::SOL_SOCKET, libc::SO_RCVBUF, 131_072)?;
    let listener = Listener::on(socket, anywhere)?;
    let daemon = lab.daemon(&rule())?;
    let mut pair = Pair::open(&lab.outside, &listener)?;
    pair.server.set_nonblocking(true)?;
    let mut written = Vec::new();
    let last = loop {
        let (last, window) = Moment::of(|| send_piece(&mut pair.client, &mut written))?;
        // Once this much is read, the window doubles, and the kernel sends a window update.
        if written.len() > 3 * window as usize {
            break last;
        }
    };
    let before = segments_sent(&pair.server)?;
    last.wait(Duration::from_secs(1));
    pair.server.read_exact(&mut written)?;
    let after = segments_sent(&pair.server)?;
    assert!(
        after.0 > before.0 && after.1 == before.1,
        "no window update was sent"
    );
    assert_reset_for(&daemon, &pair, &last)
}

/// Sends another piece, waits until all is acknowledged, and returns the receiver's window.
fn send_piece(client: &mut TcpStream, written: &mut Vec<u8>) -> Result<u32> {
    let piece = [7; 8192];
    client.write_all(&piece)?;
    written.extend_from_slice(&piece);
    eventually("all is acknowledged", patience(), || {
        let info = tcp_info(client)?;
        let all = info.tcpi_bytes_acked > written.len() as u64;
        Ok(all.then_some(info.tcpi_snd_wnd))
    })
}

/// A client sends to a namespace that cannot answer, so it retransmits.
fn retransmit(client: &Agent, server: &Agent, right: &Netns, daemon: &Daemon) -> Result<()> {
    let listener = server.listen((Veth::RIGHT, 0))?;
    let pair = Pair::open(client, &listener)?;
    right.ip(&format!("route add blackhole {}/32", Veth::LEFT))?;
    let last = pair.to_server(b"x")?;
    eventually("retransmissions", patience(), || {
        Ok((tcp_info(&pair.client)?.tcpi_total_retrans >= 3).then_some(()))
    })?;
    let record = daemon.wait_for_termination_of(&pair)?;
    record.assert_reset("idle_timeout", &last, limit());
    Ok(())
}

#[test]
fn retransmissions_do_not_save_the_session_that_sends_them() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let [left, right] = [Netns::new()?, Netns::new()?];
    Veth::between(&left, &right)?;
    let daemon = lab.daemon(&rule())?;
    retransmit(
        &lab.inside_in(&left)?,
        &lab.outside_in(&right)?,
        &right,
        &daemon,
    )
}

#[test]
fn retransmissions_do_not_save_the_session_that_receives_them() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let [left, right] = [Netns::new()?, Netns::new()?];
    Veth::between(&left, &right)?;
    let daemon = lab.daemon(&rule())?;
    retransmit(
        &lab.outside_in(&left)?,
        &lab.inside_in(&right)?,
        &right,
        &daemon,
    )
}
