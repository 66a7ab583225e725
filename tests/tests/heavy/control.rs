//! The control socket and the commands that use it.

use std::{
    collections::BTreeSet,
    fs,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::Ipv4Addr,
    os::{
        fd::AsFd as _,
        unix::{fs::PermissionsExt as _, net::UnixStream, process::CommandExt as _},
    },
    path::Path,
    process::{Child, Command, Stdio},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use nix::{
    errno::Errno,
    mount::{MsFlags, mount},
    poll::{PollFd, PollFlags, PollTimeout, poll},
    pty::openpty,
    sched::{CloneFlags, unshare},
    unistd::Group,
};
use serde_json::Value;
use session_enforcer_tests::{
    Daemon, End, Finished, Lab, Listener, Locked, Moment, Pair, assert_all_reset, daemon_command,
    die_with_parent, eventually, patience, run_to_end, whole_answer,
};

use crate::turn;

const AGENT: &str = env!("CARGO_BIN_EXE_session-enforcer-test-agent");

/// Limits that no session reaches during a test.
const FAR: &str = "idle_timeout = '1h'\nmax_lifetime = '12h'\n";

/// A user without privileges.
const NOBODY: u32 = 65_534;

/// Sessions whose list exceeds the buffers between the daemon and a client that does not read.
const MANY: usize = 3_000;

/// Two listeners with a rule each.
struct Services {
    lab: Lab,
    first: Listener,
    second: Listener,
}

impl Services {
    fn new() -> Result<Self> {
        let lab = Lab::new(AGENT)?;
        let listen = || lab.inside.listen((Ipv4Addr::LOCALHOST, 0));
        Ok(Self {
            first: listen()?,
            second: listen()?,
            lab,
        })
    }

    fn config(&self) -> String {
        self.with_limits(FAR, FAR)
    }

    fn with_limits(&self, first: &str, second: &str) -> String {
        let rule = |name, listener: &Listener, limits| {
            let port = listener.port();
            format!(
                "[[rule]]\nname = '{name}'\ndirection = 'inbound'\nlocal_ports = [{port}]\n{limits}"
            )
        };
        let rules = [
            rule("first", &self.first, first),
            rule("second", &self.second, second),
        ];
        // A small table, so that many clients can read it in a short time.
        format!("[daemon]\nmax_sessions = 8192\n{}", rules.concat())
    }

    fn open(&self, listener: &Listener, count: usize) -> Result<Vec<Pair>> {
        let open = |_| Pair::open(&self.lab.outside, listener);
        (0..count).map(open).collect()
    }
}

/// The JSON objects of an answer, one in each line.
fn objects(text: &str) -> Result<Vec<Value>> {
    text.lines()
        .map(|line| serde_json::from_str(line).with_context(|| format!("{line:?}")))
        .collect()
}

/// The sessions that the daemon lists.
fn sessions(daemon: &Daemon, query: &str) -> Result<Vec<Value>> {
    let (status, body) = daemon.ask("GET", &format!("/v1/sessions{query}"), "")?;
    ensure!(status == 200, "{query}: {status} {body}");
    objects(&body)
}

/// The id of the session of a connection's server.
fn id_of(daemon: &Daemon, pair: &Pair) -> Result<u64> {
    let port = pair.client_address.port();
    let rows = sessions(daemon, "")?;
    let row = rows.iter().find(|row| row["remote"]["port"] == port);
    row.and_then(|row| row["id"].as_u64())
        .with_context(|| format!("no session of port {port} in {rows:#?}"))
}

fn assert_code(finished: &Finished, code: i32) {
    assert_eq!(finished.code, code, "{finished:#?}");
}

#[test]
fn status_and_list_show_the_state_and_the_sessions() -> Result<()> {
    let _turn = turn(module_path!());
    let services = Services::new()?;
    let daemon = services.lab.daemon(&services.config())?;
    let first = services.open(&services.first, 3)?;
    let second = services.open(&services.second, 2)?;
    first[0].to_server(b"hello")?;
    let (status, body) = daemon.ask("GET", "/v1/status", "")?;
    assert_eq!(status, 200, "{body}");
    let status: Value = serde_json::from_str(&body)?;
    assert_eq!(status["ready"], true, "{status:#}");
    assert_eq!(status["pid"], daemon.pid(), "{status:#}");
    assert_eq!(status["sessions"], 5, "{status:#}");
    assert_eq!(status["attached"], true, "{status:#}");
    assert_eq!(status["rules"][0]["sessions"], 3, "{status:#}");
    assert_eq!(status["config"]["sha256"].as_str().map(str::len), Some(64));
    let words = daemon.command(&["status"])?;
    assert_code(&words, 0);
    assert!(words.stdout.contains(": ready\n"), "{}", words.stdout);

    let rows = sessions(&daemon, "")?;
    assert_eq!(rows.len(), 5, "{rows:#?}");
    let ids: BTreeSet<u64> = rows.iter().filter_map(|row| row["id"].as_u64()).collect();
    assert_eq!(ids.len(), 5);
    let id = id_of(&daemon, &first[0])?;
    let (status, body) = daemon.ask("GET", &format!("/v1/sessions/{id}"), "")?;
    assert_eq!(status, 200, "{body}");
    let row: Value = serde_json::from_str(&body)?;
    assert_eq!(row["rule"], "first", "{row:#}");
    assert_eq!(row["direction"], "inbound", "{row:#}");
    assert_eq!(row["local"]["port"], services.first.port(), "{row:#}");
    assert_eq!(row["bytes"]["received"], 5, "{row:#}");
    assert_eq!(row["clock"], "idle_timeout", "{row:#}");
    let left = row["left_seconds"].as_f64().unwrap_or_default();
    assert!(left > 3_000.0 && left <= 3_600.0, "{row:#}");
    let (status, _) = daemon.ask("GET", "/v1/sessions/1", "")?;
    assert_eq!(status, 404);

    // Filters and sort order, by HTTP and on the command line.
    assert_eq!(sessions(&daemon, "?rule=second")?.len(), 2);
    assert_eq!(sessions(&daemon, "?rule=second&idle_over=1h")?.len(), 0);
    let oldest = sessions(&daemon, "?sort=age&limit=1")?;
    assert_eq!(oldest[0]["remote"]["port"], first[0].client_address.port());
    let json = daemon.command(&["list", "--rule", "first", "--sort", "bytes", "--json"])?;
    assert_code(&json, 0);
    let listed = objects(&json.stdout)?;
    assert_eq!((listed.len(), listed[0]["id"].as_u64()), (3, Some(id)));
    let columns = daemon.command(&["list", "--sort", "age", "--limit", "4"])?;
    assert_code(&columns, 0);
    let lines: Vec<Vec<&str>> = columns
        .stdout
        .lines()
        .map(|l| l.split('\t').collect())
        .collect();
    assert_eq!(lines.len(), 4, "{}", columns.stdout);
    assert!(lines.iter().all(|line| line.len() == 15), "{lines:?}");
    assert_eq!(lines[0][6], first[0].client_address.to_string());
    drop(second);
    eventually("the sessions that ended are not listed", patience(), || {
        Ok((sessions(&daemon, "?rule=second")?.is_empty()).then_some(()))
    })
}

#[test]
fn kill_resets_a_session_and_the_audit_names_the_requester() -> Result<()> {
    let _turn = turn(module_path!());
    let services = Services::new()?;
    let observed = format!("{FAR}action = 'observe'\n");
    let config = services.with_limits(FAR, &observed);
    let daemon = services.lab.daemon(&config)?;
    let pairs = services.open(&services.first, 2)?;
    let observed = services.open(&services.second, 1)?;
    // Both filters must find the session before the daemon has handled all its events.
    pairs[0].to_server(b"hello")?;
    let id = id_of(&daemon, &pairs[0])?;
    let dry = daemon.command(&["kill", &id.to_string(), "--dry-run"])?;
    assert_code(&dry, 0);
    assert!(
        dry.stdout
            .starts_with(&format!("{id}\twould reset\tfirst\t")),
        "{dry:?}"
    );
    let (asked, killed) = Moment::of(|| daemon.command(&["kill", &id.to_string()]))?;
    assert_code(&killed, 0);
    assert!(
        killed.stdout.starts_with(&format!("{id}\treset\tfirst\t")),
        "{killed:?}"
    );
    pairs[0].ends()?[0].assert_reset(Errno::ECONNRESET, &asked, Duration::ZERO);
    let record = daemon.wait_for_termination_of(&pairs[0])?;
    record.assert_due("admin", &asked, Duration::ZERO);
    assert_eq!(record.text("session_enforcer.result"), "reset");
    assert_eq!(record.text("session_enforcer.requested_by.user"), "root");
    // The kernel keeps only 15 bytes of the name.
    let command = record.text("session_enforcer.requested_by.command");
    assert_eq!(command, "session-enforce");
    assert!(record.number("session_enforcer.requested_by.pid") > 1.0);
    // An observing rule resets nothing at a limit, but an administrator may.
    let (asked, answer) = Moment::of(|| daemon.ask("POST", "/v1/sessions/kill?rule=second", ""))?;
    assert_eq!(answer.0, 200);
    assert_eq!(objects(&answer.1)?[0]["result"], "reset", "{}", answer.1);
    observed[0].ends()?[0].assert_reset(Errno::ECONNRESET, &asked, Duration::ZERO);
    let record = daemon.wait_for_termination_of(&observed[0])?;
    assert_eq!(record.labels(), ["second", "admin", "enforce", "reset"]);
    let labels = [("reason", "admin"), ("result", "reset")];
    daemon.wait_for_metric("session_enforcer_terminations_total", &labels, 2.0)?;
    // No other session was reset.
    pairs[1].round_trip()?;
    Ok(())
}

#[test]
fn kill_reports_the_result_of_each_session() -> Result<()> {
    let _turn = turn(module_path!());
    let services = Services::new()?;
    let daemon = services.lab.daemon(&services.config())?;
    let pairs = services.open(&services.first, 2)?;
    let id = id_of(&daemon, &pairs[0])?;
    let some = daemon.command(&["kill", &id.to_string(), "1", "--json"])?;
    assert_code(&some, 75);
    let mut results: Vec<(u64, String)> = objects(&some.stdout)?
        .iter()
        .map(|line| (line["id"].as_u64().unwrap_or(0), line["result"].to_string()))
        .collect();
    results.sort();
    assert_eq!(
        results,
        [
            (1, "\"not_found\"".to_owned()),
            (id, "\"reset\"".to_owned())
        ]
    );
    // The filter excludes this session.
    let id = id_of(&daemon, &pairs[1])?;
    let other = daemon.command(&["kill", &id.to_string(), "--rule", "second"])?;
    assert_code(&other, 75);
    assert!(other.stdout.contains("not found"), "{other:?}");
    pairs[1].round_trip()?;
    let nobody = daemon.command(&["kill", "--rule", "second"])?;
    assert_code(&nobody, 0);
    assert!(nobody.stderr.contains("no session matches"), "{nobody:?}");
    for (args, code) in [
        (&["kill"][..], 2),
        (&["kill", "--remote", "10.0.0.1/8"], 2),
        (&["kill", "--rule", "third"], 1),
        // No rule names users or cgroups.
        (&["kill", "--user", "root"], 2),
        (&["list", "--cgroup", "/"], 2),
        (&["list", "--idle-over", "5"], 2),
    ] {
        let refused = daemon.command(args)?;
        assert_code(&refused, code);
        assert_eq!(refused.stderr.lines().count(), 1, "{args:?} {refused:?}");
    }
    let (status, body) = daemon.ask("POST", "/v1/sessions/kill", "")?;
    assert_eq!(status, 400, "{body}");
    Ok(())
}

#[test]
fn a_reset_that_hangs_is_reported_as_failed_and_completes_when_the_socket_is_unlocked() -> Result<()>
{
    let _turn = turn(module_path!());
    let services = Services::new()?;
    let daemon = services.lab.daemon(&services.config())?;
    let pairs = services.open(&services.first, 2)?;
    let locked = Locked::new(&pairs[0].server)?;
    let id = id_of(&daemon, &pairs[0])?;
    let failed = daemon.command(&["kill", "--rule", "first"])?;
    assert_code(&failed, 75);
    let lines: Vec<&str> = failed.stdout.lines().collect();
    assert_eq!(lines.len(), 2, "{failed:?}");
    let hangs = lines
        .iter()
        .find(|line| line.starts_with(&format!("{id}\t")));
    assert!(
        hangs.is_some_and(|line| line.contains("failed") && line.contains("locked")),
        "{failed:?}"
    );
    drop(locked);
    let records = eventually("the reset is recorded", patience(), || {
        let records = daemon.terminations_of(&pairs[0])?;
        Ok((records.len() == 2).then_some(records))
    })?;
    let results = [0, 1].map(|index| records[index].text("session_enforcer.result"));
    assert_eq!(results, ["failed", "reset"]);
    for record in &records {
        assert_eq!(record.text("event.reason"), "admin");
        assert_eq!(record.text("session_enforcer.requested_by.user"), "root");
    }
    Ok(())
}

#[test]
fn thousands_of_resets_at_once_are_in_the_audit_the_counters_and_the_events() -> Result<()> {
    let _turn = turn(module_path!());
    let services = Services::new()?;
    let daemon = services.lab.daemon(&services.config())?.quiet();
    let kept = services.open(&services.second, 3)?;
    let (_, pairs) = Moment::of(|| services.open(&services.first, MANY))?;
    let mut events = UnixStream::connect(daemon.control_socket())?;
    events.write_all(b"GET /v1/events HTTP/1.1\r\nHost: x\r\n\r\n")?;
    let mut events = BufReader::new(events);
    wait_for_line(&mut events, "transfer-encoding")?;
    let killed = daemon.command(&["kill", "--rule", "first", "--json"])?;
    assert_code(&killed, 0);
    let lines = objects(&killed.stdout)?;
    assert_eq!(lines.len(), MANY);
    assert!(lines.iter().all(|line| line["result"] == "reset"));
    assert_all_reset(&pairs, Duration::ZERO)?;
    let records = daemon.wait_for_terminations(MANY)?;
    assert_eq!(records.len(), MANY);
    let asked = |record: &session_enforcer_tests::Record| {
        record.labels() == ["first", "admin", "enforce", "reset"]
            && record.text("session_enforcer.requested_by.user") == "root"
    };
    assert!(records.iter().all(asked));
    let ids = |of: &mut dyn Iterator<Item = Option<u64>>| of.flatten().collect::<BTreeSet<u64>>();
    let recorded = ids(&mut records
        .iter()
        .map(|record| record.at("session_enforcer.id").as_u64()));
    let answered = ids(&mut lines.iter().map(|line| line["id"].as_u64()));
    assert_eq!((recorded.len(), &recorded), (MANY, &answered));
    let labels = [("reason", "admin"), ("result", "reset")];
    daemon.wait_for_metric("session_enforcer_terminations_total", &labels, MANY as f64)?;
    daemon.wait_for_metric("session_enforcer_sessions", &[("rule", "first")], 0.0)?;
    for pair in &kept {
        pair.round_trip()?;
    }
    // A client that follows the events receives each of them.
    let mut followed = 0;
    while followed < MANY {
        let line = wait_for_line(&mut events, "\"reason\":\"admin\"")?;
        followed += usize::from(line.contains("session-terminated"));
    }
    Ok(())
}

/// The next line that contains this text.
fn wait_for_line(reader: &mut BufReader<UnixStream>, text: &str) -> Result<String> {
    reader.get_ref().set_read_timeout(Some(patience()))?;
    loop {
        let mut line = String::new();
        ensure!(reader.read_line(&mut line)? > 0, "no line with {text:?}");
        if line.contains(text) {
            return Ok(line);
        }
    }
}

#[test]
fn a_client_that_stops_reading_delays_no_reset_and_is_disconnected() -> Result<()> {
    let _turn = turn(module_path!());
    let services = Services::new()?;
    let limits = "idle_timeout = '1s'\n";
    let daemon = services
        .lab
        .daemon(&services.with_limits(FAR, limits))?
        .quiet();
    let pairs = services.open(&services.first, MANY)?;
    let mut still = UnixStream::connect(daemon.control_socket())?;
    still.write_all(b"GET /v1/sessions HTTP/1.1\r\nHost: x\r\n\r\n")?;
    still.read_exact(&mut [0; 100])?;
    let late = services.open(&services.second, 1)?;
    assert_eq!(sessions(&daemon, "?rule=first")?.len(), pairs.len());
    late[0].ends()?[0].assert_reset(Errno::ECONNRESET, &late[0].opened, Duration::from_secs(1));
    let mut hung_up = [PollFd::new(still.as_fd(), PollFlags::empty())];
    let wait = PollTimeout::try_from(patience().as_millis())?;
    assert_eq!(poll(&mut hung_up, wait)?, 1, "the connection is open still");
    let mut rest = Vec::new();
    still.read_to_end(&mut rest)?;
    // The missing last chunk shows the reader that the answer is incomplete.
    assert!(!rest.ends_with(b"0\r\n\r\n"));
    Ok(())
}

#[test]
fn a_hundred_clients_at_once_are_all_answered() -> Result<()> {
    let _turn = turn(module_path!());
    let services = Services::new()?;
    let daemon = services.lab.daemon(&services.config())?;
    let pairs = services.open(&services.first, 200)?;
    let answers = thread::scope(|scope| {
        let clients: Vec<_> = (0..100)
            .map(|number| {
                let daemon = &daemon;
                scope.spawn(move || match number % 4 {
                    0 => Ok(sessions(daemon, "?sort=left&limit=200")?.len()),
                    1 => Ok(
                        objects(&daemon.ask("GET", "/v1/status", "")?.1)?[0]["sessions"]
                            .as_u64()
                            .unwrap_or(0) as usize,
                    ),
                    _ => Ok(sessions(daemon, "")?.len()),
                })
            })
            .collect();
        let join = |client: thread::ScopedJoinHandle<'_, Result<usize>>| match client.join() {
            Ok(answer) => answer,
            Err(_) => anyhow::bail!("a client panicked"),
        };
        clients.into_iter().map(join).collect::<Result<Vec<_>>>()
    })?;
    assert!(
        answers.iter().all(|count| *count == pairs.len()),
        "{answers:?}"
    );
    Ok(())
}

