//! Sockets that a process keeps locked in the kernel, and reapers that hang, are killed or stopped:
//! sessions of others are reset on time, and each reset is recorded once.

use std::{
    collections::HashSet,
    io::{Read as _, Write as _},
    net::Ipv4Addr,
    sync::{Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use nix::{
    errno::Errno,
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use session_enforcer_tests::{
    Agent, Cgroup, Daemon, Lab, Listener, Locked, Netns, Pair, Place, Record, bind_to_device,
    disconnect, eventually, patience, scaled, state_of, unhurried,
};

use crate::turn;

/// Serialises the tests: before Linux 6.9 a locked socket blocks the daemons of all tests.
static LOCKS: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    LOCKS.lock().unwrap_or_else(PoisonError::into_inner)
}

const AGENT: &str = env!("CARGO_BIN_EXE_session-enforcer-test-agent");
const TERMINATIONS: &str = "session_enforcer_terminations_total";

fn limit() -> Duration {
    unhurried(Duration::from_secs(2))
}

/// The longest time of an answer of `/healthz`, even under load.
fn promptly() -> Duration {
    unhurried(Duration::from_millis(500))
}

fn listen(agent: &Agent) -> Result<Listener> {
    agent.listen((Ipv4Addr::LOCALHOST, 0))
}

/// A rule for connections to this listener.
fn rule(name: &str, listener: &Listener, limit: Duration) -> String {
    format!(
        "[[rule]]\nname = \"{name}\"\ndirection = \"inbound\"\nlocal_ports = [{}]\nidle_timeout = \
         \"{}s\"\n",
        listener.port(),
        limit.as_secs()
    )
}

/// Listeners in a cgroup each, with the agents that keep the cgroups.
fn listeners_in_cgroups(lab: &Lab, count: usize) -> Result<Vec<(Agent, Listener, Cgroup)>> {
    let held = (0..count).map(|_| {
        let cgroup = lab.cgroup.child()?;
        let agent = lab.at(&Place::here().in_cgroup(&cgroup))?;
        let listener = listen(&agent)?;
        Ok((agent, listener, cgroup))
    });
    held.collect()
}

const OWN: &str = "[daemon]\nnetwork_namespaces = \"own\"\n";

/// Asserts that due connections are reset and that the daemon answers meanwhile.
fn assert_others_are_reset(lab: &Lab, daemon: &Daemon, listener: &Listener) -> Result<()> {
    let open = |_| Pair::open(&lab.outside, listener);
    let pairs = (0..10).map(open).collect::<Result<Vec<_>>>()?;
    let asked = Instant::now();
    ensure!(daemon.get("/healthz")?.0 == 200);
    ensure!(asked.elapsed() < promptly(), "{:?}", asked.elapsed());
    for pair in &pairs {
        pair.ends()?[0].assert_reset(Errno::ECONNRESET, &pair.opened, limit());
        let record = daemon.wait_for_termination_of(pair)?;
        record.assert_reset("idle_timeout", &pair.opened, limit());
    }
    Ok(())
}

/// A daemon with a rule for each of two listeners, and a connection to the first one whose server's socket is locked.
fn locked_pair() -> Result<(Lab, [Listener; 2], Daemon, Pair, Locked)> {
    let lab = Lab::new(AGENT)?;
    let listeners = [listen(&lab.inside)?, listen(&lab.inside)?];
    let [locked, others] = &listeners;
    let rules = rule("locked", locked, limit()) + &rule("others", others, limit());
    let daemon = lab.daemon(&(OWN.to_owned() + &rules))?;
    let pair = Pair::open(&lab.outside, locked)?;
    let lock = Locked::new(&pair.server)?;
    Ok((lab, listeners, daemon, pair, lock))
}

#[test]
fn a_session_that_its_process_keeps_locked_is_quarantined_and_delays_no_reset() -> Result<()> {
    let _turn = turn(module_path!());
    let _alone = alone();
    let (lab, [_locked, others], daemon, pair, lock) = locked_pair()?;
    // Once before and once after the locked session is due.
    for _ in 0..2 {
        assert_others_are_reset(&lab, &daemon, &others)?;
    }
    let failed = daemon.wait_for_termination_of(&pair)?;
    assert_eq!(failed.text("event.action"), "session-termination-failed");
    let said = failed.text("error.message");
    assert!(said.contains("keeps locked"), "{said}");
    daemon.wait_for_metric("session_enforcer_quarantined_sessions", &[], 1.0)?;
    assert!(daemon.metric("session_enforcer_reapers", &[("state", "stuck")])? >= 1.0);
    assert!(daemon.is_degraded("stuck")?);
    let (status, body) = daemon.get("/readyz")?;
    assert_eq!(status, 503);
    assert!(body.contains("locked"), "{body}");
    drop(lock);
    // The pending reset was requested once. It completes when the lock is released.
    let records = eventually("the second record", patience(), || {
        let records = daemon.terminations_of(&pair)?;
        Ok((records.len() == 2).then_some(records))
    })?;
    assert_eq!(records[1].text("session_enforcer.result"), "reset");
    daemon.wait_for_metric("session_enforcer_quarantined_sessions", &[], 0.0)?;
    daemon.wait_for_degraded("stuck", false)?;
    daemon.wait_for_metric(
        TERMINATIONS,
        &[("rule", "locked"), ("result", "reset")],
        1.0,
    )?;
    daemon.wait_for_metric(
        TERMINATIONS,
        &[("rule", "locked"), ("result", "failed")],
        1.0,
    )
}

/// A locked socket cannot be queried, so payload that waits for it does not delay the reset.
#[test]
fn payload_that_waits_for_a_locked_socket_does_not_delay_the_reset() -> Result<()> {
    let _turn = turn(module_path!());
    let _alone = alone();
    let (lab, [_locked, others], daemon, pair, lock) = locked_pair()?;
    (&pair.client).write_all(b"x")?;
    assert_others_are_reset(&lab, &daemon, &others)?;
    let failed = daemon.wait_for_termination_of(&pair)?;
    failed.assert_due("idle_timeout", &pair.opened, limit());
    let said = failed.text("error.message");
    assert!(said.contains("keeps locked"), "{said}");
    drop(lock);
    let records = eventually("the second record", patience(), || {
        let records = daemon.terminations_of(&pair)?;
        Ok((records.len() == 2).then_some(records))
    })?;
    assert_eq!(records[1].text("session_enforcer.result"), "reset");
    Ok(())
}

/// Before a session with payload on its way is reset, its socket is asked. A user can have many of those sockets locked.
#[test]
fn queries_of_locked_sockets_in_many_cgroups_delay_no_reset() -> Result<()> {
    let _turn = turn(module_path!());
    let _alone = alone();
    const CGROUPS: usize = 16;
    const OF_EACH: usize = 3;
    let lab = Lab::new(AGENT)?;
    let others = listen(&lab.inside)?;
    let lifetime = || 2 * limit();
    let of = |name: &str, listener: &Listener| {
        rule(name, listener, lifetime()).replace("idle_timeout", "max_lifetime")
    };
    let mut rules = OWN.to_owned() + &of("others", &others);
    let held = listeners_in_cgroups(&lab, CGROUPS)?;
    for (number, (_, listener, _)) in held.iter().enumerate() {
        rules += &of(&format!("locked-{number}"), listener);
    }
    let daemon = lab.daemon(&rules)?;
    // All are due at nearly the same time, the victims last.
    let of_each = held.iter().flat_map(|(_, listener, _)| [listener; OF_EACH]);
    let pairs = of_each.map(|listener| Pair::open(&lab.outside, listener));
    let pairs = pairs.collect::<Result<Vec<_>>>()?;
    let victims = (0..10).map(|_| Pair::open(&lab.outside, &others));
    let victims = victims.collect::<Result<Vec<_>>>()?;
    let locks = pairs.iter().map(|pair| Locked::new(&pair.server));
    let locks = locks.collect::<Result<Vec<_>>>()?;
    for pair in &pairs {
        (&pair.client).write_all(b"x")?;
    }
    thread::scope(|scope| {
        for victim in &victims {
            // Payload on its way at any time: the ACK of a few bytes is delayed.
            scope.spawn(|| {
                while (&victim.client).write_all(b"x").is_ok() {
                    thread::sleep(Duration::from_millis(2));
                }
            });
        }
    });
    for victim in &victims {
        let record = daemon.wait_for_termination_of(victim)?;
        record.assert_reset("max_lifetime", &victim.opened, lifetime());
        let late = record.number("session_enforcer.lateness_seconds");
        assert!(late < promptly().as_secs_f64(), "{late}");
        record.text("session_enforcer.cgroup");
    }
    // Their resets hang, too.
    for pair in &pairs {
        daemon.wait_for_termination_of(pair)?;
    }
    // At most four of each cgroup.
    let stuck = daemon.metric("session_enforcer_reapers", &[("state", "stuck")])?;
    assert!(stuck <= (4 * CGROUPS) as f64, "{stuck}");
    drop((locks, pairs));
    Ok(())
}

/// Each network namespace has its own batches, and any user can create many. All are due when the daemon continues.
#[test]
fn locked_sockets_in_many_namespaces_count_for_their_cgroup() -> Result<()> {
    let _turn = turn(module_path!());
    let _alone = alone();
    const NAMESPACES: usize = 40;
    let lab = Lab::new(AGENT)?;
    let others = listen(&lab.inside)?;
    let cgroup = lab.cgroup.child()?;
    let due = 2 * limit();
    let rules = format!(
        "{}[[rule]]\nname = \"locked\"\ndirection = \"inbound\"\ncgroups = [\"{}\"]\n\
         idle_timeout = \"{}s\"\n",
        rule("others", &others, limit()),
        cgroup.name()?,
        due.as_secs()
    );
    let daemon = lab.daemon(&rules)?;
    let held = (0..NAMESPACES).map(|_| {
        let netns = Netns::new()?;
        let place = Place::here().in_cgroup(&cgroup).in_netns(&netns);
        let listener = listen(&lab.at(&place)?)?;
        let pair = Pair::open(&lab.outside_in(&netns)?, &listener)?;
        Ok((Locked::new(&pair.server)?, pair, netns))
    });
    let held = held.collect::<Result<Vec<_>>>()?;
    daemon.freeze()?;
    thread::sleep(due);
    daemon.thaw()?;
    daemon.wait_for_terminations(NAMESPACES)?;
    assert_others_are_reset(&lab, &daemon, &others)?;
    assert_few_hang(&daemon)?;
    drop(held);
    Ok(())
}

/// Asserts that of so many locked sockets of one cgroup not many more than four occupy a reaper.
fn assert_few_hang(daemon: &Daemon) -> Result<()> {
    let stuck = daemon.metric("session_enforcer_reapers", &[("state", "stuck")])?;
    // Four, and those that were in progress when the first one began to hang.
    assert!(stuck <= 16.0, "{stuck}");
    Ok(())
}

/// A socket that is bound to an interface after its connection is established is not found by its name.
#[test]
fn locked_sockets_that_are_not_found_by_name_count_for_their_cgroup() -> Result<()> {
    let _turn = turn(module_path!());
    let _alone = alone();
    const SOCKETS: usize = 40;
    let lab = Lab::new(AGENT)?;
    let others = listen(&lab.inside)?;
    let cgroup = lab.cgroup.child()?;
    let rules = format!(
        "{OWN}{}[[rule]]\nname = \"bound\"\ndirection = \"inbound\"\nidle_timeout = \"{}s\"\n",
        rule("others", &others, limit()),
        limit().as_secs()
    );
    let daemon = lab.daemon(&rules)?;
    // The daemon knows the owners of listeners that are older than it.
    let bound = listen(&lab.at(&Place::here().in_cgroup(&cgroup))?)?;
    let held = (0..SOCKETS).map(|_| {
        let pair = Pair::open(&lab.outside, &bound)?;
        bind_to_device(&pair.server, "lo")?;
        Ok((Locked::new(&pair.server)?, pair))
    });
    let held = held.collect::<Result<Vec<_>>>()?;
    daemon.wait_for_terminations(SOCKETS)?;
    assert_others_are_reset(&lab, &daemon, &others)?;
    assert_few_hang(&daemon)?;
    drop(held);
    Ok(())
}

/// The adoption asks each socket for its age, which takes its lock.
#[test]
fn a_start_hangs_at_few_of_the_locked_sockets_of_a_cgroup() -> Result<()> {
    let _turn = turn(module_path!());
    let _alone = alone();
    const SOCKETS: usize = 40;
    let lab = Lab::new(AGENT)?;
    let cgroup = lab.cgroup.child()?;
    let locked = listen(&lab.at(&Place::here().in_cgroup(&cgroup))?)?;
    let others = listen(&lab.inside)?;
    let held = (0..SOCKETS).map(|_| {
        let pair = Pair::open(&lab.outside, &locked)?;
        Ok((Locked::new(&pair.server)?, pair))
    });
    let held = held.collect::<Result<Vec<_>>>()?;
    let older = Pair::open(&lab.outside, &others)?;
    let hour = Duration::from_secs(3_600);
    let rules = OWN.to_owned() + &rule("locked", &locked, hour) + &rule("others", &others, limit());
    if Locked::blocks_socket_tables()? {
        // The start adopts nothing until the locks are released.
        return Ok(());
    }
    let daemon = lab.daemon(&rules)?;
    let all = (SOCKETS + 1) as f64;
    daemon.wait_for_metric("session_enforcer_sessions_adopted_total", &[], all)?;
    older.ends()?[0].assert_reset(Errno::ECONNRESET, &older.opened, limit());
    assert_others_are_reset(&lab, &daemon, &others)?;
    assert_few_hang(&daemon)?;
    drop(held);
    Ok(())
}

/// A socket that is connected a second time has no known owner, so the daemon asks for it.
#[test]
fn locked_sockets_without_a_known_owner_occupy_no_reaper_before_they_are_due() -> Result<()> {
    let _turn = turn(module_path!());
    let _alone = alone();
    const SOCKETS: usize = 20;
    let lab = Lab::new(AGENT)?;
    let others = listen(&lab.inside)?;
    let far = listen(&lab.outside)?;
    let rules = rule("others", &others, limit())
        + "[[rule]]\nname = \"service\"\nusers = [54321]\nidle_timeout = \"1h\"\n"
        + "[[rule]]\nname = \"all\"\ndirection = \"outbound\"\nidle_timeout = \"1h\"\n";
    let daemon = lab.daemon(&(OWN.to_owned() + &rules))?;
    let held = (0..SOCKETS).map(|_| {
        let first = Pair::open(&lab.inside, &far)?;
        let again = Pair::dial(disconnect(first.client)?, &far, far.address)?;
        Ok((Locked::new(&again.client)?, again))
    });
    let held = held.collect::<Result<Vec<_>>>()?;
    let of_all = [("rule", "all")];
    daemon.wait_for_metric("session_enforcer_sessions", &of_all, SOCKETS as f64)?;
    assert_others_are_reset(&lab, &daemon, &others)?;
    let stuck = daemon.metric("session_enforcer_reapers", &[("state", "stuck")])?;
    assert_eq!(stuck, 0.0);
    drop(held);
    Ok(())
}

#[test]
fn a_start_and_a_reload_with_locked_sockets_adopt_every_connection() -> Result<()> {
    let _turn = turn(module_path!());
    let _alone = alone();
    let lab = Lab::new(AGENT)?;
    let [ruled, unruled, others] = [
        listen(&lab.inside)?,
        listen(&lab.inside)?,
        listen(&lab.inside)?,
    ];
    let pairs = [
        Pair::open(&lab.outside, &ruled)?,
        Pair::open(&lab.outside, &unruled)?,
    ];
    let older = Pair::open(&lab.outside, &others)?;
    let locks = [
        Locked::new(&pairs[0].server)?,
        Locked::new(&pairs[1].server)?,
    ];
    let hour = Duration::from_secs(3_600);
    let rules = |ruled_for| {
        OWN.to_owned() + &rule("ruled", &ruled, ruled_for) + &rule("others", &others, limit())
    };
    // Before Linux 6.9 a locked socket blocks the socket tables, so this daemon is not ready until
    // the lock is released.
    let daemon = if Locked::blocks_socket_tables()? {
        lab.launch().config(&rules(hour)).start_unready()?
    } else {
        lab.daemon(&rules(hour))?
    };
    daemon.wait_for_metric("session_enforcer_sessions_adopted_total", &[], 2.0)?;
    older.ends()?[0].assert_reset(Errno::ECONNRESET, &older.opened, limit());
    assert_others_are_reset(&lab, &daemon, &others)?;
    let asked = Instant::now();
    daemon.reload(&rules(2 * hour))?;
    assert!(asked.elapsed() < unhurried(Duration::from_secs(5)));
    assert_others_are_reset(&lab, &daemon, &others)?;
    // A locked socket counts as active at the moment of its adoption.
    drop(locks);
    assert_eq!(daemon.terminations_of(&pairs[0])?.len(), 0);
    // Read the byte that the lock has sent.
    (&pairs[0].client).read_exact(&mut [0])?;
    pairs[0].round_trip().map(drop)
}

#[test]
fn a_locked_socket_that_was_dialled_here_is_adopted_as_outbound() -> Result<()> {
    let _turn = turn(module_path!());
    let _alone = alone();
    let lab = Lab::new(AGENT)?;
    let listener = listen(&lab.outside)?;
    let pair = Pair::open(&lab.inside, &listener)?;
    let _lock = Locked::new(&pair.client)?;
    let dialled = rule("dialled", &listener, Duration::from_secs(3_600))
        .replace("inbound", "outbound")
        .replace("local_ports", "remote_ports");
    let config = OWN.to_owned() + &dialled;
    let daemon = lab.launch().config(&config).start_unready()?;
    daemon.wait_for_metric("session_enforcer_sessions_adopted_total", &[], 1.0)
}

#[test]
fn a_daemon_ends_at_once_while_a_reaper_hangs_and_the_next_one_starts() -> Result<()> {
    let _turn = turn(module_path!());
    let _alone = alone();
    let lab = Lab::new(AGENT)?;
    let [locked, others] = [listen(&lab.inside)?, listen(&lab.inside)?];
    let rules = rule("locked", &locked, limit()) + &rule("others", &others, limit());
    let config = OWN.to_owned() + &rules;
    let pair = Pair::open(&lab.outside, &locked)?;
    let mut locks = Vec::new();
    let mut hanging = Vec::new();
    for signal in [Signal::SIGTERM, Signal::SIGKILL] {
        let launch = lab.launch().pinned(&lab.pins).config(&config);
        let mut daemon = launch.start_unready()?;
        if locks.is_empty() {
            locks.push(Locked::new(&pair.server)?);
        }
        daemon.wait_for_metric("session_enforcer_quarantined_sessions", &[], 1.0)?;
        let stuck = |pid: &u32| state_of(*pid) == Some('D');
        hanging.extend(daemon.reapers()?.into_iter().filter(stuck));
        let asked = Instant::now();
        match signal {
            Signal::SIGTERM => daemon.stop()?,
            _ => daemon.kill()?,
        }
        assert!(asked.elapsed() < unhurried(Duration::from_secs(2)));
    }
    assert!(hanging.len() >= 2, "{hanging:?}");
    assert!(hanging.iter().all(|pid| state_of(*pid) == Some('D')));
    let launch = lab.launch().pinned(&lab.pins).config(&config);
    let daemon = launch.start_unready()?;
    assert_others_are_reset(&lab, &daemon, &others)?;
    drop(locks);
    // The hanging reapers of earlier daemons end.
    eventually("the reapers of earlier daemons end", patience(), || {
        let alive = hanging
            .iter()
            .filter(|pid| state_of(**pid).is_some_and(|s| s != 'Z'));
        Ok((alive.count() == 0).then_some(()))
    })
}

#[test]
fn locked_sessions_of_many_cgroups_are_bounded_and_delay_no_reset() -> Result<()> {
    let _turn = turn(module_path!());
    let _alone = alone();
    const CGROUPS: usize = 8;
    const OF_EACH: usize = 8;
    let lab = Lab::new(AGENT)?;
    let others = listen(&lab.inside)?;
    let mut rules = OWN.to_owned() + &rule("others", &others, limit());
    let held = listeners_in_cgroups(&lab, CGROUPS)?;
    for (number, (_, listener, _)) in held.iter().enumerate() {
        rules += &rule(&format!("locked-{number}"), listener, limit());
    }
    let daemon = lab.daemon(&rules)?;
    let mut pairs = Vec::new();
    let mut locks = Vec::new();
    for (_, listener, _) in &held {
        for _ in 0..OF_EACH {
            let pair = Pair::open(&lab.outside, listener)?;
            locks.push(Locked::new(&pair.server)?);
            pairs.push(pair);
        }
    }
    for _ in 0..3 {
        assert_others_are_reset(&lab, &daemon, &others)?;
    }
    let locked = CGROUPS * OF_EACH;
    daemon.wait_for_terminations(locked)?;
    let quarantined = daemon.metric("session_enforcer_quarantined_sessions", &[])?;
    // At most four of each cgroup, plus those in batches that were already sent when the first hang
    // was detected.
    let most = (6 * CGROUPS) as f64;
    assert!(quarantined > 0.0 && quarantined <= most, "{quarantined}");
    drop(locks);
    // Pending resets complete, and the other sessions are reset at the next attempt.
    eventually("resets of the unlocked sessions", 3 * patience(), || {
        let reset = daemon.terminations()?.into_iter().filter(|record| {
            record.text("session_enforcer.result") == "reset"
                && record.text("rule.name").starts_with("locked")
        });
        Ok((reset.count() == locked).then_some(()))
    })?;
    drop(pairs);
    Ok(())
}

/// The processor time of the thread that decides (`/proc/PID/schedstat`).
fn ran(daemon: &Daemon) -> Result<Duration> {
    let text = std::fs::read_to_string(format!("/proc/{}/schedstat", daemon.pid()))?;
    let ran_ns = text.split(' ').next().context("a number")?.parse()?;
    Ok(Duration::from_nanos(ran_ns))
}

/// A user can have very many idle sessions beside a few locked sockets.
#[test]
fn very_many_sessions_without_room_for_their_resets_cost_no_processor_time() -> Result<()> {
    let _turn = turn(module_path!());
    let _alone = alone();
    const SESSIONS: usize = 8_000;
    const LOCKED: usize = 8;
    let lab = Lab::new(AGENT)?;
    let others = listen(&lab.inside)?;
    let cgroup = lab.cgroup.child()?;
    let listener = listen(&lab.at(&Place::here().in_cgroup(&cgroup))?)?;
    // Rules that name an owner make the daemon learn the cgroups of all sessions.
    let conditions = format!("cgroups = [\"{}\"]\nlocal_ports", cgroup.name()?);
    let of_user = rule("user", &listener, 4 * limit()).replace("local_ports", &conditions);
    let daemon = lab.daemon(&(OWN.to_owned() + &rule("others", &others, limit()) + &of_user))?;
    let open = |_| Pair::open(&lab.outside, &listener);
    let pairs = (0..SESSIONS).map(open).collect::<Result<Vec<_>>>()?;
    let sessions = [("rule", "user")];
    daemon.wait_for_metric("session_enforcer_sessions", &sessions, SESSIONS as f64)?;
    // All are due when the daemon continues, the locked ones first.
    daemon.freeze()?;
    thread::sleep(4 * limit());
    let lock = |pair: &Pair| Locked::new(&pair.server);
    let locks = pairs[..LOCKED]
        .iter()
        .map(lock)
        .collect::<Result<Vec<_>>>()?;
    daemon.thaw()?;
    // The limit of a cgroup.
    daemon.wait_for_metric("session_enforcer_quarantined_sessions", &[], 4.0)?;
    let (ran_before, asked) = (ran(&daemon)?, Instant::now());
    thread::sleep(Duration::from_secs(1));
    let (ran, passed) = (ran(&daemon)? - ran_before, asked.elapsed());
    assert!(ran < passed / 4, "{ran:?} of {passed:?}");
    drop(locks);
    for pair in &pairs {
        pair.ends()?[0].assert_not_early(&pair.opened, 4 * limit());
    }
    daemon.wait_for_metric("session_enforcer_sessions", &sessions, 0.0)?;
    assert_others_are_reset(&lab, &daemon, &others)
}

/// The deadlines are long past when the daemon resumes, but the hanging resets have delayed nothing yet.
#[test]
fn sessions_that_became_due_in_a_stopped_daemon_wait_for_hanging_resets_before_they_count_as_failed()
-> Result<()> {
    let _turn = turn(module_path!());
    let _alone = alone();
    let lab = Lab::new(AGENT)?;
    let listener = listen(&lab.inside)?;
    let daemon = lab.daemon(&(OWN.to_owned() + &rule("locked", &listener, limit())))?;
    let open = |_| Pair::open(&lab.outside, &listener);
    let pairs = (0..8).map(open).collect::<Result<Vec<_>>>()?;
    daemon.wait_for_metric("session_enforcer_sessions", &[], 8.0)?;
    daemon.freeze()?;
    let lock = |pair: &Pair| Locked::new(&pair.server);
    let locks = pairs.iter().map(lock).collect::<Result<Vec<_>>>()?;
    // Longer than a reset may be delayed before it counts as failed.
    thread::sleep(limit() + Duration::from_secs(6));
    daemon.thaw()?;
    // The limit of a cgroup.
    daemon.wait_for_metric("session_enforcer_quarantined_sessions", &[], 4.0)?;
    drop(locks);
    eventually("resets of all sessions", patience(), || {
        let records = daemon.terminations()?;
        let delayed = |record: &&Record| record.text("error.message").contains("too many resets");
        ensure!(
            !records.iter().any(|record| delayed(&record)),
            "{records:?}"
        );
        let reset = |record: &&Record| record.text("session_enforcer.result") == "reset";
        Ok((records.iter().filter(reset).count() == pairs.len()).then_some(()))
    })
}

#[test]
fn reapers_killed_or_stopped_at_any_moment_lose_no_reset_and_record_none_twice() -> Result<()> {
    let _turn = turn(module_path!());
    let _alone = alone();
    const ROUNDS: usize = 12;
    const PAIRS: usize = 40;
    let lab = Lab::new(AGENT)?;
    let others = listen(&lab.inside)?;
    let daemon = lab.daemon(&(OWN.to_owned() + &rule("others", &others, limit())))?;
    let mut pairs = Vec::new();
    for round in 0..ROUNDS {
        for _ in 0..PAIRS {
            pairs.push(Pair::open(&lab.outside, &others)?);
        }
        thread::sleep(scaled(Duration::from_millis(160)));
        // Every third round all reapers, otherwise one. Every fourth round they are stopped,
        // otherwise killed.
        let reapers = daemon.reapers()?;
        let some = if round % 3 == 0 { reapers.len() } else { 1 };
        let signal = if round % 4 == 3 {
            Signal::SIGSTOP
        } else {
            Signal::SIGKILL
        };
        for pid in reapers.into_iter().take(some) {
            // The reaper may have ended meanwhile.
            let _ = kill(Pid::from_raw(pid.cast_signed()), signal);
        }
    }
    for pair in &pairs {
        pair.ends()?[0].assert_not_early(&pair.opened, limit());
    }
    let records = daemon.wait_for_terminations(pairs.len())?;
    assert_eq!(records.len(), pairs.len());
    // Compare cookies, because on a slow machine a port may already belong to another connection.
    let cookies: HashSet<u64> = records
        .iter()
        .map(|record| record.number("session_enforcer.id") as u64)
        .collect();
    assert_eq!(cookies.len(), pairs.len());
    for record in &records {
        // If a reaper was killed before it reported a reset, the result is `gone`.
        assert_ne!(
            record.text("session_enforcer.result"),
            "failed",
            "{record:#?}"
        );
    }
    daemon.wait_for_metric("session_enforcer_sessions", &[], 0.0)?;
    assert!(daemon.metric("session_enforcer_reaper_restarts_total", &[])? > 0.0);
    Ok(())
}

#[test]
fn a_reload_whose_reaper_is_killed_adopts_every_connection() -> Result<()> {
    let _turn = turn(module_path!());
    let _alone = alone();
    let lab = Lab::new(AGENT)?;
    let [ruled, unruled] = [listen(&lab.inside)?, listen(&lab.inside)?];
    let hour = Duration::from_secs(3_600);
    let before = OWN.to_owned() + &rule("ruled", &ruled, hour);
    let daemon = lab.daemon(&before)?;
    let pair = Pair::open(&lab.outside, &unruled)?;
    // The stopped reaper that is asked for the list is killed after its timeout.
    for pid in daemon.reapers()? {
        kill(Pid::from_raw(pid.cast_signed()), Signal::SIGSTOP)?;
    }
    daemon.reload(&(before + &rule("unruled", &unruled, hour)))?;
    assert_eq!(
        daemon.metric("session_enforcer_sessions_adopted_total", &[])?,
        1.0
    );
    assert!(!daemon.is_degraded("namespace")?);
    pair.round_trip().map(drop)
}

/// Capabilities, `NoNewPrivs` and Seccomp of a process, from its `status` (proc(5)).
fn status(pid: u32) -> Result<[u64; 5]> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = |name: &str| -> Result<String> {
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        Ok(line
            .context("no such line in the status")?
            .trim()
            .to_owned())
    };
    Ok([
        u64::from_str_radix(&line("CapEff:")?, 16)?,
        u64::from_str_radix(&line("CapPrm:")?, 16)?,
        u64::from_str_radix(&line("CapBnd:")?, 16)?,
        line("NoNewPrivs:")?.parse()?,
        line("Seccomp:")?.parse()?,
    ])
}

#[test]
fn engine_and_reapers_keep_only_the_privileges_they_need() -> Result<()> {
    let _turn = turn(module_path!());
    let _alone = alone();
    // Numbers of capabilities in `linux/capability.h`.
    const BPF: u64 = 1 << 39;
    const OF_REAPERS: u64 = 1 << 2 | 1 << 12 | 1 << 19 | 1 << 21;
    let lab = Lab::new(AGENT)?;
    let others = listen(&lab.inside)?;
    let daemon = lab.daemon(&rule("others", &others, limit()))?;
    assert_eq!(status(daemon.pid())?, [BPF, BPF, 0, 1, 2]);
    let reapers = daemon.reapers()?;
    assert!(reapers.len() >= 2);
    for pid in reapers {
        eventually("a reaper with reduced privileges", patience(), || {
            let is_confined = status(pid)? == [OF_REAPERS, OF_REAPERS, 0, 1, 2];
            Ok(is_confined.then_some(()))
        })?;
    }
    // These privileges suffice to enforce, reload and adopt.
    assert_others_are_reset(&lab, &daemon, &others)?;
    daemon.reload(&rule("others", &others, 2 * limit()))?;
    Ok(())
}

/// The name and the nice value of a thread, from its `stat` (proc(5)).
fn nice_of(stat: &str) -> Result<(String, i32)> {
    let (start, rest) = stat.rsplit_once(") ").context("a name")?;
    let (_, name) = start.split_once('(').context("a name")?;
    let nice = rest.split(' ').nth(16).context("no nice value")?;
    Ok((name.to_owned(), nice.parse()?))
}

#[test]
fn engine_and_reapers_have_a_raised_priority() -> Result<()> {
    let _turn = turn(module_path!());
    let lab = Lab::new(AGENT)?;
    let daemon = lab.daemon(&format!(
        "{OWN}{}",
        session_enforcer_tests::idle_rule(limit())
    ))?;
    // One that has worked on a long request of the start lowers its priority, and ends.
    eventually("the priority of the reapers", patience(), || {
        let nice = |reaper| nice_of(&std::fs::read_to_string(format!("/proc/{reaper}/stat"))?);
        let nice: Vec<_> = daemon
            .reapers()?
            .into_iter()
            .filter_map(|pid| nice(pid).ok())
            .collect();
        let all = nice.iter().all(|(_, nice)| *nice == -10);
        Ok((all && !nice.is_empty()).then_some(()))
    })?;
    let mut seen = HashSet::new();
    for thread in std::fs::read_dir(format!("/proc/{}/task", daemon.pid()))? {
        let stat = std::fs::read_to_string(thread?.path().join("stat"))?;
        let (name, nice) = nice_of(&stat)?;
        // The HTTP thread has no priority, because clients decide how much it works.
        let expected = if name == "http" { 0 } else { -10 };
        if ["http", "session-enforce"].contains(&&*name) {
            assert_eq!(nice, expected, "{name}");
            seen.insert(name);
        }
    }
    assert_eq!(seen.len(), 2, "{seen:?}");
    Ok(())
}
