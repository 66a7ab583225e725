//! Half-closed sessions: they remain sessions, and `half_closed_timeout` limits them.

use std::{
    io::{Read as _, Write as _},
    net::{Shutdown, TcpStream},
    thread,
    time::Duration,
};

use anyhow::Result;
use nix::errno::Errno;
use session_enforcer_tests::{
    Daemon, Lab, Moment, Pair, TrackedPair, ends_of, idle_rule, unhurried,
};

const AGENT: &str = env!("CARGO_BIN_EXE_session-enforcer-test-agent");

fn limit() -> Duration {
    unhurried(Duration::from_secs(2))
}

fn rule() -> String {
    idle_rule(limit())
}

/// A rule with `half_closed_timeout` and the lines of `others`.
fn half_closed_rule(others: &str) -> String {
    let limit = limit().as_secs();
    format!("[[rule]]\nname = \"r\"\nhalf_closed_timeout = \"{limit}s\"\n{others}\n")
}

/// Closes the socket for writing.
fn close(socket: &TcpStream) -> Result<Moment> {
    Ok(Moment::of(|| Ok(socket.shutdown(Shutdown::Write)?))?.0)
}

fn assert_half_closed(daemon: &Daemon, pair: &Pair, since: &Moment) -> Result<()> {
    let record = daemon.wait_for_termination_of(pair)?;
    record.assert_reset("half_closed_timeout", since, limit());
    assert_eq!(
        record.number("session_enforcer.limit_seconds"),
        limit().as_secs_f64()
    );
    Ok(())
}

#[test]
fn a_session_that_the_client_half_closed_is_reset_when_idle() -> Result<()> {
    let case = TrackedPair::open(AGENT, &rule())?;
    let last = case.pair.round_trip()?;
    // A FIN is no activity.
    last.wait(limit() / 4);
    case.pair.client.shutdown(Shutdown::Write)?;
    case.assert_reset_when_idle([Errno::ECONNRESET, Errno::ECONNABORTED], &last, limit())?;
    Ok(())
}

#[test]
fn a_session_that_the_server_half_closed_is_reset_when_idle() -> Result<()> {
    let case = TrackedPair::open(AGENT, &rule())?;
    let last = case.pair.round_trip()?;
    last.wait(limit() / 4);
    case.pair.server.shutdown(Shutdown::Write)?;
    // After a FIN from the peer, a reset is reported as EPIPE.
    case.assert_reset_when_idle([Errno::EPIPE, Errno::ECONNABORTED], &last, limit())?;
    Ok(())
}

#[test]
fn a_half_closed_session_lives_while_the_other_direction_is_busy() -> Result<()> {
    let case = TrackedPair::open(AGENT, &rule())?;
    case.pair.client.shutdown(Shutdown::Write)?;
    let mut last = case.pair.opened;
    while case.pair.opened.elapsed() < 2 * limit() {
        last = case.pair.to_client(b"x")?;
        thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(case.daemon.terminations()?.len(), 0);
    case.pair.ends()?[1].assert_reset(Errno::ECONNABORTED, &last, limit());
    case.daemon
        .wait_for_termination_of(&case.pair)?
        .assert_reset("idle_timeout", &last, limit());
    Ok(())
}

#[test]
fn a_session_that_only_the_client_closed_is_reset_when_idle() -> Result<()> {
    let case = TrackedPair::open(AGENT, &rule())?;
    let last = case.pair.round_trip()?;
    let Pair { client, server, .. } = case.pair;
    drop(client);
    let end = ends_of(&[&server])?[0];
    end.assert_reset(Errno::ECONNABORTED, &last, limit());
    case.daemon
        .wait_for_termination()?
        .assert_reset("idle_timeout", &last, limit());
    Ok(())
}

#[test]
fn fins_are_not_counted_as_bytes() -> Result<()> {
    let case = TrackedPair::open(AGENT, &rule())?;
    case.pair.to_server(b"hello")?;
    case.pair.client.shutdown(Shutdown::Write)?;
    case.pair.to_client(b"bye")?;
    assert_eq!(
        case.daemon.wait_for_termination_of(&case.pair)?.bytes(),
        [5, 3]
    );
    Ok(())
}

#[test]
fn the_fin_of_a_client_that_does_not_read_is_not_counted_as_a_byte() -> Result<()> {
    let case = TrackedPair::open(AGENT, &rule())?;
    case.pair.server.set_nonblocking(true)?;
    while (&case.pair.server).write(&[0; 1 << 16]).is_ok() {}
    // The client does not read, so its receive window is full and the server's FIN cannot be sent.
    // The client's FIN comes first.
    case.pair.server.shutdown(Shutdown::Write)?;
    case.pair.server.set_nonblocking(false)?;
    case.pair.to_server(b"hello")?;
    case.pair.client.shutdown(Shutdown::Write)?;
    assert_eq!(
        case.daemon.wait_for_termination_of(&case.pair)?.bytes()[0],
        5
    );
    Ok(())
}

#[test]
fn whichever_end_closes_first_the_limit_counts_from_its_fin_and_both_are_reset() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let daemon = lab.daemon(&half_closed_rule("idle_timeout = \"1h\""))?;
    let mut closed = Vec::new();
    for (here, there) in [(&lab.inside, &lab.outside), (&lab.outside, &lab.inside)] {
        let listener = here.listen(([127, 0, 0, 1], 0))?;
        for by_client in [true, false] {
            let pair = Pair::open(there, &listener)?;
            pair.round_trip()?.wait(limit() / 4);
            let closing = if by_client {
                &pair.client
            } else {
                &pair.server
            };
            closed.push((close(closing)?, pair));
        }
    }
    for (fin, pair) in &closed {
        pair.ends()?;
        assert_half_closed(&daemon, pair, fin)?;
    }
    let labels = [("reason", "half_closed_timeout"), ("result", "reset")];
    daemon.wait_for_metric("session_enforcer_terminations_total", &labels, 4.0)
}

