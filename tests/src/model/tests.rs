//! Errors that the check must find in handmade histories.

use std::time::Duration;

use nix::{errno::Errno, sys::signal::Signal};
use serde_json::json;

use super::{
    DEFAULT_OPERATIONS, SEEDS, TO_ONE_BLOW,
    book::{Action, Activity, Book, End, Rule, Scarce},
    check::{Seen, UNTRACKED},
    history::{Connection, Event, Fate, Payload},
    host::{Ending, Life},
    plan::{Blow, Which},
    timeline::{Change, List, Span, Struck, Timeline},
};
use crate::{audit::Record, clock::Time, metrics::Metrics, random::Random};

const fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

/// A run with one connection to a server inside the cgroup, with an idle timeout of 1 s. The connection was
/// opened at 0.5 s, had payload at 1 s and was reset at 2.01 s. The run ended 20 s later.
struct Run {
    connection: Connection,
    timeline: Timeline,
    records: Vec<String>,
    counted: usize,
    /// The counter of the sessions for which there was no slot.
    untracked: usize,
}

impl Run {
    fn good() -> Self {
        let broken = Span {
            from: ms(2_000),
            to: ms(2_012),
        };
        Self {
            connection: Connection {
                port: 0,
                inside: [false, true],
                ports: [2_000, 61_000],
                opened: Span::at(ms(500)),
                events: vec![payload(1_000, Some(1_000))],
                fates: [
                    Fate::Broken(Errno::ECONNRESET, broken),
                    Fate::Broken(Errno::ECONNABORTED, broken),
                ],
            },
            timeline: Timeline {
                changes: vec![change(0, Some(rule("r")))],
                ..Timeline::default()
            },
            records: vec![record("r", "idle_timeout", 2_008)],
            counted: 1,
            untracked: 1,
        }
    }

    fn with(change: impl FnOnce(&mut Self)) -> Self {
        let mut run = Self::good();
        change(&mut run);
        run
    }

    /// The violations that the check finds.
    fn wrong(&self) -> Vec<String> {
        let records: Vec<Record> = self
            .records
            .iter()
            .map(|line| Record::parse(line).unwrap())
            .collect();
        let name = "session_enforcer_terminations_total";
        let mut text = format!("# TYPE {name} counter\n");
        let counted = |result| {
            let of_it = |record: &&Record| record.labels()[3] == result;
            (result, records.iter().filter(of_it).count())
        };
        let reason = records.first().map_or("idle_timeout", |r| r.labels()[1]);
        for (result, count) in [("reset", self.counted), counted("gone"), counted("failed")] {
            let labels = format!("rule=\"r\",reason=\"{reason}\",mode=\"enforce\"");
            let line = format!("{name}{{{labels},result=\"{result}\"}} {count}\n");
            text += &line;
        }
        let untracked = self.untracked;
        text += &format!("# TYPE {UNTRACKED} counter\n");
        text += &format!("{UNTRACKED}{{cause=\"map_full\"}} {untracked}\n");
        let life = Life {
            records: records.clone(),
            asked: Some((records, Metrics::new(text))),
            ending: Ending::Last,
            ran: Span {
                from: ms(0),
                to: ms(22_000),
            },
        };
        let mut start = Time::now();
        start.wall = Duration::from_secs(1_767_268_800);
        let seen = Seen {
            start,
            finished: ms(22_000),
            connections: std::slice::from_ref(&self.connection),
            timeline: &self.timeline,
            lives: &[life],
        };
        seen.check().wrong
    }

    #[track_caller]
    fn assert_wrong(&self, what: &str) {
        let wrong = self.wrong();
        let found = wrong.iter().any(|wrong| wrong.contains(what));
        assert!(found, "{what:?} is not among {wrong:#?}");
    }

    #[track_caller]
    fn assert_right(&self) {
        assert_eq!(self.wrong(), Vec::<String>::new());
    }
}

fn rule(name: &str) -> Rule {
    Rule {
        idle: Some(ms(1_000)),
        ..Rule::named(name)
    }
}

