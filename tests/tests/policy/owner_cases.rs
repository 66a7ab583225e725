//! Owners that are not plain to see: sockets that change hands, processes that move or are not what
//! they seem, listeners that share a port, cgroups that lie deep or come late.

use std::{
    fs,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream},
    os::fd::{AsRawFd as _, OwnedFd},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::Result;
use nix::sys::signal::Signal;
use session_enforcer_tests::{
    Agent, Cgroup, Daemon, Lab, Listener, Pair, Place, Record, daemon_command, eventually,
    patience, run_to_end, set_option,
};

const AGENT: &str = env!("CARGO_BIN_EXE_session-enforcer-test-agent");
const LIMIT: Duration = Duration::from_secs(2);
const UID: u32 = 3_999_999_998;
const OTHER_UID: u32 = 12_346;
/// The number that a user namespace shows for who has none in it.
const NOBODY_THERE: u32 = 65_534;
/// More levels of cgroups than rules can name.
const DEEP: usize = 20;

fn rule(name: &str, conditions: &str) -> String {
    format!("[[rule]]\nname = \"{name}\"\n{conditions}\nidle_timeout = \"2s\"\n")
}

fn of_user(uid: u32) -> String {
    rule("owned", &format!("users = [{uid}]"))
}

fn of_cgroup(cgroup: &Cgroup) -> Result<String> {
    Ok(rule(
        "owned",
        &format!("cgroups = [\"{}\"]", cgroup.name()?),
    ))
}

fn listen(agent: &Agent) -> Result<Listener> {
    agent.listen((Ipv4Addr::LOCALHOST, 0))
}

fn assert_owned(daemon: &Daemon, pair: &Pair) -> Result<Record> {
    let record = daemon.wait_for_termination_of(pair)?;
    // Not when: of sockets older than the daemon that depends on how long it takes to list them all.
    assert_eq!(record.text("event.action"), "session-terminated");
    assert_eq!(record.text("event.reason"), "idle_timeout");
    assert_eq!(record.text("rule.name"), "owned");
    Ok(record)
}

/// None of these is reset, though they are idle for longer than the limit.
fn assert_live(pairs: &[&Pair]) -> Result<()> {
    for pair in pairs {
        pair.opened.wait(2 * LIMIT);
        pair.round_trip()?;
    }
    Ok(())
}

#[test]
fn a_connection_faster_than_the_look_for_its_cgroup_is_still_its_rule_s() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let slice = lab.cgroup.child()?;
    let (exempt, owned) = (slice.path().join("exempt"), slice.path().join("owned"));
    let above = slice.name()?;
    let daemon = lab.daemon(&format!(
        "[[rule]]\nname = \"exempt\"\ncgroups = [\"{above}/exempt\"]\naction = \"exempt\"\n{}{}",
        rule("owned", &format!("cgroups = [\"{above}/owned\"]")),
        "[[rule]]\nname = \"others\"\nidle_timeout = \"1s\"\n",
    ))?;
    // The daemon sleeps while cgroups and connections come: the rule of all others takes them.
    daemon.signal(Signal::SIGSTOP)?;
    let open_in = |path: &Path| {
        fs::create_dir(path)?;
        let agent = lab.at(&Place::here().in_directory(path))?;
        let listener = listen(&agent)?;
        Ok::<_, anyhow::Error>((Pair::open(&lab.outside, &listener)?, listener, agent))
    };
    let (lives, _l, _a) = open_in(&exempt)?;
    let (dies, _m, _b) = open_in(&owned)?;
    daemon.signal(Signal::SIGCONT)?;
    assert_owned(&daemon, &dies)?;
    assert_live(&[&lives])?;
    daemon.wait_for_metric("session_enforcer_sessions", &[], 0.0)?;
    daemon.wait_for_metric("session_enforcer_map_entries", &[], 0.0)
}

