//! Shared context of the engine's tasks. All tasks run on one thread, so a task has exclusive access to the state
//! between two `await` points.

use std::{
    cell::{Cell, RefCell, RefMut},
    future::Future,
    rc::Rc,
};

use anyhow::Result;
use tokio::{
    sync::Notify,
    time::{Duration, Instant},
};

use super::{holder_searches::HolderSearches, state::State, sync::Aim};
use crate::{datapath::Events, host::cgroup::Cgroup, reaper::pool::Pool};

/// How long events are left in the ring buffer after some were read. It limits the wake-ups on a host with many short
/// connections to ten per second; most of these have closed within that time. The shortest limit is ten times as long,
/// so no deadline is missed.
const READ_PAUSE: Duration = Duration::from_millis(100);

/// The shared context of the tasks.
pub(super) struct Context {
    state: RefCell<State>,
    events: RefCell<Events>,
    /// End of the pause between two reads of events.
    pub(super) paused_until: Cell<Option<Instant>>,
    pub(super) pool: Pool,
    /// The cgroup that the programs are attached to.
    pub(super) cgroup: Cgroup,
    pub(super) all_namespaces: bool,
    /// Number of reset batches in progress.
    pub(super) resets_under_way: Cell<usize>,
    /// Number of queries of candidates that wait for a grace period.
    pub(super) confirm_rounds: Cell<usize>,
    /// Whether a task is resolving owners.
    pub(super) is_finding_owners: Cell<bool>,
    /// Whether a task is growing the session table.
    pub(super) is_growing: Cell<bool>,
    /// The searches for the holders of sessions.
    pub(super) holder_searches: RefCell<HolderSearches>,
    /// Number of syncs begun. A sync stops when a newer one has begun.
    pub(super) syncs: Cell<u64>,
    /// The aim of the sync under way.
    pub(super) sync_under_way: Cell<Option<Aim>>,
    /// Notified when the loop has to re-evaluate its state.
    pub(super) wake: Notify,
    failure: RefCell<Option<anyhow::Error>>,
}

impl Context {
    pub(super) fn new(
        state: State,
        events: Events,
        pool: Pool,
        cgroup: Cgroup,
        all_namespaces: bool,
    ) -> Rc<Self> {
        Rc::new(Self {
            state: RefCell::new(state),
            events: RefCell::new(events),
            paused_until: Cell::new(None),
            pool,
            cgroup,
            all_namespaces,
            resets_under_way: Cell::new(0),
            confirm_rounds: Cell::new(0),
            is_finding_owners: Cell::new(false),
            is_growing: Cell::new(false),
            holder_searches: RefCell::default(),
            syncs: Cell::new(0),
            sync_under_way: Cell::new(None),
            wake: Notify::new(),
            failure: RefCell::new(None),
        })
    }

    /// The state. The borrow must not be held across an `await`; a lint checks that.
    pub(super) fn state(&self) -> RefMut<'_, State> {
        self.state.borrow_mut()
    }

    /// Starts a task. If it fails, the engine fails: without the programs' maps nothing can be enforced.
    pub(super) fn spawn(self: &Rc<Self>, task: impl Future<Output = Result<()>> + 'static) {
        let context = Rc::clone(self);
        tokio::task::spawn_local(async move {
            if let Err(error) = task.await {
                context.failure.borrow_mut().get_or_insert(error);
            }
            context.wake.notify_one();
        });
    }

    /// Returns the error of a task that failed.
    pub(super) fn take_failure(&self) -> Result<()> {
        self.failure.borrow_mut().take().map_or(Ok(()), Err)
    }

    /// Waits until there are events to read.
    pub(super) async fn events(&self) -> std::io::Result<()> {
        if let Some(end) = self.paused_until.get() {
            tokio::time::sleep_until(end).await;
            return Ok(());
        }
        std::future::poll_fn(|context| self.events.borrow_mut().poll(context)).await
    }

    /// Handles all events in the ring buffer.
    pub(super) fn read_events(&self) -> Result<()> {
        let mut events = self.events.borrow_mut();
        let mut state = self.state();
        let mut any = false;
        while let Some(event) = events.read() {
            any = true;
            match event {
                Ok((kind, event)) => state.handle(kind, &event),
                Err(error) => tracing::error!("an event of the kernel is not understood: {error}"),
            }
        }
        state.records.audit.flush();
        self.paused_until
            .set(any.then(|| Instant::now() + READ_PAUSE));
        state.repair()
    }
}
