//! Rules with an owner: the user and the cgroup of the process that created the socket. For an
//! accepted connection this is the listener's creator.

use std::{
    ffi::OsStr,
    fs,
    io::{BufRead as _, BufReader},
    net::{Ipv4Addr, Ipv6Addr, TcpStream},
    os::unix::ffi::OsStrExt as _,
    process::Stdio,
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result};
use nix::sys::signal::Signal;
use session_enforcer_tests::{
    Agent, Cgroup, Daemon, Lab, Listener, PROGRAMS, Pair, Place, Random, Record, eventually,
    longer_than_a_start, patience, seed,
};

use crate::turn;

const AGENT: &str = env!("CARGO_BIN_EXE_session-enforcer-test-agent");
const LIMIT: Duration = Duration::from_secs(2);
const SHORT: &str = "idle_timeout = \"2s\"";
/// Users without a name, one with a number above 2^31.
const UID: u32 = 3_999_999_999;
const OTHER_UID: u32 = 12_345;

/// `CAP_NET_ADMIN`, `CAP_PERFMON` and `CAP_BPF` (linux/capability.h): enough for a daemon that
/// enforces only in its own network namespace.
const FEWEST: [u8; 3] = [12, 38, 39];
const OWN_NAMESPACE: &str = "[daemon]\nnetwork_namespaces = \"own\"\n";

fn rule(name: &str, conditions: &str, limit: &str) -> String {
    format!("[[rule]]\nname = \"{name}\"\n{conditions}\n{limit}\n")
}

fn idle_for(limit: Duration) -> String {
    format!("idle_timeout = \"{}s\"", limit.as_secs())
}

fn of_cgroup(cgroup: &Cgroup) -> Result<String> {
    let conditions = format!("cgroups = [\"{}\"]", cgroup.name()?);
    Ok(rule("owned", &conditions, SHORT))
}

fn of_users(users: &str) -> String {
    rule("owned", &format!("users = [{users}]"), SHORT)
}

fn listen(agent: &Agent) -> Result<Listener> {
    agent.listen((Ipv4Addr::LOCALHOST, 0))
}

fn assert_reset(daemon: &Daemon, pair: &Pair) -> Result<Record> {
    let record = daemon.wait_for_termination_of(pair)?;
    record.assert_reset("idle_timeout", &pair.opened, LIMIT);
    assert_eq!(record.text("rule.name"), "owned");
    Ok(record)
}

/// A daemon that lacks the capabilities to record the owners of older listeners at its start, so it
/// resolves the owner of each connection.
fn daemon_that_resolves_owners(lab: &Lab, rules: &str) -> Result<Daemon> {
    let config = OWN_NAMESPACE.to_owned() + rules;
    lab.launch().config(&config).capabilities(&FEWEST).start()
}

fn opened(daemon: &Daemon) -> Result<f64> {
    daemon.metric("session_enforcer_sessions_opened_total", &[])
}

#[test]
fn a_rule_with_a_cgroup_applies_to_it_and_to_those_below() -> Result<()> {
    let _turn = turn(module_path!());
    let lab = Lab::new(AGENT)?;
    let [named, beside] = [lab.cgroup.child()?, lab.cgroup.child()?];
    let below = named.child()?;
    let daemon = lab.daemon(&of_cgroup(&named)?)?;
    let at = |cgroup: &Cgroup| lab.at(&Place::here().in_cgroup(cgroup));
    let [own, inner, other] = [at(&named)?, at(&below)?, at(&beside)?];
    let accepted = Pair::open(&lab.outside, &listen(&own)?)?;
    let accepted_below = Pair::open(&lab.outside, &listen(&inner)?)?;
    let dialled = Pair::open(&inner, &listen(&lab.outside)?)?;
    let elsewhere = Pair::open(&lab.outside, &listen(&other)?)?;
    let above = Pair::open(&lab.outside, &listen(&lab.inside)?)?;
    for pair in [&accepted, &accepted_below, &dialled] {
        assert_reset(&daemon, pair)?;
    }
    above.opened.wait(2 * LIMIT);
    elsewhere.round_trip()?;
    above.round_trip()?;
    assert_eq!(opened(&daemon)?, 3.0);
    Ok(())
}

