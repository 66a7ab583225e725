//! The show: prints who is connected and what happens to each client.

use std::fs;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags};
use session_enforcer_tests::{
    Daemon, Interrupted, Launch, Moment, Record, Stop, Time, run_on_terminal,
};

use super::cast::{self, Fate, NEWER, OLDER, Role};
use super::client::{Client, Said};
use super::screen::{Kind, Screen};
use super::stage::{Stage, ensure_gone};
use crate::process::say;

/// The interval of the clock's updates.
const TICK: Duration = Duration::from_millis(100);

/// A reset that is later than this counts as missing. The machine may be busy.
const PATIENCE: Duration = Duration::from_secs(5);

/// The terminal width for the session list.
const WIDTH: u16 = 100;

/// The older client is connected this long before the daemon starts.
const HEAD_START: Duration = Duration::from_secs(1);

/// The metrics that the show prints.
const METRICS: [&str; 5] = [
    "session_enforcer_sessions{",
    "session_enforcer_terminations_total{",
    "session_enforcer_termination_lateness_seconds_bucket{le=\"0.001\"}",
    "session_enforcer_termination_lateness_seconds_bucket{le=\"0.01\"}",
    "session_enforcer_termination_lateness_seconds_count",
];

/// Runs the show, removes everything, and fails if an outcome was not as expected.
pub(super) fn show(agent: &Path) -> Result<()> {
    let stop = Stop::listen()?;
    let servers = NEWER.iter().map(Role::server).collect();
    let stage = Stage::build(agent, &servers)?;
    let mut traces = stage.traces();
    let mut screen = Screen::new();
    let played = play(&stage, &stop, &mut screen, &mut traces);
    drop(stage);
    let gone = ensure_gone(&traces);
    // A terminal also interrupts the daemon. Its exit is then no failure.
    let played = stop.check().and(played);
    if let (Err(_), Err(left)) = (&played, &gone) {
        say!("{left:#}");
    }
    let summary = played?;
    gone?;
    screen.heading(&format!("{summary} Nothing is left behind."))
}

fn play(
    stage: &Stage,
    stop: &Stop,
    screen: &mut Screen,
    traces: &mut Vec<PathBuf>,
) -> Result<String> {
    let config = cast::config();
    introduce(stage, screen, &config)?;
    let older = Client::connect(&OLDER, stage)?;
    stop.wait(&mut [], HEAD_START)?;
    let launch = Launch::on(stage.cgroup.path()).config(&config);
    let daemon = stop.unblocked(|| launch.start())?.quiet();
    let process = PathBuf::from(format!("/proc/{}", daemon.pid()));
    traces.extend([process, daemon.audit_path()]);
    screen.start_clock();
    let mut clients = vec![older];
    for role in &NEWER {
        clients.push(Client::connect(role, stage)?);
    }
    let mut show = Show {
        daemon,
        clients,
        stage,
        stop,
        screen,
        lateness: Vec::new(),
    };
    let played = show.run();
    screen.stop_clock();
    if let Err(error) = &played
        && !error.is::<Interrupted>()
    {
        eprintln!("\nthe daemon's log:\n{}", show.daemon.log());
    }
    played
}

fn introduce(stage: &Stage, screen: &Screen, config: &str) -> Result<()> {
    let [clients, servers] = stage.namespaces();
    let cgroup = stage.cgroup.path().display();
    screen.heading("session-enforcer at work, on real connections, for ten seconds")?;
    screen.quote(&format!("clients  in the network namespace {clients}"))?;
    screen.quote(&format!("servers  in the network namespace {servers}"))?;
    screen.quote(&format!("         and the cgroup {cgroup}"))?;
    screen.quote("daemon   attached to that cgroup: it sees no other connection")?;
    screen.heading("The configuration, demo.toml")?;
    screen.quote(config)?;
    screen.heading("The command")?;
    screen.quote("session-enforcer run --config demo.toml \\")?;
    screen.quote(&format!("    --cgroup {cgroup}"))
}

