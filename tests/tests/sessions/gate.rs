//! The gate: no payload passes after a deadline, whatever the daemon does.
//!
//! The daemon is frozen before a connection is opened, so only the programs can stop the payload.

use std::{
    io::{Read as _, Write as _},
    net::{Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpStream},
    os::fd::AsFd as _,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
};
use session_enforcer_tests::{
    Call, Daemon, Fate, Lab, Listener, Moment, Netns, Pair, Random, Record, TrackedPair, Veth,
    ends_of, eventually, patience, reset_on_close, scaled, seed, tcp_info, unhurried,
};

const AGENT: &str = env!("CARGO_BIN_EXE_session-enforcer-test-agent");
const LIMIT: Duration = Duration::from_secs(1);
const RULE: &str = "[[rule]]\nname = \"idle\"\nidle_timeout = \"1s\"\n";

/// The state in `TCP_INFO` of a socket whose connection has ended (`net/tcp_states.h`).
const TCP_CLOSE: u8 = 7;

/// How long a test waits to see that nothing arrives.
const WHILE: Duration = Duration::from_secs(1);

const DROPPED: &str = "session_enforcer_gate_dropped_packets_total";

fn dropped(daemon: &Daemon) -> Result<[f64; 2]> {
    let metrics = daemon.metrics()?;
    let of = |way| metrics.get(DROPPED, &[("direction", way)]);
    Ok([of("ingress")?, of("egress")?])
}

/// Bytes of payload and segments with payload that both ends have received.
fn received(pair: &Pair) -> Result<[(u64, u32); 2]> {
    let of = |stream| {
        let info = tcp_info(stream)?;
        anyhow::Ok((info.tcpi_bytes_received, info.tcpi_data_segs_in))
    };
    Ok([of(&pair.client)?, of(&pair.server)?])
}

/// Whether one of the sockets becomes readable: payload, a FIN or an error.
fn comes(sockets: &[&TcpStream], within: Duration) -> Result<bool> {
    let mut fds: Vec<_> = sockets
        .iter()
        .map(|socket| PollFd::new(socket.as_fd(), PollFlags::POLLIN))
        .collect();
    Ok(poll(&mut fds, PollTimeout::try_from(within)?)? > 0)
}

/// Both ends send, and neither receives a byte.
fn assert_shut(pair: &Pair) -> Result<()> {
    let before = received(pair)?;
    (&pair.client).write_all(b"late")?;
    (&pair.server).write_all(b"late")?;
    assert!(!comes(&[&pair.client, &pair.server], WHILE)?);
    assert_eq!(received(pair)?, before);
    Ok(())
}

/// Thaws the daemon, which resets both ends and records the true deadline and lateness.
fn assert_reset_when_thawed(
    daemon: &Daemon,
    pair: &Pair,
    (reason, since, limit): (&str, &Moment, Duration),
) -> Result<()> {
    let late = since.elapsed().saturating_sub(limit);
    daemon.thaw()?;
    let mut errors = pair.ends()?.map(|end| end.error);
    errors.sort_by_key(|error| error.map(|error| error as i32));
    assert_eq!(errors, [Some(Errno::ECONNABORTED), Some(Errno::ECONNRESET)]);
    let record = daemon.wait_for_termination_of(pair)?;
    record.assert_reset(reason, since, limit);
    let told = record.number("session_enforcer.lateness_seconds");
    assert!(told >= late.as_secs_f64(), "{told} is less than {late:?}");
    Ok(())
}

/// Opens a connection while the daemon is frozen, and waits for its deadline.
fn open_and_pass_deadline(lab: &Lab, listener: &Listener, daemon: &Daemon) -> Result<Pair> {
    daemon.freeze()?;
    let pair = Pair::open(&lab.outside, listener)?;
    pair.opened.wait(LIMIT);
    Ok(pair)
}

/// Opens two connections to this address; the tracked end accepts the first and dials the second.
/// Asserts that the gate drops payload in both directions and counts the packets.
fn assert_gated(address: impl Into<SocketAddr>) -> Result<()> {
    let address = address.into();
    let lab = Lab::new(AGENT)?;
    let (inside, outside) = (lab.inside.listen(address)?, lab.outside.listen(address)?);
    let daemon = lab.daemon(RULE)?;
    for (client, listener) in [(&lab.outside, &inside), (&lab.inside, &outside)] {
        let before = dropped(&daemon)?;
        daemon.freeze()?;
        let pair = Pair::open(client, listener)?;
        pair.opened.wait(LIMIT);
        assert_shut(&pair)?;
        assert_reset_when_thawed(&daemon, &pair, ("idle_timeout", &pair.opened, LIMIT))?;
        let after = dropped(&daemon)?;
        assert!(after[0] > before[0] && after[1] > before[1], "{after:?}");
    }
    assert_eq!(daemon.terminations()?.len(), 2);
    Ok(())
}

