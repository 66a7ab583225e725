//! Connections that are older than the daemon are enforced with their true age.

use std::{
    io::Write as _,
    net::{Ipv4Addr, Shutdown, SocketAddr},
    os::fd::AsRawFd as _,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::Result;
use nix::{
    errno::Errno,
    sys::socket::{SockaddrStorage, bind},
};
use session_enforcer_tests::{
    Daemon, Lab, Listener, Moment, Netns, Pair, Random, Veth, idle_rule,
    longer_than_a_start as limit, patience, reset_on_close, seed, set_option,
};

const AGENT: &str = env!("CARGO_BIN_EXE_session-enforcer-test-agent");

fn rule() -> String {
    idle_rule(limit())
}

fn adopted(daemon: &Daemon) -> Result<f64> {
    daemon.metric("session_enforcer_sessions_adopted_total", &[])
}

fn assert_reset_for(daemon: &Daemon, pair: &Pair, last: &Moment) -> Result<()> {
    daemon.assert_reset_of(pair, "idle_timeout", last, limit())
}

#[test]
fn the_idle_time_of_an_adopted_session_includes_the_time_before_the_start() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let far = lab.outside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let inbound = Pair::open(&lab.outside, &listener)?;
    let outbound = Pair::open(&lab.inside, &far)?;
    let last = [inbound.to_server(b"in")?, outbound.to_server(b"out")?];
    last[1].wait(Duration::from_secs(2));
    let daemon = lab.daemon(&rule())?;
    assert_eq!(adopted(&daemon)?, 2.0);
    for (pair, last, direction, bytes) in [
        (&inbound, last[0], "inbound", [2, 0]),
        (&outbound, last[1], "outbound", [3, 0]),
    ] {
        assert_reset_for(&daemon, pair, &last)?;
        let record = daemon.wait_for_termination_of(pair)?;
        assert_eq!(record.text("network.direction"), direction);
        assert_eq!(record.bytes(), bytes);
    }
    Ok(())
}

/// As with a transparent proxy, a listener on the local port does not decide the direction: the
/// accepted connection has lost its listener, and the dialled one shares its port with a listener.
#[test]
fn the_direction_of_an_adopted_session_does_not_depend_on_listeners() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let anywhere = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let gone = lab.inside.listen(anywhere)?;
    let inbound = Pair::open(&lab.outside, &gone)?;
    drop(gone);
    let shared = |address| {
        let socket = lab.inside.tcp(address)?;
        set_option(&socket, libc::SOL_SOCKET, libc::SO_REUSEPORT, 1)?;
        anyhow::Ok(socket)
    };
    let beside = Listener::on(shared(anywhere)?, anywhere)?;
    let far = lab.outside.listen(anywhere)?;
    let socket = shared(beside.address)?;
    bind(socket.as_raw_fd(), &SockaddrStorage::from(beside.address))?;
    let outbound = Pair::dial(socket, &far, far.address)?;
    let last = [inbound.round_trip()?, outbound.round_trip()?];
    let rules = ["inbound", "outbound"].map(|direction| {
        let rule = rule().replace(
            "idle_timeout",
            &format!("direction = \"{direction}\"\nidle_timeout"),
        );
        rule.replace("name = \"", &format!("name = \"{direction}-"))
    });
    let daemon = lab.daemon(&rules.concat())?;
    let ends = [(&inbound, "inbound"), (&outbound, "outbound")];
    for ((pair, direction), last) in ends.into_iter().zip(last) {
        assert_reset_for(&daemon, pair, &last)?;
        let record = daemon.wait_for_termination_of(pair)?;
        assert_eq!(record.text("network.direction"), direction);
        assert!(record.text("rule.name").starts_with(direction));
        assert_eq!(
            record.number("source.port"),
            f64::from(pair.client_address.port())
        );
        assert_eq!(record.bytes(), [4, 4]);
    }
    Ok(())
}

#[test]
fn an_adopted_session_that_is_idle_for_too_long_already_is_reset_at_once() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let pair = Pair::open(&lab.outside, &listener)?;
    pair.opened.wait(limit() + Duration::from_millis(500));
    let daemon = lab.daemon(&rule())?;
    assert_reset_for(&daemon, &pair, &pair.opened)
}

#[test]
fn an_adopted_session_lives_while_it_is_busy_and_one_timeout_more() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let pair = Pair::open(&lab.outside, &listener)?;
    pair.opened.wait(Duration::from_secs(1));
    let daemon = lab.daemon(&rule())?;
    let last = pair.keep_busy(limit() + Duration::from_secs(1))?;
    assert_eq!(daemon.terminations()?.len(), 0);
    assert_reset_for(&daemon, &pair, &last)
}

