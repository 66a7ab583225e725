//! Owners of sessions in unusual cases: shared ports, MPTCP, reconnected sockets, processes that
//! move, deep cgroups, user namespaces and set-user-ID programs.

use std::{
    fs,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream},
    os::unix::fs::MetadataExt as _,
    path::Path,
    process::Command,
    time::Duration,
};

use anyhow::Result;
use nix::sys::signal::Signal;
use session_enforcer_tests::{
    Agent, Cgroup, Daemon, Lab, Listener, Pair, Place, Record, bind_to_device, daemon_command,
    disconnect, eventually, path_of, patience, run_to_end, set_option,
};

const AGENT: &str = env!("CARGO_BIN_EXE_session-enforcer-test-agent");
const LIMIT: Duration = Duration::from_secs(2);
const UID: u32 = 3_999_999_998;
const OTHER_UID: u32 = 12_346;
/// The user id that a user namespace shows for an unmapped user.
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
    // The time is not asserted: for adopted sockets it depends on how long the listing takes.
    assert_eq!(record.text("event.action"), "session-terminated");
    assert_eq!(record.text("event.reason"), "idle_timeout");
    assert_eq!(record.text("rule.name"), "owned");
    Ok(record)
}

/// Asserts that none of these is reset, though all are idle for longer than the limit.
fn assert_live(pairs: &[&Pair]) -> Result<()> {
    for pair in pairs {
        pair.opened.wait(2 * LIMIT);
        pair.round_trip()?;
    }
    Ok(())
}

