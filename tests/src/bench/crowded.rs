//! Measures a crowded host: many descriptors, network namespaces and cgroups that no rule matches.

use std::time::{Duration, Instant};

use anyhow::Result;
use session_enforcer_tests::{Cgroup, Cgroups, Holders};

use crate::{
    Bench,
    crowd::Crowd,
    exact::{accepted, after_the_limit},
    party::daemon,
    process::daemon_time,
    report::{Budget, Row},
    start::Taken,
};

/// The time limit of a reload on a busy machine.
const PATIENCE: Duration = Duration::from_secs(120);

/// The budget in seconds until the daemon is ready, and until another policy is in force.
const SOON: f64 = 1.0;

/// The budget in milliseconds for the lateness of 99 % of the other sessions.
const LATE: f64 = 5.0;

/// Measures starts, reloads, and sessions that are due during reloads.
pub(crate) fn run(bench: &Bench) -> Result<Vec<Row>> {
    let _descriptors = Holders::of_descriptors(bench.pick(2, 12))?;
    let _namespaces = Holders::of_namespaces(bench.pick(50, 1_000))?;
    bench.stop.check()?;
    let parent = Cgroup::new()?;
    let _cgroups = Cgroups::below(&parent, bench.pick(500, 16_000))?;
    bench.stop.check()?;
    let mut crowd = Crowd::new()?;
    let mut starts = Taken::default();
    for _ in 0..bench.pick(2, 5) {
        let start = Instant::now();
        let daemon = daemon(&crowd.cgroup, &accepted(PATIENCE), &bench.stop)?;
        starts.note(start, daemon_time(&daemon)?);
    }
    let sessions = bench.pick(2_000, 10_000);
    let spread = Duration::from_secs(bench.pick(3, 10));
    let limit = spread + Duration::from_secs(2);
    let daemon = daemon(&crowd.cgroup, &accepted(limit), &bench.stop)?;
    crowd.spread(sessions, spread.as_millis() as u64, bench)?;
    crowd.watch()?;
    let mut reloads = Taken::default();
    let all_have_ended = Instant::now() + limit;
    while Instant::now() < all_have_ended {
        let (start, before) = (Instant::now(), daemon_time(&daemon)?);
        daemon.reload_within(&accepted(limit), PATIENCE)?;
        reloads.note(start, daemon_time(&daemon)?.saturating_sub(before));
    }
    let late = after_the_limit(&crowd.ends(bench)?, limit, "during reloads");
    let [started, start_processor] = starts.rows("start");
    let [reloaded, reload_processor] = reloads.rows("reload");
    let mut rows = vec![
        started.budget(Budget::AtMost(SOON)),
        start_processor,
        reloaded.budget(Budget::AtMost(SOON)),
        reload_processor,
    ];
    rows.extend(late);
    rows[6] = rows[6].clone().budget(Budget::AtMost(LATE));
    Ok(rows)
}
