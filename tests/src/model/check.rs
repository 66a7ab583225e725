//! Compares everything that was observed in a run with the model. Pure.

use std::{collections::HashMap, time::Duration};

use super::{
    book::{End, Scarce},
    case::Case,
    history::Connection,
    host::{Ending, Life, TERMINATIONS},
    replay::Replay,
    report::Report,
    termination::Termination,
    timeline::Timeline,
};
use crate::{audit::Record, clock::Time};

/// The counter of the sessions that could not be tracked.
pub(super) const UNTRACKED: &str = "session_enforcer_sessions_untracked_total";

/// The observations of a run.
pub(super) struct Seen<'a> {
    pub(super) start: Time,
    /// The time after which nothing more was done.
    pub(super) finished: Duration,
    pub(super) connections: &'a [Connection],
    pub(super) timeline: &'a Timeline,
    pub(super) lives: &'a [Life],
}

impl Seen<'_> {
    pub(super) fn check(&self) -> Report {
        let mut report = Report::default();
        let records = self.records(&mut report);
        let mut untold = vec![0; self.timeline.struck.len()];
        for connection in self.connections {
            let none = Vec::new();
            let of_it = records.get(&connection.ports).unwrap_or(&none);
            let mut case = Case::new(self, connection, of_it);
            case.check(&mut report.counts);
            for struck in End::BOTH.into_iter().filter_map(|end| case.untold_by(end)) {
                untold[struck] += 1;
            }
            for wrong in case.wrong {
                report
                    .wrong
                    .push(format!("{wrong}: {connection}  {of_it:?}"));
            }
        }
        for (struck, untold) in self.timeline.struck.iter().zip(untold) {
            // A reaper works on one session at a time.
            if untold > struck.reapers {
                let wrong = format!("{untold} resets were not told of by {struck:?}");
                report.wrong.push(wrong);
            }
        }
        self.check_counters(&mut report);
        self.check_left_out(&mut report);
        report.counts.lists = self.timeline.lists.len();
        let full = self.timeline.lists.iter().filter(|list| list.is_full);
        report.counts.full_lists = full.count();
        report
    }

    /// Checks that each daemon has counted the sessions for which there was no slot when they were established.
    fn check_left_out(&self, report: &mut Report) {
        let scarce = self.timeline.changes.first().map(|c| c.book.scarce);
        let Some(cause) = scarce.and_then(Scarce::cause) else {
            return;
        };
        for life in self.lives {
            let Some((_, metrics)) = &life.asked else {
                continue;
            };
            // The daemon was asked after the last list of its sessions.
            let is_left_out = |replay: &Replay<'_>, end| {
                let left_out = replay.first_clocks(end).left_out.unwrap_or_default();
                left_out > Duration::ZERO && left_out <= life.ran.to
            };
            let opened = self.connections.iter();
            let opened = opened.filter(|connection| connection.opened.from > life.ran.from);
            let left_out: usize = opened
                .map(|connection| {
                    let replay = Replay::of(connection, self.timeline);
                    let sessions = connection.sessions();
                    sessions.filter(|end| is_left_out(&replay, *end)).count()
                })
                .sum();
            let counted = metrics.get(UNTRACKED, &[("cause", cause)]);
            let is_right = counted.as_ref().is_ok_and(|c| *c >= left_out as f64);
            if !is_right {
                let wrong = format!("{left_out} sessions found no slot, {counted:?} counted");
                report.wrong.push(wrong);
            }
        }
    }

    /// Groups the terminations by connection. A record without a connection is an error.
    fn records(&self, report: &mut Report) -> HashMap<[u16; 2], Vec<(usize, Termination)>> {
        let known = self.connections.iter().map(|connection| connection.ports);
        let mut records: HashMap<_, Vec<_>> = known.map(|ports| (ports, Vec::new())).collect();
        for (life, Life { records: all, .. }) in self.lives.iter().enumerate() {
            for record in all {
                match records.get_mut(&record.ports()) {
                    Some(of_it) => of_it.push((life, Termination::of(record, &self.start))),
                    None => report.wrong.push(format!("whose is {record:?}")),
                }
            }
        }
        records
    }

    /// Checks that each counter equals the number of records with its labels and that there are no other
    /// counters.
    fn check_counters(&self, report: &mut Report) {
        for life in self.lives {
            for labels in labels_of(&life.records) {
                let names = ["rule", "reason", "mode", "result"];
                let labels: Vec<_> = names.into_iter().zip(labels).collect();
                self.check_counter(life, &labels, report);
            }
            self.check_counter(life, &[], report);
        }
    }

    /// Checks that a counter is at least the number of records that were read before it, and at most the
    /// number of all written records.
    fn check_counter(&self, life: &Life, labels: &[(&str, &str)], report: &mut Report) {
        let Some((before, metrics)) = &life.asked else {
            return;
        };
        let of_them = |record: &&Record| {
            let of_record = record.labels();
            labels
                .iter()
                .zip(of_record)
                .all(|((_, wanted), label)| *wanted == label)
        };
        let count = |records: &[Record]| records.iter().filter(of_them).count() as f64;
        let (least, most) = match life.ending {
            // A killed daemon may have counted records that it did not write.
            Ending::Killed => (count(before), f64::INFINITY),
            Ending::Stopped | Ending::Last => (count(before), count(&life.records)),
        };
        let counted = metrics.get(TERMINATIONS, labels);
        if !counted
            .as_ref()
            .is_ok_and(|counted| (least..=most).contains(counted))
        {
            let wrong = format!("{least} to {most} records, {counted:?} counted of {labels:?}");
            report.wrong.push(wrong);
        }
    }
}

fn labels_of(records: &[Record]) -> Vec<[&str; 4]> {
    let mut labels: Vec<_> = records.iter().map(Record::labels).collect();
    labels.sort_unstable();
    labels.dedup();
    labels
}
