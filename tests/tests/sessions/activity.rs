//! `activity`, `min_payload`, `min_answer`, `response_timeout` and `lifetime_jitter`: which payload
//! counts as activity, and how long this host may take to answer.

use std::{
    net::Shutdown,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use nix::errno::Errno;
use session_enforcer_tests::{
    Daemon, Lab, Listener, Moment, Netns, Pair, RawTcp, Sequence, Veth, idle_rule, patience,
    tcp_info, unhurried,
};

const AGENT: &str = env!("CARGO_BIN_EXE_session-enforcer-test-agent");

fn idle() -> Duration {
    unhurried(Duration::from_secs(1))
}

/// The response timeout, as a duration and as a line of the configuration.
fn response() -> (Duration, String) {
    let limit = 4 * idle();
    (
        limit,
        format!("response_timeout = \"{}s\"\n", limit.as_secs()),
    )
}

/// A daemon with one rule, for inbound connections to the listener's port.
fn daemon_for(lab: &Lab, listener: &Listener, limits: &str) -> Result<Daemon> {
    let port = listener.port();
    lab.daemon(&format!(
        "[[rule]]\nname = \"r\"\ndirection = \"inbound\"\nlocal_ports = [{port}]\n{limits}\n"
    ))
}

/// The same, with the idle timeout and further lines.
fn idle_daemon_for(lab: &Lab, listener: &Listener, more: &str) -> Result<Daemon> {
    let idle = idle().as_secs();
    daemon_for(
        lab,
        listener,
        &format!("idle_timeout = \"{idle}s\"\n{more}"),
    )
}

/// Calls `pass` every 50 ms until it fails or `duration` is over. Returns the last success and the
/// result.
fn repeat(
    duration: Duration,
    mut pass: impl FnMut() -> Result<Moment>,
) -> (Option<Moment>, Result<()>) {
    let start = Instant::now();
    let mut last = None;
    while start.elapsed() < duration {
        match pass() {
            Ok(moment) => last = Some(moment),
            Err(error) => return (last, Err(error)),
        }
        thread::sleep(Duration::from_millis(50));
    }
    (last, Ok(()))
}

/// Asserts that `pass` is no activity: the session is reset one idle timeout after it was opened.
fn assert_cut(daemon: &Daemon, pair: &Pair, pass: impl FnMut() -> Result<Moment>) -> Result<()> {
    let (_, result) = repeat(patience(), pass);
    assert!(result.is_err(), "the session was not reset");
    let record = daemon.wait_for_termination_of(pair)?;
    record.assert_reset("idle_timeout", &pair.opened, idle());
    Ok(())
}

/// Asserts that `pass` is activity: the session lives for several idle timeouts and is reset one
/// timeout after the last call.
fn assert_lives(daemon: &Daemon, pair: &Pair, pass: impl FnMut() -> Result<Moment>) -> Result<()> {
    let (last, result) = repeat(3 * idle(), pass);
    result?;
    let last = last.unwrap_or(pair.opened);
    let record = daemon.wait_for_termination_of(pair)?;
    record.assert_reset("idle_timeout", &last, idle());
    Ok(())
}

fn push(pair: &Pair) -> Result<Moment> {
    pair.to_client(b"news")
}

fn ping(pair: &Pair) -> Result<Moment> {
    pair.to_server(b"ping")
}

#[test]
fn sent_payload_does_not_count_if_activity_is_received() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen(([127, 0, 0, 1], 0))?;
    let limits = "activity = \"received\"";
    let daemon = idle_daemon_for(&lab, &listener, limits)?;
    let pushed = Pair::open(&lab.outside, &listener)?;
    assert_cut(&daemon, &pushed, || push(&pushed))?;
    let pinged = Pair::open(&lab.outside, &listener)?;
    assert_lives(&daemon, &pinged, || ping(&pinged))
}

#[test]
fn received_payload_does_not_count_if_activity_is_sent() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen(([127, 0, 0, 1], 0))?;
    let limits = "activity = \"sent\"";
    let daemon = idle_daemon_for(&lab, &listener, limits)?;
    let pinged = Pair::open(&lab.outside, &listener)?;
    assert_cut(&daemon, &pinged, || ping(&pinged))?;
    let pushed = Pair::open(&lab.outside, &listener)?;
    assert_lives(&daemon, &pushed, || push(&pushed))
}

