//! Network namespaces: one attachment covers all of them. They may come and go, and the daemon
//! keeps none alive.

use std::{
    fs::File,
    io::{IoSlice, IoSliceMut, Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpStream},
    os::{
        fd::{AsRawFd as _, FromRawFd as _, RawFd},
        unix::net::UnixStream,
    },
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result};
use nix::{
    cmsg_space,
    errno::Errno,
    sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg},
};
use session_enforcer::reaper::namespaces::visit_all;
use session_enforcer_tests::{
    Agent, Daemon, Lab, Netns, Pair, Veth, assert_all_reset, disconnect, ends_of, eventually,
    idle_rule, longer_than_a_start as limit, patience, reset_on_close,
};

const AGENT: &str = env!("CARGO_BIN_EXE_session-enforcer-test-agent");

fn rule() -> String {
    idle_rule(limit())
}

#[test]
fn clients_and_servers_in_other_namespaces_are_enforced() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let [left, right] = [Netns::new()?, Netns::new()?];
    Veth::between(&left, &right)?;
    let daemon = lab.daemon(&rule())?;
    let clients = [lab.inside_in(&left)?, lab.outside_in(&left)?];
    let servers = [lab.outside_in(&right)?, lab.inside_in(&right)?];
    let mut sessions = Vec::new();
    for address in [Veth::RIGHT, Veth::RIGHT_V6] {
        for (client, server) in clients.iter().zip(&servers) {
            let pair = Pair::open(client, &server.listen((address, 0))?)?;
            sessions.push((pair.round_trip()?, pair));
        }
    }
    for (last, pair) in &sessions {
        daemon.assert_reset_of(pair, "idle_timeout", last, limit())?;
    }
    Ok(())
}

/// A survey lists sockets only in namespaces that have TCP sockets.
#[test]
fn a_survey_knows_whether_a_namespace_has_tcp_sockets() -> Result<()> {
    let netns = Netns::new()?;
    let has_tcp_sockets = || {
        let mut found = Vec::new();
        let errors = visit_all(vec![netns.path()], |_, namespace| {
            found.push(namespace.has_tcp_sockets());
        });
        (found, errors.0.len())
    };
    assert_eq!(has_tcp_sockets(), (vec![false], 0));
    let lab = Lab::new(AGENT)?;
    let agent = lab.outside_in(&netns)?;
    for address in [
        IpAddr::from(Ipv4Addr::LOCALHOST),
        Ipv6Addr::LOCALHOST.into(),
    ] {
        let listener = agent.listen((address, 0))?;
        assert_eq!(has_tcp_sockets(), (vec![true], 0));
        drop(listener);
        eventually("no socket", patience(), || {
            Ok((has_tcp_sockets() == (vec![false], 0)).then_some(()))
        })?;
    }
    Ok(())
}

#[test]
fn a_busy_client_in_another_namespace_lives() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let [left, right] = [Netns::new()?, Netns::new()?];
    Veth::between(&left, &right)?;
    let daemon = lab.daemon(&rule())?;
    let listener = lab.inside_in(&right)?.listen((Veth::RIGHT, 0))?;
    let pair = Pair::open(&lab.outside_in(&left)?, &listener)?;
    let last = pair.keep_busy(2 * limit())?;
    assert_eq!(daemon.terminations()?.len(), 0);
    pair.ends()?[0].assert_reset(Errno::ECONNRESET, &last, limit());
    Ok(())
}

#[test]
fn with_network_namespaces_own_no_other_namespace_is_enforced() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let netns = Netns::new()?;
    let there = lab.inside_in(&netns)?;
    let listen = |agent: &Agent| agent.listen((Ipv4Addr::LOCALHOST, 0));
    // One connection from before the start and one from after it.
    let older = Pair::open(&there, &listen(&there)?)?;
    let daemon = lab.daemon(&format!(
        "[daemon]\nnetwork_namespaces = \"own\"\n{}",
        rule()
    ))?;
    let newer = Pair::open(&there, &listen(&there)?)?;
    let own = Pair::open(&lab.outside, &listen(&lab.inside)?)?;
    own.ends()?[0].assert_reset(Errno::ECONNRESET, &own.opened, limit());
    newer.opened.wait(2 * limit());
    older.round_trip()?;
    newer.round_trip()?;
    daemon.wait_for_termination()?;
    assert_eq!(
        daemon.metric("session_enforcer_sessions_opened_total", &[])?,
        1.0
    );
    Ok(())
}

