//! Adds sessions to the searches for their holders.

use super::{
    context::Context,
    holder_searches::{HOST, Name, Sought},
    phase::Expired,
    state::State,
};
use crate::reaper::protocol::SocketKey;

/// Searches for the holder of a session that can be reset only through it.
pub(super) fn seek(context: &Context, state: &mut State, expired: &Expired, key: SocketKey) {
    // The reset counts as unanswered until the search ends.
    state.tracker.begin_reset(expired);
    let sought = Sought {
        key,
        to_reset: Some(*expired),
        has_begun: false,
    };
    let name = (expired.cookie, expired.session.established_ns);
    let cgroup_id = expired.session.owner.cgroup_id;
    add(context, state, cgroup_id, name, sought);
}

/// Adds a session to the searches of its cgroup or, if that is not known, of the host.
pub(super) fn add(context: &Context, state: &State, cgroup_id: u64, name: Name, sought: Sought) {
    let is_known = state.owner_resolver.cgroup_directory(cgroup_id).is_some();
    let scope = if is_known { cgroup_id } else { HOST };
    let mut searches = context.holder_searches.borrow_mut();
    searches.add(scope, name, sought);
}
