//! The session table starts small and grows while connections are opened, used and closed. No
//! session is lost, reset early or counted wrongly.

use std::{
    fs,
    net::Ipv4Addr,
    path::Path,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use session_enforcer::{
    datapath::{Datapath, Options, PinDir},
    host::cgroup::Cgroup,
};
use session_enforcer_common::{Limits, MatchEntry};
use session_enforcer_tests::{
    Daemon, Lab, Listener, Pair, Pins, cookie, disconnect, eventually, idle_rule,
    longer_than_a_start, patience,
};

use crate::turn;

const AGENT: &str = env!("CARGO_BIN_EXE_session-enforcer-test-agent");

/// The daemon's log messages at the begin and at the end of the growth.
const BEGINS: &str = "is made larger";
const DONE: &str = "has room for";

/// The test holds both ends of each connection, with at most 20,000 descriptors.
const MOST: usize = 9_000;

/// A rule whose sessions end during the test and a rule whose sessions do not.
fn config(limit: Duration, short: &Listener) -> String {
    let short = short.port();
    format!(
        "[[rule]]\nname = \"short\"\nlocal_ports = [{short}]\nidle_timeout = \"{}s\"\n\
         [[rule]]\nname = \"long\"\nidle_timeout = \"3600s\"\n",
        limit.as_secs()
    )
}

/// Serialises tests that open so many connections: two of them would exceed the limit of
/// descriptors.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn listen(lab: &Lab) -> Result<Listener> {
    lab.inside.listen((Ipv4Addr::LOCALHOST, 0))
}

/// Opens connections, and closes some, until the log contains `said`. Once the growth has begun it
/// closes as many as it opens, so that a slow machine does not fill the table first. On a host with
/// many sockets the table is larger from the start.
fn fill_until(daemon: &Daemon, lab: &Lab, listener: &Listener, said: &str) -> Result<Vec<Pair>> {
    const AT_ONCE: usize = 50;
    let mut pairs = Vec::new();
    eventually("the table grows", 3 * patience(), || {
        let log = daemon.log();
        if log.contains(said) {
            return Ok(Some(()));
        }
        ensure!(pairs.len() < MOST, "the table does not grow: {log}");
        for _ in 0..AT_ONCE {
            pairs.push(Pair::open(&lab.inside, listener)?);
        }
        pairs.drain(..if log.contains(BEGINS) { AT_ONCE } else { 10 });
        Ok(None)
    })?;
    Ok(pairs)
}

/// A daemon with pins and its listeners. The rule `short` of the first one has this limit.
fn start() -> Result<(Lab, [Listener; 2], Duration, Daemon)> {
    let lab = Lab::new(AGENT)?;
    let listeners = [listen(&lab)?, listen(&lab)?];
    let limit = longer_than_a_start();
    let daemon = lab.pinned_daemon(&config(limit, &listeners[0]))?;
    Ok((lab, listeners, limit, daemon))
}

/// Asserts that every session of the rule `long` is tracked and none was refused.
fn assert_all_are_tracked(daemon: &Daemon, pairs: &[Pair]) -> Result<()> {
    let both = 2.0 * pairs.len() as f64;
    daemon.wait_for_metric("session_enforcer_sessions", &[("rule", "long")], both)?;
    for cause in ["map_full", "rule_full"] {
        let untracked = "session_enforcer_sessions_untracked_total";
        assert_eq!(daemon.metric(untracked, &[("cause", cause)])?, 0.0);
    }
    Ok(())
}