#[test]
fn a_namespace_that_disappears_with_its_sessions_is_no_failure() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let daemon = lab.daemon(&rule())?;
    let netns = Netns::new()?;
    let agent = lab.inside_in(&netns)?;
    let listener = agent.listen((Ipv4Addr::LOCALHOST, 0))?;
    let opened: Result<Vec<_>> = (0..5).map(|_| Pair::open(&agent, &listener)).collect();
    daemon.wait_for_metric("session_enforcer_sessions_opened_total", &[], 10.0)?;
    for (number, pair) in opened?.into_iter().enumerate() {
        if number % 2 == 0 {
            reset_on_close(&pair.client)?;
        }
    }
    drop((agent, listener));
    netns.delete()?;
    daemon.wait_for_metric("session_enforcer_sessions", &[], 0.0)?;
    // The deadlines of those sessions pass, then a new session is enforced.
    let pair = Pair::open(&lab.outside, &lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?)?;
    pair.ends()?[0].assert_reset(Errno::ECONNRESET, &pair.opened, limit());
    assert_eq!(
        daemon
            .wait_for_termination()?
            .text("session_enforcer.result"),
        "reset"
    );
    Ok(())
}

#[test]
fn a_session_whose_peer_disappeared_with_its_namespace_is_reset() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let [left, right] = [Netns::new()?, Netns::new()?];
    Veth::between(&left, &right)?;
    let daemon = lab.daemon(&rule())?;
    let agent = lab.outside_in(&right)?;
    let listener = agent.listen((Veth::RIGHT, 0))?;
    let pair = Pair::open(&lab.inside_in(&left)?, &listener)?;
    let last = pair.round_trip()?;
    right.ip(&format!("link set {} down", Veth::INTERFACE))?;
    let Pair { client, server, .. } = pair;
    drop((server, agent, listener));
    right.delete()?;
    let end = ends_of(&[&client])?[0];
    end.assert_reset(Errno::ECONNABORTED, &last, limit());
    daemon
        .wait_for_termination()?
        .assert_reset("idle_timeout", &last, limit());
    Ok(())
}

#[test]
fn a_namespace_without_sessions_is_not_kept_alive() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let [left, right] = [Netns::new()?, Netns::new()?];
    Veth::between(&left, &right)?;
    let agent = lab.inside_in(&right)?;
    let listener = agent.listen((Ipv4Addr::LOCALHOST, 0))?;
    // An adopted session that closes by itself, and a new one that the daemon resets.
    let older = Pair::open(&lab.outside_in(&right)?, &listener)?;
    let daemon = lab.daemon(&rule())?;
    assert_eq!(
        daemon.metric("session_enforcer_sessions_adopted_total", &[])?,
        1.0
    );
    let newer = Pair::open(&lab.outside_in(&right)?, &listener)?;
    drop(older);
    newer.ends()?;
    drop((newer, agent, listener));
    right.delete()?;
    // A veth pair disappears together with the namespace of either end.
    let cable = format!("link show {}", Veth::INTERFACE);
    eventually("the namespace ends", patience(), || match left.ip(&cable) {
        Ok(_) => Ok(None),
        Err(error) if error.to_string().contains("does not exist") => Ok(Some(())),
        Err(error) => Err(error),
    })?;
    daemon.wait_for_termination()?;
    Ok(())
}

#[test]
fn a_connection_in_a_namespace_that_only_a_descriptor_keeps_alive_is_adopted() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let netns = Netns::new()?;
    let (inside, outside) = (lab.inside_in(&netns)?, lab.outside_in(&netns)?);
    let listener = inside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let pair = Pair::open(&outside, &listener)?;
    // The sockets belong to this process, which is in another namespace.
    let _held = File::open(format!("/proc/{}/ns/net", inside.pid()))?;
    drop((inside, outside));
    netns.delete()?;
    let daemon = lab.daemon(&rule())?;
    pair.ends()?[0].assert_reset(Errno::ECONNRESET, &pair.opened, limit());
    let record = daemon.wait_for_termination_of(&pair)?;
    record.assert_reset("idle_timeout", &pair.opened, limit());
    Ok(())
}

