//! A process at which the kernel hangs: whoever looks at its namespaces or descriptors waits.

use std::{net::Ipv4Addr, time::Duration};

use anyhow::Result;
use session_enforcer_tests::{
    Agent, Daemon, Lab, Listener, Netns, Pair, services::HangingExec, unhurried,
};

use crate::turn;

const AGENT: &str = env!("CARGO_BIN_EXE_session-enforcer-test-agent");

/// A daemon that waited for the process would be late for as long as the process hangs.
const LATE_SECONDS: f64 = 5.0;

fn limit() -> Duration {
    unhurried(Duration::from_secs(1))
}

fn rule(name: &str) -> String {
    let seconds = limit().as_secs();
    format!("[[rule]]\nname = \"{name}\"\ndirection = \"inbound\"\nidle_timeout = \"{seconds}s\"\n")
}

fn listen(agent: &Agent) -> Result<Listener> {
    agent.listen((Ipv4Addr::LOCALHOST, 0))
}

/// An MPTCP connection, which is reset through the process that holds it.
fn open_mptcp(lab: &Lab) -> Result<Pair> {
    let socket =
        |agent: &Agent| agent.socket(libc::AF_INET, libc::SOCK_STREAM, libc::IPPROTO_MPTCP);
    let listener = Listener::on(socket(&lab.inside)?, (Ipv4Addr::LOCALHOST, 0).into())?;
    Pair::dial(socket(&lab.outside)?, &listener, listener.address)
}

fn assert_in_time(daemon: &Daemon, pair: &Pair) -> Result<()> {
    let record = daemon.wait_for_termination_of(pair)?;
    record.assert_reset("idle_timeout", &pair.opened, limit());
    let late = record.number("session_enforcer.lateness_seconds");
    let bound = unhurried(Duration::from_secs(1)).as_secs_f64() * LATE_SECONDS;
    assert!(late < bound, "{late} s late");
    Ok(())
}

#[test]
fn a_process_that_hangs_in_execve_delays_no_start_no_reload_and_no_reset() -> Result<()> {
    let _turn = turn(module_path!());
    let lab = Lab::new(AGENT)?;
    let (known, later) = (Netns::new()?, Netns::new()?);
    let far = listen(&lab.inside_in(&known)?)?;
    let near = listen(&lab.inside)?;
    let older = [
        Pair::open(&lab.outside, &near)?,
        Pair::open(&lab.outside_in(&known)?, &far)?,
    ];
    let hanging = HangingExec::start()?;
    let daemon = lab.launch().config(&rule("first")).start_unready()?;
    for pair in &older {
        daemon.wait_for_termination_of(pair)?;
    }
    daemon.wait_for_degraded("namespace", true)?;
    daemon.wait_for_log("the kernel hangs at 1 process")?;
    daemon.reload(&rule("second"))?;
    // The process of the first must be searched for, and the namespace of the second.
    let mptcp = open_mptcp(&lab)?;
    let in_new = Pair::open(&lab.outside_in(&later)?, &listen(&lab.inside_in(&later)?)?)?;
    for pair in [&mptcp, &in_new] {
        assert_in_time(&daemon, pair)?;
    }
    drop(hanging);
    daemon.reload(&rule("third"))?;
    daemon.wait_for_degraded("namespace", false)
}