#[test]
fn a_rule_with_a_user_applies_to_connections_in_both_directions() -> Result<()> {
    let _turn = turn(module_path!());
    let lab = Lab::new(AGENT)?;
    let daemon = lab.daemon(&of_users(&format!("\"nobody\", {UID}")))?;
    let of_user = |uid| lab.at(&Place::here().in_cgroup(&lab.cgroup).as_user(uid));
    let nobody = nix::unistd::User::from_name("nobody")?.context("no user nobody")?;
    let [by_number, by_name, other] = [
        of_user(UID)?,
        of_user(nobody.uid.as_raw())?,
        of_user(OTHER_UID)?,
    ];
    let accepted = Pair::open(&lab.outside, &by_number.listen((Ipv6Addr::LOCALHOST, 0))?)?;
    let dialled = Pair::open(&by_name, &listen(&lab.outside)?)?;
    let others = [
        Pair::open(&other, &listen(&lab.inside)?)?,
        Pair::open(&lab.outside, &listen(&other)?)?,
    ];
    assert_reset(&daemon, &accepted)?;
    let record = assert_reset(&daemon, &dialled)?;
    assert_eq!(record.text("user.name"), "nobody");
    others[1].opened.wait(2 * LIMIT);
    for pair in &others {
        pair.round_trip()?;
    }
    assert_eq!(opened(&daemon)?, 2.0);
    Ok(())
}

#[test]
fn both_conditions_must_hold_and_the_first_rule_decides() -> Result<()> {
    let _turn = turn(module_path!());
    let lab = Lab::new(AGENT)?;
    let named = lab.cgroup.child()?;
    let path = named.name()?;
    let both = format!("cgroups = [\"{path}\"]\nusers = [{UID}]");
    let config = rule("exempt", &both, "action = \"exempt\"") + &of_cgroup(&named)?;
    let daemon = lab.daemon(&config)?;
    let exempt = lab.at(&Place::here().in_cgroup(&named).as_user(UID))?;
    let other = lab.at(&Place::here().in_cgroup(&named))?;
    let lives = Pair::open(&lab.outside, &listen(&exempt)?)?;
    let dies = Pair::open(&lab.outside, &listen(&other)?)?;
    assert_reset(&daemon, &dies)?;
    lives.opened.wait(2 * LIMIT);
    lives.round_trip()?;
    Ok(())
}

/// Sockets older than the daemon: a connection, and a listener that accepts further ones later.
fn assert_older_sockets_are_owned(capabilities: Option<&[u8]>) -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let named = lab.cgroup.child()?;
    let below = named.child()?;
    let (owner, other) = (
        lab.at(&Place::here().in_cgroup(&below).as_user(UID))?,
        lab.at(&Place::here().in_cgroup(&below).as_user(OTHER_UID))?,
    );
    let [mine, theirs] = [listen(&owner)?, listen(&other)?];
    let older = Pair::open(&lab.outside, &mine)?;
    let older_of_other = Pair::open(&lab.outside, &theirs)?;
    let path = named.name()?;
    let conditions = format!("cgroups = [\"{path}\"]\nusers = [{UID}]");
    let config = OWN_NAMESPACE.to_owned() + &rule("owned", &conditions, SHORT);
    let launch = lab.launch().config(&config);
    let launch = match capabilities {
        Some(bits) => launch.capabilities(bits),
        None => launch,
    };
    let daemon = launch.start()?;
    let newer = Pair::open(&lab.outside, &mine)?;
    let newer_of_other = Pair::open(&lab.outside, &theirs)?;
    let busy = Pair::open(&lab.outside, &mine)?;
    let last = busy.keep_busy(LIMIT)?;
    for pair in [&older, &newer] {
        let record = assert_reset(&daemon, pair)?;
        assert_eq!(record.text("user.id"), UID.to_string());
        assert_eq!(record.text("session_enforcer.cgroup"), below.name()?);
    }
    let record = daemon.wait_for_termination_of(&busy)?;
    record.assert_reset("idle_timeout", &last, LIMIT);
    newer_of_other.opened.wait(2 * LIMIT);
    older_of_other.round_trip()?;
    newer_of_other.round_trip()?;
    assert_eq!(opened(&daemon)?, 2.0);
    assert_eq!(
        daemon.metric("session_enforcer_sessions_adopted_total", &[])?,
        1.0
    );
    daemon.wait_for_metric("session_enforcer_sessions", &[], 0.0)?;
    assert_eq!(daemon.metric("session_enforcer_map_entries", &[])?, 0.0);
    Ok(())
}