fn change(at: u64, rule: Option<Rule>) -> Change {
    Change {
        when: Span::at(ms(at)),
        book: Book {
            rules: vec![[None, rule]],
            ..Book::default()
        },
        resumes: false,
    }
}

fn payload(written: u64, arrived: Option<u64>) -> Event {
    Event::Payload(Payload {
        from: End::Client,
        bytes: 10,
        through: 10,
        alone: true,
        written: Span::at(ms(written)),
        arrived: arrived.map(ms),
    })
}

/// A record of the reset in the good run, but with this rule, reason and deadline.
fn record(rule: &str, reason: &str, deadline: u64) -> String {
    outcome(rule, reason, deadline, "reset")
}

fn outcome(rule: &str, reason: &str, deadline: u64, result: &str) -> String {
    let time = |ms: u64| format!("2026-01-01T12:00:{:02}.{:03}Z", ms / 1_000, ms % 1_000);
    json!({
        "@timestamp": time(deadline + 1),
        "event": {"action": "session-terminated", "reason": reason},
        "rule": {"name": rule},
        "network": {"direction": "inbound"},
        "source": {"port": 2_000, "bytes": 10},
        "destination": {"port": 61_000, "bytes": 0},
        "session_enforcer": {
            "mode": "enforce", "result": result, "established": time(500),
            "last_received": time(1_000), "deadline": time(deadline), "limit_seconds": 1.0,
            "idle_seconds": 1.009, "lateness_seconds": 0.001,
        },
        "error": {"message": "the socket, which its process keeps locked"},
    })
    .to_string()
}

#[test]
fn a_session_that_ends_when_it_must_is_right() {
    Run::good().assert_right();
}

#[test]
fn an_early_end_is_found() {
    let run = Run::with(|run| run.connection.events.push(payload(1_500, Some(1_500))));
    run.assert_wrong("no session of it had expired");
    run.assert_wrong("deadline that is not the session's");
}

#[test]
fn a_session_that_is_missed_is_found() {
    let missed = |run: &mut Run| {
        run.connection.fates = [Fate::Open; 2];
        run.records.clear();
        run.counted = 0;
    };
    Run::with(missed).assert_wrong("the Server's session was missed");
    // It is no violation if no rule limits the session or if no daemon runs.
    Run::with(|run| {
        missed(run);
        run.timeline.changes[0] = change(0, None);
    })
    .assert_right();
    Run::with(|run| {
        missed(run);
        run.timeline.outages.push(Span {
            from: ms(1_500),
            to: ms(21_000),
        });
    })
    .assert_right();
}

#[test]
fn payload_that_passes_after_the_deadline_is_found() {
    let late = |run: &mut Run| run.connection.events.push(payload(2_030, Some(2_031)));
    Run::with(late).assert_wrong("payload passed after the deadline");
    Run::with(|run| run.connection.events.push(payload(2_030, None))).assert_right();
}

#[test]
fn payload_that_is_lost_is_found() {
    let lost = Run::with(|run| {
        run.timeline.changes[0] = change(0, None);
        run.connection.fates = [Fate::Open; 2];
        run.connection.events.push(payload(1_500, None));
        run.records.clear();
    });
    lost.assert_wrong("payload was lost");
}

#[test]
fn a_reset_of_what_is_not_enforced_is_found() {
    let observed = Rule {
        action: Action::Observe,
        ..rule("r")
    };
    for rule in [None, Some(observed)] {
        let run = Run::with(|run| run.timeline.changes[0] = change(0, rule));
        run.assert_wrong("no session of it had expired");
    }
    let run = Run::with(|run| run.connection.inside = [true, false]);
    run.assert_wrong("an end was reset that is not below the cgroup");
}

#[test]
fn a_reset_without_a_record_is_wrong_and_where_a_daemon_was_killed_the_next_one_records_it() {
    let killed = |run: &mut Run| run.timeline.kills.push(Span::at(ms(2_010)));
    let unrecorded = |run: &mut Run| {
        run.records.clear();
        run.counted = 0;
    };
    Run::with(unrecorded).assert_wrong("no record says so");
    Run::with(|run| {
        unrecorded(run);
        killed(run);
    })
    .assert_wrong("no record says so");
    Run::with(|run| {
        run.records = vec![outcome("r", "idle_timeout", 2_008, "gone")];
        run.counted = 0;
        killed(run);
    })
    .assert_right();
}

