//! Connections that one socket takes over from another without a word to the peer (`TCP_REPAIR`), as CRIU does it,
//! and as root of a container may to have its clock start anew.

use std::{
    net::{Ipv4Addr, SocketAddr, TcpStream},
    os::fd::OwnedFd,
    time::Duration,
};

use anyhow::Result;
use nix::errno::Errno;
use session_enforcer_tests::{
    Agent, Daemon, End, Lab, Netns, Pair, dial, ends_of, option, set_bytes_option, set_option,
    tcp_info, unhurried,
};

const AGENT: &str = env!("CARGO_BIN_EXE_session-enforcer-test-agent");
const TCP: i32 = libc::IPPROTO_TCP;

// Of linux/tcp.h.
const OFF_NO_PROBE: i32 = -1;
const QUEUES: [i32; 2] = [1, 2];
const MSS: u32 = 2;
const WINDOW_SCALE: u32 = 3;
const SACK: u32 = 4;
const TIMESTAMPS: u32 = 8;

/// What another socket needs to go on with a connection.
struct Saved {
    local: SocketAddr,
    peer: SocketAddr,
    sequences: [i32; 2],
    timestamp: i32,
    mss: i32,
    scales: u32,
}

/// Closes a socket of which the peer is to notice nothing.
fn save(socket: TcpStream) -> Result<Saved> {
    set_option(&socket, TCP, libc::TCP_REPAIR, 1)?;
    let sequence = |queue| {
        set_option(&socket, TCP, libc::TCP_REPAIR_QUEUE, queue)?;
        option(&socket, TCP, libc::TCP_QUEUE_SEQ)
    };
    // `tcpi_snd_wscale` and `tcpi_rcv_wscale`, four bits each.
    let scales = tcp_info(&socket)?.tcpi_snd_rcv_wscale;
    let saved = Saved {
        local: socket.local_addr()?,
        peer: socket.peer_addr()?,
        sequences: [sequence(QUEUES[0])?, sequence(QUEUES[1])?],
        timestamp: option(&socket, TCP, libc::TCP_TIMESTAMP)?,
        mss: option(&socket, TCP, libc::TCP_MAXSEG)?,
        scales: u32::from(scales & 15) | u32::from(scales >> 4) << 16,
    };
    drop(socket);
    Ok(saved)
}

/// Goes on with a connection by a socket of this agent.
fn restore(agent: &Agent, saved: &Saved) -> Result<TcpStream> {
    let socket: OwnedFd = agent.tcp(saved.local)?;
    set_option(&socket, TCP, libc::TCP_REPAIR, 1)?;
    bind(&socket, saved.local)?;
    for (queue, sequence) in QUEUES.into_iter().zip(saved.sequences) {
        set_option(&socket, TCP, libc::TCP_REPAIR_QUEUE, queue)?;
        set_option(&socket, TCP, libc::TCP_QUEUE_SEQ, sequence)?;
    }
    let restored = dial(socket, saved.peer)?;
    let options = [
        (MSS, saved.mss.cast_unsigned()),
        (WINDOW_SCALE, saved.scales),
        (SACK, 0),
        (TIMESTAMPS, 0),
    ];
    let bytes = options.map(|(name, value)| [name.to_ne_bytes(), value.to_ne_bytes()].concat());
    set_bytes_option(&restored, TCP, libc::TCP_REPAIR_OPTIONS, &bytes.concat())?;
    set_option(&restored, TCP, libc::TCP_TIMESTAMP, saved.timestamp)?;
    set_option(&restored, TCP, libc::TCP_REPAIR_QUEUE, 0)?;
    set_option(&restored, TCP, libc::TCP_REPAIR, OFF_NO_PROBE)?;
    Ok(restored)
}

fn bind(socket: &OwnedFd, to: SocketAddr) -> Result<()> {
    use nix::sys::socket::{SockaddrStorage, bind};
    use std::os::fd::AsRawFd as _;
    bind(socket.as_raw_fd(), &SockaddrStorage::from(to))?;
    Ok(())
}

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
        client = restore(&lab.inside, &save(client)?)?;
    }
    let record = daemon.wait_for_termination()?;
    record.assert_reset("max_lifetime", &opened, limit());
    assert_eq!(record.text("network.direction"), "outbound");
    assert_both_reset(&client, &server)
}

#[test]
fn an_accepted_connection_that_is_restored_is_still_accepted_and_as_idle_as_it_was() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let daemon = lab.daemon(&rule("inbound", &seconds("idle_timeout", limit())))?;
    let pair = Pair::open(&lab.outside, &listener)?;
    let last = pair.round_trip()?;
    last.wait(limit() / 2);
    let Pair { client, server, .. } = pair;
    let server = restore(&lab.inside, &save(server)?)?;
    let record = daemon.wait_for_termination()?;
    record.assert_reset("idle_timeout", &last, limit());
    assert_eq!(record.text("network.direction"), "inbound");
    assert_both_reset(&client, &server)
}

/// Whoever has it forgotten gains nothing.
#[test]
fn a_restored_connection_that_nobody_remembers_is_past_its_limits() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let Pair { client, server, .. } = Pair::open(&lab.outside, &listener)?;
    let saved = save(server)?;
    let hour = seconds("idle_timeout", Duration::from_secs(3_600));
    let daemon = lab.daemon(&(rule("inbound", &hour) + &rule("outbound", &hour)))?;
    // It is late when it is there, and not restored to the end then.
    daemon.freeze()?;
    let server = restore(&lab.inside, &saved)?;
    daemon.thaw()?;
    let record = daemon.wait_for_termination()?;
    assert_eq!(record.text("session_enforcer.result"), "reset");
    assert_both_reset(&client, &server)
}

fn assert_both_reset(client: &TcpStream, server: &TcpStream) -> Result<()> {
    let ends: Vec<End> = ends_of(&[client, server])?;
    let mut errors: Vec<_> = ends.iter().filter_map(|end| end.error).collect();
    errors.sort_by_key(|error| *error as i32);
    assert_eq!(errors, [Errno::ECONNABORTED, Errno::ECONNRESET]);
    Ok(())
}

/// A socket that closes without a word for another reason leaves nothing to a new connection.
#[test]
fn a_new_connection_of_the_same_ports_has_clocks_of_its_own() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    // In which nobody else takes the port.
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
    bind(&socket, from)?;
    let second = Pair::dial(socket, &listener, listener.address)?;
    let record = daemon.wait_for_termination_of(&second)?;
    record.assert_reset("max_lifetime", &second.opened, limit());
    Ok(())
}
