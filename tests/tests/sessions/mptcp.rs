//! MPTCP: the application holds one connection, and each of its subflows is a session.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    os::fd::{AsRawFd, OwnedFd},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use nix::{
    errno::Errno,
    sched::{CloneFlags, unshare},
};
use session_enforcer_tests::{
    Agent, Daemon, End, Lab, Listener, Moment, Netns, Pair, Record, Veth, dial, ends_of,
    eventually, idle_rule, is_kernel_before, option, patience, unhurried,
};

const AGENT: &str = env!("CARGO_BIN_EXE_session-enforcer-test-agent");

fn limit() -> Duration {
    unhurried(Duration::from_secs(2))
}

fn rule() -> String {
    idle_rule(limit())
}
const TERMINATIONS: &str = "session_enforcer_terminations_total";
const LOCALHOST: ([u8; 4], u16) = ([127, 0, 0, 1], 0);

/// An MPTCP socket of the agent. Fails on a kernel without MPTCP.
fn mptcp(agent: &Agent) -> Result<OwnedFd> {
    agent
        .socket(libc::AF_INET, libc::SOCK_STREAM, libc::IPPROTO_MPTCP)
        .context("an MPTCP socket (CONFIG_MPTCP, net.mptcp.enabled)")
}

fn listen(agent: &Agent, address: impl Into<SocketAddr>) -> Result<Listener> {
    Listener::on(mptcp(agent)?, address.into())
}

/// A connection that uses MPTCP at both ends.
fn open(client: &Agent, listener: &Listener) -> Result<Pair> {
    let pair = Pair::dial(mptcp(client)?, listener, listener.address)?;
    for end in [&pair.client, &pair.server] {
        let protocol = option(end, libc::SOL_SOCKET, libc::SO_PROTOCOL)?;
        ensure!(protocol == libc::IPPROTO_MPTCP, "fell back to TCP");
    }
    Ok(pair)
}

/// The end that was reset on this host reads no error, but it cannot send any more.
fn assert_ended_here(end: &End, stream: &TcpStream, last: &Moment) {
    end.assert_not_early(last, limit());
    assert_eq!(end.error, None);
    let written = (&*stream).write(b"late");
    assert!(written.is_err(), "{written:?}");
}

#[test]
fn both_applications_see_the_reset_at_once_where_the_server_is_tracked() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = listen(&lab.inside, LOCALHOST)?;
    let daemon = lab.daemon(&rule())?;
    let pair = open(&lab.outside, &listener)?;
    let last = pair.round_trip()?;
    let [client, server] = pair.ends()?;
    client.assert_reset(Errno::ECONNRESET, &last, limit());
    assert_ended_here(&server, &pair.server, &last);
    let record = daemon.wait_for_termination_of(&pair)?;
    record.assert_reset("idle_timeout", &last, limit());
    assert_eq!(record.text("network.direction"), "inbound");
    daemon.wait_for_metric("session_enforcer_sessions", &[], 0.0)?;
    daemon.wait_for_metric(TERMINATIONS, &[("result", "reset")], 1.0)?;
    daemon.wait_for_metric(TERMINATIONS, &[("result", "failed")], 0.0)
}

#[test]
fn both_applications_see_the_reset_at_once_where_the_client_is_tracked() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = listen(&lab.outside, LOCALHOST)?;
    let daemon = lab.daemon(&rule())?;
    let pair = open(&lab.inside, &listener)?;
    let last = pair.round_trip()?;
    let [client, server] = pair.ends()?;
    assert_ended_here(&client, &pair.client, &last);
    server.assert_reset(Errno::ECONNRESET, &last, limit());
    let record = daemon.wait_for_termination_of(&pair)?;
    record.assert_reset("idle_timeout", &last, limit());
    assert_eq!(record.text("network.direction"), "outbound");
    Ok(())
}

#[test]
fn a_connection_that_is_older_than_the_daemon_is_reset_too() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = listen(&lab.inside, LOCALHOST)?;
    let pair = open(&lab.outside, &listener)?;
    let last = pair.round_trip()?;
    let daemon = lab.daemon(&rule())?;
    let [client, server] = pair.ends()?;
    client.assert_reset(Errno::ECONNRESET, &last, limit());
    assert_ended_here(&server, &pair.server, &last);
    let record = daemon.wait_for_termination_of(&pair)?;
    record.assert_reset("idle_timeout", &last, limit());
    Ok(())
}