#[test]
fn a_table_that_grows_loses_no_session_and_no_payload() -> Result<()> {
    let _turn = turn(module_path!());
    let _alone = alone();
    let (lab, [short, long], limit, daemon) = start()?;
    let silent = Pair::open(&lab.outside, &short)?;
    let busy = Pair::open(&lab.outside, &short)?;
    let is_over = AtomicBool::new(false);
    let mut trips = 0_u64;
    let (mut pairs, last) = thread::scope(|scope| {
        let trips = &mut trips;
        let used = scope.spawn(|| {
            let mut last = busy.round_trip()?;
            *trips += 1;
            while !is_over.load(Ordering::Relaxed) {
                last = busy.round_trip()?;
                *trips += 1;
            }
            anyhow::Ok(last)
        });
        let pairs = fill_until(&daemon, &lab, &long, DONE);
        is_over.store(true, Ordering::Relaxed);
        let last = used.join().expect("the thread panicked")?;
        let pairs: Vec<Pair> = pairs?;
        anyhow::Ok((pairs, last))
    })?;
    assert_all_are_tracked(&daemon, &pairs)?;
    // Parts of both records were written into the smaller table.
    for (pair, since) in [(&silent, &silent.opened), (&busy, &last)] {
        let record = daemon.wait_for_termination_of(pair)?;
        record.assert_reset("idle_timeout", since, limit);
        for end in pair.ends()? {
            end.assert_not_early(since, limit);
        }
    }
    let record = daemon.wait_for_termination_of(&busy)?;
    assert_eq!(record.bytes(), [4 * trips; 2]);
    // The counters continue.
    let of_long = [("rule", "long")];
    let opened = daemon.metric("session_enforcer_sessions_opened_total", &of_long)?;
    let closed = daemon.metric("session_enforcer_sessions_closed_total", &of_long)?;
    assert_eq!(opened - closed, 2.0 * pairs.len() as f64);
    pairs.truncate(10);
    assert_all_are_tracked(&daemon, &pairs)?;
    daemon.wait_for_metric("session_enforcer_map_entries", &[], 20.0)?;
    let repaired = "session_enforcer_reconcile_repaired_total";
    for kind in ["missed", "stale", "unscheduled"] {
        assert_eq!(daemon.metric(repaired, &[("kind", kind)])?, 0.0, "{kind}");
    }
    Ok(())
}

#[test]
fn a_table_that_cannot_grow_keeps_its_sessions() -> Result<()> {
    let _turn = turn(module_path!());
    let _alone = alone();
    let (lab, [short, long], limit, daemon) = start()?;
    // A foreign directory where the daemon would pin the maps of the larger table.
    let [set] = &lab.pins.sets()?[..] else {
        anyhow::bail!("not one set of pins");
    };
    let mut in_the_way = set.clone().into_os_string();
    in_the_way.push("-next");
    fs::create_dir_all(Path::new(&in_the_way).join("other"))?;
    let mut pairs = fill_until(&daemon, &lab, &long, "could not grow")?;
    fs::remove_dir_all(&in_the_way)?;
    assert_all_are_tracked(&daemon, &pairs)?;
    // The smaller table fills up, and the message says what to do.
    while pairs.len() < MOST && !daemon.is_degraded("untracked")? {
        for _ in 0..200 {
            pairs.push(Pair::open(&lab.inside, &long)?);
        }
    }
    daemon.wait_for_degraded("untracked", true)?;
    let (_, body) = daemon.get("/readyz")?;
    assert!(body.contains("raise daemon.max_sessions"), "{body}");
    pairs.truncate(10);
    let pair = Pair::open(&lab.outside, &short)?;
    let record = daemon.wait_for_termination_of(&pair)?;
    record.assert_reset("idle_timeout", &pair.opened, limit);
    Ok(())
}

/// The permitted capabilities of the daemon's thread with this name (`/proc/PID/task/TID/status`).
fn capabilities_of(daemon: &Daemon, thread: &str) -> Result<u64> {
    for task in fs::read_dir(format!("/proc/{}/task", daemon.pid()))? {
        let task = task?.path();
        if fs::read_to_string(task.join("comm"))?.trim_end() == thread {
            let status = fs::read_to_string(task.join("status"))?;
            let line = status.lines().find_map(|line| line.strip_prefix("CapPrm:"));
            return Ok(u64::from_str_radix(line.context("CapPrm")?.trim(), 16)?);
        }
    }
    anyhow::bail!("no thread {thread}");
}

#[test]
fn the_thread_that_loads_larger_tables_keeps_three_capabilities() -> Result<()> {
    let _turn = turn(module_path!());
    // CAP_NET_ADMIN, CAP_PERFMON and CAP_BPF (`linux/capability.h`).
    const KEPT: u64 = 1 << 12 | 1 << 38 | 1 << 39;
    let lab = Lab::new(AGENT)?;
    let daemon = lab.pinned_daemon(&idle_rule(Duration::from_secs(60)))?;
    assert_eq!(capabilities_of(&daemon, "load-larger")?, KEPT);
    Ok(())
}