#[test]
fn a_reset_that_is_recorded_as_gone_is_only_right_where_a_reaper_was_struck() {
    let gone = |run: &mut Run| {
        run.records = vec![outcome("r", "idle_timeout", 2_008, "gone")];
        run.counted = 0;
    };
    let struck = |at, reapers| Struck {
        when: Span::at(ms(at)),
        reapers,
        signal: Signal::SIGKILL,
    };
    Run::with(gone).assert_wrong("no record says so");
    for (at, reapers, wrong) in [
        (2_010, 1, None),
        (2_020, 1, Some("no record says so")),
        (2_010, 0, Some("1 resets were not told of")),
    ] {
        let run = Run::with(|run| {
            gone(run);
            run.timeline.struck.push(struck(at, reapers));
        });
        match wrong {
            Some(wrong) => run.assert_wrong(wrong),
            None => run.assert_right(),
        }
    }
    // Without any record the reset is unexplained.
    Run::with(|run| {
        run.records.clear();
        run.timeline.struck.push(struck(2_010, 1));
    })
    .assert_wrong("no record says so");
}

#[test]
fn a_reset_that_failed_is_only_right_where_the_socket_was_locked() {
    let failed = |run: &mut Run| {
        let record = outcome("r", "idle_timeout", 2_008, "failed");
        run.records.insert(0, record);
    };
    let lock = |end| {
        let [from, to] = [ms(1_200), ms(2_012)];
        Event::Locked(end, Span { from, to })
    };
    Run::with(failed).assert_wrong("a result that the connection does not show");
    let locked = Run::with(|run| {
        failed(run);
        run.connection.events.push(lock(End::Server));
    });
    locked.assert_right();
    Run::with(|run| {
        failed(run);
        run.connection.events.push(lock(End::Client));
    })
    .assert_wrong("a result that the connection does not show");
    Run::with(|run| {
        failed(run);
        failed(run);
        run.connection.events.push(lock(End::Server));
    })
    .assert_wrong("failed too often");
}

#[test]
fn a_connection_that_another_socket_takes_over_keeps_its_clocks_and_not_its_bytes() {
    let restored = |at, record: String| {
        Run::with(|run| {
            run.connection
                .events
                .push(Event::Restored(Span::at(ms(at))));
            run.records = vec![record];
        })
    };
    let with_bytes = |deadline| record("r", "idle_timeout", deadline);
    let without = |deadline| with_bytes(deadline).replace("\"bytes\":10", "\"bytes\":0");
    restored(1_500, without(2_008)).assert_right();
    restored(1_500, with_bytes(2_008)).assert_wrong("other bytes than the session's");
    restored(1_500, without(2_500)).assert_wrong("deadline that is not the session's");
    // The kernel programs store the clocks of tracked sessions only.
    let forgotten = |book: Option<Rule>| {
        let mut run = restored(1_500, without(2_008));
        run.timeline.changes[0] = change(0, book);
        run.timeline.changes.push(change(1_700, Some(rule("r"))));
        run
    };
    forgotten(Some(rule("r"))).assert_right();
    forgotten(None).assert_wrong("no session of it had expired");
}

#[test]
fn a_forged_segment_counts_where_another_socket_takes_the_connection_over_before_a_packet_shows() {
    let forged = |then: Event| {
        Run::with(|run| {
            let forged = Event::Forged(End::Server, Span::at(ms(1_400)));
            run.connection.events.extend([forged, then]);
            let record = record("r", "idle_timeout", 2_408);
            run.records = vec![record.replace("\"bytes\":10", "\"bytes\":0")];
            for fate in &mut run.connection.fates {
                if let Fate::Broken(_, when) = fate {
                    *when = when.after(ms(400));
                }
            }
        })
    };
    let wrong = "deadline that is not the session's";
    forged(Event::Restored(Span::at(ms(1_500)))).assert_right();
    forged(Event::Finished(End::Client, Span::at(ms(1_500)))).assert_wrong(wrong);
}