#[test]
fn only_the_expired_one_of_two_connections_of_a_process_is_reset() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = listen(&lab.inside, LOCALHOST)?;
    let plain = lab.inside.listen(LOCALHOST)?;
    let daemon = lab.daemon(&rule())?;
    let [busy, idle] = [
        open(&lab.outside, &listener)?,
        open(&lab.outside, &listener)?,
    ];
    let tcp = Pair::open(&lab.outside, &plain)?;
    thread::scope(|scope| -> Result<()> {
        let ends = scope.spawn(|| idle.ends());
        busy.keep_busy(2 * limit())?;
        let [client, _] = ends.join().expect("the thread that waits")?;
        client.assert_reset(Errno::ECONNRESET, &idle.opened, limit());
        Ok(())
    })?;
    assert_eq!(daemon.terminations_of(&busy)?.len(), 0);
    let last = busy.round_trip()?;
    let record = daemon.wait_for_termination_of(&idle)?;
    record.assert_reset("idle_timeout", &idle.opened, limit());
    // The plain TCP connection in the same batch is reset with `SOCK_DESTROY` as usual.
    let [client, server] = tcp.ends()?;
    client.assert_reset(Errno::ECONNRESET, &tcp.opened, limit());
    server.assert_reset(Errno::ECONNABORTED, &tcp.opened, limit());
    // The listener still works.
    let later = open(&lab.outside, &listener)?;
    later.round_trip()?;
    busy.ends()?[0].assert_reset(Errno::ECONNRESET, &last, limit());
    Ok(())
}

#[test]
fn a_connection_that_has_fallen_back_to_tcp_is_reset() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let plain_server = lab.outside.listen(LOCALHOST)?;
    let server = listen(&lab.inside, LOCALHOST)?;
    let daemon = lab.daemon(&rule())?;
    // An MPTCP socket that dialled a plain TCP server, and an accepted socket of an MPTCP listener
    // whose client is plain TCP.
    let dialled = mptcp(&lab.inside)?;
    let dialled = Pair::dial(dialled, &plain_server, plain_server.address)?;
    let accepted = Pair::open(&lab.outside, &server)?;
    let last = [dialled.round_trip()?, accepted.round_trip()?];
    for (pair, last) in [&dialled, &accepted].into_iter().zip(last) {
        for end in pair.ends()? {
            end.assert_not_early(&last, limit());
        }
        let record = daemon.wait_for_termination_of(pair)?;
        record.assert_reset("idle_timeout", &last, limit());
    }
    Ok(())
}

#[test]
fn an_unaccepted_connection_stays_behind_the_gate_and_is_reset_once_accepted() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = listen(&lab.inside, LOCALHOST)?;
    let daemon = lab.daemon(&rule())?;
    let (opened, client) = Moment::of(|| dial(mptcp(&lab.outside)?, listener.address))?;
    let failed = daemon.wait_for_termination()?;
    failed.assert_due("idle_timeout", &opened, limit());
    assert_eq!(failed.text("session_enforcer.result"), "failed");
    let said = failed.text("error.message");
    assert!(said.contains("no process has accepted"), "{said}");
    daemon.wait_for_log(said)?;
    (&client).write_all(b"late")?;
    let server = listener.accept()?;
    // The daemon's next attempt succeeds.
    let ends = ends_of(&[&client, &server])?;
    assert_eq!(ends[0].error, Some(Errno::ECONNRESET));
    let mut late = [0];
    let read = (&server).read(&mut late);
    assert!(
        !matches!(read, Ok(1..)),
        "payload passed after the deadline"
    );
    let records = daemon.wait_for_terminations(2)?;
    records[1].assert_reset("idle_timeout", &opened, limit());
    Ok(())
}

/// Closes every other descriptor in this thread's table. The table is a copy: without this, sockets
/// that other tests close would stay open in it.
fn close_all_others(kept: &impl AsRawFd) -> Result<()> {
    let kept = libc::c_uint::try_from(kept.as_raw_fd())?;
    for (first, last) in [(3, kept - 1), (kept + 1, libc::c_uint::MAX)] {
        if first <= last {
            // SAFETY: the call takes no pointers, and nothing else uses this thread's own table.
            let status = unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
            Errno::result(status).context("close_range(2)")?;
        }
    }
    Ok(())
}

#[test]
fn a_connection_in_the_descriptor_table_of_a_single_thread_is_reset() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = listen(&lab.inside, LOCALHOST)?;
    let daemon = lab.daemon(&rule())?;
    let (opened, client) = Moment::of(|| dial(mptcp(&lab.outside)?, listener.address))?;
    // `pidfd_open()` accepts a thread from Linux 6.9 on.
    let is_out_of_reach = is_kernel_before(6, 9)?;
    let (end, ended) = std::sync::mpsc::channel::<()>();
    thread::scope(|scope| {
        let listener = &listener;
        let holder = scope.spawn(move || -> Result<()> {
            unshare(CloneFlags::CLONE_FILES)?;
            let server = listener.accept()?;
            close_all_others(&server)?;
            let _ = ended.recv();
            Ok(())
        });
        let result = if is_out_of_reach { "failed" } else { "reset" };
        let is_it = |record: &Record| record.text("session_enforcer.result") == result;
        // On a slow machine a long reset may first be recorded as hanging.
        let record = eventually("the record", patience(), || {
            Ok(daemon.terminations()?.into_iter().find(is_it))
        });
        let ends = (!is_out_of_reach).then(|| ends_of(&[&client]));
        drop(end);
        holder.join().expect("the thread does not panic")?;
        record?.assert_due("idle_timeout", &opened, limit());
        if let Some(ends) = ends {
            assert_eq!(ends?[0].error, Some(Errno::ECONNRESET));
        }
        Ok(())
    })
}