/// The daemon has kept its netlink socket in the namespace since it reset the first sessions. Each
/// time more sessions are due than one netlink exchange resets.
#[test]
fn sessions_in_a_namespace_that_only_the_daemon_s_netlink_socket_reaches_are_reset() -> Result<()> {
    const SESSIONS: usize = 200;
    let lab = Lab::new(AGENT)?;
    let netns = Netns::new()?;
    let (inside, outside) = (lab.inside_in(&netns)?, lab.outside_in(&netns)?);
    let listener = inside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let daemon = lab.daemon(&rule())?;
    let open = || -> Result<Vec<_>> {
        let pairs = (0..SESSIONS).map(|_| Pair::open(&outside, &listener));
        pairs.collect()
    };
    let first = open()?;
    daemon.freeze()?;
    thread::sleep(limit() / 2);
    let second = open()?;
    thread::sleep(limit() / 2);
    daemon.thaw()?;
    daemon.wait_for_terminations(SESSIONS)?;
    daemon.freeze()?;
    drop((inside, outside));
    netns.delete()?;
    thread::sleep(limit());
    daemon.thaw()?;
    for pairs in [&first, &second] {
        assert_all_reset(pairs, limit())?;
    }
    let records = daemon.wait_for_terminations(2 * SESSIONS)?;
    assert_eq!(records.len(), 2 * SESSIONS);
    for record in records {
        assert_eq!(record.text("session_enforcer.result"), "reset");
    }
    Ok(())
}

/// A session in a namespace that only its sockets keep alive: neither a mount nor a process leads
/// to it.
fn hidden(lab: &Lab, daemon: impl FnOnce() -> Result<Daemon>) -> Result<(Daemon, Pair)> {
    let netns = Netns::new()?;
    let (inside, outside) = (lab.inside_in(&netns)?, lab.outside_in(&netns)?);
    let listener = inside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let daemon = daemon()?;
    let pair = Pair::open(&outside, &listener)?;
    drop((inside, outside));
    netns.delete()?;
    Ok((daemon, pair))
}

fn assert_reset_through_its_process(daemon: &Daemon, pair: &Pair) -> Result<()> {
    let record = daemon.wait_for_termination_of(pair)?;
    assert_eq!(record.text("session_enforcer.result"), "reset");
    record.assert_due("idle_timeout", &pair.opened, limit());
    pair.ends()?[0].assert_not_early(&pair.opened, limit());
    Ok(())
}

#[test]
fn a_session_in_an_unreachable_namespace_is_reset_through_its_process() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let (daemon, pair) = hidden(&lab, || lab.daemon(&rule()))?;
    assert_reset_through_its_process(&daemon, &pair)
}

#[test]
fn a_session_in_an_unreachable_namespace_is_taken_over() -> Result<()> {
    for is_killed in [true, false] {
        let lab = Lab::new(AGENT)?;
        let (mut first, pair) = hidden(&lab, || Ok(lab.pinned_daemon(&rule())?.quiet()))?;
        if is_killed {
            first.kill()?;
        } else {
            first.stop()?;
        }
        let second = lab.pinned_daemon(&rule())?;
        assert_reset_through_its_process(&second, &pair)?;
    }
    Ok(())
}

/// Moves the sockets into an unread message, so that no process holds them.
fn send_away(pair: Pair) -> Result<UnixStream> {
    let (here, there) = UnixStream::pair()?;
    let sockets = [pair.client.as_raw_fd(), pair.server.as_raw_fd()];
    let bytes = [IoSlice::new(b"s")];
    let rights = [ControlMessage::ScmRights(&sockets)];
    sendmsg::<()>(there.as_raw_fd(), &bytes, &rights, MsgFlags::empty(), None)?;
    // Closing the sending end does not discard the message.
    drop((pair, there));
    Ok(here)
}