#[test]
fn nothing_passes_an_idle_ipv4_session_while_the_daemon_is_frozen() -> Result<()> {
    assert_gated((Ipv4Addr::LOCALHOST, 0))
}

#[test]
fn nothing_passes_an_idle_ipv6_session_while_the_daemon_is_frozen() -> Result<()> {
    assert_gated((Ipv6Addr::LOCALHOST, 0))
}

#[test]
fn nothing_passes_an_idle_ipv4_session_of_ipv6_sockets_while_the_daemon_is_frozen() -> Result<()> {
    assert_gated((Ipv4Addr::LOCALHOST.to_ipv6_mapped(), 0))
}

/// Root of a container can set such a route at any time. If there are more headers than the
/// programs parse, payload is dropped too, and a RST passes.
#[test]
fn nothing_passes_in_an_encapsulated_packet() -> Result<()> {
    for depth in [1, 5] {
        for address in [Veth::BEYOND, Veth::BEYOND_V6] {
            let lab = Lab::new(AGENT)?;
            let [left, right] = [Netns::new()?, Netns::new()?];
            Veth::between(&left, &right)?;
            Veth::lay_on(&left, &right)?;
            let listener = lab.outside_in(&right)?.listen((address, 0))?;
            let inside = lab.inside_in(&left)?;
            let daemon = lab.daemon(RULE)?;
            daemon.freeze()?;
            let pair = Pair::open(&inside, &listener)?;
            Veth::encapsulate(&left, &right, depth)?;
            pair.opened.wait(LIMIT);
            assert_shut(&pair)?;
            assert_reset_when_thawed(&daemon, &pair, ("idle_timeout", &pair.opened, LIMIT))?;
            let unreadable = daemon.metric("session_enforcer_kernel_errors_total", &[])?;
            assert_eq!(unreadable > 0.0, depth == 5, "{unreadable}");
        }
    }
    Ok(())
}

/// Sends bytes until one does not arrive. Returns a time just before the last byte that arrived was
/// sent.
fn send_until_shut(from: &TcpStream, to: &TcpStream) -> Result<Instant> {
    let mut last = None;
    let start = Instant::now();
    while start.elapsed() < patience() {
        let about_to_send = Instant::now();
        let (mut from, mut to) = (from, to);
        from.write_all(b"x")?;
        if !comes(&[to], scaled(WHILE))? {
            return last.context("no byte arrived");
        }
        to.read_exact(&mut [0])?;
        last = Some(about_to_send);
        thread::sleep(Duration::from_millis(1));
    }
    anyhow::bail!("the gate is still open after {:?}", patience())
}

#[test]
fn a_busy_session_passes_payload_until_its_lifetime_ends_and_not_after() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let daemon = lab.daemon("[[rule]]\nname = \"old\"\nmax_lifetime = \"2s\"\n")?;
    let limit = Duration::from_secs(2);
    for to_server in [true, false] {
        daemon.freeze()?;
        let pair = Pair::open(&lab.outside, &listener)?;
        let (from, to) = match to_server {
            true => (&pair.client, &pair.server),
            false => (&pair.server, &pair.client),
        };
        let last = send_until_shut(from, to)?;
        assert!(last < pair.opened.latest.at + limit);
        assert!(Instant::now() >= pair.opened.earliest.at + limit);
        assert_shut(&pair)?;
        assert_reset_when_thawed(&daemon, &pair, ("max_lifetime", &pair.opened, limit))?;
    }
    Ok(())
}

/// A connection whose client sends a byte just before or just after each deadline.
struct Racer {
    pair: Pair,
    sent: Vec<Moment>,
    /// The deadline as the client knows it.
    due: Instant,
}

impl Racer {
    /// Sends a byte at the deadline, minus `early`, plus `after`.
    fn send(&mut self, early: Duration, after: Duration) {
        let at = self.due - early + after;
        thread::sleep(at.saturating_duration_since(Instant::now() + early));
        while Instant::now() < at {
            std::hint::spin_loop();
        }
        // Writing fails once the session has been reset.
        if let Ok((moment, ())) = Moment::of(|| Ok((&self.pair.client).write_all(b"x")?)) {
            self.due = moment.latest.at + LIMIT;
            self.sent.push(moment);
        }
    }