/// A policy with this rule and a small table, or with the rule's `max_sessions`.
fn few_slots(at: u64, scarce: Scarce, resets_untracked: bool) -> Change {
    let most = (scarce == Scarce::Rule).then_some(1);
    let mut few = change(at, Some(Rule { most, ..rule("r") }));
    few.book.scarce = if most.is_some() {
        Scarce::Nothing
    } else {
        scarce
    };
    few.book.resets_untracked = resets_untracked;
    few
}

/// A list that has the session with this knowledge of its establishment, or has it not.
fn list(at: u64, session: Option<bool>) -> List {
    let session = session.map(|is_known| ((2_000, End::Server), is_known));
    List {
        when: Span::at(ms(at)),
        sessions: session.into_iter().collect(),
        is_full: true,
    }
}

/// The session is reset at 1.3 s, because there is no slot for it.
fn reset_untracked(run: &mut Run) {
    let mut untracked = outcome("r", "untracked", 1_300, "reset");
    for unknown in [
        r#""limit_seconds":1.0"#,
        r#""established":"2026-01-01T12:00:00.500Z""#,
    ] {
        assert!(untracked.contains(unknown), "{untracked}");
        let key = unknown.split_once(':').unwrap().0;
        untracked = untracked.replace(unknown, &format!("{key}:null"));
    }
    run.records = vec![untracked];
    for fate in &mut run.connection.fates {
        if let Fate::Broken(_, when) = fate {
            *when = Span::at(ms(1_302));
        }
    }
}

#[test]
fn a_session_for_which_there_is_no_slot_is_only_reset_where_that_is_told_or_when_there_is_one() {
    for scarce in [Scarce::Rule, Scarce::Table] {
        let left_out = |listed: Option<bool>, resets_untracked| {
            Run::with(|run| {
                run.timeline.changes[0] = few_slots(0, scarce, resets_untracked);
                run.timeline.lists.push(list(1_200, listed));
                reset_untracked(run);
            })
        };
        left_out(None, true).assert_right();
        left_out(None, false).assert_wrong("no session of it had expired");
        left_out(Some(true), true).assert_wrong("no session of it had expired");
        // The daemon adopts the session after the list and resets it. At 2,005 ms the session is already overdue.
        let tracked_late = |listed: u64| {
            let mut run = left_out(None, false);
            run.connection.fates = Run::good().connection.fates;
            run.records = vec![record("r", "idle_timeout", 2_008)];
            run.timeline.lists[0].when = Span::at(ms(listed));
            run
        };
        tracked_late(1_200).assert_right();
        tracked_late(2_005).assert_right();
    }
}

#[test]
fn a_session_that_a_new_policy_tracks_may_find_no_slot_in_a_small_table() {
    let adopted = |policies: [Change; 2], lists: &[List]| {
        Run::with(|run| {
            run.timeline.changes = policies.to_vec();
            run.timeline.lists = lists.to_vec();
            reset_untracked(run);
        })
    };
    let small = |at| few_slots(at, Scarce::Table, true);
    let untracked = |at| {
        let mut none = change(at, None);
        none.book.scarce = Scarce::Table;
        none
    };
    let [before, after] = [list(600, None), list(1_250, None)];
    let begun = adopted(
        [untracked(0), small(1_200)],
        &[before.clone(), after.clone()],
    );
    begun.assert_right();
    // It was tracked from its establishment, and released in between.
    let again = [small(0), untracked(700)];
    let again = |lists: &[List]| {
        let mut run = adopted(again.clone(), lists);
        run.timeline.changes.push(small(1_200));
        run
    };
    again(&[list(600, Some(true)), after]).assert_right();
    // The list after the change shows the record from the establishment, so the session was tracked throughout.
    again(&[list(1_250, Some(true))]).assert_wrong("no session of it had expired");
    // A policy with a slot for every session.
    let ample = change(1_200, Some(rule("r")));
    adopted([untracked(0), ample], &[before]).assert_wrong("no session of it had expired");
}

