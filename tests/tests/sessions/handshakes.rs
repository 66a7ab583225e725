//! Connections that are established in unusual ways are tracked like all others.

use std::{
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr},
    os::fd::AsRawFd as _,
    thread,
    time::Duration,
};

use anyhow::Result;
use nix::{
    errno::Errno,
    sys::socket::{MsgFlags, SockaddrStorage, sendto},
};
use session_enforcer_tests::{
    Agent, Lab, Listener, Moment, Netns, Pair, Saved, bind_to_device, dial, ends_of, eventually,
    idle_rule, longer_than_a_start, patience, set_bytes_option, set_option, tcp_info,
};

const AGENT: &str = env!("CARGO_BIN_EXE_session-enforcer-test-agent");
const LIMIT: Duration = Duration::from_secs(2);
const RULE: &str = "[[rule]]\nname = \"idle\"\nidle_timeout = \"2s\"\n";

/// `TCPI_OPT_SYN_DATA` of `linux/tcp.h`.
const SYN_DATA: u8 = 32;

/// `TCP_SYN_RECV` of `net/tcp_states.h`.
const SYN_RECV: u8 = 3;

fn listen_with(agent: &Agent, option: i32, value: i32) -> Result<Listener> {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let socket = agent.tcp(address)?;
    set_option(&socket, libc::IPPROTO_TCP, option, value)?;
    Listener::on(socket, address)
}

/// A namespace with TCP Fast Open at both ends, and agents in it, inside and outside the watched cgroup.
fn fast_open(lab: &Lab) -> Result<(Netns, Agent, Agent)> {
    let netns = Netns::new()?;
    netns.set_parameter("ipv4/tcp_fastopen", "3")?;
    let (inside, outside) = (lab.inside_in(&netns)?, lab.outside_in(&netns)?);
    Ok((netns, inside, outside))
}

#[test]
fn payload_that_completes_a_deferred_accept_is_counted() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = listen_with(&lab.inside, libc::TCP_DEFER_ACCEPT, 5)?;
    let daemon = lab.daemon(RULE)?;
    let mut client = dial(lab.outside.tcp(listener.address)?, listener.address)?;
    // The kernel creates the server's socket when the first payload arrives.
    thread::sleep(Duration::from_millis(500));
    let (last, mut server) = Moment::of(|| {
        client.write_all(b"hello")?;
        listener.accept()
    })?;
    server.read_exact(&mut [0; 5])?;
    let record = daemon.wait_for_termination()?;
    record.assert_reset("idle_timeout", &last, LIMIT);
    assert_eq!(record.bytes(), [5, 0]);
    Ok(())
}

#[test]
fn payload_in_the_packet_that_opens_the_connection_is_counted() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let (_netns, inside, outside) = fast_open(&lab)?;
    let listener = listen_with(&inside, libc::TCP_FASTOPEN, 16)?;
    let daemon = lab.daemon(RULE)?;
    // The first connection obtains the Fast Open cookie, with which the second sends payload in its
    // SYN.
    let first = dial_with(&outside, &listener, b"first")?;
    let second = dial_with(&outside, &listener, b"second")?;
    assert_ne!(
        tcp_info(&second.server)?.tcpi_options & SYN_DATA,
        0,
        "the SYN had no payload"
    );
    for (pair, bytes) in [(&first, 5), (&second, 6)] {
        pair.ends()?[0].assert_reset(Errno::ECONNRESET, &pair.opened, LIMIT);
        let record = daemon.wait_for_termination_of(pair)?;
        record.assert_reset("idle_timeout", &pair.opened, LIMIT);
        assert_eq!(record.bytes(), [bytes, 0]);
    }
    Ok(())
}

/// The payload arrives before the connection is established or together with it, so no hook sees
/// it.
#[test]
fn a_request_in_the_handshake_is_owed_an_answer() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let (_netns, inside, outside) = fast_open(&lab)?;
    let listener = listen_with(&inside, libc::TCP_FASTOPEN, 16)?;
    let deferred = listen_with(&inside, libc::TCP_DEFER_ACCEPT, 5)?;
    let daemon = lab.daemon(
        "[[rule]]\nname = \"r\"\ndirection = \"inbound\"\nidle_timeout = \"1s\"\n\
         response_timeout = \"3s\"\n",
    )?;
    let pairs = [
        // The payload comes with the ACK of the handshake, with the SYN, and to a listener that waits
        // for payload before it creates a socket.
        dial_with(&outside, &listener, b"first")?,
        dial_with(&outside, &listener, b"second")?,
        dial_with(&outside, &deferred, b"third")?,
    ];
    for (pair, bytes) in pairs.iter().zip([5, 6, 5]) {
        let record = daemon.wait_for_termination_of(pair)?;
        record.assert_reset("response_timeout", &pair.opened, Duration::from_secs(3));
        assert_eq!(record.bytes(), [bytes, 0]);
    }
    Ok(())
}

/// With TCP Fast Open a socket is a session before the client has confirmed its SYN.
#[test]
fn a_session_in_an_incomplete_handshake_is_reset_under_its_new_name() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let (_netns, inside, outside) = fast_open(&lab)?;
    let listener = listen_with(&inside, libc::TCP_FASTOPEN, 16)?;
    let daemon = lab.daemon(RULE)?;
    drop(dial_with(&outside, &listener, b"first")?);
    // Accepted sockets take over the filter, which drops what completes the handshake.
    accept_only_syn(&listener)?;
    let pair = dial_with(&outside, &listener, b"second")?;
    assert_eq!(tcp_info(&pair.server)?.tcpi_state, SYN_RECV);
    bind_to_device(&pair.server, "lo")?;
    let record = daemon.wait_for_termination_of(&pair)?;
    record.assert_reset("idle_timeout", &pair.opened, LIMIT);
    let repaired = "session_enforcer_reconcile_repaired_total";
    assert_eq!(daemon.metric(repaired, &[("kind", "stale")])?, 0.0);
    Ok(())
}