    /// The activity in the audit record includes the last byte that arrived.
    fn check(&self, record: &Record) -> Result<usize> {
        let arrived = tcp_info(&self.pair.server)?.tcpi_bytes_received as usize;
        let told = record.number("source.bytes");
        ensure!(arrived as f64 <= told, "{arrived} arrived, {record:?}");
        if let Some(last) = arrived.checked_sub(1).map(|last| &self.sent[last]) {
            let activity = record.time("session_enforcer.last_received");
            // The audit computes wall-clock times from two clocks, which adds a small error.
            let is_known = activity + Duration::from_millis(1) >= last.earliest.wall;
            ensure!(is_known, "{last:?} is not the last activity of {record:?}");
        }
        Ok(arrived)
    }
}

#[test]
fn a_byte_at_the_deadline_renews_the_session_or_does_not_arrive() -> Result<()> {
    const RACERS: usize = 150;
    const ROUNDS: usize = 4;
    let seed = seed()?;
    let mut random = Random::of(seed, 0);
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let daemon = lab.daemon(RULE)?;
    let mut racers = Vec::new();
    for _ in 0..RACERS {
        let pair = Pair::open(&lab.outside, &listener)?;
        let due = pair.opened.latest.at + LIMIT;
        let sent = Vec::new();
        racers.push(Racer { pair, sent, due });
        thread::sleep(Duration::from_millis(4));
    }
    let early = Duration::from_micros(300);
    for racer in (0..ROUNDS).flat_map(|_| 0..RACERS) {
        racers[racer].send(early, Duration::from_micros(random.below(450)));
    }
    let records = daemon.wait_for_terminations(RACERS)?;
    let mut arrived = 0;
    for racer in &racers {
        let (client, server) = (&racer.pair.client_address, &racer.pair.server_address);
        let ports = [client.port(), server.port()];
        let record = records.iter().find(|record| record.ports() == ports);
        arrived += racer.check(record.context("no record of a racer")?)?;
    }
    let sent: usize = racers.iter().map(|racer| racer.sent.len()).sum();
    println!("of {sent} bytes {arrived} arrived in time");
    Ok(())
}

#[test]
fn an_answer_passes_while_it_is_owed_and_not_after_its_limit() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let idle = unhurried(LIMIT);
    let limit = 5 * idle;
    let daemon = lab.daemon(&format!(
        "[[rule]]\nname = \"r\"\ndirection = \"inbound\"\nidle_timeout = \"{}s\"\n\
         response_timeout = \"{}s\"\n",
        idle.as_secs(),
        limit.as_secs(),
    ))?;
    daemon.freeze()?;
    let (timely, late) = (
        Pair::open(&lab.outside, &listener)?,
        Pair::open(&lab.outside, &listener)?,
    );
    let asked = [timely.to_server(b"query")?, late.to_server(b"query")?];
    asked[0].wait(idle + idle / 2);
    let answered = timely.to_client(b"answer")?;
    asked[1].wait(limit);
    assert_shut(&timely)?;
    assert_shut(&late)?;
    assert_reset_when_thawed(&daemon, &late, ("response_timeout", &asked[1], limit))?;
    daemon
        .wait_for_termination_of(&timely)?
        .assert_reset("idle_timeout", &answered, idle);
    Ok(())
}

#[test]
fn an_observed_session_has_no_gate() -> Result<()> {
    for config in [
        format!("[daemon]\nmode = \"observe\"\n{RULE}"),
        format!("{RULE}action = \"observe\"\n"),
    ] {
        let lab = Lab::new(AGENT)?;
        let listener = lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?;
        let daemon = lab.daemon(&config)?;
        let pair = open_and_pass_deadline(&lab, &listener, &daemon)?;
        pair.round_trip()?;
        daemon.thaw()?;
        assert_eq!(dropped(&daemon)?, [0.0, 0.0]);
    }
    Ok(())
}

#[test]
fn an_active_session_has_no_gate_while_the_daemon_is_frozen() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?;
    // Long enough that even a busy machine sends in time.
    let daemon = lab.daemon(&RULE.replace("1s", "4s"))?;
    daemon.freeze()?;
    let pair = Pair::open(&lab.outside, &listener)?;
    pair.keep_busy(Duration::from_secs(6))?;
    daemon.thaw()?;
    assert_eq!(dropped(&daemon)?, [0.0, 0.0]);
    assert_eq!(daemon.terminations()?.len(), 0);
    pair.round_trip()?;
    Ok(())
}