#[test]
fn payload_of_one_direction_during_a_late_adoption_counts_in_both() {
    // The daemon queried the socket before and after the payload at 1.9 s, the second time at 2 s.
    let adopted = |listed: Option<bool>| {
        Run::with(|run| {
            let mut small = few_slots(0, Scarce::Table, false);
            let rule = small.book.rules[0][End::Server as usize].as_mut();
            rule.unwrap().activity = Activity::Sent;
            run.timeline.changes[0] = small;
            run.timeline.lists.push(list(1_200, listed));
            run.connection.events = vec![payload(1_900, Some(1_900))];
            let received = "\"last_received\":\"2026-01-01T12:00:0";
            let record = record("r", "idle_timeout", 3_000);
            run.records = vec![record.replace(&format!("{received}1"), &format!("{received}2"))];
            for fate in &mut run.connection.fates {
                if let Fate::Broken(_, when) = fate {
                    *when = Span::at(ms(3_002));
                }
            }
        })
    };
    adopted(None).assert_right();
    adopted(Some(true)).assert_wrong("deadline that is not the session's");
}

#[test]
fn a_session_that_found_no_slot_and_is_not_counted_is_found() {
    let left_out = |at| {
        Run::with(|run| {
            run.timeline.changes[0] = few_slots(0, Scarce::Table, true);
            run.timeline.lists.push(list(at, None));
            run.untracked = 0;
            reset_untracked(run);
        })
    };
    left_out(1_200).assert_wrong("1 sessions found no slot");
    // The session was not established yet.
    left_out(400).assert_right();
}

#[test]
fn a_lock_does_not_excuse_a_reset_that_nobody_records() {
    let unrecorded = |run: &mut Run| {
        run.records.clear();
        run.counted = 0;
        let [from, to] = [ms(1_200), ms(2_012)];
        let lock = Event::Locked(End::Server, Span { from, to });
        run.connection.events.push(lock);
    };
    Run::with(unrecorded).assert_wrong("no record says so");
    // If the daemon ended meanwhile, its reaper continues when the lock is released.
    Run::with(|run| {
        unrecorded(run);
        run.timeline.stops.push(Span::at(ms(1_300)));
    })
    .assert_right();
}

#[test]
fn a_reset_that_hung_is_right_by_what_was_known_when_it_was_asked_for() {
    // A byte that the lock had delayed passes when no program is attached any longer.
    let stopped = |run: &mut Run| {
        let none = Change {
            when: Span::at(ms(2_100)),
            book: Book::default(),
            resumes: false,
        };
        run.timeline.changes.push(none);
        run.timeline.stops.push(Span::at(ms(2_100)));
        run.records = vec![outcome("r", "idle_timeout", 2_008, "failed")];
        run.counted = 0;
        run.connection.events.push(payload(3_000, Some(3_000)));
        let broken = Span {
            from: ms(3_000),
            to: ms(3_010),
        };
        for fate in &mut run.connection.fates {
            if let Fate::Broken(_, when) = fate {
                *when = broken;
            }
        }
    };
    Run::with(stopped).assert_wrong("no session of it had expired");
    Run::with(|run| {
        stopped(run);
        let [from, to] = [ms(1_200), ms(3_000)];
        let lock = Event::Locked(End::Server, Span { from, to });
        run.connection.events.push(lock);
    })
    .assert_right();
}

#[test]
fn payload_after_a_stop_is_not_in_the_record_of_a_session_that_is_gone() {
    // A hanging reset lets one more payload pass. The next daemon records the session as gone.
    let passed = |stopped: u64| {
        Run::with(|run| {
            let none = Change {
                when: Span::at(ms(stopped)),
                book: Book::default(),
                resumes: false,
            };
            run.timeline.changes.push(none);
            run.timeline.stops.push(Span::at(ms(2_100)));
            let [from, to] = [ms(2_100), ms(4_000)];
            run.timeline.outages.push(Span { from, to });
            let gone = outcome("r", "idle_timeout", 2_008, "gone");
            run.records = vec![gone.replace("12:00:02.009Z", "12:00:04.009Z")];
            run.counted = 0;
            let [from, to] = [ms(1_200), ms(3_000)];
            let lock = Event::Locked(End::Server, Span { from, to });
            run.connection
                .events
                .extend([lock, payload(3_000, Some(3_000))]);
            for fate in &mut run.connection.fates {
                if let Fate::Broken(_, when) = fate {
                    *when = Span::at(ms(3_002));
                }
            }
        })
    };
    passed(2_100).assert_right();
    passed(3_500).assert_wrong("other bytes than the session's");
}

