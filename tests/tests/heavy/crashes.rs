//! A daemon that is killed again and again under load: no clock restarts, and nothing is recorded
//! twice.

use std::{
    env,
    net::Ipv4Addr,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result};
use session_enforcer_tests::{
    Agent, Lab, Listener, Moment, Pair, Place, Record, reset_on_close, unhurried,
};

use crate::turn;

const AGENT: &str = env!("CARGO_BIN_EXE_session-enforcer-test-agent");

/// Longer than the work between two kills.
fn limit() -> Duration {
    unhurried(Duration::from_secs(3))
}

/// The number of kills if `SESSION_ENFORCER_KILLS` is not set.
const KILLS: usize = 6;

fn kills() -> Result<usize> {
    match env::var("SESSION_ENFORCER_KILLS") {
        Ok(text) => text.parse().context("SESSION_ENFORCER_KILLS"),
        Err(_) => Ok(KILLS),
    }
}

/// A connection with the reason and the start of the limit that will end it.
struct Watched {
    pair: Pair,
    reason: &'static str,
    since: Moment,
}

impl Watched {
    /// The number of its records. Asserts that it did not end early and that the record has its
    /// true deadline.
    fn check(&self, records: &[Record]) -> Result<usize> {
        for end in self.pair.ends()? {
            end.assert_not_early(&self.since, limit());
        }
        let ports = [
            self.pair.client_address.port(),
            self.pair.server_address.port(),
        ];
        let of_it: Vec<_> = records.iter().filter(|r| r.ports() == ports).collect();
        for record in &of_it {
            record.assert_due(self.reason, &self.since, limit());
        }
        assert!(of_it.len() <= 1, "{of_it:#?}");
        Ok(of_it.len())
    }
}

/// Opens and closes connections until `stop` is set. Returns their number.
fn churn(client: &Agent, listener: &Listener, stop: &AtomicBool) -> Result<usize> {
    let mut opened = 0;
    while !stop.load(Ordering::Relaxed) {
        let pair = Pair::open(client, listener)?;
        pair.round_trip()?;
        // An orderly close would keep the port in TIME_WAIT for a minute, and there are not enough
        // ports.
        if opened % 16 != 0 {
            reset_on_close(&pair.client)?;
        }
        opened += 1;
    }
    Ok(opened)
}

#[test]
fn no_clock_restarts_however_often_the_daemon_is_killed_under_load() -> Result<()> {
    let _turn = turn(module_path!());
    let lab = Lab::new(AGENT)?;
    let listen = || lab.inside.listen((Ipv4Addr::LOCALHOST, 0));
    let [idle, old, busy, churned] = [listen()?, listen()?, listen()?, listen()?];
    let limit = limit().as_secs();
    let config = format!(
        "[[rule]]\nname = \"idle\"\nlocal_ports = [{}, {}, {}]\nidle_timeout = \"{limit}s\"\n\
         [[rule]]\nname = \"old\"\nlocal_ports = [{}]\nmax_lifetime = \"{limit}s\"\n",
        idle.port(),
        busy.port(),
        churned.port(),
        old.port(),
    );
    let elsewhere = lab.at(&Place::here())?;
    lab.pinned_daemon(&config)?.quiet().kill()?;
    let busy_pair = Pair::open(&lab.outside, &busy)?;
    let (stop, rounds) = (AtomicBool::new(false), AtomicUsize::new(0));
    let mut watched = Vec::new();
    let mut records = Vec::new();
    let last = thread::scope(|scope| {
        let load = scope.spawn(|| churn(&elsewhere, &churned, &stop));
        let talk = scope.spawn(|| -> Result<()> {
            while !stop.load(Ordering::Relaxed) {
                busy_pair.keep_busy(Duration::from_millis(100))?;
                rounds.fetch_add(1, Ordering::Relaxed);
            }
            Ok(())
        });
        let mut killed = || -> Result<_> {
            for round in 0..kills()? {
                // A kill during the take-over or just after it.
                let start = Duration::from_millis(29 * round as u64 % 500);
                let launch = lab.launch().pinned(&lab.pins).config(&config);
                records.extend(launch.cut_short(start)?);
                let mut daemon = lab.pinned_daemon(&config)?.quiet();
                // The programs saw every connection from its establishment, so none is adopted.
                let adopted = "session_enforcer_sessions_adopted_total";
                assert_eq!(daemon.metric(adopted, &[])?, 0.0, "{}", daemon.log());
                let idle_pair = Pair::open(&lab.outside, &idle)?;
                let old_pair = Pair::open(&lab.outside, &old)?;
                // A kill at a different moment in each round.
                thread::sleep(Duration::from_millis(37 * round as u64 % 400));
                daemon.kill()?;
                records.extend(daemon.terminations()?);
                // Only the programs see this round trip. It moves the idle clock and not the
                // lifetime.
                let since = idle_pair.round_trip()?;
                old_pair.round_trip()?;
                let established = old_pair.opened;
                for (pair, reason, since) in [
                    (idle_pair, "idle_timeout", since),
                    (old_pair, "max_lifetime", established),
                ] {
                    watched.push(Watched {
                        pair,
                        reason,
                        since,
                    });
                }
            }
            lab.pinned_daemon(&config)
        };
        let daemon = killed();
        let ended: Result<()> = daemon.as_ref().map_or(Ok(()), |_| {
            watched.iter().try_for_each(|w| w.pair.ends().map(drop))
        });
        stop.store(true, Ordering::Relaxed);
        let joined = (load.join().expect("churn"), talk.join().expect("talk"));
        ended?;
        let opened = joined.0?;
        joined.1?;
        println!("{} kills, {opened} connections came and went", kills()?);
        daemon
    })?;
    // If a daemon is killed between the kernel's answer and the record, that record may be lost.
    // The last daemon is not killed, and these two sessions were alive when the previous one was.
    for watched in watched.iter().rev().take(2) {
        last.wait_for_termination_of(&watched.pair)?;
    }
    records.extend(last.terminations()?);
    let mut recorded = 0;
    for watched in &watched {
        recorded += watched.check(&records)?;
    }
    println!("{recorded} of {} ends are recorded", watched.len());
    assert!(rounds.load(Ordering::Relaxed) > 0);
    busy_pair.round_trip()?;
    assert_eq!(records.len(), recorded, "others were reset: {records:#?}");
    // All connections that came and went have left the table.
    last.wait_for_metric("session_enforcer_sessions", &[], 1.0)?;
    last.wait_for_metric("session_enforcer_map_entries", &[], 1.0)
}
