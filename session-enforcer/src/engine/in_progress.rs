//! What resets occupy while they are in progress. Each value gives it back when it is dropped.

use std::{cell::Cell, rc::Rc};

use session_enforcer_common::Ancestors;

use super::{context::Context, hang_limits::HangScope, slow_owners::SlowKey, state::State};
use crate::reaper::protocol::Search;

/// The limits on hanging resets that apply to a cgroup.
pub(super) fn hang_scope(state: &State, cgroup_id: u64) -> HangScope {
    let ancestors = state.ancestors_of(cgroup_id);
    HangScope::of(cgroup_id, &ancestors.unwrap_or(Ancestors::UNKNOWN))
}

/// The part of those limits that is reached; `None` if another reset may hang.
pub(super) fn full_part(state: &State, cgroup_id: u64) -> Option<Rc<HangScope>> {
    if state.hanging.is_empty() {
        return None;
    }
    let full = state.hanging.full_part(&hang_scope(state, cgroup_id));
    full.map(Rc::new)
}

/// What a batch occupies while it is in progress.
pub(super) enum Slot {
    /// One of the regular batches.
    Regular { _batch: Counted },
    /// One of the hanging resets that its cgroup may have.
    Separate(HangPermit),
    /// The turn of its sockets' owner, whose resets are slow.
    SlowTurn(Turn),
}

/// The turn of an owner whose resets are slow, until it is dropped.
pub(super) struct Turn {
    context: Rc<Context>,
    pub(super) key: SlowKey,
}

impl Turn {
    /// Begins a turn; `None` while the owner's last one, or too many others, have not ended.
    pub(super) fn begin(context: &Rc<Context>, state: &mut State, key: SlowKey) -> Option<Self> {
        state.slow.begin_turn(key).then(|| Self {
            context: Rc::clone(context),
            key,
        })
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.context.state().slow.end_turn(self.key);
        self.context.wake.notify_one();
    }
}

/// Counts something in a counter of the context until it is dropped.
pub(super) struct Counted {
    pub(super) context: Rc<Context>,
    counter: fn(&Context) -> &Cell<usize>,
}

impl Counted {
    pub(super) fn begin(context: &Rc<Context>, counter: fn(&Context) -> &Cell<usize>) -> Self {
        counter(context).update(|count| count + 1);
        Self {
            context: Rc::clone(context),
            counter,
        }
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        (self.counter)(&self.context).update(|count| count - 1);
        self.context.wake.notify_one();
    }
}

/// Counts a search for a namespace until it is dropped.
pub(super) struct SearchUnderWay {
    context: Rc<Context>,
    pub(super) search: Search,
}

impl SearchUnderWay {
    pub(super) fn begin(context: &Rc<Context>, state: &mut State, search: Search) -> Self {
        state.handles.searches[search as usize] += 1;
        Self {
            context: Rc::clone(context),
            search,
        }
    }
}

impl Drop for SearchUnderWay {
    fn drop(&mut self) {
        self.context.state().handles.searches[self.search as usize] -= 1;
    }
}

/// Counts a reset or a query that hangs, or may hang, until it is dropped.
pub(super) struct HangPermit {
    context: Rc<Context>,
    hang_scope: HangScope,
    cgroup_id: u64,
    is_silent: bool,
}

impl HangPermit {
    pub(super) fn begin(context: &Rc<Context>, state: &mut State, cgroup_id: u64) -> Self {
        let hang_scope = hang_scope(state, cgroup_id);
        state.hanging.begin(&hang_scope);
        Self {
            context: Rc::clone(context),
            hang_scope,
            cgroup_id,
            is_silent: false,
        }
    }

    /// Notes that the reaper is silent.
    pub(super) fn silent(mut self) -> Self {
        if !std::mem::replace(&mut self.is_silent, true) {
            self.context.state().hanging.note_silent(self.cgroup_id);
        }
        self
    }
}

impl Drop for HangPermit {
    fn drop(&mut self) {
        let mut state = self.context.state();
        state.hanging.end(&self.hang_scope);
        if self.is_silent {
            state.hanging.note_returned(self.cgroup_id);
        }
        state.note_backlog();
        drop(state);
        self.context.wake.notify_one();
    }
}