/// Between the two queries of an adoption payload comes all the time.
#[test]
fn payload_that_does_not_count_leaves_the_clock_of_an_adopted_session() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let pair = Pair::open(&lab.outside, &listener)?;
    let last = pair.to_client(b"out")?;
    thread::scope(|scope| {
        scope.spawn(|| {
            // Bounded, so that a daemon that does not start fails the test.
            let began = Instant::now();
            while began.elapsed() < patience() && (&pair.client).write_all(b"x").is_ok() {
                thread::sleep(Duration::from_millis(5));
            }
        });
        last.wait(Duration::from_secs(2));
        let daemon = lab.daemon(&(rule() + "activity = \"sent\"\n"))?;
        let record = daemon.wait_for_termination_of(&pair)?;
        record.assert_reset("idle_timeout", &last, limit());
        Ok(())
    })
}

#[test]
fn sessions_of_other_namespaces_are_adopted() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let [left, right] = [Netns::new()?, Netns::new()?];
    Veth::between(&left, &right)?;
    let clients = [lab.inside_in(&left)?, lab.outside_in(&left)?];
    let servers = [lab.outside_in(&right)?, lab.inside_in(&right)?];
    // The listeners live until the daemon has adopted the connections.
    let (mut pairs, mut listeners) = (Vec::new(), Vec::new());
    for address in [Veth::RIGHT, Veth::RIGHT_V6] {
        for (client, server) in clients.iter().zip(&servers) {
            let listener = server.listen((address, 0))?;
            pairs.push(Pair::open(client, &listener)?);
            listeners.push(listener);
        }
    }
    pairs[3].opened.wait(Duration::from_secs(1));
    let daemon = lab.daemon(&rule())?;
    assert_eq!(adopted(&daemon)?, 4.0);
    let last = pairs[3].round_trip()?;
    for pair in &pairs[..3] {
        assert_reset_for(&daemon, pair, &pair.opened)?;
    }
    assert_reset_for(&daemon, &pairs[3], &last)
}

#[test]
fn an_adopted_session_that_ends_by_itself_is_forgotten_without_a_record() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let open = || Pair::open(&lab.outside, &listener);
    let [closed, reset, reset_here] = [open()?, open()?, open()?];
    let daemon = lab.daemon(&rule())?;
    assert_eq!(adopted(&daemon)?, 3.0);
    reset_on_close(&reset.client)?;
    reset_on_close(&reset_here.server)?;
    let (reset_by_server, other_end) = (reset_here.server, reset_here.client);
    drop((closed, reset, reset_by_server, other_end));
    daemon.wait_for_metric("session_enforcer_sessions", &[], 0.0)?;
    // By then the deadlines of the three closed sessions have passed.
    let pair = open()?;
    assert_reset_for(&daemon, &pair, &pair.opened)?;
    assert_eq!(daemon.terminations()?.len(), 1);
    assert_eq!(
        daemon.metric("session_enforcer_sessions_closed_total", &[])?,
        4.0
    );
    Ok(())
}

#[test]
fn a_half_closed_session_is_adopted() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let pairs = [
        Pair::open(&lab.outside, &listener)?,
        Pair::open(&lab.outside, &listener)?,
    ];
    pairs[0].client.shutdown(Shutdown::Write)?;
    pairs[1].server.shutdown(Shutdown::Write)?;
    // A FIN is no request, so the idle timeout applies.
    let daemon = lab.daemon(&(rule() + "response_timeout = \"1h\"\n"))?;
    assert_eq!(adopted(&daemon)?, 2.0);
    for pair in &pairs {
        assert_reset_for(&daemon, pair, &pair.opened)?;
    }
    Ok(())
}

#[test]
fn a_fin_does_not_end_an_adopted_session() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let pair = Pair::open(&lab.outside, &listener)?;
    let daemon = lab.daemon(&rule())?;
    pair.client.shutdown(Shutdown::Write)?;
    assert_reset_for(&daemon, &pair, &pair.opened)
}