/// The running show. The daemon must be dropped before the clients.
struct Show<'a> {
    daemon: Daemon,
    clients: Vec<Client>,
    stage: &'a Stage,
    stop: &'a Stop,
    screen: &'a Screen,
    /// The lateness of each reset in seconds.
    lateness: Vec<f64>,
}

impl Show<'_> {
    /// Runs to the end and returns the summary.
    fn run(&mut self) -> Result<String> {
        self.present()?;
        while !self.clients.iter().all(Client::is_settled) {
            self.talk()?;
            let ended = self.wait()?;
            self.tell_records()?;
            for number in ended {
                self.tell_reset(number)?;
            }
            self.check_none_is_overdue()?;
            self.screen.clock(&self.connected())?;
        }
        self.tell_survivors()?;
        self.end_by_hand()?;
        self.quote_audit()?;
        self.quote_metrics()?;
        self.stop_daemon()?;
        self.summary()
    }

    fn present(&self) -> Result<()> {
        self.screen.heading("Who is connected")?;
        for client in &self.clients {
            let Role {
                name, rule, story, ..
            } = client.role;
            let route = client.route();
            self.screen
                .quote(&format!("{name:<8}  {route}, rule {rule}"))?;
            self.screen.quote(&format!("          {story}"))?;
        }
        // The daemon does not track the exempt client.
        let tracked = u32::try_from(self.clients.len() - 1)?;
        let wait_for = |name, value| self.daemon.wait_for_metric(name, &[], value);
        wait_for("session_enforcer_sessions_adopted_total", 1.0)?;
        wait_for("session_enforcer_sessions", tracked.into())?;
        self.list()?;
        self.screen.heading("What happens")?;
        self.screen.quote("idle   by the kernel's stamps")?;
        self.screen
            .quote("after  by the client's own clock, since its last byte or since it connected")?;
        let line = format!("tracks {tracked} connections; one was there before it");
        self.tell(Instant::now(), Kind::Ready, "daemon", &[line])
    }

    /// Prints the list of sessions that an operator sees.
    fn list(&self) -> Result<()> {
        self.screen.heading("session-enforcer list")?;
        let listed = self.daemon.command_for(&["list"])?;
        let listed = self
            .stop
            .unblocked(|| run_on_terminal(listed, WIDTH, PATIENCE))?;
        for client in &self.clients {
            let port = client.pair.client_address.port();
            let is_listed = listed.contains(&format!(":{port} "));
            let is_exempt = client.role.fate == Fate::Untouched;
            // On a busy machine the session may have been reset before the list was made.
            let is_due = client.overdue() > Duration::ZERO;
            let name = client.role.name;
            ensure!(
                is_listed != is_exempt || is_due,
                "{name} is not in the list as it should be:\n{listed}"
            );
        }
        self.screen.quote(&listed)
    }

    /// Resets the observed client on request, as an operator would.
    fn end_by_hand(&mut self) -> Result<()> {
        let observed = |client: &&mut Client| client.role.fate == Fate::Recorded;
        let client = self.clients.iter_mut().find(observed);
        let client = client.context("one is only observed")?;
        client.ended = true;
        let rule = client.role.rule;
        self.screen
            .heading(&format!("session-enforcer kill --rule {rule}"))?;
        let args = ["kill", "--rule", rule];
        let (asked, killed) = Moment::of(|| self.stop.unblocked(|| self.daemon.command(&args)))?;
        ensure!(killed.code == 0, "kill: {killed:?}");
        self.screen.quote(&killed.stdout)?;
        let ends = client.ends()?;
        client.check_killed(&ends, &asked)?;
        let records = self.daemon.wait_for_terminations_of(&client.pair, 2)?;
        client.check_kill_record(records.last().context("two records")?)?;
        let (name, route) = (client.role.name, client.route());
        let [client_sees, server_sees] = ends.map(|end| end.error.map_or("nothing", Errno::desc));
        let lines = [
            route,
            "reason admin; the audit has who asked".to_owned(),
            format!("client sees: {client_sees}"),
            format!("server sees: {server_sees}"),
        ];
        self.tell(ends[0].seen.at, Kind::Reset, name, &lines)
    }

    fn talk(&mut self) -> Result<()> {
        for number in 0..self.clients.len() {
            let client = &mut self.clients[number];
            let (kind, line) = match client.talk() {
                None => continue,
                Some(Said::Lives(count)) => (Kind::Lives, format!("{count} round trips so far")),
                Some(Said::FallsSilent(count)) => (
                    Kind::Silent,
                    format!("from now on, after {count} round trips"),
                ),
            };
            let name = client.role.name;
            self.tell(Instant::now(), kind, name, &[line])?;
        }
        Ok(())
    }

    /// Waits until connections end, a client must send, or the clock must be updated. Returns the ended
    /// clients.
    fn wait(&self) -> Result<Vec<usize>> {
        let clients = self.clients.iter().enumerate();
        let (numbers, open): (Vec<_>, Vec<_>) = clients.filter(|(_, client)| !client.ended).unzip();
        let next = open.iter().filter_map(|client| client.sends_at()).min();
        let pause = next.map_or(TICK, |next| {
            next.saturating_duration_since(Instant::now()).min(TICK)
        });
        // poll(2) reports errors and the end of both directions even without requested events.
        let sockets = open.iter().map(|client| client.pair.client.as_fd());
        let mut fds: Vec<_> = sockets
            .map(|fd| PollFd::new(fd, PollFlags::empty()))
            .collect();
        self.stop.wait(&mut fds, pause)?;
        let ended = numbers
            .into_iter()
            .zip(&fds)
            .filter(|(_, fd)| fd.any() == Some(true));
        Ok(ended.map(|(number, _)| number).collect())
    }

    fn tell_reset(&mut self, number: usize) -> Result<()> {
        let client = &mut self.clients[number];
        client.ended = true;
        client.reason()?;
        let ends = client.ends()?;
        let record = self.daemon.wait_for_termination_of(&client.pair)?;
        client.check_reset(&ends, &record)?;
        self.lateness.push(lateness(&record));
        let (name, route) = (client.role.name, client.route());
        let after = client.time_to(&ends[0]).as_secs_f64();
        let [client_sees, server_sees] = ends.map(|end| end.error.map_or("nothing", Errno::desc));
        let lines = [
            route,
            why(&record),
            format!("client sees: {client_sees}, after {after:.3} s"),
            format!("server sees: {server_sees}"),
        ];
        self.tell(ends[0].seen.at, Kind::Reset, name, &lines)
    }

    /// Prints the observed sessions that would have been reset.
    fn tell_records(&mut self) -> Result<()> {
        for number in 0..self.clients.len() {
            let client = &mut self.clients[number];
            if client.role.fate != Fate::Recorded || client.recorded {
                continue;
            }
            let records = self.daemon.terminations_of(&client.pair)?;
            let Some(record) = records.first() else {
                continue;
            };
            client.recorded = true;
            client.check_record(record)?;
            let (name, route) = (client.role.name, client.route());
            let lines = [
                route,
                why(record),
                "would be reset by a rule that enforces; this one only observes".to_owned(),
            ];
            self.tell(written_at(record), Kind::Record, name, &lines)?;
        }
        Ok(())
    }

    fn check_none_is_overdue(&self) -> Result<()> {
        for client in self.clients.iter().filter(|client| !client.is_settled()) {
            let late = client.overdue();
            if late > PATIENCE {
                let Role { name, fate, .. } = client.role;
                bail!("{name} was due {late:.1?} ago, and nothing has happened ({fate:?})");
            }
        }
        Ok(())
    }

    /// Checks that the remaining connections still work.
    fn tell_survivors(&self) -> Result<()> {
        for client in self.clients.iter().filter(|client| !client.ended) {
            let name = client.role.name;
            let silence = client.silent_for().as_secs_f64();
            let answer = client.pair.round_trip();
            answer.with_context(|| format!("{name} was to live, and does not answer"))?;
            let line = format!("answers, after {silence:.1} s of silence");
            self.tell(Instant::now(), Kind::Lives, name, &[line])?;
        }
        Ok(())
    }

    fn tell(&self, at: Instant, kind: Kind, who: &str, lines: &[String]) -> Result<()> {
        self.screen.event(at, kind, who, lines)
    }

    /// The names of the connected clients, for the clock.
    fn connected(&self) -> String {
        let open = self.clients.iter().filter(|client| !client.ended);
        let names: Vec<_> = open.map(|client| client.role.name).collect();
        format!("connected: {}", names.join(", "))
    }

    /// Prints the audit record of the first client that connected while the daemon was running.
    fn quote_audit(&self) -> Result<()> {
        let client = self.clients.get(1).context("there are several clients")?;
        let (name, port) = (client.role.name, client.pair.client_address.port());
        self.screen
            .heading(&format!("The audit's line on the client named {name}"))?;
        let audit = fs::read_to_string(self.daemon.audit_path()).context("reading the audit")?;
        let is_on_it = |line: &&str| line.contains(&format!("\"port\":{port},"));
        let line = audit.lines().find(is_on_it);
        self.screen
            .quote(line.context("the audit has no line on it")?)
    }

    fn quote_metrics(&self) -> Result<()> {
        self.screen.heading("Some of the metrics")?;
        let metrics = self.daemon.metrics()?;
        let is_shown = |line: &&str| METRICS.iter().any(|name| line.starts_with(name));
        // Every counter has a zero series for each set of labels from the start.
        let is_used = |line: &&str| !(line.contains("_total{") && line.ends_with(" 0"));
        let mut lines = metrics.text().lines().filter(is_shown).filter(is_used);
        lines.try_for_each(|line| self.screen.quote(line))
    }

    fn stop_daemon(&mut self) -> Result<()> {
        self.daemon.stop()?;
        let attached = self.stage.cgroup.attached_programs()?;
        ensure!(
            attached == 0,
            "the daemon has ended, and {attached} programs are attached"
        );
        Ok(())
    }

    fn summary(&self) -> Result<String> {
        let mut lateness = self.lateness.clone();
        lateness.sort_by(f64::total_cmp);
        let ends = lateness.first().zip(lateness.last());
        let (least, most) = ends.context("nothing was reset")?;
        Ok(format!(
            "As promised: {} connections reset {} to {} after their deadlines, none early; the busy \
             one lived while it was busy; the observed one was only recorded until an operator reset it, the exempt one let be.",
            lateness.len(),
            milliseconds(*least),
            milliseconds(*most),
        ))
    }
}

/// The limit that was reached, and how precisely.
fn why(record: &Record) -> String {
    let what = if record.text("event.reason") == "max_lifetime" {
        format!("{:.3} s old", record.number("event.duration") / 1e9)
    } else {
        format!(
            "idle {:.3} s",
            record.number("session_enforcer.idle_seconds")
        )
    };
    let (rule, late) = (record.text("rule.name"), milliseconds(lateness(record)));
    format!("rule {rule}: {what}, {late} after its deadline")
}

fn lateness(record: &Record) -> f64 {
    record.number("session_enforcer.lateness_seconds")
}

/// The time of the record.
fn written_at(record: &Record) -> Instant {
    let now = Time::now();
    now.at - now.wall.saturating_sub(record.time("@timestamp"))
}

fn milliseconds(seconds: f64) -> String {
    format!("{:.1} ms", seconds * 1e3)
}