#[test]
fn payload_in_either_direction_counts_if_activity_is_any() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen(([127, 0, 0, 1], 0))?;
    let limits = "activity = \"any\"";
    let daemon = idle_daemon_for(&lab, &listener, limits)?;
    let pushed = Pair::open(&lab.outside, &listener)?;
    assert_lives(&daemon, &pushed, || push(&pushed))?;
    let pinged = Pair::open(&lab.outside, &listener)?;
    assert_lives(&daemon, &pinged, || ping(&pinged))
}

#[test]
fn payload_below_the_minimum_is_no_activity_but_its_bytes_are_recorded() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen(([127, 0, 0, 1], 0))?;
    let daemon = idle_daemon_for(&lab, &listener, "min_payload = 16")?;
    let small = Pair::open(&lab.outside, &listener)?;
    assert_cut(&daemon, &small, || small.to_server(&[b'x'; 15]))?;
    let record = daemon.wait_for_termination_of(&small)?;
    let [received, _] = record.bytes();
    assert!(received >= 15 && received % 15 == 0, "{received}");
    let enough = Pair::open(&lab.outside, &listener)?;
    assert_lives(&daemon, &enough, || enough.to_server(&[b'x'; 16]))
}

#[test]
fn while_this_host_owes_the_answer_the_session_is_not_idle() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen(([127, 0, 0, 1], 0))?;
    let daemon = idle_daemon_for(&lab, &listener, &response().1)?;
    let pair = Pair::open(&lab.outside, &listener)?;
    // A round trip first, then a request within the same tick. The request is the later of the two.
    pair.round_trip()?;
    let asked = ping(&pair)?;
    asked.wait(2 * idle() + idle() / 2);
    let answered = push(&pair)?;
    let [client, server] = pair.ends()?;
    client.assert_reset(Errno::ECONNRESET, &answered, idle());
    server.assert_reset(Errno::ECONNABORTED, &answered, idle());
    let record = daemon.wait_for_termination_of(&pair)?;
    record.assert_reset("idle_timeout", &answered, idle());
    Ok(())
}

#[test]
fn an_answer_below_the_minimum_is_none_and_its_parts_since_the_last_request_add_up() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen(([127, 0, 0, 1], 0))?;
    let (limit, response) = response();
    let daemon = idle_daemon_for(&lab, &listener, &(response + "min_answer = 100"))?;
    let answered = Pair::open(&lab.outside, &listener)?;
    // Like the banner that a server sends without a request.
    let small = |pair: &Pair| pair.to_client(&[b'x'; 60]);
    ping(&answered)?;
    small(&answered)?;
    ping(&answered)?;
    small(&answered)?.wait(2 * idle());
    let last = small(&answered)?;
    let record = daemon.wait_for_termination_of(&answered)?;
    record.assert_reset("idle_timeout", &last, idle());
    let never = Pair::open(&lab.outside, &listener)?;
    ping(&never)?;
    let last = small(&never)?;
    let record = daemon.wait_for_termination_of(&never)?;
    record.assert_reset("response_timeout", &last, limit);
    Ok(())
}

/// Events that are pushed add up to less than an answer. Each restarts the response clock where sent payload is
/// activity, so no session ends in the middle of them.
#[test]
fn short_messages_that_are_no_answer_are_activity_all_the_same() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let [pushed, received] = [0; 2].map(|_| lab.inside.listen(([127, 0, 0, 1], 0)));
    let (pushed, received) = (pushed?, received?);
    let (limit, response) = response();
    let rule = |name: &str, port: u16, more: &str| {
        format!(
            "[[rule]]\nname = \"{name}\"\ndirection = \"inbound\"\nlocal_ports = [{port}]\n\
             idle_timeout = \"{}s\"\n{response}min_answer = 1024\n{more}",
            idle().as_secs()
        )
    };
    let daemon = lab.daemon(&format!(
        "{}{}",
        rule("pushed", pushed.port(), ""),
        rule("received", received.port(), "activity = \"received\"\n")
    ))?;
    let kept = Pair::open(&lab.outside, &pushed)?;
    let silent = Pair::open(&lab.outside, &received)?;
    let asked = ping(&silent)?;
    ping(&kept)?;
    let push = || {
        // The one whose client is silent is reset meanwhile.
        let _ = silent.to_client(b"event");
        kept.to_client(b"event")
    };
    let (last, result) = repeat(limit + idle(), push);
    result?;
    let last = last.context("an event was pushed")?;
    let record = daemon.wait_for_termination_of(&silent)?;
    record.assert_reset("response_timeout", &asked, limit);
    let record = daemon.wait_for_termination_of(&kept)?;
    record.assert_reset("response_timeout", &last, limit);
    Ok(())
}