#[test]
fn of_older_listeners_that_share_a_port_each_connection_has_its_own() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let [named, beside] = [lab.cgroup.child()?, lab.cgroup.child()?];
    let (mut address, mut listeners, mut agents) = (
        SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
        Vec::new(),
        Vec::new(),
    );
    for cgroup in [&beside, &named] {
        let agent = lab.at(&Place::here().in_cgroup(cgroup))?;
        let socket = agent.tcp(address)?;
        set_option(&socket, libc::SOL_SOCKET, libc::SO_REUSEPORT, 1)?;
        let listener = Listener::on(socket, address)?;
        address = listener.address;
        listeners.push(listener);
        agents.push(agent);
    }
    // The kernel spreads them over both.
    let dial = |_| session_enforcer_tests::dial(lab.outside.tcp(address)?, address);
    let _dialled: Vec<TcpStream> = (0..40).map(dial).collect::<Result<_>>()?;
    let (mut others, mut owned) = (Vec::new(), Vec::new());
    eventually("all are accepted", patience(), || {
        others.extend(listeners[0].accept_waiting()?);
        owned.extend(listeners[1].accept_waiting()?);
        Ok((others.len() + owned.len() == 40).then_some(()))
    })?;
    assert!(
        !others.is_empty() && !owned.is_empty(),
        "one of them has all"
    );
    let port = |stream: &TcpStream| Ok(stream.peer_addr()?.port());
    let lives: Vec<u16> = others.iter().map(port).collect::<Result<_>>()?;
    let daemon = lab.daemon(&of_cgroup(&named)?)?;
    daemon.wait_for_terminations(owned.len())?;
    std::thread::sleep(LIMIT);
    let records = daemon.terminations()?;
    assert_eq!(records.len(), owned.len());
    for record in &records {
        assert!(!lives.contains(&record.ports()[0]), "{record:?}");
    }
    Ok(())
}

#[test]
fn older_listeners_of_both_families_on_one_port_are_told_apart() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let at = |uid| lab.at(&Place::here().in_cgroup(&lab.cgroup).as_user(uid));
    let (owner, other) = (at(UID)?, at(OTHER_UID)?);
    let any = SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0));
    let socket = other.tcp(any)?;
    set_option(&socket, libc::IPPROTO_IPV6, libc::IPV6_V6ONLY, 1)?;
    let theirs = Listener::on(socket, any)?;
    let port = theirs.port();
    let mine = owner.listen((Ipv4Addr::UNSPECIFIED, port))?;
    let dial = |listener: &Listener, to: SocketAddr| Pair::dial(lab.outside.tcp(to)?, listener, to);
    let ipv4 = dial(&mine, (Ipv4Addr::LOCALHOST, port).into())?;
    let ipv6 = dial(&theirs, (Ipv6Addr::LOCALHOST, port).into())?;
    let daemon = lab.daemon(&of_user(UID))?;
    assert_owned(&daemon, &ipv4)?;
    assert_live(&[&ipv6])
}

/// Older and newer than the daemon, of listeners that are.
#[test]
fn mptcp_connections_have_the_owner_of_their_listener() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let named = lab.cgroup.child()?;
    let at = |uid| lab.at(&Place::here().in_cgroup(&named).as_user(uid));
    let (owner, other) = (at(UID)?, at(OTHER_UID)?);
    let mptcp = |agent: &Agent| agent.socket(libc::AF_INET, libc::SOCK_STREAM, libc::IPPROTO_MPTCP);
    let listen = |agent: &Agent| Listener::on(mptcp(agent)?, (Ipv4Addr::LOCALHOST, 0).into());
    let open =
        |from: &Agent, listener: &Listener| Pair::dial(mptcp(from)?, listener, listener.address);
    let [mine, theirs] = [listen(&owner)?, listen(&other)?];
    let away = listen(&lab.outside)?;
    let older = open(&lab.outside, &mine)?;
    let older_of_other = open(&lab.outside, &theirs)?;
    let conditions = format!("cgroups = [\"{}\"]\nusers = [{UID}]", named.name()?);
    let daemon = lab.daemon(&rule("owned", &conditions))?;
    let newer_listener = listen(&owner)?;
    let mut pairs = vec![older];
    for listener in [&mine, &newer_listener] {
        pairs.push(open(&lab.outside, listener)?);
    }
    pairs.push(open(&owner, &away)?);
    let others = [
        older_of_other,
        open(&lab.outside, &theirs)?,
        open(&other, &away)?,
    ];
    for pair in &pairs {
        let record = assert_owned(&daemon, pair)?;
        assert_eq!(record.text("user.id"), UID.to_string());
        assert_eq!(record.text("session_enforcer.cgroup"), named.name()?);
    }
    assert_live(&others.each_ref())
}