#[test]
fn a_connection_opened_before_its_cgroup_is_resolved_still_gets_its_rule() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let slice = lab.cgroup.child()?;
    let (exempt, owned) = (slice.path().join("exempt"), slice.path().join("owned"));
    let above = slice.name()?;
    let daemon = lab.daemon(&format!(
        "[[rule]]\nname = \"exempt\"\ncgroups = [\"{above}/exempt\"]\naction = \"exempt\"\n{}{}",
        rule("owned", &format!("cgroups = [\"{above}/owned\"]")),
        "[[rule]]\nname = \"others\"\nidle_timeout = \"1s\"\n",
    ))?;
    // The daemon is stopped while cgroups and connections are created. Until it resolves the
    // cgroups, the rule `others` applies.
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
fn adopted_connections_of_listeners_that_share_a_port_have_the_owner_of_their_listener()
-> Result<()> {
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
    // The kernel distributes the connections over both listeners.
    let dial = |_| session_enforcer_tests::dial(lab.outside.tcp(address)?, address);
    let _dialled: Vec<TcpStream> = (0..40).map(dial).collect::<Result<_>>()?;
    let (mut others, mut owned) = (Vec::new(), Vec::new());
    eventually("all connections are accepted", patience(), || {
        others.extend(listeners[0].accept_waiting()?);
        owned.extend(listeners[1].accept_waiting()?);
        Ok((others.len() + owned.len() == 40).then_some(()))
    })?;
    assert!(
        !others.is_empty() && !owned.is_empty(),
        "one listener accepted all connections"
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
fn adopted_connections_of_an_ipv4_and_an_ipv6_listener_on_one_port_are_told_apart() -> Result<()> {
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

/// Connections from before and after the start, through listeners from before and after it.
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
fn a_socket_that_was_created_before_the_daemon_and_dials_later_has_its_owner() -> Result<()> {
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
fn a_socket_that_connects_again_keeps_its_owner() -> Result<()> {
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

/// The daemon looks for the owner of such a session by the addresses, ports and interface that its record has.
#[test]
fn a_socket_that_connects_again_and_is_bound_to_an_interface_keeps_its_owner() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let owner = lab.at(&Place::here().in_cgroup(&lab.cgroup).as_user(UID))?;
    let listener = listen(&lab.outside)?;
    let daemon = lab.daemon(&of_user(UID))?;
    let first = Pair::open(&owner, &listener)?;
    // Without the daemon, since it must not look before the socket is bound.
    daemon.freeze()?;
    let again = Pair::dial(disconnect(first.client)?, &listener, listener.address)?;
    bind_to_device(&again.client, "lo")?;
    daemon.thaw()?;
    let record = assert_owned(&daemon, &again)?;
    assert_eq!(record.text("user.id"), UID.to_string());
    Ok(())
}

#[test]
fn a_rule_of_a_cgroup_applies_to_deeper_cgroups_than_rules_can_name() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let [named, beside] = [lab.cgroup.child()?, lab.cgroup.child()?];
    let at = |cgroup: &Cgroup| {
        let innermost = cgroup.chain("d", DEEP)?;
        lab.at(&Place::here().in_directory(&path_of(&innermost)))
    };
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

#[test]
fn a_rule_applies_to_cgroups_that_are_deeper_than_a_path_can_express() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let [named, beside] = [lab.cgroup.child()?, lab.cgroup.child()?];
    // 20 levels exceed `PATH_MAX`; 100 levels are passed several at a time.
    for levels in [DEEP, 5 * DEEP] {
        let name = "n".repeat(250);
        let top = named.child()?;
        let innermost = top.chain(&name, levels)?;
        let inner = lab.at(&Place::here().in_directory(&path_of(&innermost)))?;
        let listener = listen(&inner)?;
        let older = Pair::open(&lab.outside, &listener)?;
        let other = rule("other", &format!("cgroups = [\"{}\"]", beside.name()?));
        let daemon = lab.daemon(&(other + &of_cgroup(&named)?))?;
        let newer = Pair::open(&lab.outside, &listener)?;
        for pair in [&older, &newer] {
            let record = assert_owned(&daemon, pair)?;
            let path = record.text("session_enforcer.cgroup");
            assert!(path.starts_with(&named.name()?), "{path}");
            assert!(path.ends_with(&format!("/{name}//...")), "{path}");
            let id = record.at("session_enforcer.cgroup_id").as_u64();
            assert_eq!(id, Some(innermost.metadata()?.ino()));
        }
    }
    Ok(())
}

#[test]
fn the_names_of_a_users_cgroups_do_not_enlarge_records_and_lists() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let user = lab.cgroup.child()?;
    // JSON writes each byte as six.
    let innermost = user.chain(&"\u{1}".repeat(250), 14)?;
    let inner = lab.at(&Place::here().in_directory(&path_of(&innermost)))?;
    let daemon = lab.daemon(&of_cgroup(&user)?)?;
    let pair = Pair::open(&lab.outside, &listen(&inner)?)?;
    // A filter for the cgroup above still selects the session.
    let selected = format!("/v1/sessions?cgroup={}", user.name()?);
    let row = eventually("the cgroup is known", patience(), || {
        let (_, row) = daemon.ask("GET", &selected, "")?;
        Ok((!row.is_empty()).then_some(row))
    })?;
    let record = assert_owned(&daemon, &pair)?;
    let line = fs::read_to_string(daemon.audit_path())?;
    let longest = line.lines().map(str::len).max();
    assert!(longest < Some(2048) && row.len() < 2048, "{row}{line}");
    let path = record.text("session_enforcer.cgroup");
    assert_eq!(path, user.name()? + "//...");
    let id = record.at("session_enforcer.cgroup_id").as_u64();
    assert_eq!(id, Some(innermost.metadata()?.ino()));
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
fn sockets_of_a_process_that_moves_keep_the_cgroup_in_which_they_were_created() -> Result<()> {
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

/// A user can have another number inside a user namespace. Rules mean the numbers of the host.
#[test]
fn a_user_in_a_user_namespace_has_the_number_of_the_host() -> Result<()> {
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

/// The owner is the user that started the process, even if the program runs with another user's
/// rights (set-user-ID, seteuid(2)). For sockets older than the programs, the kernel only knows the
/// effective user.
#[test]
fn the_owner_of_a_set_user_id_program_is_the_user_who_started_it() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let place = Place::here().in_cgroup(&lab.cgroup).with_rights_of(UID);
    let agent = lab.at(&place)?;
    let older = Pair::open(&agent, &listen(&lab.outside)?)?;
    let daemon = lab.daemon(&of_user(UID))?;
    let newer = Pair::open(&agent, &listen(&lab.outside)?)?;
    assert_owned(&daemon, &older)?;
    assert_live(&[&newer])
}
