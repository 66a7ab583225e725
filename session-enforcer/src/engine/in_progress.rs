//! What resets occupy while they are in progress. Each value gives it back when it is dropped.

use std::rc::Rc;

use session_enforcer_common::{Ancestors, Session};

use super::{context::Context, hanging::Culprit, state::State};
use crate::host::clock::monotonic_ns;

pub(super) fn culprit(state: &State, session: &Session) -> Culprit {
    let cgroup_id = session.owner.cgroup_id;
    let ancestors = state.ancestors_of(cgroup_id);
    Culprit::of(cgroup_id, &ancestors.unwrap_or(Ancestors::UNKNOWN))
}

/// What a batch occupies while it is in progress.
pub(super) enum Slot {
    /// One of the regular batches.
    OfAll { _waited: Waited },
    /// One of the hanging resets that its cgroup may have.
    Apart(Hangs),
}

/// Counts a regular batch until it is dropped.
pub(super) struct Waited(Rc<Context>);

impl Waited {
    pub(super) fn begin(context: &Rc<Context>) -> Self {
        let under_way = &context.resets_under_way;
        under_way.set(under_way.get() + 1);
        Self(Rc::clone(context))
    }
}

impl Drop for Waited {
    fn drop(&mut self) {
        let under_way = &self.0.resets_under_way;
        under_way.set(under_way.get() - 1);
        self.0.wake.notify_one();
    }
}

/// Counts a search of the whole host until it is dropped.
pub(super) struct SearchUnderWay(Rc<Context>);

impl SearchUnderWay {
    pub(super) fn begin(context: &Rc<Context>, state: &mut State) -> Self {
        state.handles.searches += 1;
        Self(Rc::clone(context))
    }
}

impl Drop for SearchUnderWay {
    fn drop(&mut self) {
        self.0.state().handles.searches -= 1;
    }
}

/// Counts a reset that hangs, or may hang, until it is dropped.
pub(super) struct Hangs {
    context: Rc<Context>,
    culprit: Culprit,
}

impl Hangs {
    pub(super) fn begin(context: &Rc<Context>, state: &mut State, session: &Session) -> Self {
        let culprit = culprit(state, session);
        state.hanging.begin(culprit, monotonic_ns());
        Self {
            context: Rc::clone(context),
            culprit,
        }
    }
}

impl Drop for Hangs {
    fn drop(&mut self) {
        let mut state = self.context.state();
        state.hanging.end(self.culprit, monotonic_ns());
        state.note_backlog();
        drop(state);
        self.context.wake.notify_one();
    }
}
