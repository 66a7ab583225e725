//! Measures the cost of the eBPF programs per run, as reported by the kernel.
//!
//! The kernel reads the clock before and after each run. That overhead is in the figures of every program,
//! including the null program, so the difference is the program's own cost.

use anyhow::{Context as _, Result};

use crate::{
    Bench,
    bpf::{Body, Hook, Programs, Spent, Statistics},
    party::{Kind, Party},
    report::{Budget, Row},
    statistics::{differences, ratios, turns},
};

/// Minimum numbers of sessions in the table.
const FEW: u64 = 1;
const SOME: u64 = 10_000;
const MANY: u64 = 250_000;

/// The budgets: the ratio to the cost of the necessary calls, and nanoseconds.
const TRACKED: f64 = 1.6;
const UNTRACKED_NS: f64 = 6.0;

/// A party and its programs.
struct Subject {
    party: Party,
    programs: Programs,
    /// The number of invented sessions in the table.
    invented: u64,
}

/// Nanoseconds per run, for each round.
#[derive(Default)]
struct Costs(Vec<[f64; 2]>);

impl Costs {
    fn of(&self, way: usize) -> Vec<f64> {
        self.0.iter().map(|costs| costs[way]).collect()
    }
}

const WAYS: [(Hook, &str); 2] = [(Hook::Ingress, "ingress"), (Hook::Egress, "egress")];

pub(crate) fn run(bench: &Bench) -> Result<Vec<Row>> {
    let _statistics = Statistics::on()?;
    let daemons = [Kind::Tracked, Kind::Untracked, Kind::Elsewhere];
    let kinds = [Kind::NULL].into_iter().chain(daemons);
    let kinds = kinds.chain(Body::ALL.map(Kind::Plain));
    let mut subjects = Vec::new();
    for kind in kinds {
        let party = Party::set_up(kind, &bench.agent, bench.cpu, &bench.stop)?;
        let programs = Programs::of(party.cgroup.path())?;
        subjects.push(Subject {
            party,
            programs,
            invented: 0,
        });
    }
    let mut rows = Vec::new();
    let pairs = bench.pick(1_000, SOME as usize / 2);
    open(&mut subjects, 1, bench)?;
    rows.extend(packets(&mut subjects, "warm", FEW, 1, bench)?);
    open(&mut subjects, pairs - 1, bench)?;
    for sessions in [SOME, MANY] {
        fill(&mut subjects, sessions)?;
        rows.extend(packets(&mut subjects, "warm", sessions, 1, bench)?);
        rows.extend(packets(&mut subjects, "cold", sessions, pairs, bench)?);
    }
    rows.extend(connections(&mut subjects, bench)?);
    Ok(rows)
}

fn open(subjects: &mut [Subject], count: usize, bench: &Bench) -> Result<()> {
    for Subject { party, .. } in subjects {
        party.worker.ask(&bench.stop, format!("open {count}"))?;
    }
    Ok(())
}

/// Fills the daemons' tables with invented sessions.
fn fill(subjects: &mut [Subject], sessions: u64) -> Result<()> {
    let is_tracked = |subject: &&Subject| subject.party.kind == Kind::Tracked;
    let tracked = subjects.iter().find(is_tracked).context("a session")?;
    let value = tracked.programs.sessions()?.some_record()?;
    for subject in subjects {
        if let Some(daemon) = subject.party.daemon() {
            let real = daemon.metric("session_enforcer_sessions", &[])? as u64;
            let more = sessions.saturating_sub(real + subject.invented);
            subject.programs.sessions()?.invent(more, &value)?;
            subject.invented += more;
        }
    }
    Ok(())
}