#[test]
fn requests_of_ten_megabytes_are_refused() -> Result<()> {
    let _turn = turn(module_path!());
    let services = Services::new()?;
    let daemon = services.lab.daemon(&services.config())?;
    let pairs = services.open(&services.first, 1)?;
    let megabytes = vec![b'1'; 10 << 20];
    for head in [
        "POST /v1/sessions/kill HTTP/1.1\r\nHost: x\r\nContent-Length: 10485760\r\n\r\n",
        "POST /v1/sessions/kill HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\na00000\r\n",
        "GET /v1/status HTTP/1.1\r\nX: ",
        "GET /v1/sessions?rule=",
    ] {
        let mut client = UnixStream::connect(daemon.control_socket())?;
        client.set_read_timeout(Some(patience()))?;
        client.set_write_timeout(Some(patience()))?;
        client.write_all(head.as_bytes())?;
        // The daemon closes the connection before it has read everything.
        let sent = client.write_all(&megabytes);
        assert!(sent.is_err(), "{head}");
        let mut answer = Vec::new();
        let read = client.read_to_end(&mut answer);
        let text = String::from_utf8_lossy(&answer);
        assert!(
            read.is_err() || text.starts_with("HTTP/1.1 4"),
            "{head} {text}"
        );
    }
    assert_eq!(sessions(&daemon, "")?.len(), pairs.len());
    Ok(())
}