#[test]
fn connections_of_older_listeners_have_owners() -> Result<()> {
    let _turn = turn(module_path!());
    assert_older_sockets_are_owned(None)
}

/// Without `CAP_SYS_PTRACE` the daemon cannot record the owners of older listeners at its start.
/// Without `CAP_DAC_READ_SEARCH` it has to search for the path of a cgroup.
#[test]
fn without_cap_sys_ptrace_connections_of_older_listeners_have_owners() -> Result<()> {
    let _turn = turn(module_path!());
    assert_older_sockets_are_owned(Some(&FEWEST))
}

/// The name is not UTF-8 and ends as the kernel marks removed cgroups.
#[test]
fn a_cgroup_whose_name_is_not_utf8_is_below_its_ancestors() -> Result<()> {
    let _turn = turn(module_path!());
    let lab = Lab::new(AGENT)?;
    let named = lab.cgroup.child()?;
    let strange = named.path().join(OsStr::from_bytes(b"\xff (deleted)"));
    fs::create_dir(&strange)?;
    let owner = lab.at(&Place::here().in_directory(&strange))?;
    let listener = listen(&owner)?;
    let older = Pair::open(&lab.outside, &listener)?;
    let daemon = lab.daemon(&of_cgroup(&named)?)?;
    let newer = Pair::open(&lab.outside, &listener)?;
    assert_reset(&daemon, &older)?;
    assert_reset(&daemon, &newer)?;
    Ok(())
}

#[test]
fn a_connection_that_closes_before_its_owner_is_resolved_leaves_nothing() -> Result<()> {
    let _turn = turn(module_path!());
    let lab = Lab::new(AGENT)?;
    let listener = listen(&lab.inside)?;
    let daemon = daemon_that_resolves_owners(&lab, &of_users("0"))?;
    for _ in 0..50 {
        drop(Pair::open(&lab.outside, &listener)?);
    }
    let last = Pair::open(&lab.outside, &listener)?;
    assert_reset(&daemon, &last)?;
    assert_eq!(daemon.metric("session_enforcer_sessions", &[])?, 0.0);
    daemon.wait_for_metric("session_enforcer_map_entries", &[], 0.0)?;
    Ok(())
}

/// The daemon resolves the owner of one session after the other, and some close at that moment.
#[test]
fn sessions_that_close_while_owners_are_resolved_are_counted_as_opened_and_as_closed() -> Result<()>
{
    let _turn = turn(module_path!());
    const ROUNDS: usize = 40;
    const PAIRS: usize = 100;
    let lab = Lab::new(AGENT)?;
    let listener = listen(&lab.inside)?;
    let daemon = daemon_that_resolves_owners(&lab, &of_users("0"))?;
    let mut random = Random::of(seed()?, 0);
    for _ in 0..ROUNDS {
        daemon.freeze()?;
        let open = |_| Pair::open(&lab.outside, &listener);
        let mut pairs = (0..PAIRS).map(open).collect::<Result<Vec<_>>>()?;
        // A random order, because the daemon resolves owners in the order of establishment.
        random.shuffle(&mut pairs);
        daemon.thaw()?;
        // The connections close while the daemon resolves owners.
        for pair in pairs {
            drop(pair);
            thread::sleep(Duration::from_micros(100));
        }
    }
    daemon.wait_for_metric("session_enforcer_sessions", &[], 0.0)?;
    daemon.wait_for_metric("session_enforcer_map_entries", &[], 0.0)?;
    let closed = daemon.metric("session_enforcer_sessions_closed_total", &[])?;
    assert_eq!(opened(&daemon)?, closed);
    assert!(closed > 0.0);
    Ok(())
}

