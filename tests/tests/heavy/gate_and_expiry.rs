//! Kernel and daemon agree on when a session expires: for random sessions, limits and times, the
//! gate passes or drops payload on real sockets as `expiry` says. Also the packet path around it:
//! events, policies, headers.

use std::{
    collections::BTreeMap,
    io::{Read as _, Write as _},
    net::{Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, SocketAddrV6, TcpStream},
    os::fd::AsRawFd as _,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use nix::sys::socket::{MsgFlags, SockaddrIn6, sendto};
use session_enforcer::{
    datapath::{Adoption, Datapath},
    host::{cgroup::Cgroup, clock::monotonic_ns},
};
use session_enforcer_common::{
    ErrorKind, EventKind, Expiry, Limits, MatchEntry, PacketDirection, PortRange, Session, Traffic,
    expiry, flags,
};
use session_enforcer_tests::{
    Lab, Listener, Pair, Random, RawTcp, SEED, Sequence, cookie, eventually, patience,
    reset_on_close, seed, tcp_info,
};

use crate::{load, turn};

const AGENT: &str = env!("CARGO_BIN_EXE_session-enforcer-test-agent");

/// The number of payloads in the comparison.
const CASES: u64 = 20_000;

const MS: u64 = 1_000_000;
const HOUR: u64 = 3_600_000 * MS;

/// The programs, attached to a cgroup of the test without a daemon, and a listener in it.
///
/// Fields are dropped in this order: the programs are detached before the cgroup is removed.
struct Bench {
    kernel: Datapath,
    listener: Listener,
    lab: Lab,
}

impl Bench {
    fn new(address: impl Into<SocketAddr>) -> Result<Self> {
        let lab = Lab::new(AGENT)?;
        let listener = lab.inside.listen(address)?;
        let mut kernel = load(1024)?;
        kernel.attach(&Cgroup::open(lab.cgroup.path())?)?;
        Ok(Self {
            kernel,
            listener,
            lab,
        })
    }

    /// A connection whose accepted end is tracked.
    fn open(&self) -> Result<Pair> {
        let pair = Pair::open(&self.lab.outside, &self.listener)?;
        for end in [&pair.client, &pair.server] {
            reset_on_close(end)?;
        }
        Ok(pair)
    }

    /// Puts a policy with one rule for all connections into force.
    fn put(&mut self, generation: u32, limits: Limits) -> Result<()> {
        let limits = Limits {
            generation,
            ..limits
        };
        let entries = [MatchEntry::any(0)];
        Ok(self.kernel.put_policy(generation, &entries, &[limits])?)
    }

    fn session(&self, of: &TcpStream) -> Result<Session> {
        let session = self.kernel.session(cookie(of)?)?;
        session.context("the connection is not tracked")
    }

    /// Replaces a session by one with other times.
    fn replace(&mut self, cookie: u64, session: &Session) -> Result<()> {
        let before = self.kernel.session(cookie)?.context("no session")?;
        self.kernel.remove(cookie, before.established_ns)?;
        let adopted = self.kernel.adopt(cookie, session)?;
        ensure!(adopted == Adoption::Inserted, "{adopted:?}");
        Ok(())
    }

    fn dropped(&self, way: PacketDirection) -> Result<u64> {
        Ok(self.kernel.gate_drops()?[way as usize])
    }
}

/// A limit for a time stamp of this age: none, one that ends just before or after now, or an
/// arbitrary one.
fn random_limit(random: &mut Random, age: u64) -> u64 {
    match random.below(8) {
        0 | 1 => 0,
        2 => 1 + random.below(HOUR),
        // Ends just before or after now.
        3 | 4 => age.saturating_sub(10 * MS).max(1) + random.below(20 * MS),
        5 => age.saturating_sub(random.below(HOUR)).max(1),
        _ => age + random.below(HOUR),
    }
}

/// Random limits and times. About half of the sessions are past the deadline, and some just reach
/// it.
fn random_case(random: &mut Random, session: Session, now: u64) -> (Session, Limits) {
    let ago = |random: &mut Random| now.saturating_sub(random.below(HOUR));
    let mut times = [0; 4].map(|_| ago(random));
    times.sort_unstable();
    let [established, a, b, answered] = times;
    let half_closed_ns = random.one_of(&[Session::NOT_HALF_CLOSED, a, b, answered]);
    let (received, sent) = if random.once_in(2) { (a, b) } else { (b, a) };
    let session = Session {
        established_ns: established,
        last_received_ns: received,
        last_sent_ns: sent,
        answered_ns: random.one_of(&[0, 0, answered, established]),
        half_closed_ns,
        ..session
    };
    let limit = |random: &mut Random, since: u64| random_limit(random, now - since);
    let max_lifetime_ns = limit(random, established);
    let limits = Limits {
        idle_timeout_ns: limit(random, received.max(sent)),
        max_lifetime_ns,
        lifetime_jitter_ns: max_lifetime_ns / 100 * random.one_of(&[0, 0, 10, 90]),
        response_timeout_ns: limit(random, received),
        half_closed_timeout_ns: limit(random, half_closed_ns.min(now)),
        generation: 0,
        min_payload: random.below(20) as u16,
        min_answer: random.below(20) as u32,
        max_sessions: 0,
        activity: random.below(4) as u8,
        gate: u8::from(!random.once_in(5)),
        jitter_key: 0,
    };
    (session, limits)
}

/// Sends a payload. Returns whether it arrived; otherwise the gate has dropped it.
fn passes(bench: &Bench, from: &TcpStream, to: &TcpStream, way: PacketDirection) -> Result<bool> {
    let before = bench.dropped(way)?;
    let (mut from, mut to) = (from, to);
    from.write_all(b"payload")?;
    to.set_nonblocking(true)?;
    let start = Instant::now();
    loop {
        if to.read(&mut [0; 16]).is_ok_and(|read| read > 0) {
            return Ok(true);
        }
        if bench.dropped(way)? > before {
            return Ok(false);
        }
        ensure!(start.elapsed() < patience(), "neither arrived nor dropped");
        thread::yield_now();
    }
}

#[test]
fn the_gate_agrees_with_expiry_at_random_times() -> Result<()> {
    let _turn = turn(module_path!());
    let seed = seed()?;
    let mut bench = Bench::new((Ipv4Addr::LOCALHOST, 0))?;
    bench.put(1, Limits::default())?;
    let mut outcomes = BTreeMap::<_, u32>::new();
    for case in 0..CASES {
        let mut random = Random::of(seed, case);
        let generation = case as u32 + 2;
        let pair = bench.open()?;
        let cookie = cookie(&pair.server)?;
        let own = bench.session(&pair.server)?;
        let (session, limits) = random_case(&mut random, own, monotonic_ns());
        // The session has the current policy, or an older one, so that the packet matches it again.
        let session = Session {
            generation: if random.once_in(2) {
                generation
            } else {
                own.generation
            },
            ..session
        };
        bench.put(generation, limits)?;
        bench.replace(cookie, &session)?;
        let (from, to, way) = if random.once_in(2) {
            (&pair.client, &pair.server, PacketDirection::Ingress)
        } else {
            (&pair.server, &pair.client, PacketDirection::Egress)
        };
        let shut = |now| {
            limits.gate == 1 && matches!(expiry(&session, &limits, now), Expiry::Expired { .. })
        };
        let before = shut(monotonic_ns());
        let passed = passes(&bench, from, to, way)?;
        let after = shut(monotonic_ns());
        let told = || format!("{SEED}={seed}, case {case}, {way:?}, {session:#?}, {limits:#?}");
        // If the deadline passed during the test, both results are correct.
        ensure!(
            before != after || passed != before,
            "kernel and host differ: {}",
            told()
        );
        let left = bench.session(&pair.server)?;
        if !passed {
            let stamps = |s: &Session| {
                let bytes = (s.bytes_received, s.bytes_sent);
                (s.last_received_ns, s.last_sent_ns, s.answered_ns, bytes)
            };
            ensure!(stamps(&left) == stamps(&session), "revived: {}", told());
        }
        let kind = if limits.gate == 0 {
            "no gate"
        } else if before != after {
            "meanwhile"
        } else {
            ""
        };
        *outcomes.entry((way.name(), kind, passed)).or_default() += 1;
    }
    println!("{outcomes:?}");
    for way in PacketDirection::ALL {
        for passed in [true, false] {
            let count = outcomes.get(&(way.name(), "", passed)).copied();
            assert!(count.unwrap_or(0) > CASES as u32 / 20, "{outcomes:?}");
        }
    }
    Ok(())
}

/// Limits with this idle timeout.
fn idle_for(limit: Duration) -> Limits {
    Limits {
        idle_timeout_ns: limit.as_nanos() as u64,
        min_payload: 1,
        gate: 1,
        ..Limits::default()
    }
}

const SHORT: Duration = Duration::from_millis(50);
const LONG: Duration = Duration::from_secs(3600);

/// Waits until the session is certainly idle under the short limit.
fn wait_for_deadline() {
    thread::sleep(SHORT + Duration::from_millis(30));
}

#[test]
fn many_late_packets_cause_one_event_for_each_expiry() -> Result<()> {
    let _turn = turn(module_path!());
    const STORM: u64 = 2_000;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()?;
    let _entered = runtime.enter();
    let mut bench = Bench::new((Ipv4Addr::LOCALHOST, 0))?;
    let mut events = bench.kernel.take_events()?;
    let mut expired = |of: u64| -> Result<usize> {
        let mut count = 0;
        while let Some(event) = events.read() {
            let (kind, event) = event?;
            count += usize::from(kind == EventKind::Expired && event.cookie == of);
        }
        Ok(count)
    };
    bench.put(1, idle_for(SHORT))?;
    let pair = bench.open()?;
    let cookie = cookie(&pair.server)?;
    let raw = RawTcp::new(&bench.lab.outside)?;
    for round in 0..2 {
        wait_for_deadline();
        // New payload, duplicate payload, and a keepalive with an old byte. The gate drops all of
        // them.
        let at = Sequence::of(&pair.client)?;
        let before = bench.dropped(PacketDirection::Ingress)?;
        for number in 0..STORM {
            let back = [0, 3, 1][number as usize % 3];
            let payload = [b'x'; 3];
            let length = if back == 1 { 1 } else { 3 };
            let at = Sequence {
                to_send: at.to_send.wrapping_sub(back),
                ..at
            };
            raw.send(&pair.client, at, &payload[..length])?;
        }
        eventually("the drop of all packets", patience(), || {
            let dropped = bench.dropped(PacketDirection::Ingress)? - before;
            Ok((dropped == STORM).then_some(()))
        })?;
        assert_eq!(expired(cookie)?, 1);
        assert_ne!(
            bench.session(&pair.server)?.flags & flags::EXPIRY_REPORTED,
            0
        );
        // A policy with a longer limit opens the gate, and the next expiry is reported again.
        bench.put(2 + 2 * round, idle_for(LONG))?;
        pair.round_trip()?;
        assert_eq!(bench.session(&pair.server)?.flags, 0);
        bench.put(3 + 2 * round, idle_for(SHORT))?;
    }
    assert_eq!(expired(cookie)?, 0);
    assert_eq!(bench.kernel.error_count(ErrorKind::EventLost)?, 0);
    Ok(())
}

/// A peer can send any number of FINs that the stack refuses, because data before them is missing.
#[test]
fn many_fins_cause_one_event_until_the_daemon_has_looked() -> Result<()> {
    let _turn = turn(module_path!());
    const STORM: usize = 2_000;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()?;
    let _entered = runtime.enter();
    let mut bench = Bench::new((Ipv4Addr::LOCALHOST, 0))?;
    let mut events = bench.kernel.take_events()?;
    bench.put(1, idle_for(LONG))?;
    let pair = bench.open()?;
    let cookie = cookie(&pair.server)?;
    let raw = RawTcp::new(&bench.lab.outside)?;
    let adopted = |session: Session| Session {
        flags: flags::END_UNREPORTED,
        ..session
    };
    bench.replace(cookie, &adopted(bench.session(&pair.server)?))?;
    let at = Sequence::of(&pair.client)?;
    let beyond_a_gap = Sequence {
        to_send: at.to_send.wrapping_add(100_000),
        ..at
    };
    for _ in 0..2 {
        for _ in 0..STORM {
            raw.send_fin(&pair.client, beyond_a_gap)?;
        }
        // Loopback delivers a packet before the send returns, except to a busy socket.
        pair.round_trip()?;
        let mut reports = 0;
        while let Some(event) = events.read() {
            let (kind, event) = event?;
            reports += usize::from(kind == EventKind::MayEnd && event.cookie == cookie);
        }
        assert_eq!(reports, 1);
        let session = bench.session(&pair.server)?;
        assert_ne!(session.flags & flags::END_REPORTED, 0);
        ensure!(bench.kernel.update(cookie, &adopted(session))?);
    }
    assert_eq!(bench.kernel.error_count(ErrorKind::EventLost)?, 0);
    Ok(())
}

#[test]
fn a_session_that_no_rule_matches_any_more_has_no_gate() -> Result<()> {
    let _turn = turn(module_path!());
    let mut bench = Bench::new((Ipv4Addr::LOCALHOST, 0))?;
    bench.put(1, idle_for(SHORT))?;
    let pair = bench.open()?;
    wait_for_deadline();
    let nothing = MatchEntry {
        local_ports: PortRange { first: 1, last: 0 },
        ..MatchEntry::any(0)
    };
    let limits = Limits {
        generation: 2,
        ..idle_for(SHORT)
    };
    bench.kernel.put_policy(2, &[nothing], &[limits])?;
    pair.round_trip()?;
    assert_eq!(bench.kernel.gate_drops()?, [0, 0]);
    Ok(())
}

/// The number of payload bytes that a socket has received.
fn bytes_at(to: &TcpStream) -> Result<u64> {
    Ok(tcp_info(to)?.tcpi_bytes_received)
}

#[test]
fn only_the_daemon_opens_a_gate_that_it_has_shut() -> Result<()> {
    let _turn = turn(module_path!());
    let mut bench = Bench::new((Ipv4Addr::LOCALHOST, 0))?;
    bench.put(1, idle_for(LONG))?;
    let pair = bench.open()?;
    pair.round_trip()?;
    let before = bench.session(&pair.server)?;
    let named = (cookie(&pair.server)?, before.established_ns);
    // With another time of establishment the request names another session, so nothing is shut.
    assert_eq!(bench.kernel.shut(&[(named.0, named.1 + 1)])?, [None]);
    assert_eq!(bench.session(&pair.server)?, before);
    let shut = bench.kernel.shut(&[named])?;
    let expected = Session {
        open_until_ns: Session::SHUT,
        ..before
    };
    assert_eq!(shut, [Some(expected)]);
    // Nothing passes, even within the limits and under another policy.
    for generation in [1, 2] {
        bench.put(generation, idle_for(LONG))?;
        for (from, to, way) in [
            (&pair.client, &pair.server, PacketDirection::Ingress),
            (&pair.server, &pair.client, PacketDirection::Egress),
        ] {
            let (dropped, arrived) = (bench.dropped(way)?, bytes_at(to)?);
            let mut from = from;
            from.write_all(b"x")?;
            eventually("the drop of the payload", patience(), || {
                Ok((bench.dropped(way)? > dropped).then_some(()))
            })?;
            assert_eq!(bytes_at(to)?, arrived);
        }
        let now = bench.session(&pair.server)?;
        assert!(now.is_shut() && now.generation == generation, "{now:#?}");
    }
    bench.kernel.reopen(named.0, named.1)?;
    // The stack retransmits the dropped payload.
    eventually("the retransmitted payload", patience(), || {
        let arrived = [bytes_at(&pair.client)?, bytes_at(&pair.server)?];
        Ok((arrived == [b"pongxx".len() as u64; 2]).then_some(()))
    })?;
    assert!(!bench.session(&pair.server)?.is_shut());
    Ok(())
}

#[test]
fn an_observing_rule_shuts_no_gate() -> Result<()> {
    let _turn = turn(module_path!());
    let mut bench = Bench::new((Ipv4Addr::LOCALHOST, 0))?;
    let observes = Limits {
        gate: 0,
        ..idle_for(LONG)
    };
    bench.put(1, observes)?;
    let pair = bench.open()?;
    let named = (
        cookie(&pair.server)?,
        bench.session(&pair.server)?.established_ns,
    );
    bench.kernel.shut(&[named])?;
    pair.round_trip()?;
    assert_eq!(bench.kernel.gate_drops()?, [0, 0]);
    Ok(())
}

/// One end sends while the gate is being shut. All payload that arrives must be in the record that
/// was read after the shutting.
#[test]
fn payload_that_passes_while_the_gate_is_shut_is_in_the_record() -> Result<()> {
    let _turn = turn(module_path!());
    const ROUNDS: u64 = 1_000;
    let seed = seed()?;
    let mut bench = Bench::new((Ipv4Addr::LOCALHOST, 0))?;
    bench.put(1, idle_for(LONG))?;
    let mut shut_out = 0;
    for round in 0..ROUNDS {
        let mut random = Random::of(seed, round);
        let pair = bench.open()?;
        let named = (
            cookie(&pair.server)?,
            bench.session(&pair.server)?.established_ns,
        );
        let (mut from, to, way) = if random.once_in(2) {
            (&pair.client, &pair.server, PacketDirection::Ingress)
        } else {
            (&pair.server, &pair.client, PacketDirection::Egress)
        };
        from.set_nodelay(true)?;
        let dropped = bench.dropped(way)?;
        let pause = Duration::from_micros(random.below(100));
        let [sends, ended] = [false; 2].map(AtomicBool::new);
        let record = thread::scope(|scope| {
            scope.spawn(|| {
                while !ended.load(Ordering::Relaxed) && from.write_all(b"x").is_ok() {
                    sends.store(true, Ordering::Relaxed);
                }
            });
            while !sends.load(Ordering::Relaxed) {
                thread::yield_now();
            }
            spin(pause);
            let record = bench.kernel.shut(&[named]);
            spin(Duration::from_micros(50));
            ended.store(true, Ordering::Relaxed);
            record
        });
        let record = record?[0].context("the session")?;
        let arrived = bytes_at(to)?;
        let is_known = match way {
            PacketDirection::Ingress => {
                arrived <= record.bytes_received || record.awaits_received()
            }
            PacketDirection::Egress => arrived <= record.bytes_sent,
        };
        ensure!(
            is_known,
            "{arrived} bytes arrived, {SEED}={seed}, round {round}, {way:?}, {record:#?}"
        );
        shut_out += u64::from(bench.dropped(way)? > dropped);
    }
    assert!(shut_out > ROUNDS / 20, "{shut_out}");
    Ok(())
}

/// Waits without giving up the processor.
fn spin(time: Duration) {
    let start = Instant::now();
    while start.elapsed() < time {
        std::hint::spin_loop();
    }
}

/// Sends a TCP segment behind more IPv6 extension headers than the programs parse.
fn send_behind_headers(bench: &Bench, pair: &Pair, payload: &[u8]) -> Result<()> {
    const HEADERS: usize = 9;
    const DESTINATION: u8 = 60;
    let at = Sequence::of(&pair.client)?;
    let address = Ipv6Addr::LOCALHOST.octets();
    let mut segment = Vec::new();
    segment.extend(pair.client_address.port().to_be_bytes());
    segment.extend(pair.server_address.port().to_be_bytes());
    segment.extend(at.to_send.to_be_bytes());
    segment.extend(at.to_receive.to_be_bytes());
    segment.extend([0x50, 0x10, 0x20, 0x00, 0, 0, 0, 0]);
    segment.extend(payload);
    let length = segment.len() as u32;
    let pseudo = [
        &address[..],
        &address,
        &length.to_be_bytes(),
        &[0, 0, 0, 6],
        &segment,
    ]
    .concat();
    let words = pseudo
        .chunks(2)
        .map(|w| u32::from(w[0]) << 8 | u32::from(*w.get(1).unwrap_or(&0)));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    segment[16..18].copy_from_slice(&(!(sum as u16)).to_be_bytes());
    let mut packet = vec![0x60, 0, 0, 0];
    packet.extend(((HEADERS * 8 + segment.len()) as u16).to_be_bytes());
    packet.extend([DESTINATION, 64]);
    packet.extend(address);
    packet.extend(address);
    for number in 1..=HEADERS {
        let next = if number == HEADERS { 6 } else { DESTINATION };
        packet.extend([next, 0, 1, 4, 0, 0, 0, 0]);
    }
    packet.extend(segment);
    let raw = bench
        .lab
        .outside
        .socket(libc::AF_INET6, libc::SOCK_RAW, libc::IPPROTO_RAW)?;
    let to = SockaddrIn6::from(SocketAddrV6::new(Ipv6Addr::LOCALHOST, 0, 0, 0));
    sendto(raw.as_raw_fd(), &packet, &to, MsgFlags::empty())?;
    Ok(())
}

#[test]
fn payload_behind_unparsed_headers_is_gated() -> Result<()> {
    let _turn = turn(module_path!());
    let mut bench = Bench::new((Ipv6Addr::LOCALHOST, 0))?;
    bench.put(1, idle_for(LONG))?;
    let mut pair = bench.open()?;
    let unreadable = |bench: &Bench| bench.kernel.error_count(ErrorKind::HeaderUnreadable);
    // Before the deadline it passes.
    send_behind_headers(&bench, &pair, b"new")?;
    let mut received = [0; 3];
    pair.server.read_exact(&mut received)?;
    assert_eq!(&received, b"new");
    assert_eq!(unreadable(&bench)?, 1);
    // The client's stack did not send this payload. It only answers the acknowledgement.
    bench.put(2, idle_for(SHORT))?;
    wait_for_deadline();
    let before = tcp_info(&pair.server)?.tcpi_bytes_received;
    send_behind_headers(&bench, &pair, b"newlate")?;
    eventually("the drop of the payload", patience(), || {
        Ok((bench.dropped(PacketDirection::Ingress)? == 1).then_some(()))
    })?;
    assert_eq!(unreadable(&bench)?, 2);
    assert_eq!(tcp_info(&pair.server)?.tcpi_bytes_received, before);
    Ok(())
}

#[test]
fn a_fin_is_no_payload_behind_unparsed_headers() -> Result<()> {
    let _turn = turn(module_path!());
    let mut bench = Bench::new((Ipv6Addr::LOCALHOST, 0))?;
    bench.put(1, idle_for(LONG))?;
    let ends: [fn(&Pair) -> &TcpStream; 2] = [|pair| &pair.server, |pair| &pair.client];
    for (number, end) in ends.into_iter().enumerate() {
        let pair = bench.open()?;
        let before = bench.session(&pair.server)?;
        end(&pair).shutdown(Shutdown::Write)?;
        let seen = bench.kernel.error_count(ErrorKind::HeaderUnreadable)?;
        send_behind_headers(&bench, &pair, b"")?;
        eventually("the packet in the programs", patience(), || {
            let now = bench.kernel.error_count(ErrorKind::HeaderUnreadable)?;
            Ok((now > seen).then_some(()))
        })?;
        let after = bench.session(&pair.server)?;
        assert!(after.half_closed_ns >= before.established_ns);
        assert_eq!(before.half_closed_ns, Session::NOT_HALF_CLOSED);
        // A FIN does not count as payload.
        let payload = |session: &Session| Traffic {
            received_candidate_ns: 0,
            flags: 0,
            half_closed_ns: 0,
            ..session.traffic()
        };
        assert_eq!(payload(&after), payload(&before), "end {number}");
    }
    Ok(())
}