#[test]
fn payload_restarts_the_limit_of_a_half_closed_session() -> Result<()> {
    let case = TrackedPair::open(AGENT, &half_closed_rule(""))?;
    let fin = close(&case.pair.client)?;
    let mut last = case.pair.to_client(b"x")?;
    while fin.elapsed() < 2 * limit() {
        thread::sleep(Duration::from_millis(50));
        last = case.pair.to_client(b"x")?;
    }
    assert_half_closed(&case.daemon, &case.pair, &last)
}

#[test]
fn a_session_that_is_open_in_both_directions_has_no_half_closed_timeout() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen(([127, 0, 0, 1], 0))?;
    let daemon = lab.daemon(&half_closed_rule(""))?;
    let open = Pair::open(&lab.outside, &listener)?;
    let pair = Pair::open(&lab.outside, &listener)?;
    open.opened.wait(2 * limit());
    let fin = close(&pair.server)?;
    assert_half_closed(&daemon, &pair, &fin)?;
    open.round_trip()?;
    assert_eq!(daemon.terminations()?.len(), 1);
    Ok(())
}

#[test]
fn a_fin_does_not_save_a_session_that_is_already_idle_for_too_long() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen(([127, 0, 0, 1], 0))?;
    let daemon = lab.daemon(&(rule() + "half_closed_timeout = \"1h\"\n"))?;
    daemon.freeze()?;
    let pair = Pair::open(&lab.outside, &listener)?;
    pair.opened.wait(limit());
    close(&pair.client)?;
    daemon.thaw()?;
    let record = daemon.wait_for_termination_of(&pair)?;
    record.assert_reset("idle_timeout", &pair.opened, limit());
    Ok(())
}

#[test]
fn no_payload_passes_a_half_closed_session_after_its_limit() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen(([127, 0, 0, 1], 0))?;
    let daemon = lab.daemon(&half_closed_rule(""))?;
    daemon.freeze()?;
    let pair = Pair::open(&lab.outside, &listener)?;
    let fin = close(&pair.client)?;
    fin.wait(limit());
    (&pair.server).write_all(b"late")?;
    daemon.thaw()?;
    assert_half_closed(&daemon, &pair, &fin)?;
    let dropped = daemon.metric("session_enforcer_gate_dropped_packets_total", &[])?;
    assert!(dropped >= 1.0, "{dropped}");
    Ok(())
}