/// A session without a resolved owner when the rules change is counted as opened only if a new rule
/// applies to it. The programs' own matching must not count it again.
#[test]
fn undecided_sessions_are_counted_once_or_never_when_the_rules_change() -> Result<()> {
    let _turn = turn(module_path!());
    let lab = Lab::new(AGENT)?;
    let [kept, released] = [listen(&lab.inside)?, listen(&lab.inside)?];
    let daemon = daemon_that_resolves_owners(&lab, &of_users("0"))?;
    daemon.freeze()?;
    let listeners = [&kept, &released].into_iter().cycle().take(40);
    let open = |listener| Pair::open(&lab.outside, listener);
    let pairs = listeners.map(open).collect::<Result<Vec<_>>>()?;
    let of_port = format!("local_ports = [{}]", kept.port());
    let rules = rule("of_port", &of_port, "idle_timeout = \"1h\"");
    daemon.reload_soon(&(OWN_NAMESPACE.to_owned() + &rules))?;
    daemon.thaw()?;
    // Packets during the reload: the programs match sessions of an older policy again.
    for _ in 0..50 {
        for pair in &pairs {
            pair.to_server(b"x")?;
        }
    }
    daemon.wait_for_log("rule(s) in force")?;
    daemon.wait_for_metric("session_enforcer_sessions", &[], 20.0)?;
    daemon.wait_for_metric("session_enforcer_map_entries", &[], 20.0)?;
    assert_eq!(opened(&daemon)?, 20.0);
    drop(pairs);
    daemon.wait_for_metric("session_enforcer_sessions_closed_total", &[], 20.0)?;
    daemon.wait_for_metric("session_enforcer_map_entries", &[], 0.0)?;
    Ok(())
}

/// The daemon reads sessions in batches of 128 and then resolves their owners. Payload that arrives
/// after the read is in none of those records and must still count.
#[test]
fn payload_while_owners_are_resolved_is_activity() -> Result<()> {
    let _turn = turn(module_path!());
    const PAIRS: usize = 300;
    const ROUNDS: u64 = 12;
    // No session ends before the last payload.
    let limit = 3 * longer_than_a_start();
    let lab = Lab::new(AGENT)?;
    let listener = listen(&lab.inside)?;
    let daemon =
        daemon_that_resolves_owners(&lab, &rule("owned", "users = [0]", &idle_for(limit)))?;
    daemon.freeze()?;
    let mut random = Random::of(seed()?, 0);
    let mut pairs = Vec::new();
    for _ in 0..PAIRS {
        let pair = Pair::open(&lab.outside, &listener)?;
        pairs.push((pair.opened, 1 + random.below(ROUNDS), pair));
    }
    daemon.thaw()?;
    for round in 0..ROUNDS {
        for (last, _, pair) in pairs.iter_mut().filter(|(_, rounds, _)| round < *rounds) {
            *last = pair.to_server(b"x")?;
        }
    }
    daemon.wait_for_terminations(PAIRS)?;
    for (last, rounds, pair) in &pairs {
        let record = daemon.wait_for_termination_of(pair)?;
        record.assert_reset("idle_timeout", last, limit);
        assert_eq!(record.bytes(), [*rounds, 0]);
        assert_eq!(record.text("user.id"), "0");
    }
    Ok(())
}

