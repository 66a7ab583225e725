//! `explain` agrees with the daemon: with random rules and real connections, it names for each end
//! the same rule as the audit record.
//!
//! `SESSION_ENFORCER_SEED` repeats a run.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::Path,
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result};
use session_enforcer_tests::{
    Agent, Lab, Listener, Pair, Place, Random, Record, daemon_command, patience, run_to_end, seed,
};

const AGENT: &str = env!("CARGO_BIN_EXE_session-enforcer-test-agent");
const CONNECTIONS: usize = 40;
const RULES: usize = 24;
/// A user that exists on every host, and a user id without a name.
const NOBODY: &str = "nobody";
const UID: u32 = 3_999_999_997;

/// A user and cgroup that create sockets.
struct Owner {
    agent: Agent,
    /// The user's name and number. Rules and `--user` take either.
    users: [String; 2],
    cgroup: String,
}

impl Owner {
    fn new(lab: &Lab, cgroup: &Path, name: String, user: &str, uid: u32) -> Result<Self> {
        let place = Place::here().in_directory(cgroup).as_user(uid);
        Ok(Self {
            agent: lab.at(&place)?,
            users: [user.to_owned(), uid.to_string()],
            cgroup: name,
        })
    }
}

/// A rule with an owner and random other conditions.
fn random_rule(random: &mut Random, index: usize, owners: &[Owner], ports: &[u16]) -> String {
    let mut rule = format!("[[rule]]\nname = \"r{index}\"\n");
    let mut add = |line: String| {
        rule.push_str(&line);
        rule.push('\n');
    };
    if random.once_in(2) {
        let direction = random.one_of(&["inbound", "outbound"]);
        add(format!("direction = \"{direction}\""));
    }
    for key in ["local_ports", "remote_ports"] {
        if random.once_in(3) {
            let port = random.one_of(ports);
            let range = if random.once_in(2) {
                port.to_string()
            } else {
                format!("\"{port}-65535\"")
            };
            add(format!("{key} = [{range}]"));
        }
    }
    for key in ["local", "remote"] {
        if random.once_in(3) {
            let nets = [
                "127.0.0.0/30",
                "127.0.0.2",
                "::1",
                "::/0",
                "0.0.0.0/0",
                "::ffff:127.0.0.3",
            ];
            add(format!(
                "{key} = [\"{}\", \"10.0.0.0/8\"]",
                random.one_of(&nets)
            ));
        }
    }
    let owner = &owners[random.below(owners.len() as u64) as usize];
    let asks = random.below(3);
    if asks != 0 {
        let [name, uid] = &owner.users;
        let user = match name.parse::<u32>().is_err() && random.once_in(2) {
            true => format!("\"{name}\""),
            false => uid.clone(),
        };
        add(format!("users = [54321, {user}]"));
    }
    if asks != 1 {
        add(format!("cgroups = [\"/no-such\", \"{}\"]", owner.cgroup));
    }
    add(match random.once_in(5) {
        true => "action = \"exempt\"".to_owned(),
        false => "idle_timeout = \"1s\"".to_owned(),
    });
    rule
}

/// One end of a connection, for `explain`.
struct Question<'a> {
    local: SocketAddr,
    remote: SocketAddr,
    direction: &'static str,
    owner: &'a Owner,
}

impl Question<'_> {
    /// The rule that tracks this end according to `explain`. `None` if the end is exempt or no rule
    /// matches.
    fn explained(&self, config: &Path, random: &mut Random) -> Result<Option<String>> {
        let user = &self.owner.users[random.below(2) as usize];
        let mut command = daemon_command()?;
        command
            .arg("explain")
            .args([self.local.to_string(), self.remote.to_string()])
            .args(["--direction", self.direction, "--user", user])
            .args(["--cgroup", &self.owner.cgroup, "--config"])
            .arg(config);
        let finished = run_to_end(command, patience())?;
        assert_eq!(finished.code, 0, "{}", finished.stderr);
        let said = finished.stdout;
        let decided = said
            .lines()
            .find_map(|line| line.trim().strip_prefix("decided: "));
        let decided = decided.with_context(|| format!("no decision in: {said}"))?;
        let tracked = decided.strip_prefix("observed by rule \"");
        Ok(tracked.and_then(|rest| Some(rest.split_once('"')?.0.to_owned())))
    }
}

