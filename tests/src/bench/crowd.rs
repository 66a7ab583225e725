//! Many simultaneous connections, held by as many workers as they need.

use anyhow::{Context as _, Result};
use session_enforcer_tests::{Cgroup, Netns, Place};

use crate::{
    Bench, party,
    worker::{MAX_PAIRS, Worker},
};

/// The first worker's port. The others use the following ports.
pub(crate) const FIRST_PORT: u16 = 7000;

/// The last worker's port. Higher ports belong to the clients.
pub(crate) const LAST_PORT: u16 = 9999;

/// Connections in a separate cgroup and network namespace.
pub(crate) struct Crowd {
    workers: Vec<Worker>,
    /// The cgroup of both ends.
    pub(crate) cgroup: Cgroup,
    /// The namespace.
    pub(crate) netns: Netns,
}

impl Crowd {
    /// A crowd without connections.
    pub(crate) fn new() -> Result<Self> {
        Self::in_cgroup(Cgroup::new()?)
    }

    /// The same, in a new child of this cgroup.
    pub(crate) fn below(parent: &Cgroup) -> Result<Self> {
        Self::in_cgroup(parent.child()?)
    }

    fn in_cgroup(cgroup: Cgroup) -> Result<Self> {
        Ok(Self {
            workers: Vec::new(),
            cgroup,
            netns: party::namespace()?,
        })
    }

    /// Opens this number of further connections with new workers, which all start at the same time.
    pub(crate) fn open(&mut self, pairs: usize, bench: &Bench) -> Result<()> {
        self.open_by(pairs, bench, |share| format!("open {share}"))
    }

    /// The same, spread evenly over this time.
    pub(crate) fn spread(&mut self, pairs: usize, milliseconds: u64, bench: &Bench) -> Result<()> {
        let request = |share| format!("spread {share} {milliseconds}");
        self.open_by(pairs, bench, request)
    }

    fn open_by(
        &mut self,
        pairs: usize,
        bench: &Bench,
        request: impl Fn(usize) -> String,
    ) -> Result<()> {
        let (before, more) = (self.workers.len(), pairs.div_ceil(MAX_PAIRS));
        for n in 0..more {
            let mut worker = self.hire(bench)?;
            worker.begin(request(pairs * (n + 1) / more - pairs * n / more))?;
            self.workers.push(worker);
        }
        for worker in &mut self.workers[before..] {
            worker.answer(&bench.stop).context("opening connections")?;
        }
        Ok(())
    }

    fn hire(&self, bench: &Bench) -> Result<Worker> {
        let place = Place::here().in_cgroup(&self.cgroup).in_netns(&self.netns);
        let mut worker = Worker::start(&bench.agent, &place, None)?;
        let port = FIRST_PORT + u16::try_from(self.workers.len())?;
        worker.ask(&bench.stop, format_args!("listen {port}"))?;
        Ok(worker)
    }

    /// Lets every worker watch for the end of its connections.
    pub(crate) fn watch(&mut self) -> Result<()> {
        self.workers
            .iter_mut()
            .try_for_each(|worker| worker.begin("ends"))
    }

    /// Waits until all connections have ended and returns the lifetime of each in nanoseconds.
    pub(crate) fn ends(&mut self, bench: &Bench) -> Result<Vec<f64>> {
        let mut lives = Vec::new();
        for worker in &mut self.workers {
            lives.extend(worker.answer(&bench.stop).context("waiting for ends")?);
        }
        Ok(lives)
    }
}