#[test]
fn unknown_paths_methods_and_parameters_are_refused() -> Result<()> {
    let _turn = turn(module_path!());
    let services = Services::new()?;
    let daemon = services.lab.daemon(&services.config())?;
    for (method, path, status) in [
        ("GET", "/", 404),
        ("GET", "/v1/sessions/x", 404),
        ("POST", "/v1/status", 405),
        ("GET", "/v1/sessions/kill", 405),
        ("GET", "/v1/sessions?sort=left", 400),
        ("GET", "/v1/sessions?limit=0", 400),
        ("GET", "/v1/sessions?rulez=first", 400),
        ("GET", "/v1/sessions?rule=third", 404),
    ] {
        let (found, body) = daemon.ask(method, path, "")?;
        assert_eq!(found, status, "{method} {path}: {body}");
        let error: Value = serde_json::from_str(&body)?;
        assert!(error["error"].is_string(), "{body}");
    }
    Ok(())
}

#[test]
fn reload_waits_for_the_change_and_reports_it() -> Result<()> {
    let _turn = turn(module_path!());
    let services = Services::new()?;
    let daemon = services.lab.daemon(&services.config())?;
    let pairs = services.open(&services.first, 2)?;
    let gone = services.open(&services.second, 1)?;
    let only_first = services
        .config()
        .split("[[rule]]")
        .take(2)
        .collect::<Vec<_>>()
        .join("[[rule]]");
    daemon.write_config(&only_first)?;
    let reloaded = daemon.command(&["reload"])?;
    assert_code(&reloaded, 0);
    let said = "1 rule(s) in force; of the sessions 2 kept, 1 released, 0 expired, 0 adopted\n";
    assert_eq!(reloaded.stdout, said);
    let records = daemon.audit()?;
    let loaded = records
        .iter()
        .rfind(|record| record.text("event.action") == "policy-loaded");
    let loaded = loaded.context("no record of the reload")?;
    assert_eq!(loaded.text("session_enforcer.requested_by.user"), "root");
    daemon.write_config(&only_first.replace("1h", "1x"))?;
    let refused = daemon.command(&["reload"])?;
    assert_code(&refused, 78);
    assert!(
        refused
            .stderr
            .contains("config.toml:7:16: rule \"first\": idle_timeout: "),
        "{refused:?}"
    );
    assert_eq!(refused.stderr.lines().count(), 1);
    let error = refused
        .stderr
        .trim_end()
        .trim_start_matches("session-enforcer: ");
    let as_json = daemon.command(&["reload", "--json"])?;
    assert_code(&as_json, 78);
    let said: Value = serde_json::from_str(&as_json.stdout)?;
    assert_eq!(said, serde_json::json!({ "error": error }));
    let status = daemon.command(&["status", "--json"])?;
    let status: Value = serde_json::from_str(&status.stdout)?;
    assert_eq!(status["config"]["last_reload_successful"], false);
    assert_eq!(status["config"]["last_reload_error"], error);
    let status = daemon.command(&["status"])?.stdout;
    assert!(
        status.contains(&format!("last reload    refused: {error}\n")),
        "{status}"
    );
    // A new limit that the sessions have already passed.
    thread::sleep(Duration::from_millis(1_100));
    daemon.write_config(&only_first.replace("1h", "1s"))?;
    let (status, body) = daemon.ask("POST", "/v1/reload", "")?;
    assert_eq!(status, 200, "{body}");
    let status = daemon.command(&["status"])?.stdout;
    assert!(!status.contains("last reload"), "{status}");
    let change: Value = serde_json::from_str(&body)?;
    assert_eq!(
        (change["expired"].as_u64(), change["rules"].as_u64()),
        (Some(2), Some(1))
    );
    for pair in &pairs {
        assert_eq!(
            daemon.wait_for_termination_of(pair)?.text("event.reason"),
            "policy"
        );
    }
    gone[0].round_trip()?;
    Ok(())
}