/// A request arrives between the read of a record and its update.
#[test]
fn a_request_while_owners_are_resolved_is_owed_an_answer() -> Result<()> {
    let _turn = turn(module_path!());
    const ROUNDS: usize = 10;
    const PAIRS: usize = 300;
    // No answered session ends before the last request.
    let limit = 2 * longer_than_a_start();
    let lab = Lab::new(AGENT)?;
    let listener = listen(&lab.inside)?;
    let limits = idle_for(limit) + "\nresponse_timeout = \"1h\"";
    let daemon = daemon_that_resolves_owners(&lab, &rule("owned", "users = [0]", &limits))?;
    let mut random = Random::of(seed()?, 0);
    let mut asked = Vec::new();
    for _ in 0..ROUNDS {
        daemon.freeze()?;
        let open = |_| Pair::open(&lab.outside, &listener);
        let mut pairs = (0..PAIRS).map(open).collect::<Result<Vec<_>>>()?;
        random.shuffle(&mut pairs);
        daemon.thaw()?;
        for pair in pairs {
            // These pauses add up to about the time that the daemon takes.
            thread::sleep(Duration::from_micros(random.below(40)));
            pair.to_server(b"x")?;
            asked.push(pair);
        }
    }
    daemon.wait_for_metric(
        "session_enforcer_sessions_opened_total",
        &[],
        asked.len() as f64,
    )?;
    let answered = asked[0].to_client(b"y")?;
    let record = daemon.wait_for_termination_of(&asked[0])?;
    record.assert_reset("idle_timeout", &answered, limit);
    answered.wait(limit + Duration::from_secs(1));
    let ended = daemon.terminations()?.len();
    assert_eq!(ended, 1, "a session that is owed an answer has ended");
    Ok(())
}

/// The name that the audit has of a process: the `comm` of its main thread, at most 15 characters.
fn name_of(pid: u32) -> Result<String> {
    let name = fs::read_to_string(format!("/proc/{pid}/comm"))?;
    Ok(name.trim_end().to_owned())
}

/// An agent creates the sockets, and the test process holds them.
#[test]
fn the_audit_names_an_owner_that_is_gone_and_the_process_that_holds_the_connection() -> Result<()> {
    let _turn = turn(module_path!());
    let lab = Lab::new(AGENT)?;
    let unit = lab.cgroup.child()?;
    let name = unit.name()?;
    let limit = longer_than_a_start();
    let users = format!("users = [{UID}]");
    let daemon = lab.daemon(&rule("owned", &users, &idle_for(limit)))?;
    let agent = lab.at(&Place::here().in_cgroup(&unit).as_user(UID))?;
    let listener = listen(&agent)?;
    let accepted = Pair::open(&lab.outside, &listener)?;
    let dialled = Pair::open(&agent, &listen(&lab.outside)?)?;
    // The daemon has read the sessions and resolved the cgroup before the agent and the cgroup are
    // gone.
    eventually("the resolved cgroup", patience(), || {
        let (_, sessions) = daemon.ask("GET", &format!("/v1/sessions?cgroup={name}"), "")?;
        Ok((sessions.lines().count() == 2).then_some(()))
    })?;
    drop(agent);
    drop(unit);
    let holder = std::process::id();
    for pair in [&accepted, &dialled] {
        let record = daemon.wait_for_termination_of(pair)?;
        record.assert_reset("idle_timeout", &pair.opened, limit);
        assert_eq!(record.at("process.pid").as_u64(), Some(u64::from(holder)));
        assert_eq!(record.text("process.name"), name_of(holder)?);
        assert_eq!(record.text("user.id"), UID.to_string());
        assert!(record.at("user.name").is_null());
        assert_eq!(record.text("session_enforcer.cgroup"), name);
    }
    Ok(())
}