#[test]
fn a_socket_that_is_older_than_the_daemon_and_dials_later_is_owned() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let at = |uid| lab.at(&Place::here().in_cgroup(&lab.cgroup).as_user(uid));
    let (owner, other) = (at(UID)?, at(OTHER_UID)?);
    let listener = listen(&lab.outside)?;
    let [mine, theirs] = [owner.tcp(listener.address)?, other.tcp(listener.address)?];
    let daemon = lab.daemon(&of_user(UID))?;
    let dies = Pair::dial(mine, &listener, listener.address)?;
    let lives = Pair::dial(theirs, &listener, listener.address)?;
    let record = assert_owned(&daemon, &dies)?;
    assert_eq!(record.text("user.id"), UID.to_string());
    assert_live(&[&lives])
}

#[test]
fn a_socket_that_connects_again_is_still_its_owner_s() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let at = |uid| lab.at(&Place::here().in_cgroup(&lab.cgroup).as_user(uid));
    let (owner, other) = (at(UID)?, at(OTHER_UID)?);
    let listener = listen(&lab.outside)?;
    let daemon = lab.daemon(&of_user(UID))?;
    let again = |agent: &Agent| {
        let first = Pair::open(agent, &listener)?;
        Pair::dial(disconnect(first.client)?, &listener, listener.address)
    };
    let (dies, lives) = (again(&owner)?, again(&other)?);
    let record = assert_owned(&daemon, &dies)?;
    assert_eq!(record.text("user.id"), UID.to_string());
    assert_live(&[&lives])
}

/// connect(2) with the family `AF_UNSPEC`: the connection is reset, and the socket stays.
fn disconnect(stream: TcpStream) -> Result<OwnedFd> {
    // SAFETY: a structure of integers, for which zeroes are a value.
    let mut nowhere: libc::sockaddr = unsafe { std::mem::zeroed() };
    nowhere.sa_family = libc::AF_UNSPEC as libc::sa_family_t;
    let length = size_of::<libc::sockaddr>() as libc::socklen_t;
    // SAFETY: the kernel reads `length` bytes of a value of that size.
    let status = unsafe { libc::connect(stream.as_raw_fd(), &raw const nowhere, length) };
    anyhow::ensure!(
        status == 0,
        "disconnecting: {}",
        std::io::Error::last_os_error()
    );
    Ok(stream.into())
}

/// Makes a chain of cgroups; its end.
fn deep_below(cgroup: &Cgroup) -> Result<PathBuf> {
    let mut path = cgroup.path().to_owned();
    for _ in 0..DEEP {
        path.push("d");
        fs::create_dir(&path)?;
    }
    Ok(path)
}

#[test]
fn a_rule_of_a_cgroup_takes_what_lies_deeper_than_rules_can_name() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let [named, beside] = [lab.cgroup.child()?, lab.cgroup.child()?];
    let at = |cgroup: &Cgroup| lab.at(&Place::here().in_directory(&deep_below(cgroup)?));
    let [inner, other] = [at(&named)?, at(&beside)?];
    let listener = listen(&inner)?;
    let older = Pair::open(&lab.outside, &listener)?;
    let config = of_cgroup(&named)?;
    let daemon = lab.daemon(&config)?;
    let newer = Pair::open(&lab.outside, &listen(&inner)?)?;
    let lives = Pair::open(&lab.outside, &listen(&other)?)?;
    let deep = named.name()? + &"/d".repeat(DEEP);
    let newest = Pair::open(&lab.outside, &listener)?;
    for pair in [&older, &newer, &newest] {
        let record = assert_owned(&daemon, pair)?;
        assert_eq!(record.text("session_enforcer.cgroup"), deep);
    }
    assert_live(&[&lives])?;
    let said = explain(&config, &newer, &["--cgroup", &deep])?;
    assert!(
        said.contains("decided: enforced by rule \"owned\""),
        "{said}"
    );
    Ok(())
}