#[test]
fn a_configuration_of_the_command_line_is_not_reloaded() -> Result<()> {
    let _turn = turn(module_path!());
    let services = Services::new()?;
    let port = services.first.port().to_string();
    let args = ["--port", &port, "--idle-timeout", "1h"];
    let daemon = services.lab.launch().args(&args).start()?;
    let pairs = services.open(&services.first, 1)?;
    let refused = daemon.command(&["reload"])?;
    assert_code(&refused, 78);
    assert!(
        refused.stderr.contains("came from the command line"),
        "{refused:?}"
    );
    let id = id_of(&daemon, &pairs[0])?.to_string();
    let explained = daemon.command(&["explain", "--session", &id])?;
    assert_code(&explained, 0);
    assert!(explained.stdout.contains("rule \"cli\""), "{explained:?}");
    Ok(())
}

#[test]
fn explain_uses_the_configuration_file_for_a_live_session() -> Result<()> {
    let _turn = turn(module_path!());
    let services = Services::new()?;
    let daemon = services.lab.daemon(&services.config())?;
    let pairs = services.open(&services.second, 1)?;
    let id = id_of(&daemon, &pairs[0])?.to_string();
    let explained = daemon.command(&["explain", "--session", &id])?;
    assert_code(&explained, 0);
    for part in [
        "limited by rule \"second\", mode enforce, open",
        "by idle_timeout, if nothing passes",
        "rule \"first\": no: local port",
        "decided: enforced by rule \"second\"",
    ] {
        assert!(
            explained.stdout.contains(part),
            "{part:?} in {}",
            explained.stdout
        );
    }
    assert!(
        !explained
            .stdout
            .contains("is not what the daemon has in force")
    );
    daemon.write_config(&(services.config() + "# changed\n"))?;
    let explained = daemon.command(&["explain", "--session", &id])?;
    assert!(
        explained
            .stdout
            .contains("is not what the daemon has in force"),
        "{explained:?}"
    );
    let gone = daemon.command(&["explain", "--session", "1"])?;
    assert_code(&gone, 1);
    Ok(())
}

