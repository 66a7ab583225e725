//! OpenSSH: an idle login is reset at both ends, and a login in which somebody types lives.

use std::{collections::BTreeSet, fs, thread, time::Duration};

use anyhow::Result;
use session_enforcer_tests::{Daemon, Moment, eventually, patience, scaled, services::OpenSsh};

const AGENT: &str = env!("CARGO_BIN_EXE_session-enforcer-test-agent");
const TYPING: Duration = Duration::from_millis(500);

/// Longer than a login takes; one waits for another.
fn limit() -> Duration {
    scaled(Duration::from_secs(4))
}

fn daemon(openssh: &OpenSsh) -> Result<Daemon> {
    openssh.lab.daemon(&format!(
        "[[rule]]\nname = \"ssh\"\nlocal_ports = [{}]\nidle_timeout = \"{}s\"\n",
        OpenSsh::PORT,
        limit().as_secs()
    ))
}

/// The processes in the cgroup, without zombies.
fn processes(openssh: &OpenSsh) -> Result<BTreeSet<u64>> {
    let processes = fs::read_to_string(openssh.lab.cgroup.path().join("cgroup.procs"))?;
    Ok(processes
        .lines()
        .map(str::parse)
        .collect::<Result<_, _>>()?)
}

#[test]
fn an_idle_login_ends_with_its_processes_and_one_with_typing_lives() -> Result<()> {
    let openssh = OpenSsh::start(AGENT)?;
    let daemon = daemon(&openssh)?;
    let mut typing = openssh.login("the ssh that types", &[])?;
    let without_idle = processes(&openssh)?;
    let mut idle = openssh.login("the idle ssh", &[])?;
    assert!(processes(&openssh)?.contains(&idle.shell) && !without_idle.contains(&idle.shell));
    let (last, ()) = Moment::of(|| idle.round_trip())?;
    while last.elapsed() < 2 * limit() + Duration::from_secs(1) {
        typing.round_trip()?;
        thread::sleep(TYPING);
    }

    let record = daemon.wait_for_termination()?;
    record.assert_reset("idle_timeout", &last, limit());
    assert_eq!(record.ports(), [idle.port, OpenSsh::PORT]);
    // TCP keepalive probes did not count as activity.
    assert!(openssh.keepalive_probes()? > 0);
    let status = idle.client.finish(patience())?;
    assert_eq!(status.code(), Some(255));
    // The message depends on whether the client reads or writes first.
    let output = idle.client.output();
    let says = |text| output.contains(text);
    assert!(
        says("Connection reset by peer") || says("Broken pipe"),
        "{output}"
    );
    eventually("the end of the idle login's processes", patience(), || {
        Ok((processes(&openssh)? == without_idle).then_some(()))
    })?;
    let says = format!("port {}: Software caused connection abort", idle.port);
    assert!(openssh.log().contains(&says), "{}", openssh.log());

    typing.round_trip()?;
    assert_eq!(daemon.terminations()?.len(), 1);
    Ok(())
}

/// SSH's own keepalives are encrypted payload, which nothing on the way can distinguish from
/// typing. To end idle logins, turn them off in the client and in the server.
#[test]
fn ssh_keepalives_are_payload_and_keep_a_login_alive() -> Result<()> {
    let openssh = OpenSsh::start(AGENT)?;
    let daemon = daemon(&openssh)?;
    let (opened, mut login) =
        Moment::of(|| openssh.login("the ssh with keepalives", &["ServerAliveInterval=1"]))?;
    opened.wait(2 * limit());
    login.round_trip()?;
    assert_eq!(daemon.terminations()?.len(), 0);
    Ok(())
}