#[test]
fn the_seeds_of_the_tests_have_all_that_can_happen_to_a_daemon() {
    let kind = |blow: &Blow| match blow {
        Blow::Freeze(_) => "freeze".to_owned(),
        Blow::Kill { frozen, .. } => format!("kill {frozen}"),
        Blow::Stop { .. } => "stop".to_owned(),
        Blow::Reload { kill_after, .. } => format!("reload {}", kill_after.is_some()),
        Blow::WrongReload => "wrong reload".to_owned(),
        Blow::KillReapers { which, frozen, .. } => {
            let of_all = *which == Which::All;
            format!("kill reapers {of_all} {}", frozen.is_some())
        }
        Blow::StopReapers(which) => format!("stop reapers {}", *which == Which::All),
        Blow::Drop(..) => "drop".to_owned(),
    };
    let mut kinds = Vec::new();
    for seed in SEEDS {
        let mut random = Random::of(seed, 0);
        let mut book = Book::random(&mut random);
        for number in 0..DEFAULT_OPERATIONS.div_ceil(TO_ONE_BLOW) {
            let (_, blow) = Blow::random(&mut random, number, &book);
            kinds.push(kind(&blow));
            match blow {
                Blow::Reload { book: next, .. }
                | Blow::Kill {
                    next: Some(next), ..
                }
                | Blow::Stop {
                    next: Some(next), ..
                } => book = next,
                _ => {}
            }
        }
    }
    kinds.sort_unstable();
    kinds.dedup();
    let all = 1 + 2 + 1 + 2 + 1 + 4 + 2 + 1;
    assert_eq!(kinds.len(), all, "{kinds:#?}");
    let scarce = SEEDS.map(Scarce::of);
    assert_eq!(scarce, [Scarce::Table, Scarce::Nothing, Scarce::Rule]);
}

#[test]
fn a_record_of_another_rule_reason_or_time_is_found() {
    for (rule, reason, deadline) in [
        ("s", "idle_timeout", 2_008),
        ("r", "max_lifetime", 2_008),
        ("r", "idle_timeout", 2_208),
        ("r", "policy", 2_008),
    ] {
        let run = Run::with(|run| run.records = vec![record(rule, reason, deadline)]);
        run.assert_wrong("deadline that is not the session's");
    }
}

#[test]
fn two_records_of_one_end_and_one_of_none_are_found() {
    let twice = Run::with(|run| run.records.push(run.records[0].clone()));
    twice.assert_wrong("ended twice");
    twice.assert_wrong("counted");
    Run::with(|run| run.connection.ports = [3_000, 61_000]).assert_wrong("whose is");
}

#[test]
fn an_end_that_reads_another_error_and_one_that_stays_open_are_found() {
    Run::with(|run| run.connection.fates.swap(0, 1)).assert_wrong("end read ECONNRESET");
    Run::with(|run| run.connection.fates[0] = Fate::Open).assert_wrong("the other is open");
}

#[test]
fn a_counter_that_is_not_the_number_of_the_records_is_found() {
    Run::with(|run| run.counted = 2).assert_wrong("1 to 1 records, Ok(2.0) counted");
}

#[test]
fn a_longer_limit_that_came_in_time_holds() {
    let longer = Rule {
        idle: Some(ms(3_000)),
        ..rule("r")
    };
    let run = Run::with(|run| run.timeline.changes.push(change(1_500, Some(longer))));
    run.assert_wrong("no session of it had expired");
}