#[test]
fn events_are_shown_as_they_are_recorded_until_the_daemon_stops() -> Result<()> {
    let _turn = turn(module_path!());
    let services = Services::new()?;
    let mut daemon = services.lab.daemon(&services.config())?;
    let pairs = services.open(&services.first, 1)?;
    let mut command = daemon.command_for(&["events"])?;
    let mut follower = die_with_parent(&mut command)
        .stdout(Stdio::piped())
        .spawn()?;
    let output = follower.stdout.take().context("no pipe")?;
    let mut lines = BufReader::new(output).lines();
    let id = id_of(&daemon, &pairs[0])?.to_string();
    // Each iteration causes another event, until the follower has connected and received one.
    let pairs = services.open(&services.first, 50)?;
    let mut killed = pairs.iter();
    let (first, next) = thread::scope(|scope| {
        let reading = scope.spawn(move || (lines.next(), lines));
        while !reading.is_finished() {
            let pair = killed.next().context("no event came")?;
            let id = id_of(&daemon, pair)?.to_string();
            assert_code(&daemon.command(&["kill", &id])?, 0);
        }
        match reading.join() {
            Ok((first, lines)) => anyhow::Ok((first, lines)),
            Err(_) => anyhow::bail!("the reader panicked"),
        }
    })?;
    let first = first.context("no line")??;
    assert!(
        first.contains("session-terminated  first  admin  reset "),
        "{first}"
    );
    assert!(first.ends_with("asked for by root"), "{first}");
    assert_code(&daemon.command(&["kill", &id])?, 0);
    daemon.stop()?;
    let rest: Vec<String> = next.collect::<Result<_, _>>()?;
    assert!(
        rest.iter()
            .any(|line| line.contains(&format!("reset {id} "))),
        "{rest:?}"
    );
    let last = rest.last().context("no line at the end")?;
    assert!(last.contains("enforcer-stopped"), "{rest:?}");
    assert_eq!(follower.wait()?.code(), Some(0));
    Ok(())
}