fn explain(config: &str, pair: &Pair, more: &[&str]) -> Result<String> {
    let directory = tempfile::tempdir()?;
    let path = directory.path().join("config.toml");
    fs::write(&path, config)?;
    let mut command: Command = daemon_command()?;
    let ends = [pair.server_address, pair.client_address].map(|end| end.to_string());
    command
        .arg("explain")
        .args(ends)
        .args(more)
        .arg("--config")
        .arg(path);
    let finished = run_to_end(command, patience())?;
    assert_eq!(finished.code, 0, "{}", finished.stderr);
    Ok(finished.stdout)
}

#[test]
fn a_process_that_moves_leaves_its_sockets_where_they_were_made() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let [named, beside] = [lab.cgroup.child()?, lab.cgroup.child()?];
    let [comes, goes] = [
        lab.at(&Place::here().in_cgroup(&beside))?,
        lab.at(&Place::here().in_cgroup(&named))?,
    ];
    let daemon = lab.daemon(&of_cgroup(&named)?)?;
    let [beside_still, named_still] = [listen(&comes)?, listen(&goes)?];
    for (agent, to) in [(&comes, &named), (&goes, &beside)] {
        fs::write(to.path().join("cgroup.procs"), agent.pid().to_string())?;
    }
    let [named_now, beside_now] = [listen(&comes)?, listen(&goes)?];
    let open = |listener: &Listener| Pair::open(&lab.outside, listener);
    let (one, two) = (open(&named_still)?, open(&named_now)?);
    let others = [open(&beside_still)?, open(&beside_now)?];
    assert_owned(&daemon, &one)?;
    assert_owned(&daemon, &two)?;
    assert_live(&others.each_ref())
}

/// In a user namespace a user may have another number. Rules speak of the numbers of the host.
#[test]
fn a_user_in_a_user_namespace_is_known_by_the_number_on_the_host() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let place = Place::here().in_cgroup(&lab.cgroup).as_user(UID);
    let agent = lab.at(&place.in_own_user_namespace())?;
    let listener = listen(&agent)?;
    let older = Pair::open(&lab.outside, &listener)?;
    let exempt =
        format!("[[rule]]\nname = \"exempt\"\nusers = [{NOBODY_THERE}, 0]\naction = \"exempt\"\n");
    let daemon = lab.daemon(&(exempt + &of_user(UID)))?;
    let newer = Pair::open(&lab.outside, &listener)?;
    let newest = Pair::open(&lab.outside, &listen(&agent)?)?;
    for pair in [&older, &newer, &newest] {
        let record = assert_owned(&daemon, pair)?;
        assert_eq!(record.text("user.id"), UID.to_string());
    }
    Ok(())
}

/// The user of a process is the one that started it, also where the program has another's rights
/// (set-user-ID, seteuid(2)). Of sockets older than the programs the kernel only keeps the latter.
#[test]
fn a_program_with_another_user_s_rights_is_still_the_user_s_who_started_it() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let place = Place::here().in_cgroup(&lab.cgroup).with_rights_of(UID);
    let agent = lab.at(&place)?;
    let older = Pair::open(&agent, &listen(&lab.outside)?)?;
    let daemon = lab.daemon(&of_user(UID))?;
    let newer = Pair::open(&agent, &listen(&lab.outside)?)?;
    assert_owned(&daemon, &older)?;
    assert_live(&[&newer])
}
