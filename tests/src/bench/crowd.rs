//! Many connections at once, held by as many workers as it takes.

use anyhow::{Context as _, Result};
use session_enforcer_tests::{Cgroup, Netns, Place};

use crate::{
    Bench, party,
    worker::{MAX_PAIRS, Worker},
};

/// Where the first worker listens; the others behind it.
pub(crate) const FIRST_PORT: u16 = 7000;

/// Where the last may listen: from here on are the clients' ports.
pub(crate) const LAST_PORT: u16 = 9999;

/// Connections in a cgroup and a network namespace of their own.
pub(crate) struct Crowd {
    workers: Vec<Worker>,
    pairs: Vec<usize>,
    /// The cgroup of both ends.
    pub(crate) cgroup: Cgroup,
    /// The namespace.
    pub(crate) netns: Netns,
}

impl Crowd {
    /// Without any connection yet.
    pub(crate) fn new() -> Result<Self> {
        Ok(Self {
            workers: Vec::new(),
            pairs: Vec::new(),
            cgroup: Cgroup::new()?,
            netns: party::namespace()?,
        })
    }

    /// Starts workers that have room for so many connections more, and divides these among them.
    pub(crate) fn make_room(&mut self, pairs: usize, bench: &Bench) -> Result<()> {
        let more = pairs.div_ceil(MAX_PAIRS);
        for n in 0..more {
            let place = Place::here().in_cgroup(&self.cgroup).in_netns(&self.netns);
            let mut worker = Worker::start(&bench.agent, &place, None)?;
            let port = FIRST_PORT + u16::try_from(self.workers.len())?;
            worker.ask(&bench.stop, format_args!("listen {port}"))?;
            self.workers.push(worker);
            self.pairs.push(pairs * (n + 1) / more - pairs * n / more);
        }
        Ok(())
    }

    /// Has each worker that has none yet open its share of the connections, all at the same time.
    pub(crate) fn open(&mut self, pairs: usize, bench: &Bench) -> Result<()> {
        let before = self.workers.len();
        self.make_room(pairs, bench)?;
        let shares = self.pairs[before..].to_vec();
        let workers = &mut self.workers[before..];
        for (worker, share) in workers.iter_mut().zip(shares) {
            worker.begin(format_args!("open {share}"))?;
        }
        for worker in workers {
            worker.answer(&bench.stop).context("opening connections")?;
        }
        Ok(())
    }

    /// The same, evenly over this many milliseconds.
    pub(crate) fn spread(&mut self, pairs: usize, milliseconds: u64, bench: &Bench) -> Result<()> {
        self.make_room(pairs, bench)?;
        for (worker, share) in self.workers.iter_mut().zip(&self.pairs) {
            worker.begin(format_args!("spread {share} {milliseconds}"))?;
        }
        for worker in &mut self.workers {
            worker.answer(&bench.stop).context("opening connections")?;
        }
        Ok(())
    }

    /// Has every worker watch for the end of its connections.
    pub(crate) fn watch(&mut self) -> Result<()> {
        self.workers
            .iter_mut()
            .try_for_each(|worker| worker.begin("ends"))
    }

    /// Waits until all connections have ended; how long each has lived, in nanoseconds.
    pub(crate) fn ends(&mut self, bench: &Bench) -> Result<Vec<f64>> {
        let mut lives = Vec::new();
        for worker in &mut self.workers {
            lives.extend(worker.answer(&bench.stop).context("waiting for ends")?);
        }
        Ok(lives)
    }
}