#[test]
fn every_follower_of_the_events_gets_the_last_record_and_ends_with_0() -> Result<()> {
    let _turn = turn(module_path!());
    let services = Services::new()?;
    let mut daemon = services.lab.daemon(&services.config())?;
    let follow = |_| {
        let mut command = daemon.command_for(&["events"])?;
        let follower = die_with_parent(command.stdout(Stdio::piped())).spawn()?;
        anyhow::Ok(follower)
    };
    let followers = (0..12).map(follow).collect::<Result<Vec<_>>>()?;
    // A follower that has printed a record is connected.
    let connected = |mut follower: Child| {
        let mut output = BufReader::new(follower.stdout.take().context("no pipe")?);
        let mut hung_up = [PollFd::new(output.get_ref().as_fd(), PollFlags::POLLIN)];
        eventually("a record", patience(), || {
            assert_code(&daemon.command(&["reload"])?, 0);
            let ready = poll(&mut hung_up, PollTimeout::from(50u8))?;
            Ok((ready == 1).then_some(()))
        })?;
        let mut first = String::new();
        output.read_line(&mut first)?;
        anyhow::Ok((follower, output))
    };
    let followers = followers.into_iter().map(connected);
    let followers = followers.collect::<Result<Vec<_>>>()?;
    daemon.stop()?;
    for (mut follower, mut output) in followers {
        let mut rest = String::new();
        output.read_to_string(&mut rest)?;
        assert!(rest.trim_end().ends_with("enforcer-stopped"), "{rest}");
        assert_eq!(follower.wait()?.code(), Some(0));
    }
    Ok(())
}

