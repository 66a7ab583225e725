//! A host with many sockets and cgroups, or one where a user keeps changing them: sessions of
//! others are still reset in time.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr},
    os::fd::OwnedFd,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use session_enforcer_tests::{
    Agent, Cgroups, Daemon, Holders, Lab, Listener, Pair, Place, dial, unhurried,
};

use crate::turn;

const AGENT: &str = env!("CARGO_BIN_EXE_session-enforcer-test-agent");

fn limit() -> Duration {
    unhurried(Duration::from_secs(1))
}

/// The longest time of a start or a reload, even on a busy machine.
fn soon() -> Duration {
    unhurried(Duration::from_secs(20))
}

/// The largest lateness of a reset. A search of the host on the engine's thread would take 1 to 5
/// s.
const LATE_SECONDS: f64 = 0.5;

fn listen(agent: &Agent) -> Result<Listener> {
    agent.listen((Ipv4Addr::LOCALHOST, 0))
}

fn idle_rule(name: &str, conditions: &str, limit: Duration) -> String {
    let seconds = limit.as_secs();
    format!("[[rule]]\nname = \"{name}\"\n{conditions}\nidle_timeout = \"{seconds}s\"\n")
}

fn of_port(name: &str, listener: &Listener, limit: Duration) -> String {
    let conditions = format!(
        "direction = \"inbound\"\nlocal_ports = [{}]",
        listener.port()
    );
    idle_rule(name, &conditions, limit)
}

/// Opens connections one after the other. Asserts that each is reset in time and that the daemon
/// answers meanwhile.
fn assert_in_time(lab: &Lab, daemon: &Daemon, listener: &Listener, count: usize) -> Result<()> {
    let mut pairs = Vec::new();
    for _ in 0..count {
        pairs.push(Pair::open(&lab.outside, listener)?);
        let asked = Instant::now();
        ensure!(daemon.get("/healthz")?.0 == 200);
        assert!(asked.elapsed() < unhurried(Duration::from_secs(1)));
        thread::sleep(Duration::from_millis(100));
    }
    for pair in &pairs {
        let record = daemon.wait_for_termination_of(pair)?;
        record.assert_reset("idle_timeout", &pair.opened, limit());
        let late = record.number("session_enforcer.lateness_seconds");
        assert!(
            late < unhurried(Duration::from_secs(1)).as_secs_f64() * LATE_SECONDS,
            "{late}"
        );
    }
    Ok(())
}

#[test]
fn a_start_and_a_reload_with_many_descriptors_and_cgroups_delay_no_reset() -> Result<()> {
    let _turn = turn(module_path!());
    const CGROUPS: usize = 1_000;
    let lab = Lab::new(AGENT)?;
    let _crowd = Holders::of_descriptors(4)?;
    let parent = lab.cgroup.child()?;
    let cgroups = Cgroups::below(&parent, CGROUPS)?;
    let listener = listen(&lab.inside)?;
    let rules = of_port("victims", &listener, limit());
    let started = Instant::now();
    let daemon = lab.daemon(&rules)?;
    assert!(started.elapsed() < soon(), "{:?}", started.elapsed());
    thread::scope(|scope| {
        let victims = scope.spawn(|| assert_in_time(&lab, &daemon, &listener, 20));
        for _ in 0..3 {
            let asked = Instant::now();
            daemon.reload(&rules)?;
            assert!(asked.elapsed() < soon(), "{:?}", asked.elapsed());
        }
        victims.join().expect("the thread of the victims")
    })?;
    drop(cgroups);
    Ok(())
}