/// Attaches a socket filter that drops segments without the SYN flag.
fn accept_only_syn(listener: &Listener) -> Result<()> {
    let code = |operation: u32| operation as u16;
    let instruction = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    let load_byte = code(libc::BPF_LD | libc::BPF_B | libc::BPF_ABS);
    let if_any_of = code(libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K);
    let keep = code(libc::BPF_RET | libc::BPF_K);
    let mut program = [
        // Byte 13 of the TCP header has the flags; 2 is SYN.
        instruction(load_byte, 0, 0, 13),
        instruction(if_any_of, 0, 1, 2),
        instruction(keep, 0, 0, u32::MAX),
        instruction(keep, 0, 0, 0),
    ];
    let program = libc::sock_fprog {
        len: program.len() as u16,
        filter: program.as_mut_ptr(),
    };
    // SAFETY: the structure is as long as the slice, and its pointer stays valid during the call.
    let bytes = unsafe {
        std::slice::from_raw_parts((&raw const program).cast::<u8>(), size_of_val(&program))
    };
    set_bytes_option(listener, libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, bytes)
}

/// Connects and sends in one call (TCP Fast Open), so payload and establishment have one time.
fn dial_with(client: &Agent, listener: &Listener, payload: &[u8]) -> Result<Pair> {
    let socket = client.tcp(listener.address)?;
    let to = SockaddrStorage::from(listener.address);
    let flags = MsgFlags::from_bits_retain(libc::MSG_FASTOPEN);
    let (opened, server) = Moment::of(|| {
        sendto(socket.as_raw_fd(), payload, &to, flags)?;
        let mut server = listener.accept()?;
        server.read_exact(&mut vec![0; payload.len()])?;
        Ok(server)
    })?;
    Pair::of(socket.into(), server, opened)
}

/// The kernel reports an active establishment for a restored socket. Adopted or new, it must not
/// count as dialled.
#[test]
fn a_restored_connection_does_not_count_as_dialled() -> Result<()> {
    let limit = longer_than_a_start();
    let lab = Lab::new(AGENT)?;
    let rule = idle_rule(limit).replace("idle_timeout", "direction = \"inbound\"\nidle_timeout");
    let restored = || {
        let listener = lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?;
        let pair = Pair::open(&lab.outside, &listener)?;
        pair.round_trip()?;
        drop(listener);
        // While the connection has no socket, the kernel would answer every packet with a RST.
        set_option(&pair.client, libc::IPPROTO_TCP, libc::TCP_QUICKACK, 1)?;
        eventually("nothing is on its way", patience(), || {
            Ok((tcp_info(&pair.server)?.tcpi_unacked == 0).then_some(()))
        })?;
        let server = Saved::of(pair.server)?.restore(&lab.inside)?;
        Pair::of(pair.client, server, pair.opened)
    };
    let older = restored()?;
    older.to_client(b"back")?;
    let daemon = lab.daemon(&rule)?;
    let last = older.to_client(b"here")?;
    let newer = restored()?;
    let newer_last = newer.to_client(b"here")?;
    for (pair, sent, last) in [(older, 8.0, last), (newer, 4.0, newer_last)] {
        pair.ends()?[0].assert_reset(Errno::ECONNRESET, &last, limit);
        let record = daemon.wait_for_termination_of(&pair)?;
        record.assert_reset("idle_timeout", &last, limit);
        assert_eq!(record.text("network.direction"), "inbound");
        assert_eq!(record.number("destination.bytes"), sent);
    }
    Ok(())
}

#[test]
fn sessions_that_a_syn_cookie_made_are_enforced() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let netns = Netns::new()?;
    // SYN cookies for every connection, even without a SYN flood.
    netns.set_parameter("ipv4/tcp_syncookies", "2")?;
    let [inside, outside] = [lab.inside_in(&netns)?, lab.outside_in(&netns)?];
    let listener = inside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let daemon = lab.daemon(RULE)?;
    let pair = Pair::open(&outside, &listener)?;
    let last = pair.round_trip()?;
    pair.ends()?[0].assert_reset(Errno::ECONNRESET, &last, LIMIT);
    let record = daemon.wait_for_termination_of(&pair)?;
    record.assert_reset("idle_timeout", &last, LIMIT);
    assert_eq!(record.bytes(), [4, 4]);
    Ok(())
}

#[test]
fn a_connection_that_nobody_accepts_is_reset_when_idle() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let daemon = lab.daemon(RULE)?;
    let (opened, client) =
        Moment::of(|| dial(lab.outside.tcp(listener.address)?, listener.address))?;
    ends_of(&[&client])?[0].assert_reset(Errno::ECONNRESET, &opened, LIMIT);
    daemon
        .wait_for_termination()?
        .assert_reset("idle_timeout", &opened, LIMIT);
    // The listener still works. accept(2) returns the reset connection first.
    drop(listener.accept()?);
    Pair::open(&lab.outside, &listener)?.round_trip()?;
    Ok(())
}