fn get_back(from: &UnixStream) -> Result<[TcpStream; 2]> {
    let mut byte = [0];
    let mut bytes = [IoSliceMut::new(&mut byte)];
    let mut space = cmsg_space!([RawFd; 2]);
    let flags = MsgFlags::empty();
    let message = recvmsg::<()>(from.as_raw_fd(), &mut bytes, Some(&mut space), flags)?;
    let mut sockets = Vec::new();
    for received in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(fds) = received {
            // SAFETY: the kernel has just created these descriptors for this process.
            sockets.extend(
                fds.into_iter()
                    .map(|fd| unsafe { TcpStream::from_raw_fd(fd) }),
            );
        }
    }
    sockets
        .try_into()
        .ok()
        .context("not two sockets in the message")
}

/// No process holds the sockets when the session is due, and the daemon that knew the namespace
/// stops.
#[test]
fn a_session_that_no_process_holds_stays_behind_the_gate_even_after_a_restart() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let (mut first, pair) = hidden(&lab, || Ok(lab.pinned_daemon(&rule())?.quiet()))?;
    let opened = pair.opened;
    let away = send_away(pair)?;
    let record = first.wait_for_termination()?;
    assert_eq!(record.text("event.action"), "session-termination-failed");
    assert_eq!(record.text("session_enforcer.result"), "failed");
    record.assert_due("idle_timeout", &opened, limit());
    let cause = [("cause", "namespace")];
    let untracked = "session_enforcer_sessions_untracked_total";
    first.wait_for_metric(untracked, &cause, 1.0)?;
    first.stop()?;
    let second = lab.pinned_daemon(&rule())?;
    // The second daemon tries to reset it and shuts the gate. Nothing kept the gate shut meanwhile.
    second.wait_for_metric(untracked, &cause, 1.0)?;
    let [client, server] = get_back(&away)?;
    (&client).write_all(b"late")?;
    server.set_read_timeout(Some(Duration::from_millis(300)))?;
    let mut received = [0; 4];
    assert!((&server).read(&mut received).is_err(), "{received:?}");
    // The process holds the sockets again, so the next attempt succeeds.
    let ends = ends_of(&[&client, &server])?;
    assert!(ends.iter().all(|end| end.error.is_some()), "{ends:?}");
    Ok(())
}

/// After `connect(AF_UNSPEC)` the kernel does not know the owner of the socket any more, and no
/// mount or process leads to its namespace.
#[test]
fn a_session_of_unknown_owner_has_the_limits_of_the_first_rule_that_could_apply() -> Result<()> {
    of_unknown_owner(false)
}

/// The earlier daemon has not decided about it, and the next one cannot adopt it.
#[test]
fn a_session_of_unknown_owner_has_those_limits_after_a_restart_too() -> Result<()> {
    of_unknown_owner(true)
}

fn of_unknown_owner(is_restarted: bool) -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let netns = Netns::new()?;
    let (inside, outside) = (lab.inside_in(&netns)?, lab.outside_in(&netns)?);
    let listener = outside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let seconds = limit().as_secs();
    let port = listener.port();
    let rules = format!(
        "[[rule]]\nname = \"free\"\nusers = [4711]\naction = \"exempt\"\n\
         [[rule]]\nname = \"ours\"\nusers = [0]\nremote_ports = [{port}]\nidle_timeout = \
         \"{seconds}s\"\n"
    );
    let mut daemon = lab.pinned_daemon(&rules)?;
    let first = Pair::open(&inside, &listener)?;
    drop((inside, outside));
    netns.delete()?;
    let again = Pair::dial(disconnect(first.client)?, &listener, listener.address)?;
    if is_restarted {
        daemon.kill()?;
        daemon = lab.pinned_daemon(&rules)?;
    }
    let record = daemon.wait_for_termination_of(&again)?;
    assert_eq!(record.text("session_enforcer.result"), "reset");
    assert_eq!(record.text("rule.name"), "ours");
    record.assert_due("idle_timeout", &again.opened, limit());
    again.ends()?[0].assert_not_early(&again.opened, limit());
    Ok(())
}