/// Measures packets that use this number of connections in turn. With one connection its data stays in the
/// processor's first-level caches.
fn packets(
    subjects: &mut [Subject],
    warmth: &str,
    sessions: u64,
    pairs: usize,
    bench: &Bench,
) -> Result<Vec<Row>> {
    let trips = bench.pick(4_000, 10_000);
    let rounds = bench.pick(7, 22);
    let mut costs: Vec<Costs> = subjects.iter().map(|_| Costs::default()).collect();
    for round in 0..rounds {
        for turn in turns(subjects.len(), round) {
            let subject = &mut subjects[turn];
            let before = spent(subject)?;
            let request = format!("ping {trips} {pairs}");
            subject.party.worker.ask(&bench.stop, request)?;
            let after = spent(subject)?;
            costs[turn]
                .0
                .push([0, 1].map(|way| after[way].since(before[way]).per_run()));
        }
    }
    let mut rows = Vec::new();
    let is_calls = |subject: &Subject| subject.party.kind == Kind::Plain(Body::Calls);
    let calls = subjects.iter().position(is_calls);
    let calls = calls.context("the necessary calls alone")?;
    let shown = |subject: &Subject| sessions != SOME || subject.party.daemon().is_some();
    let compared = subjects.iter().zip(&costs).skip(1);
    for (subject, cost) in compared.filter(|(subject, _)| shown(subject)) {
        for (way, (_, name)) in WAYS.iter().enumerate() {
            let more = differences(&cost.of(way), &costs[0].of(way));
            let row = |what: &str| {
                let what = format!("{name}, {what}, {sessions} in the map, {warmth}");
                Row::new(what, "ns", &more)
            };
            let row = match subject.party.kind {
                Kind::Tracked => {
                    let calls = differences(&costs[calls].of(way), &costs[0].of(way));
                    row("tracked")
                        .beside("necessary calls", &ratios(&more, &calls))
                        .budget(Budget::RatioAtMost(TRACKED))
                }
                Kind::Untracked => row("untracked").budget(Budget::AtMost(UNTRACKED_NS)),
                Kind::Elsewhere => {
                    row("untracked, rule without ports").budget(Budget::AtMost(UNTRACKED_NS))
                }
                // The other kinds show only the unavoidable cost and know no sessions.
                kind => Row::new(format!("{name}, {}, {warmth}", kind.name()), "ns", &more),
            };
            rows.push(row);
        }
    }
    Ok(rows)
}

fn spent(subject: &Subject) -> Result<[Spent; 2]> {
    let [ingress, egress] = WAYS.map(|(hook, _)| subject.programs.spent(hook));
    Ok([ingress?, egress?])
}

/// Measures the programs that run for each connection and for each socket, per connection with both ends.
fn connections(subjects: &mut [Subject], bench: &Bench) -> Result<Vec<Row>> {
    let count = bench.pick(300, 1_000);
    let rounds = bench.pick(5, 11);
    let hooks = [Hook::Lifecycle, Hook::SocketMade];
    let mut costs = vec![[Vec::new(), Vec::new()]; subjects.len()];
    for round in 0..rounds {
        for turn in turns(subjects.len(), round) {
            let Subject {
                party, programs, ..
            } = &mut subjects[turn];
            let before = hooks.map(|hook| programs.spent(hook));
            party.worker.ask(&bench.stop, format!("connect {count}"))?;
            for ((hook, before), costs) in hooks.iter().zip(before).zip(&mut costs[turn]) {
                let spent = programs.spent(*hook)?.since(before?);
                costs.push(spent.nanoseconds as f64 / f64::from(count));
            }
        }
    }
    let mut rows = Vec::new();
    let compared = subjects.iter().zip(&costs);
    for (subject, costs_of) in compared.filter(|(subject, _)| subject.party.daemon().is_some()) {
        let names = ["establishment and end", "new sockets"];
        for (n, name) in names.into_iter().enumerate() {
            // If no rule names owners, no program runs for a new socket.
            if costs_of[n].iter().all(|cost| *cost == 0.0) {
                continue;
            }
            let more = differences(&costs_of[n], &costs[0][n]);
            let what = format!("{name}, a connection, {}", subject.party.kind.name());
            rows.push(Row::new(what, "ns", &more));
        }
    }
    Ok(rows)
}