#[test]
fn a_missing_answer_has_its_own_limit() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen(([127, 0, 0, 1], 0))?;
    let daemon = idle_daemon_for(&lab, &listener, &response().1)?;
    let pair = Pair::open(&lab.outside, &listener)?;
    let asked = ping(&pair)?;
    let limit = response().0;
    let [client, _] = pair.ends()?;
    client.assert_reset(Errno::ECONNRESET, &asked, limit);
    let record = daemon.wait_for_termination_of(&pair)?;
    record.assert_reset("response_timeout", &asked, limit);
    let labels = [("reason", "response_timeout"), ("result", "reset")];
    daemon.wait_for_metric("session_enforcer_terminations_total", &labels, 1.0)
}

#[test]
fn a_segment_that_the_stack_refuses_is_no_request() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen(([127, 0, 0, 1], 0))?;
    let idle = 3 * idle();
    let limits = format!(
        "idle_timeout = \"{}s\"\nresponse_timeout = \"1s\"",
        idle.as_secs()
    );
    let daemon = daemon_for(&lab, &listener, &limits)?;
    let pair = Pair::open(&lab.outside, &listener)?;
    for number in 0..4_u32 {
        let at = Sequence {
            to_send: number << 30,
            to_receive: 0,
        };
        RawTcp::new(&lab.outside)?.send(&pair.client, at, b"x")?;
    }
    let record = daemon.wait_for_termination_of(&pair)?;
    record.assert_reset("idle_timeout", &pair.opened, idle);
    Ok(())
}

#[test]
fn unacknowledged_payload_counts_from_the_time_at_which_it_was_sent() -> Result<()> {
    assert_counts_without_an_answer("")?;
    assert_counts_without_an_answer("[daemon]\nmode = \"observe\"\n")
}

/// The peer does not acknowledge, and the RTO is so long that nothing is retransmitted before the
/// deadline. So no packet shows that the payload was sent; the daemon must query the socket.
fn assert_counts_without_an_answer(mode: &str) -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let [left, right] = [Netns::new()?, Netns::new()?];
    Veth::between(&left, &right)?;
    left.ip(&format!(
        "route change 10.77.0.0/24 dev {} rto_min 60s",
        Veth::INTERFACE
    ))?;
    let listener = lab.outside_in(&right)?.listen((Veth::RIGHT, 0))?;
    let limit = 2 * idle();
    let daemon = lab.daemon(&format!("{mode}{}", idle_rule(limit)))?;
    let pair = Pair::open(&lab.inside_in(&left)?, &listener)?;
    pair.round_trip()?;
    right.ip(&format!("route add blackhole {}/32", Veth::LEFT))?;
    pair.opened.wait(limit / 2);
    let sent = ping(&pair)?;
    sent.wait(limit / 4);
    assert_eq!(tcp_info(&pair.client)?.tcpi_total_retrans, 0);
    let record = daemon.wait_for_termination_of(&pair)?;
    record.assert_due("idle_timeout", &sent, limit);
    assert_eq!(record.number("source.bytes"), 8.0);
    Ok(())
}

#[test]
fn an_answer_starts_the_idle_clock_even_if_activity_is_received() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen(([127, 0, 0, 1], 0))?;
    let limits = format!("{}activity = \"received\"", response().1);
    let daemon = idle_daemon_for(&lab, &listener, &limits)?;
    let pair = Pair::open(&lab.outside, &listener)?;
    ping(&pair)?.wait(2 * idle());
    let answered = push(&pair)?;
    // Payload that the server sends after the answer is no activity.
    let (_, result) = repeat(patience(), || push(&pair));
    assert!(result.is_err(), "the session was not reset");
    let record = daemon.wait_for_termination_of(&pair)?;
    record.assert_reset("idle_timeout", &answered, idle());
    Ok(())
}