#[test]
fn a_half_closed_session_may_owe_the_answer() -> Result<()> {
    let case = TrackedPair::open(AGENT, &half_closed_rule("response_timeout = \"1h\""))?;
    case.pair.to_server(b"query")?;
    close(&case.pair.client)?.wait(2 * limit());
    let answered = case.pair.to_client(b"answer")?;
    assert_half_closed(&case.daemon, &case.pair, &answered)
}

/// A host that has sent its FIN cannot answer any more, whatever it receives.
#[test]
fn a_fin_in_place_of_the_answer_ends_the_wait_for_it() -> Result<()> {
    let limits = "response_timeout = \"1h\"\nidle_timeout = \"1h\"";
    let case = TrackedPair::open(AGENT, &half_closed_rule(limits))?;
    case.pair.to_server(b"query")?.wait(limit() / 4);
    close(&case.pair.server)?.wait(limit() / 4);
    let last = case.pair.to_server(b"more")?;
    assert_half_closed(&case.daemon, &case.pair, &last)
}

#[test]
fn an_adopted_session_whose_fin_was_sent_owes_no_answer() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let pair = Pair::open(&lab.outside, &lab.inside.listen(([127, 0, 0, 1], 0))?)?;
    pair.to_server(b"query")?;
    close(&pair.server)?;
    let rule = half_closed_rule("response_timeout = \"1h\"\nidle_timeout = \"1h\"");
    let (started, daemon) = Moment::of(|| lab.daemon(&rule))?;
    assert_half_closed(&daemon, &pair, &started)
}

/// A server has closed the connection, and a client that pauses has not read all. The FIN waits behind the rest.
#[test]
fn a_fin_that_waits_behind_unsent_payload_does_not_count_before_it_leaves() -> Result<()> {
    for is_adopted in [false, true] {
        let lab = Lab::new(AGENT)?;
        let listener = lab.inside.listen(([127, 0, 0, 1], 0))?;
        let rule = half_closed_rule("idle_timeout = \"1h\"");
        let mut daemon = None;
        if !is_adopted {
            daemon = Some(lab.daemon(&rule)?);
        }
        let pair = Pair::open(&lab.outside, &listener)?;
        pair.server.set_nonblocking(true)?;
        let mut sent = 0;
        while let Ok(count) = (&pair.server).write(&[0; 1 << 16]) {
            sent += count;
        }
        let closed = close(&pair.server)?;
        let daemon = match daemon {
            Some(daemon) => daemon,
            None => lab.daemon(&rule)?,
        };
        closed.wait(2 * limit());
        let mut received = 0;
        let mut buffer = vec![0; 1 << 16];
        let end = loop {
            match (&pair.client).read(&mut buffer)? {
                0 => break Moment::of(|| Ok(()))?.0,
                count => received += count,
            }
        };
        assert_eq!(received, sent, "adopted: {is_adopted}");
        // The FIN has left just before.
        let record = daemon.wait_for_termination_of(&pair)?;
        assert_eq!(record.text("event.reason"), "half_closed_timeout");
        assert!(end.elapsed() + limit() / 4 > limit());
    }
    Ok(())
}

#[test]
fn the_limit_of_an_adopted_session_counts_from_its_fin_or_its_adoption() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen(([127, 0, 0, 1], 0))?;
    let open = || Pair::open(&lab.outside, &listener);
    let (by_client, by_server, before) = (open()?, open()?, open()?);
    close(&before.client)?;
    let (started, daemon) = Moment::of(|| lab.daemon(&half_closed_rule("")))?;
    // Both ends have sent payload, so the FIN is acknowledged at once.
    by_client.round_trip()?;
    by_server.round_trip()?;
    let fins = [close(&by_client.client)?, close(&by_server.server)?];
    assert_half_closed(&daemon, &before, &started)?;
    assert_half_closed(&daemon, &by_client, &fins[0])?;
    assert_half_closed(&daemon, &by_server, &fins[1])
}

#[test]
fn a_fin_that_arrives_while_no_daemon_runs_counts_from_the_next_start() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen(([127, 0, 0, 1], 0))?;
    let rule = half_closed_rule("idle_timeout = \"1h\"");
    let mut first = lab.pinned_daemon(&rule)?;
    let pair = Pair::open(&lab.outside, &listener)?;
    first.stop()?;
    close(&pair.client)?;
    let (started, second) = Moment::of(|| lab.pinned_daemon(&rule))?;
    assert_half_closed(&second, &pair, &started)
}