#[test]
fn output_that_cannot_be_written_is_an_error() -> Result<()> {
    let _turn = turn(module_path!());
    let services = Services::new()?;
    let daemon = services.lab.daemon(&services.config())?;
    let pairs = services.open(&services.first, 1)?;
    let id = id_of(&daemon, &pairs[0])?.to_string();
    let all: [&[&str]; 6] = [
        &["status"],
        &["status", "--json"],
        &["list"],
        &["reload"],
        &["explain", "--session", &id],
        &["kill", "--dry-run", &id],
    ];
    for args in all {
        let mut command = daemon.command_for(args)?;
        let full = fs::File::options().write(true).open("/dev/full")?;
        let failed = command.stdout(full).output()?;
        let stderr = String::from_utf8_lossy(&failed.stderr);
        assert_eq!(failed.status.code(), Some(1), "{args:?} {stderr}");
        let why = ": No space left on device (os error 28)\n";
        assert!(stderr.ends_with(why), "{args:?} {stderr}");
    }
    Ok(())
}

#[test]
fn an_unknown_rule_or_session_in_a_request_is_reported_in_plain_words() -> Result<()> {
    let _turn = turn(module_path!());
    let services = Services::new()?;
    let daemon = services.lab.daemon(&services.config())?;
    let unknown = daemon.command(&["list", "--rule", "third"])?;
    assert_code(&unknown, 1);
    let why =
        "there is no rule \"third\"; `session-enforcer status` shows the names of the rules\n";
    assert!(unknown.stderr.ends_with(why), "{unknown:?}");
    let dry_run = daemon.command(&["kill", "--dry-run", "1"])?;
    assert_code(&dry_run, 75);
    assert_eq!(dry_run.stdout, "1\tnot found\n");
    assert!(
        dry_run.stderr.contains("1 of 1 sessions were not found"),
        "{dry_run:?}"
    );
    assert_code(&daemon.command(&["kill", "1", "2", "--rule", "first"])?, 75);
    daemon.wait_for_log("asks for a reset of the sessions 1, 2 with rule=first")
}

#[test]
fn only_root_and_the_members_of_the_group_may_use_the_control_socket() -> Result<()> {
    let _turn = turn(module_path!());
    let services = Services::new()?;
    let directory = tempfile::tempdir()?;
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755))?;
    let socket = directory.path().join("group.sock");
    let group = Group::from_name("daemon")?.context("there is no group daemon")?;
    let config = format!(
        "[control]\nsocket = '{}'\ngroup = 'daemon'\n{}",
        socket.display(),
        services.config()
    );
    let _daemon = services.lab.daemon(&config)?;
    let mode = fs::metadata(&socket)?.permissions().mode();
    assert_eq!(mode & 0o777, 0o660);
    let ask = |gid: u32, groups: &[u32]| -> Result<Finished> {
        let mut command = daemon_command()?;
        command.args(["status", "--socket"]).arg(&socket);
        let groups = groups.to_vec();
        // `Command::uid` and `Command::gid` would drop these supplementary groups.
        // SAFETY: the closure only makes system calls and allocates nothing.
        unsafe {
            command.pre_exec(move || {
                let ids: &[libc::gid_t] = &groups;
                let results = [
                    libc::setgroups(ids.len(), ids.as_ptr()),
                    libc::setgid(gid),
                    libc::setuid(NOBODY),
                ];
                match results {
                    [0, 0, 0] => Ok(()),
                    _ => Err(std::io::Error::last_os_error()),
                }
            })
        };
        run_to_end(command, patience())
    };
    assert_code(&ask(group.gid.as_raw(), &[])?, 0);
    assert_code(&ask(NOBODY, &[7, group.gid.as_raw()])?, 0);
    let refused = ask(NOBODY, &[7])?;
    assert_code(&refused, 77);
    assert!(refused.stderr.contains("control.group"), "{refused:?}");
    // Even if the mode lets everybody connect, the daemon checks the peer's credentials.
    fs::set_permissions(&socket, fs::Permissions::from_mode(0o666))?;
    let refused = ask(NOBODY, &[7])?;
    assert_code(&refused, 77);
    assert!(
        refused.stderr.contains("user 65534 may not ask"),
        "{refused:?}"
    );
    assert_code(&ask(NOBODY, &[group.gid.as_raw()])?, 0);
    Ok(())
}