#[test]
fn a_session_without_a_request_is_idle_whatever_the_response_timeout() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen(([127, 0, 0, 1], 0))?;
    let daemon = idle_daemon_for(&lab, &listener, &response().1)?;
    let silent = Pair::open(&lab.outside, &listener)?;
    let half_closed = Pair::open(&lab.outside, &listener)?;
    half_closed.client.shutdown(Shutdown::Write)?;
    for pair in [&silent, &half_closed] {
        let record = daemon.wait_for_termination_of(pair)?;
        record.assert_reset("idle_timeout", &pair.opened, idle());
    }
    Ok(())
}

#[test]
fn lifetimes_are_spread_within_the_jitter_and_none_is_longer() -> Result<()> {
    const SESSIONS: usize = 60;
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen(([127, 0, 0, 1], 0))?;
    let limits = "max_lifetime = \"4s\"\nlifetime_jitter = \"50%\"";
    let daemon = daemon_for(&lab, &listener, limits)?;
    let pairs: Vec<Pair> = (0..SESSIONS)
        .map(|_| Pair::open(&lab.outside, &listener))
        .collect::<Result<_>>()?;
    daemon.wait_for_terminations(SESSIONS)?;
    let mut limits = Vec::new();
    for pair in &pairs {
        let record = daemon.wait_for_termination_of(pair)?;
        let limit = record.number("session_enforcer.limit_seconds");
        record.assert_reset("max_lifetime", &pair.opened, Duration::from_secs_f64(limit));
        limits.push(limit);
    }
    assert!(
        limits.iter().all(|limit| (2.0..=4.0).contains(limit)),
        "{limits:?}"
    );
    // If 60 lifetimes are evenly distributed, a quarter of the range is empty with a probability of
    // 10^-7.
    for quarter in 0..4 {
        let start = 2.0 + 0.5 * f64::from(quarter);
        let range = start..start + 0.5;
        assert!(
            limits.iter().any(|limit| range.contains(limit)),
            "{range:?}: {limits:?}"
        );
    }
    Ok(())
}

/// The share of a session in the jitter never changes.
#[test]
fn the_share_of_the_jitter_is_the_same_after_a_reload_and_a_restart() -> Result<()> {
    const SESSIONS: usize = 8;
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen(([127, 0, 0, 1], 0))?;
    let config = |name: &str, lifetime: &str| {
        format!(
            "[daemon]\nmode = \"observe\"\n[[rule]]\nname = \"{name}\"\n\
             direction = \"inbound\"\nmax_lifetime = \"{lifetime}\"\nlifetime_jitter = \"50%\"\n"
        )
    };
    let mut daemon = lab.daemon(&config("first", "2s"))?;
    let pairs: Vec<Pair> = (0..SESSIONS)
        .map(|_| Pair::open(&lab.outside, &listener))
        .collect::<Result<_>>()?;
    let shares = |daemon: &Daemon, lifetime: f64| -> Result<Vec<f64>> {
        let share = |pair: &Pair| {
            let records = daemon.terminations_of(pair)?;
            let last = records.last().context("a record")?;
            Ok(last.number("session_enforcer.limit_seconds") / lifetime)
        };
        pairs.iter().map(share).collect()
    };
    // Shares have a resolution of 1/65,536.
    let assert_same = |now: Vec<f64>, before: &[f64]| {
        for (now, before) in now.iter().zip(before) {
            assert!((now - before).abs() < 1e-4, "{now} is not {before}");
        }
    };
    daemon.wait_for_terminations(SESSIONS)?;
    let first = shares(&daemon, 2.0)?;
    daemon.reload(&config("second", "3s"))?;
    daemon.wait_for_terminations(2 * SESSIONS)?;
    assert_same(shares(&daemon, 3.0)?, &first);
    // Without pins, the next daemon has no data of the first.
    daemon.stop()?;
    let daemon = lab.daemon(&config("third", "2s"))?;
    daemon.wait_for_terminations(SESSIONS)?;
    assert_same(shares(&daemon, 2.0)?, &first);
    Ok(())
}
