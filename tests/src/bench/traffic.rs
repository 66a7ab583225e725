//! The same traffic with and without those who watch: round trips, connections, bulk data.
//!
//! Everything runs on one processor. So what takes time takes processor time of the worker, in whose
//! system calls packets are handled, or of whoever watches, and their sum is the elapsed time on a
//! machine that does nothing else. Both are measured: other programs slow the first down, but not the
//! second, by which the budget is judged.

use std::time::Duration;

use anyhow::Result;

use crate::{
    Bench,
    party::{Kind, Party},
    process::{cpu_time, daemon_time},
    report::{Budget, Row},
    statistics::{ratios, turns},
};

/// How long a daemon leaves events lie, and some more: after that it has done what was to be done.
const SETTLED: Duration = Duration::from_millis(150);

/// One byte there and one back, over one connection of which one thread holds both ends.
pub(crate) fn round_trips(bench: &Bench) -> Result<Vec<Row>> {
    let count = bench.pick(8_000, 20_000);
    let compared = Compared {
        rounds: bench.pick(16, 40),
        unit: "us",
        budget: Some(Budget::RatioAtMost(1.06)),
        prepare: &["close", "open 1", "ping 500 1"],
        request: format!("ping {count} 1"),
        figure: |nanoseconds| nanoseconds / 1e3 / f64::from(count),
    };
    compared.rows(bench)
}

/// Connections one after the other, each for one byte.
pub(crate) fn connections(bench: &Bench) -> Result<Vec<Row>> {
    let count = bench.pick(1_500, 4_000);
    let compared = Compared {
        rounds: bench.pick(8, 24),
        unit: "us",
        budget: Some(Budget::RatioAtMost(1.08)),
        prepare: &["connect 100"],
        request: format!("connect {count}"),
        figure: |nanoseconds| nanoseconds / 1e3 / f64::from(count),
    };
    compared.rows(bench)
}

/// Much data in one direction over one connection.
pub(crate) fn bulk(bench: &Bench) -> Result<Vec<Row>> {
    let mebibytes = bench.pick(256, 1_024);
    let compared = Compared {
        rounds: bench.pick(8, 16),
        unit: "GB/s",
        budget: None,
        prepare: &["close", "open 1", "transfer 32"],
        request: format!("transfer {mebibytes}"),
        figure: |nanoseconds| f64::from(mebibytes << 10) * 1_024.0 / nanoseconds,
    };
    compared.rows(bench)
}

/// A comparison of all parties.
struct Compared<Figure> {
    rounds: usize,
    unit: &'static str,
    budget: Option<Budget>,
    /// What a worker is asked for before each round. A connection of its own for each: how fast one
    /// is depends on where it lies in memory and how its windows have grown.
    prepare: &'static [&'static str],
    /// What it is asked for then; it answers with nanoseconds.
    request: String,
    /// What nanoseconds mean.
    figure: Figure,
}

/// Nanoseconds of one round.
#[derive(Clone, Copy)]
struct Times {
    elapsed: f64,
    processor: f64,
}

impl<Figure: Fn(f64) -> f64> Compared<Figure> {
    /// Measures them in turns.
    fn rows(&self, bench: &Bench) -> Result<Vec<Row>> {
        let (mut parties, mut missing) = set_up(bench)?;
        let mut times = vec![Vec::new(); parties.len()];
        // The first round finds caches and memory as they are at the beginning.
        for round in 0..=self.rounds {
            for turn in turns(parties.len(), round.saturating_sub(1)) {
                let measured = self.measure(&mut parties[turn], bench)?;
                if round > 0 {
                    times[turn].push(measured);
                }
            }
        }
        let kinds: Vec<Kind> = parties.iter().map(|party| party.kind).collect();
        let mut rows = self.table(&kinds, &times, "", |times| times.elapsed, None);
        rows.append(&mut missing);
        let processor = |times: &Times| times.processor;
        rows.extend(self.table(&kinds, &times, ", processor time", processor, self.budget));
        Ok(rows)
    }

    fn measure(&self, party: &mut Party, bench: &Bench) -> Result<Times> {
        for request in self.prepare {
            party.worker.ask(&bench.stop, request)?;
        }
        let before = processor_time(party)?;
        let elapsed = party.worker.number(&bench.stop, &self.request)?;
        let late = what_the_daemon_does_after(party, bench)?;
        Ok(Times {
            elapsed: elapsed + late,
            processor: processor_time(party)? - before,
        })
    }

    fn table(
        &self,
        kinds: &[Kind],
        times: &[Vec<Times>],
        what: &str,
        which: impl Fn(&Times) -> f64,
        budget: Option<Budget>,
    ) -> Vec<Row> {
        let figures = |of: &Vec<Times>| -> Vec<f64> {
            of.iter().map(|times| (self.figure)(which(times))).collect()
        };
        let bare = figures(&times[0]);
        let row = |(kind, own): (&Kind, &Vec<Times>)| {
            let own = figures(own);
            let row = Row::new(format!("{}{what}", kind.name()), self.unit, &own);
            match (kind, budget) {
                (Kind::Bare, _) => row,
                (Kind::Tracked, Some(budget)) => row
                    .beside(Kind::Bare.name(), &ratios(&own, &bare))
                    .budget(budget),
                _ => row.beside(Kind::Bare.name(), &ratios(&own, &bare)),
            }
        };
        kinds.iter().zip(times).map(row).collect()
    }
}

/// Every party that can be had here, and a row for each that cannot.
fn set_up(bench: &Bench) -> Result<(Vec<Party>, Vec<Row>)> {
    let (mut parties, mut missing) = (Vec::new(), Vec::new());
    for kind in Kind::ALL {
        match Party::set_up(kind, &bench.agent, bench.cpu, &bench.stop) {
            Ok(party) => parties.push(party),
            Err(error) if kind.is_a_peer() => {
                bench.stop.check()?;
                missing.push(Row::unavailable(kind.name(), &format!("{error:#}")));
            }
            Err(error) => return Err(error),
        }
    }
    Ok((parties, missing))
}

/// Nanoseconds that the processes of a party have run.
fn processor_time(party: &Party) -> Result<f64> {
    let times = party.processes().map(cpu_time);
    Ok(times.sum::<Result<Duration>>()?.as_nanos() as f64)
}

/// Nanoseconds that the daemon works for connections that have ended: it leaves events lie for a
/// while. It is part of their cost, and must not become part of the next party's.
fn what_the_daemon_does_after(party: &Party, bench: &Bench) -> Result<f64> {
    let Some(daemon) = party.daemon() else {
        return Ok(0.0);
    };
    let before = daemon_time(daemon)?;
    bench.stop.pause(SETTLED)?;
    Ok((daemon_time(daemon)? - before).as_nanos() as f64)
}
