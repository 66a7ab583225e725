//! A daemon that is killed again and again while connections come, go and talk.

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

/// It must outlast what is done between two kills.
fn limit() -> Duration {
    unhurried(Duration::from_secs(3))
}

/// How often it is killed where `SESSION_ENFORCER_KILLS` does not say.
const KILLS: usize = 6;

fn kills() -> Result<usize> {
    match env::var("SESSION_ENFORCER_KILLS") {
        Ok(text) => text.parse().context("SESSION_ENFORCER_KILLS"),
        Err(_) => Ok(KILLS),
    }
}

/// One connection whose end is known beforehand.
struct Watched {
    pair: Pair,
    reason: &'static str,
    since: Moment,
}

impl Watched {
    /// Its records; it must not have ended early, and each record must have its true deadline.
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

/// Opens and closes connections until it is told to stop; how many.
fn churn(client: &Agent, listener: &Listener, stop: &AtomicBool) -> Result<usize> {
    let mut opened = 0;
    while !stop.load(Ordering::Relaxed) {
        let pair = Pair::open(client, listener)?;
        pair.round_trip()?;
        // An orderly end keeps the port for a minute, and there are not so many.
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
                // Somewhere in the take-over itself, or just after it.
                let start = Duration::from_millis(29 * round as u64 % 500);
                let launch = lab.launch().pinned(&lab.pins).config(&config);
                records.extend(launch.cut_short(start)?);
                let mut daemon = lab.pinned_daemon(&config)?.quiet();
                // Each connection was seen when it began, by the programs before or by these.
                let adopted = "session_enforcer_sessions_adopted_total";
                assert_eq!(daemon.metric(adopted, &[])?, 0.0, "{}", daemon.log());
                let idle_pair = Pair::open(&lab.outside, &idle)?;
                let old_pair = Pair::open(&lab.outside, &old)?;
                // At another moment of the daemon's life each time.
                thread::sleep(Duration::from_millis(37 * round as u64 % 400));
                daemon.kill()?;
                records.extend(daemon.terminations()?);
                // Seen by the programs alone. It moves the one clock and not the other.
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
    // A daemon that is killed between the kernel's answer and the record takes the record with it. The
    // last one is not killed, and these two lived when the one before was.
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
    // What came and went is forgotten, to the last one.
    last.wait_for_metric("session_enforcer_sessions", &[], 1.0)?;
    last.wait_for_metric("session_enforcer_map_entries", &[], 1.0)
}