#[test]
fn connections_of_no_rule_of_an_exempt_rule_and_outside_of_the_cgroup_are_not_adopted() -> Result<()>
{
    let lab = Lab::new(AGENT)?;
    let listen = || lab.inside.listen((Ipv4Addr::LOCALHOST, 0));
    let [exempt, none, enforced] = [listen()?, listen()?, listen()?];
    let outside = lab.outside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let open = |listener| Pair::open(&lab.outside, listener);
    let untouched = [open(&exempt)?, open(&none)?, open(&outside)?];
    let reset = open(&enforced)?;
    let daemon = lab.daemon(&format!(
        "[[rule]]\nname = \"exempt\"\nlocal_ports = [{}]\naction = \"exempt\"\n\
         [[rule]]\nname = \"enforced\"\nlocal_ports = [{}]\nidle_timeout = \"{}s\"\n",
        exempt.port(),
        enforced.port(),
        limit().as_secs(),
    ))?;
    assert_eq!(adopted(&daemon)?, 1.0);
    assert_reset_for(&daemon, &reset, &reset.opened)?;
    reset.opened.wait(limit() + Duration::from_secs(1));
    for pair in &untouched {
        pair.round_trip()?;
    }
    assert_eq!(daemon.terminations()?.len(), 1);
    Ok(())
}

#[test]
fn an_adopted_session_is_reset_on_both_ends() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let pair = Pair::open(&lab.outside, &listener)?;
    let daemon = lab.daemon(&rule())?;
    let [client, server] = pair.ends()?;
    client.assert_reset(Errno::ECONNRESET, &pair.opened, limit());
    server.assert_reset(Errno::ECONNABORTED, &pair.opened, limit());
    daemon.wait_for_metric("session_enforcer_sessions", &[], 0.0)?;
    Ok(())
}

#[test]
fn an_adopted_session_has_the_longer_limit_if_the_last_sender_is_unknown() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen(([127, 0, 0, 1], 0))?;
    let answered = Pair::open(&lab.outside, &listener)?;
    // Question and answer within the same millisecond, as from every server that answers at once.
    // `TCP_INFO` does not tell which was later.
    let last = answered.round_trip()?;
    let limits = "idle_timeout = \"1h\"\nresponse_timeout = \"2s\"";
    let daemon = lab.daemon(&format!("[[rule]]\nname = \"r\"\n{limits}\n"))?;
    daemon.wait_for_metric("session_enforcer_sessions_adopted_total", &[], 1.0)?;
    last.wait(Duration::from_secs(4));
    answered.round_trip()?;
    assert_eq!(daemon.terminations()?.len(), 0);
    Ok(())
}

#[test]
fn an_adopted_session_that_has_sent_less_than_min_answer_owes_the_answer() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let pair = Pair::open(&lab.outside, &listener)?;
    let asked = pair.to_server(b"query")?;
    asked.wait(Duration::from_millis(100));
    let last = pair.to_client(&[b'x'; 50])?;
    let limits = "response_timeout = \"1h\"\nmin_answer = 100\n";
    let daemon = lab.daemon(&(rule() + limits))?;
    last.wait(limit() + Duration::from_secs(1));
    assert_eq!(daemon.terminations()?.len(), 0);
    let answered = pair.to_client(&[b'x'; 100])?;
    assert_reset_for(&daemon, &pair, &answered)
}

/// No event reports the close of a socket that closes after it was listed and before it was
/// inserted into the table.
#[test]
fn connections_that_close_while_they_are_adopted_leave_nothing() -> Result<()> {
    const PAIRS: usize = 1_500;
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let open = || Pair::open(&lab.inside, &listener);
    let mut pairs = (0..PAIRS).map(|_| open()).collect::<Result<Vec<_>>>()?;
    let mut random = Random::of(seed()?, 0);
    let started = AtomicBool::new(false);
    let (daemon, pairs) = thread::scope(|scope| {
        let churn = scope.spawn(|| -> Result<Vec<Pair>> {
            while !started.load(Ordering::Relaxed) {
                // Each closed connection is replaced, so the number stays the same.
                let index = random.below(PAIRS as u64) as usize;
                if random.once_in(2) {
                    reset_on_close(&pairs[index].client)?;
                }
                pairs[index] = open()?;
                thread::sleep(Duration::from_micros(100));
            }
            Ok(pairs)
        });
        let daemon = lab.daemon(&idle_rule(Duration::from_secs(3_600)));
        started.store(true, Ordering::Relaxed);
        anyhow::Ok((daemon?, churn.join().expect("a thread of the test")?))
    })?;
    assert!(adopted(&daemon)? > 0.0);
    let sessions = 2.0 * pairs.len() as f64;
    daemon.wait_for_metric("session_enforcer_sessions", &[], sessions)?;
    daemon.wait_for_metric("session_enforcer_map_entries", &[], sessions)?;
    Ok(())
}