#[test]
fn a_cgroup_of_the_rules_that_comes_and_goes_constantly_delays_no_reset() -> Result<()> {
    let _turn = turn(module_path!());
    let lab = Lab::new(AGENT)?;
    let _crowd = Holders::of_descriptors(4)?;
    let slice = lab.cgroup.child()?;
    let unit = slice.path().join("unit");
    let listener = listen(&lab.inside)?;
    let named = format!("cgroups = [\"{}/unit\"]", slice.name()?);
    let hour = Duration::from_secs(3_600);
    let rules = idle_rule("named", &named, hour) + &of_port("victims", &listener, limit());
    let daemon = lab.daemon(&rules)?;
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let churn = scope.spawn(|| -> Result<u32> {
            let mut rounds = 0;
            while !stop.load(Ordering::Relaxed) {
                fs::create_dir(&unit)?;
                thread::sleep(Duration::from_millis(10));
                fs::remove_dir(&unit)?;
                thread::sleep(Duration::from_millis(10));
                rounds += 1;
            }
            Ok(rounds)
        });
        let victims = assert_in_time(&lab, &daemon, &listener, 20);
        stop.store(true, Ordering::Relaxed);
        assert!(churn.join().expect("the thread that churns")? > 10);
        victims
    })?;
    // A cgroup that stays is found.
    fs::create_dir(&unit)?;
    let agent = lab.at(&Place::here().in_directory(&unit))?;
    let pair = Pair::open(&lab.outside, &listen(&agent)?)?;
    daemon.wait_for_metric("session_enforcer_sessions", &[("rule", "named")], 1.0)?;
    drop((pair, agent));
    Ok(())
}

#[test]
fn unaccepted_mptcp_connections_delay_no_reset_and_are_recorded_once() -> Result<()> {
    let _turn = turn(module_path!());
    const CONNECTIONS: usize = 100;
    let lab = Lab::new(AGENT)?;
    let _crowd = Holders::of_descriptors(4)?;
    let mptcp = |agent: &Agent| -> Result<OwnedFd> {
        agent.socket(libc::AF_INET, libc::SOCK_STREAM, libc::IPPROTO_MPTCP)
    };
    let waiting = mptcp(&lab.inside)?;
    let waiting = Listener::on(waiting, SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))?;
    let listener = listen(&lab.inside)?;
    let rules = of_port("unaccepted", &waiting, limit()) + &of_port("victims", &listener, limit());
    let daemon = lab.daemon(&rules)?;
    let mut clients = Vec::new();
    for _ in 0..CONNECTIONS {
        clients.push(dial(mptcp(&lab.outside)?, waiting.address)?);
    }
    assert_in_time(&lab, &daemon, &listener, 20)?;
    let failed = [("rule", "unaccepted"), ("result", "failed")];
    let name = "session_enforcer_terminations_total";
    daemon.wait_for_metric(name, &failed, CONNECTIONS as f64)?;
    // The second attempt fails for the same reason and is not recorded again.
    thread::sleep(unhurried(Duration::from_secs(11)));
    assert_eq!(daemon.metric(name, &failed)?, CONNECTIONS as f64);
    Ok(())
}

#[test]
fn sessions_of_unknown_owner_with_many_listeners_delay_no_reset() -> Result<()> {
    let _turn = turn(module_path!());
    const LISTENERS: usize = 2_000;
    const SESSIONS: usize = 200;
    let lab = Lab::new(AGENT)?;
    // These sockets are older than the programs, which have not recorded their owners.
    let many = (0..LISTENERS).map(|_| listen(&lab.outside));
    let many = many.collect::<Result<Vec<_>>>()?;
    let [server, listener] = [listen(&lab.outside)?, listen(&lab.inside)?];
    let clients: Vec<OwnedFd> = (0..SESSIONS)
        .map(|_| lab.inside.tcp(server.address))
        .collect::<Result<_>>()?;
    let of_user = format!("users = [0]\nremote_ports = [{}]", server.port());
    let hour = Duration::from_secs(3_600);
    let rules = idle_rule("owned", &of_user, hour) + &of_port("victims", &listener, limit());
    let daemon = lab.daemon(&rules)?;
    let mut connected = Vec::new();
    for client in clients {
        connected.push((dial(client, server.address)?, server.accept()?));
    }
    assert_in_time(&lab, &daemon, &listener, 20)?;
    let sessions = SESSIONS as f64;
    daemon.wait_for_metric("session_enforcer_sessions", &[("rule", "owned")], sessions)?;
    drop(many);
    Ok(())
}