/// A server whose listener a thread has created, and which forks for each connection. The audit
/// must name the child.
#[test]
fn the_audit_names_the_forked_backend_and_not_the_server() -> Result<()> {
    let _turn = turn(module_path!());
    const SERVER: &str = "import os, socket, threading, time\n\
        made = []\n\
        def make():\n \
            s = socket.socket(); s.bind(('127.0.0.1', 0)); s.listen(); made.append(s)\n\
        t = threading.Thread(target=make, name='listener'); t.start(); t.join()\n\
        print(made[0].getsockname()[1], flush=True)\n\
        c, _ = made[0].accept()\n\
        if os.fork() == 0:\n \
            made[0].close(); print(os.getpid(), flush=True); time.sleep(60)\n\
        c.close()\n\
        time.sleep(60)\n";
    let lab = Lab::new(AGENT)?;
    let daemon = lab.daemon(&rule("owned", "", SHORT))?;
    let place = Place::here().in_cgroup(&lab.cgroup);
    let mut command = place.command(lab.agent_binary(), "python3");
    command.args(["-c", SERVER]).stdout(Stdio::piped());
    let mut server = command.spawn()?;
    let output = server.stdout.take().context("no output of the server")?;
    let mut lines = BufReader::new(output).lines();
    let mut number = || -> Result<u32> { Ok(lines.next().context("a line")??.parse()?) };
    let port = u16::try_from(number()?)?;
    let client = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
    let backend = number()?;
    let (pid, name) = (server.id(), name_of(backend)?);
    let record = daemon.wait_for_termination()?;
    assert_ne!(pid, backend);
    assert_eq!(record.at("process.pid").as_u64(), Some(u64::from(backend)));
    assert_eq!(record.text("process.name"), name);
    assert_eq!(record.text("user.id"), "0");
    assert_eq!(record.text("session_enforcer.cgroup"), lab.cgroup.name()?);
    drop(client);
    server.kill()?;
    server.wait()?;
    Ok(())
}

#[test]
fn a_cgroup_that_is_created_later_is_found_each_time() -> Result<()> {
    let _turn = turn(module_path!());
    let lab = Lab::new(AGENT)?;
    let slice = lab.cgroup.child()?;
    let path = slice.path().join("unit/inner");
    let conditions = format!("cgroups = [\"{}/unit/inner\"]", slice.name()?);
    // No session ends before the last connection is open.
    let limit = 3 * longer_than_a_start();
    let daemon = lab.daemon(&rule("owned", &conditions, &idle_for(limit)))?;
    let (mut listeners, mut pairs) = (Vec::new(), Vec::new());
    let some = Duration::from_millis(200);
    for (is_late, pause) in [
        (false, Duration::ZERO),
        (true, some),
        (true, Duration::ZERO),
        (false, some),
        (false, Duration::ZERO),
    ] {
        if is_late {
            // The connection is opened before the daemon knows the cgroup, so it is adopted.
            daemon.signal(Signal::SIGSTOP)?;
        }
        fs::create_dir_all(&path)?;
        let agent = lab.at(&Place::here().in_directory(&path))?;
        let listener = listen(&agent)?;
        pairs.push(Pair::open(&lab.outside, &listener)?);
        listeners.push(listener);
        daemon.signal(Signal::SIGCONT)?;
        daemon.wait_for_metric("session_enforcer_sessions", &[], pairs.len() as f64)?;
        drop(agent);
        remove(&path)?;
        // With a pause, the daemon begins to watch the parent, which is then removed too.
        thread::sleep(pause);
        fs::remove_dir(path.parent().context("a parent")?)?;
    }
    // Sessions of removed cgroups keep their rule.
    for pair in &pairs {
        let record = daemon.wait_for_termination_of(pair)?;
        record.assert_reset("idle_timeout", &pair.opened, limit);
        assert!(conditions.contains(record.text("session_enforcer.cgroup")));
    }
    Ok(())
}

