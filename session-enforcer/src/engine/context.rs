//! What the engine's tasks share. All run on one thread: between two of its waits a task has the state to
//! itself.

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

use super::state::State;
use crate::{datapath::Events, host::cgroup::Cgroup, reaper::pool::Pool};

/// How long the daemon leaves events in the ring buffer after it has read some. It bounds the
/// wake-ups of a host with many short connections to ten a second, most of which have ended by
/// then. The shortest limit is ten times as long, so no deadline is missed by it.
const READ_PAUSE: Duration = Duration::from_millis(100);

/// What the tasks share.
pub(super) struct Context {
    state: RefCell<State>,
    events: RefCell<Events>,
    /// Until when events are left alone.
    pub(super) paused_until: Cell<Option<Instant>>,
    pub(super) pool: Pool,
    /// What the programs are attached to.
    pub(super) cgroup: Cgroup,
    pub(super) all_namespaces: bool,
    /// Batches of resets that are waited for.
    pub(super) resets_under_way: Cell<usize>,
    /// Whether a task looks for owners.
    pub(super) is_finding_owners: Cell<bool>,
    /// Whether a task makes the session table larger.
    pub(super) is_growing: Cell<bool>,
    /// Whether a task looks for the holders of sessions.
    pub(super) is_finding_holders: Cell<bool>,
    /// Until when it does not look at all processes.
    pub(super) all_rest_until: Cell<Instant>,
    /// Counts the syncs: one that is not the last breaks off.
    pub(super) syncs: Cell<u64>,
    /// Told where the loop has something to look at again.
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
            is_finding_owners: Cell::new(false),
            is_growing: Cell::new(false),
            is_finding_holders: Cell::new(false),
            all_rest_until: Cell::new(Instant::now()),
            syncs: Cell::new(0),
            wake: Notify::new(),
            failure: RefCell::new(None),
        })
    }

    /// The state, until the task waits. To hold it over a wait is an error that a lint finds.
    pub(super) fn state(&self) -> RefMut<'_, State> {
        self.state.borrow_mut()
    }

    /// Starts a task. Where it fails, so does the engine: without the programs' maps nothing can be enforced.
    pub(super) fn spawn(self: &Rc<Self>, task: impl Future<Output = Result<()>> + 'static) {
        let context = Rc::clone(self);
        tokio::task::spawn_local(async move {
            if let Err(error) = task.await {
                context.failure.borrow_mut().get_or_insert(error);
            }
            context.wake.notify_one();
        });
    }

    /// What a task has failed with.
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

    /// Reads all events that the kernel has sent by now.
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