/// The addresses of the end that dialled and of the end that accepted, from the audit record.
fn addresses(record: &Record) -> Result<[SocketAddr; 2]> {
    let [source, destination] = record.ports();
    let ip = |path| record.text(path).parse::<IpAddr>().context(path);
    Ok([
        SocketAddr::new(ip("source.ip")?, source),
        SocketAddr::new(ip("destination.ip")?, destination),
    ])
}

#[test]
fn explain_names_the_rule_that_decides_about_real_connections() -> Result<()> {
    let random = &mut Random::of(seed()?, 0);
    let lab = Lab::new(AGENT)?;
    let outer = lab.cgroup.child()?;
    let inner = outer.child()?;
    let nobody = nix::unistd::User::from_name(NOBODY)?.context("no user nobody")?;
    let owners = [
        Owner::new(&lab, lab.cgroup.path(), lab.cgroup.name()?, "root", 0)?,
        Owner::new(
            &lab,
            outer.path(),
            outer.name()?,
            NOBODY,
            nobody.uid.as_raw(),
        )?,
        Owner::new(&lab, inner.path(), inner.name()?, &UID.to_string(), UID)?,
    ];
    let all = |ip: IpAddr| SocketAddr::new(ip, 0);
    let any = [
        all(Ipv4Addr::UNSPECIFIED.into()),
        all(Ipv6Addr::UNSPECIFIED.into()),
    ];
    let listeners: Vec<(Listener, &Owner)> = owners
        .iter()
        .flat_map(|owner| any.map(|any| Ok((owner.agent.listen(any)?, owner))))
        .collect::<Result<_>>()?;
    let ports: Vec<u16> = listeners
        .iter()
        .map(|(listener, _)| listener.port())
        .collect();
    let mut text = "[daemon]\nmode = \"observe\"\n".to_owned();
    for index in 0..RULES {
        write!(text, "{}", random_rule(random, index, &owners, &ports))?;
    }
    let directory = tempfile::tempdir()?;
    let config = directory.path().join("config.toml");
    fs::write(&config, &text)?;
    let daemon = lab.daemon(&text)?;
    let mut pairs = Vec::new();
    // The keys have addresses besides ports, because one port may be in two connections with
    // different addresses.
    let mut expected: BTreeMap<([SocketAddr; 2], &str), Option<String>> = BTreeMap::new();
    for _ in 0..CONNECTIONS {
        let (listener, server) = &listeners[random.below(listeners.len() as u64) as usize];
        let client = &owners[random.below(owners.len() as u64) as usize];
        let ipv4 = Ipv4Addr::new(127, 0, 0, 1 + random.below(5) as u8);
        let ip = match (listener.address.is_ipv4(), random.once_in(2)) {
            (true, _) => IpAddr::V4(ipv4),
            (false, true) => ipv4.to_ipv6_mapped().into(),
            (false, false) => Ipv6Addr::LOCALHOST.into(),
        };
        let to = SocketAddr::new(ip, listener.port());
        let pair = Pair::dial(client.agent.tcp(to)?, listener, to)?;
        let (dialled, accepted) = (pair.client_address, pair.server_address);
        let key = [dialled, accepted].map(|at| SocketAddr::new(at.ip().to_canonical(), at.port()));
        let ends = [
            (dialled, accepted, "outbound", client),
            (accepted, dialled, "inbound", *server),
        ];
        for (local, remote, direction, owner) in ends {
            let question = Question {
                local,
                remote,
                direction,
                owner,
            };
            let rule = question.explained(&config, random)?;
            expected.insert((key, direction), rule);
        }
        pairs.push(pair);
    }
    assert_eq!(expected.len(), 2 * CONNECTIONS);
    let tracked = expected.values().flatten().count();
    let rules: std::collections::BTreeSet<_> = expected.values().flatten().collect();
    println!(
        "{tracked} of {} ends are tracked, by {} rules",
        expected.len(),
        rules.len()
    );
    daemon.wait_for_terminations(tracked)?;
    thread::sleep(Duration::from_secs(1));
    let records = daemon.terminations()?;
    assert_eq!(records.len(), tracked, "{text}");
    for record in records {
        let key = (addresses(&record)?, record.text("network.direction"));
        let rule = expected.get(&key).and_then(Option::as_deref);
        assert_eq!(rule, Some(record.text("rule.name")), "{record:?}\n{text}");
    }
    Ok(())
}