#[test]
fn a_reload_matches_owners_anew() -> Result<()> {
    let _turn = turn(module_path!());
    let lab = Lab::new(AGENT)?;
    let gone = lab.cgroup.child()?;
    let older = listen(&lab.at(&Place::here().in_cgroup(&gone).as_user(UID))?)?;
    let daemon = lab.daemon(&rule("all", "", "idle_timeout = \"1h\""))?;
    let newer = listen(&lab.at(&Place::here().in_cgroup(&gone).as_user(OTHER_UID))?)?;
    let pairs = [&older, &newer].map(|listener| Pair::open(&lab.outside, listener));
    let [mine, theirs] = pairs;
    let (mine, theirs) = (mine?, theirs?);
    daemon.wait_for_metric("session_enforcer_sessions", &[], 2.0)?;
    let conditions = format!("cgroups = [\"{}\"]\nusers = [{UID}]", gone.name()?);
    let log = daemon.reload(&rule("owned", &conditions, "idle_timeout = \"1s\""))?;
    assert!(log.contains("in force"), "{log}");
    let record = daemon.wait_for_termination_of(&mine)?;
    assert_eq!(record.text("rule.name"), "owned");
    theirs.round_trip()?;
    daemon.wait_for_metric("session_enforcer_sessions", &[], 0.0)?;
    // Under another rule the second connection is tracked again.
    let limit = longer_than_a_start();
    let conditions = format!("users = [{OTHER_UID}]");
    daemon.reload(&rule("owned", &conditions, &idle_for(limit)))?;
    let last = theirs.round_trip()?;
    let record = daemon.wait_for_termination_of(&theirs)?;
    record.assert_reset("idle_timeout", &last, limit);
    Ok(())
}

#[test]
fn owners_are_recorded_only_while_a_rule_names_an_owner() -> Result<()> {
    let _turn = turn(module_path!());
    let lab = Lab::new(AGENT)?;
    let nobody_asked = rule("owned", "", SHORT);
    let daemon = lab
        .launch()
        .pinned(&lab.pins)
        .config(&nobody_asked)
        .start()?;
    assert_eq!(lab.cgroup.attached_programs()?, PROGRAMS);
    let agent = lab.at(&Place::here().in_cgroup(&lab.cgroup).as_user(UID))?;
    let older = listen(&agent)?;
    let by_socket = Pair::open(&agent, &listen(&lab.outside)?)?;
    // The owner comes from the socket.
    let record = assert_reset(&daemon, &by_socket)?;
    assert_eq!(record.text("user.id"), UID.to_string());
    assert_eq!(record.text("session_enforcer.cgroup"), lab.cgroup.name()?);
    let asked = of_users(&UID.to_string());
    daemon.reload(&asked)?;
    assert_eq!(lab.cgroup.attached_programs()?, PROGRAMS + 1);
    let others = Pair::open(&lab.outside, &listen(&lab.inside)?)?;
    let newer = Pair::open(&lab.outside, &listen(&agent)?)?;
    for pair in [&Pair::open(&lab.outside, &older)?, &newer] {
        assert_reset(&daemon, pair)?;
    }
    others.round_trip()?;
    // A refused policy changes nothing.
    let refused = rule("a", "users = [\"nobody-of-this-name\"]", SHORT);
    assert!(daemon.reload(&refused)?.contains("there is no user"));
    assert_eq!(lab.cgroup.attached_programs()?, PROGRAMS + 1);
    daemon.reload(&nobody_asked)?;
    assert_eq!(lab.cgroup.attached_programs()?, PROGRAMS);
    Ok(())
}

#[test]
fn an_unknown_user_is_refused_at_the_start_and_at_a_reload() -> Result<()> {
    let _turn = turn(module_path!());
    let lab = Lab::new(AGENT)?;
    let wrong = of_users("\"no-such-user\"");
    let refused = lab.launch().config(&wrong).refused()?;
    assert_eq!(refused.code, 78, "{}", refused.stderr);
    let said = "config.toml:3:9: rule \"owned\": users: there is no user \"no-such-user\" on this host; create it, \
                or give the uid";
    assert!(refused.stderr.contains(said), "{}", refused.stderr);
    let daemon = lab.daemon(&of_users("0"))?;
    let pair = Pair::open(&lab.outside, &listen(&lab.inside)?)?;
    let log = daemon.reload(&wrong)?;
    assert!(log.contains(said), "{log}");
    assert_reset(&daemon, &pair)?;
    Ok(())
}

/// Removes a cgroup once its processes have left it.
fn remove(path: &std::path::Path) -> Result<()> {
    eventually("the cgroup is removed", patience(), || {
        Ok(fs::remove_dir(path).is_ok().then_some(()))
    })
}