#[test]
fn a_connection_that_its_process_has_closed_is_reset() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = listen(&lab.inside, LOCALHOST)?;
    let daemon = lab.daemon(&rule())?;
    let Pair { client, server, .. } = open(&lab.outside, &listener)?;
    // The client still holds its end, which nothing resets during the test.
    drop(server);
    let record = daemon.wait_for_termination()?;
    assert_eq!(record.text("session_enforcer.result"), "reset");
    daemon.wait_for_metric("session_enforcer_sessions", &[], 0.0)?;
    drop(client);
    Ok(())
}

#[test]
fn without_cap_sys_ptrace_the_termination_fails_and_the_error_names_it() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = listen(&lab.inside, LOCALHOST)?;
    let config = format!("[daemon]\nnetwork_namespaces = \"own\"\n{}", rule());
    // CAP_NET_ADMIN, CAP_PERFMON and CAP_BPF.
    let daemon = lab
        .launch()
        .config(&config)
        .capabilities(&[12, 38, 39])
        .start()?;
    let pair = open(&lab.outside, &listener)?;
    let record = daemon.wait_for_termination_of(&pair)?;
    assert_eq!(record.text("event.action"), "session-termination-failed");
    assert_eq!(record.text("session_enforcer.result"), "failed");
    let said = record.text("error.message");
    assert!(said.contains("CAP_SYS_PTRACE"), "{said}");
    daemon.wait_for_log(said)?;
    daemon.wait_for_metric(TERMINATIONS, &[("result", "failed")], 1.0)
}

/// Two namespaces in which each connection gets a second subflow. It is a backup: it carries
/// nothing while the first one works.
struct Backup {
    listener: Listener,
    inside: Agent,
    _outside: Agent,
    _namespaces: [Netns; 2],
}

impl Backup {
    fn new(lab: &Lab) -> Result<Self> {
        let [left, right] = [Netns::new()?, Netns::new()?];
        Veth::between(&left, &right)?;
        left.ip("addr add 10.77.0.3/24 dev veth0")?;
        left.ip("mptcp limits set subflow 2 add_addr_accepted 2")?;
        right.ip("mptcp limits set subflow 2 add_addr_accepted 2")?;
        left.ip("mptcp endpoint add 10.77.0.3 dev veth0 subflow backup")?;
        let inside = lab.inside_in(&left)?;
        let outside = lab.outside_in(&right)?;
        Ok(Self {
            listener: listen(&outside, (Veth::RIGHT, 0))?,
            inside,
            _outside: outside,
            _namespaces: [left, right],
        })
    }

    /// A connection with two subflows, so two sessions.
    fn open(&self, daemon: &Daemon) -> Result<Pair> {
        let pair = open(&self.inside, &self.listener)?;
        // The kernel adds the second subflow once the first is fully established.
        pair.round_trip()?;
        daemon.wait_for_metric("session_enforcer_sessions", &[], 2.0)?;
        Ok(pair)
    }
}

#[test]
fn an_idle_subflow_of_a_busy_connection_is_reset_alone_and_the_last_one_with_the_connection()
-> Result<()> {
    let lab = Lab::new(AGENT)?;
    let backup = Backup::new(&lab)?;
    let daemon = lab.daemon(&rule())?;
    let (opening, pair) = Moment::of(|| backup.open(&daemon))?;
    pair.keep_busy(2 * limit())?;
    let records = daemon.wait_for_terminations(1)?;
    let [source, _] = records[0].ports();
    assert_ne!(source, pair.client_address.port(), "the busy subflow");
    // The idle time of the second subflow began at its establishment.
    records[0].assert_reset("idle_timeout", &opening, limit());
    let last = pair.round_trip()?;
    let [client, server] = pair.ends()?;
    assert_ended_here(&client, &pair.client, &last);
    server.assert_reset(Errno::ECONNRESET, &last, limit());
    let record = daemon.wait_for_termination_of(&pair)?;
    record.assert_reset("idle_timeout", &last, limit());
    daemon.wait_for_metric("session_enforcer_sessions", &[], 0.0)
}

#[test]
fn a_connection_ends_with_the_lifetime_of_any_of_its_subflows() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let backup = Backup::new(&lab)?;
    let lifetime = unhurried(Duration::from_secs(3));
    let seconds = lifetime.as_secs();
    let rule = format!("[[rule]]\nname = \"life\"\nmax_lifetime = \"{seconds}s\"\n");
    let daemon = lab.daemon(&rule)?;
    let pair = backup.open(&daemon)?;
    let end = pair.keep_busy_until_end()?;
    end.assert_not_early(&pair.opened, lifetime);
    pair.ends()?;
    daemon.wait_for_metric("session_enforcer_sessions", &[], 0.0)?;
    for record in daemon.wait_for_terminations(1)? {
        assert_eq!(record.text("event.reason"), "max_lifetime");
        assert_ne!(record.text("session_enforcer.result"), "failed");
    }
    Ok(())
}