#[test]
fn a_session_past_its_deadline_can_still_close_in_the_orderly_way() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let daemon = lab.daemon(RULE)?;
    let mut pair = open_and_pass_deadline(&lab, &listener, &daemon)?;
    pair.client.shutdown(Shutdown::Write)?;
    assert_eq!(pair.server.read(&mut [0])?, 0);
    pair.server.shutdown(Shutdown::Write)?;
    assert_eq!(pair.client.read(&mut [0])?, 0);
    eventually("the server's socket has the last ACK", patience(), || {
        Ok((tcp_info(&pair.server)?.tcpi_state == TCP_CLOSE).then_some(()))
    })?;
    drop(pair);
    daemon.thaw()?;
    daemon.wait_for_metric("session_enforcer_sessions_closed_total", &[], 1.0)?;
    assert_eq!(dropped(&daemon)?, [0.0, 0.0]);
    assert_eq!(daemon.terminations()?.len(), 0);
    Ok(())
}

#[test]
fn either_end_can_abort_a_session_past_its_deadline() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let daemon = lab.daemon(RULE)?;
    let pairs = [
        open_and_pass_deadline(&lab, &listener, &daemon)?,
        open_and_pass_deadline(&lab, &listener, &daemon)?,
    ];
    let [first, second] = pairs;
    assert_shut(&first)?;
    let aborted = [(first.client, first.server), (second.server, second.client)];
    for (from, to) in aborted {
        reset_on_close(&from)?;
        drop(from);
        assert_eq!(ends_of(&[&to])?[0].error, Some(Errno::ECONNRESET));
    }
    daemon.thaw()?;
    daemon.wait_for_metric("session_enforcer_sessions_closed_total", &[], 2.0)?;
    assert_eq!(daemon.terminations()?.len(), 0);
    Ok(())
}

#[test]
fn payload_with_a_fin_waits_behind_the_gate() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let daemon = lab.daemon(RULE)?;
    let pair = open_and_pass_deadline(&lab, &listener, &daemon)?;
    assert_shut(&pair)?;
    // The stack sets the FIN on the last unacknowledged segment.
    pair.client.shutdown(Shutdown::Write)?;
    pair.server.shutdown(Shutdown::Write)?;
    assert!(!comes(&[&pair.client, &pair.server], WHILE)?);
    daemon.thaw()?;
    daemon
        .wait_for_termination_of(&pair)?
        .assert_reset("idle_timeout", &pair.opened, LIMIT);
    Ok(())
}

/// Sends single bytes, which `min_payload` ignores, until the connection ends or the time is over.
fn chatter(mut stream: &TcpStream, duration: Duration) {
    let start = Instant::now();
    while start.elapsed() < duration && stream.write_all(b"x").is_ok() {
        thread::sleep(Duration::from_millis(1));
    }
}

fn quiet_rule(timeout: &str) -> String {
    format!("[[rule]]\nname = \"r\"\nidle_timeout = \"{timeout}\"\nmin_payload = 100\n")
}

#[test]
fn a_session_that_a_new_policy_ends_has_that_reason_even_if_the_gate_drops_first() -> Result<()> {
    let case = TrackedPair::open(AGENT, &quiet_rule("1h"))?;
    case.pair.opened.wait(2 * LIMIT);
    thread::scope(|scope| {
        scope.spawn(|| chatter(&case.pair.client, patience()));
        scope.spawn(|| chatter(&case.pair.server, patience()));
        case.daemon.reload(&quiet_rule("1s"))?;
        let record = case.daemon.wait_for_termination_of(&case.pair)?;
        assert_eq!(record.text("event.reason"), "policy");
        Ok(())
    })
}

#[test]
fn a_session_whose_reset_fails_stays_behind_the_gate_and_is_retried_for_the_same_reason()
-> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let hour = quiet_rule("1h");
    let (daemon, interposer) = lab.launch().config(&hour).start_interposed()?;
    let pair = Pair::open(&lab.outside, &listener)?;
    pair.opened.wait(2 * LIMIT);
    interposer.set(Call::Destroy, Fate::Fail(Errno::EPERM));
    daemon.reload(&quiet_rule("1s"))?;
    let first = daemon.wait_for_termination_of(&pair)?;
    assert_eq!(first.text("event.action"), "session-termination-failed");
    assert_eq!(first.text("event.reason"), "policy");
    interposer.set(Call::Destroy, Fate::Pass);
    // The gate's events do not bring the next attempt forward.
    assert_shut(&pair)?;
    assert_eq!(daemon.terminations_of(&pair)?.len(), 1);
    let second = eventually("the next attempt", patience(), || {
        Ok(daemon.terminations_of(&pair)?.into_iter().nth(1))
    })?;
    // The times come from the records, because a busy machine may show them late.
    let apart = second.time("@timestamp") - first.time("@timestamp");
    assert!(apart >= Duration::from_secs(8), "{apart:?}");
    assert_eq!(second.text("session_enforcer.result"), "reset");
    assert_eq!(second.text("event.reason"), "policy");
    ensure!(dropped(&daemon)?.iter().all(|count| *count > 0.0));
    Ok(())
}