#[test]
fn a_control_socket_in_use_is_an_error_and_an_impossible_default_one_is_not() -> Result<()> {
    let _turn = turn(module_path!());
    let services = Services::new()?;
    let daemon = services.lab.daemon(&services.config())?;
    let taken = daemon.control_socket();
    let other = Lab::new(AGENT)?;
    let config = services.config();
    let args = ["--control-socket", taken.to_str().context("a path")?];
    let refused = other.launch().config(&config).args(&args).refused()?;
    assert_code(&refused, 1);
    assert!(refused.stderr.contains("control.socket: "), "{refused:?}");
    // A file system at /run where no directory can be created.
    fn read_only_run(command: &mut Command) {
        let set = || {
            let none = None::<&Path>;
            unshare(CloneFlags::CLONE_NEWNS)?;
            mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
            mount(
                Some("none"),
                "/run",
                Some("tmpfs"),
                MsFlags::MS_RDONLY,
                none,
            )?;
            Ok(())
        };
        // SAFETY: between fork and exec the closure only makes system calls.
        unsafe { command.pre_exec(set) };
    }
    let config = format!("[control]\n{config}");
    let without = other
        .launch()
        .config(&config)
        .prepared(read_only_run)
        .start()?;
    without.wait_for_log("no control socket, and no commands")?;
    let asked = without.command(&["status"])?;
    assert_code(&asked, 69);
    assert!(asked.stderr.contains("no daemon answers"), "{asked:?}");
    Ok(())
}

#[test]
fn kill_of_several_sessions_asks_for_confirmation_on_a_terminal() -> Result<()> {
    let _turn = turn(module_path!());
    let services = Services::new()?;
    let daemon = services.lab.daemon(&services.config())?;
    let pairs = services.open(&services.first, 2)?;
    let answered = |answer: &str| -> Result<(i32, String)> {
        let terminal = openpty(None, None)?;
        let mut command = daemon.command_for(&["kill", "--rule", "first"])?;
        command
            .stdin(Stdio::from(terminal.slave.try_clone()?))
            .stderr(Stdio::from(terminal.slave))
            .stdout(Stdio::piped());
        let mut child = die_with_parent(&mut command).spawn()?;
        // The child now has the only copies of the slave.
        drop(command);
        let mut terminal = fs::File::from(terminal.master);
        let mut shown = String::new();
        let mut byte = [0];
        while !shown.contains("[y/N] ") {
            ensure!(terminal.read(&mut byte)? == 1, "{shown}");
            shown.push(char::from(byte[0]));
        }
        writeln!(terminal, "{answer}")?;
        let mut results = String::new();
        child
            .stdout
            .take()
            .context("a pipe")?
            .read_to_string(&mut results)?;
        let code = child.wait()?.code().context("a signal")?;
        Ok((code, shown + &results))
    };
    let (code, text) = answered("n")?;
    assert!(
        code == 0 && text.contains("Reset these 2 sessions? "),
        "{text}"
    );
    assert!(
        text.contains("REMOTE") && !text.contains("\treset\t"),
        "{text}"
    );
    pairs[0].round_trip()?;
    let (asked, (code, text)) = Moment::of(|| answered("y"))?;
    assert_eq!((code, text.matches("\treset\t").count()), (0, 2), "{text}");
    for end in pairs
        .iter()
        .map(Pair::ends)
        .collect::<Result<Vec<[End; 2]>>>()?
    {
        end[0].assert_reset(Errno::ECONNRESET, &asked, Duration::ZERO);
    }
    Ok(())
}

#[test]
fn chunked_answers_are_decoded() -> Result<()> {
    let _turn = turn(module_path!());
    let answer =
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n1\r\nd\r\n0\r\n\r\n";
    assert_eq!(whole_answer(answer)?, (200, "abcd".to_owned()));
    assert!(whole_answer(&answer[..answer.len() - 5]).is_err());
    Ok(())
}
