//! Measures the same traffic with and without watchers: round trips, connections, bulk data.
//!
//! Everything runs on one processor. Packets are handled within the worker's system calls, so all time is
//! processor time of the worker or of the watcher. On an otherwise idle machine their sum is the elapsed
//! time. Both are measured: other programs increase the elapsed time but not the processor time, which is
//! compared with the budget.

use std::time::Duration;

use anyhow::Result;

use crate::{
    Bench,
    party::{Kind, Party},
    process::{cpu_time, daemon_time},
    report::{Budget, Row},
    statistics::{ratios, turns},
};

/// Longer than the daemon leaves events in the ring buffer. After this time its work is done.
const SETTLED: Duration = Duration::from_millis(150);

/// Measures round trips of one byte over one connection, with both ends in one thread.
pub(crate) fn round_trips(bench: &Bench) -> Result<Vec<Row>> {
    let count = bench.pick(8_000, 20_000);
    let compared = Compared {
        rounds: bench.pick(16, 40),
        unit: "us",
        owners: &[],
        budgets: &[(Kind::Tracked, 1.06)],
        prepare: &["close", "open 1", "ping 500 1"],
        request: format!("ping {count} 1"),
        figure: |nanoseconds| nanoseconds / 1e3 / f64::from(count),
    };
    compared.rows(bench)
}

/// Measures connections in a row, each for one byte.
pub(crate) fn connections(bench: &Bench) -> Result<Vec<Row>> {
    let count = bench.pick(1_500, 4_000);
    let compared = Compared {
        rounds: bench.pick(8, 24),
        unit: "us",
        owners: &Kind::OWNERS,
        budgets: &[(Kind::Tracked, 1.08), (Kind::Owned, 1.15)],
        prepare: &["connect 100"],
        request: format!("connect {count}"),
        figure: |nanoseconds| nanoseconds / 1e3 / f64::from(count),
    };
    compared.rows(bench)
}

/// Measures bulk data in one direction over one connection.
pub(crate) fn bulk(bench: &Bench) -> Result<Vec<Row>> {
    let mebibytes = bench.pick(256, 1_024);
    let compared = Compared {
        rounds: bench.pick(8, 16),
        unit: "GB/s",
        owners: &[],
        budgets: &[],
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
    /// Further parties.
    owners: &'static [Kind],
    /// The greatest ratios to the bare party.
    budgets: &'static [(Kind, f64)],
    /// The requests to the worker before each round. Each round has a new connection, because the speed of
    /// one depends on its memory addresses and window sizes.
    prepare: &'static [&'static str],
    /// The measured request. The worker answers with nanoseconds.
    request: String,
    /// Converts nanoseconds to the figure.
    figure: Figure,
}

/// Nanoseconds of one round.
#[derive(Clone, Copy)]
struct Times {
    elapsed: f64,
    processor: f64,
}

impl<Figure: Fn(f64) -> f64> Compared<Figure> {
    /// Measures the parties in turns.
    fn rows(&self, bench: &Bench) -> Result<Vec<Row>> {
        let (mut parties, mut missing) = set_up(self.owners, bench)?;
        let mut times = vec![Vec::new(); parties.len()];
        // The first round is discarded, because caches and memory are cold.
        for round in 0..=self.rounds {
            for turn in turns(parties.len(), round.saturating_sub(1)) {
                let measured = self.measure(&mut parties[turn], bench)?;
                if round > 0 {
                    times[turn].push(measured);
                }
            }
        }
        let kinds: Vec<Kind> = parties.iter().map(|party| party.kind).collect();
        let mut rows = self.table(&kinds, &times, "", |times| times.elapsed, &[]);
        rows.append(&mut missing);
        let processor = |times: &Times| times.processor;
        rows.extend(self.table(&kinds, &times, ", processor time", processor, self.budgets));
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
        budgets: &[(Kind, f64)],
    ) -> Vec<Row> {
        let figures = |of: &Vec<Times>| -> Vec<f64> {
            of.iter().map(|times| (self.figure)(which(times))).collect()
        };
        let bare = figures(&times[0]);
        let row = |(kind, own): (&Kind, &Vec<Times>)| {
            let own = figures(own);
            let row = Row::new(format!("{}{what}", kind.name()), self.unit, &own);
            if *kind == Kind::Bare {
                return row;
            }
            let row = row.beside(Kind::Bare.name(), &ratios(&own, &bare));
            match budgets.iter().find(|(of, _)| of == kind) {
                Some((_, most)) => row.budget(Budget::RatioAtMost(*most)),
                None => row,
            }
        };
        kinds.iter().zip(times).map(row).collect()
    }
}

/// All parties that are available here, and a row for each that is not.
fn set_up(owners: &[Kind], bench: &Bench) -> Result<(Vec<Party>, Vec<Row>)> {
    let (mut parties, mut missing) = (Vec::new(), Vec::new());
    for kind in Kind::ALL.into_iter().chain(owners.iter().copied()) {
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

/// The processor time of a party's processes in nanoseconds.
fn processor_time(party: &Party) -> Result<f64> {
    let times = party.processes().map(cpu_time);
    Ok(times.sum::<Result<Duration>>()?.as_nanos() as f64)
}

/// The daemon's processor time in nanoseconds for connections that have ended, because it reads events with a
/// delay. It counts for this party and must not fall into the next party's time.
fn what_the_daemon_does_after(party: &Party, bench: &Bench) -> Result<f64> {
    let Some(daemon) = party.daemon() else {
        return Ok(0.0);
    };
    let before = daemon_time(daemon)?;
    bench.stop.pause(SETTLED)?;
    Ok((daemon_time(daemon)? - before).as_nanos() as f64)
}