/// Kills the daemon once the growth has begun and `is_time` holds. Asserts that the next daemon has
/// all sessions.
fn assert_the_next_daemon_has_all_sessions(
    is_time: impl Fn(&Lab, &Daemon) -> Result<bool>,
) -> Result<()> {
    let _alone = alone();
    let lab = Lab::new(AGENT)?;
    let [short, long] = [listen(&lab)?, listen(&lab)?];
    let limit = 2 * longer_than_a_start();
    let config = config(limit, &short);
    let mut daemon = lab.pinned_daemon(&config)?;
    let used = Pair::open(&lab.outside, &short)?;
    let pairs = fill_until(&daemon, &lab, &long, BEGINS)?;
    while !is_time(&lab, &daemon)? {
        used.round_trip()?;
    }
    daemon.kill()?;
    let last = used.round_trip()?;
    let mut second = lab.pinned_daemon(&config)?;
    assert_all_are_tracked(&second, &pairs)?;
    let record = second.wait_for_termination_of(&used)?;
    record.assert_reset("idle_timeout", &last, limit);
    // The second and the third daemon make the table large enough at their start.
    second.stop()?;
    let third = lab.pinned_daemon(&config)?;
    assert_all_are_tracked(&third, &pairs)?;
    for daemon in [&second, &third] {
        assert!(!daemon.log().contains(BEGINS), "{}", daemon.log());
    }
    Ok(())
}

#[test]
fn a_daemon_killed_while_it_makes_a_larger_table_leaves_all_sessions_to_the_next() -> Result<()> {
    let _turn = turn(module_path!());
    assert_the_next_daemon_has_all_sessions(|_, _| Ok(true))
}

#[test]
fn a_daemon_killed_between_two_tables_leaves_all_sessions_to_the_next() -> Result<()> {
    let _turn = turn(module_path!());
    assert_the_next_daemon_has_all_sessions(|lab, daemon| {
        // If the growth is too fast to be observed, it is over.
        let is_between = lab.pins.names()?.iter().any(|name| name == "TORN");
        Ok(is_between || daemon.log().contains(DONE))
    })
}

/// Loads the programs with these pins, without a daemon.
fn load_pinned(pins: &Pins, max_sessions: u32) -> Result<Datapath> {
    let options = Options {
        max_sessions,
        only_netns: None,
        notes_owners: false,
        verbose: false,
    };
    Ok(Datapath::load(options, Some(PinDir::hold(pins.path())?))?)
}

/// The next daemon copies the table, and only then replaces the programs.
#[test]
fn a_socket_that_is_connected_again_after_its_session_was_copied_has_its_later_session()
-> Result<()> {
    let _turn = turn(module_path!());
    let lab = Lab::new(AGENT)?;
    let pins = Pins::new();
    let cgroup = Cgroup::open(lab.cgroup.path())?;
    let limits = Limits {
        idle_timeout_ns: 3_600_000_000_000,
        max_lifetime_ns: 0,
        lifetime_jitter_ns: 0,
        response_timeout_ns: 0,
        half_closed_timeout_ns: 0,
        min_answer: 0,
        max_sessions: 0,
        generation: 1,
        min_payload: 1,
        activity: 0,
        gate: 0,
        jitter_key: 0,
    };
    let mut before = load_pinned(&pins, 1_024)?;
    before.put_policy(1, &[MatchEntry::any(0)], &[limits])?;
    before.attach(&cgroup)?;
    before.commit()?;
    let listener = lab.outside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let first = Pair::open(&lab.inside, &listener)?;
    let cookie = cookie(&first.client)?;
    let copied = before.session(cookie)?.context("the first session")?;
    drop(before);

    let mut after = load_pinned(&pins, 2_048)?;
    let again = Pair::dial(disconnect(first.client)?, &listener, listener.address)?;
    after.attach(&cgroup)?;
    after.compare_sessions()?;
    let session = after.session(cookie)?.context("the second session")?;
    assert!(session.established_ns > copied.established_ns);
    assert_eq!(session.local_port, again.client.local_addr()?.port());
    Ok(())
}
