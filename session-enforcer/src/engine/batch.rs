//! Batches of late sessions: how each is reset, and the request to the reaper.

use std::{os::fd::OwnedFd, rc::Rc};

use session_enforcer_common::{Expiry, Reason, expiry};

use super::{
    handles::SearchNeed,
    in_progress::SearchUnderWay,
    judge::only_lifetime,
    phase::{Expired, Phase},
    state::State,
};
use crate::{
    host::clock::monotonic_ns,
    reaper::{
        diag::SocketId,
        protocol::{Disconnect, Extent, Held, Netns, Request, Search},
    },
};

/// The method of a reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum ResetMethod {
    /// `SOCK_DESTROY`.
    Destroy,
    /// Through a descriptor of the process that holds the socket.
    Disconnect,
    /// As `Disconnect`, but without `sock_diag`: the socket is found by its cookie.
    ByCookie,
}

/// Sessions of one network namespace with the same reset method.
pub(super) struct Batch {
    pub(super) netns_cookie: u64,
    pub(super) method: ResetMethod,
    /// The search for the namespace, if one is needed.
    pub(super) search: Option<SearchUnderWay>,
    pub(super) sessions: Vec<Expired>,
    /// Whether it is the turn of an owner whose resets are slow.
    pub(super) is_turn: bool,
}

impl State {
    pub(super) fn method_for(&self, expired: &Expired, now_ns: u64) -> ResetMethod {
        let session = &expired.session;
        let (netns_cookie, existed_ns) = (session.netns_cookie, session.established_ns);
        let search_need = self.handles.search(netns_cookie, existed_ns, now_ns);
        if self.needs_search(expired) || search_need == SearchNeed::FoundNothing {
            ResetMethod::ByCookie
        } else if self.has_no_destroy || session.is_mptcp_subflow() {
            ResetMethod::Disconnect
        } else {
            ResetMethod::Destroy
        }
    }

    /// Whether `sock_diag` cannot reach the session's socket: it is blocked, or finds another socket under that name.
    fn needs_search(&self, expired: &Expired) -> bool {
        let phase = self.tracker.phase(expired.cookie, &expired.session);
        let is_shadowed_by_socket =
            matches!(phase, Some(Phase::Tried(tried)) if tried.is_shadowed_by_socket);
        is_shadowed_by_socket || self.hanging.is_diag_blocked
    }

    /// The request to reset a batch, the namespace descriptor that goes with it, and whether the reaper may search for
    /// the namespace.
    pub(super) fn request(&mut self, batch: &Batch) -> (Request, Option<Rc<OwnedFd>>, bool) {
        let (mut netns, handle) = self.handles.netns(batch.netns_cookie);
        if let Some(under_way) = &batch.search {
            netns.search = under_way.search;
        }
        let may_search = handle.is_none() && netns.search != Search::Nowhere;
        (self.request_in(netns, batch), handle, may_search)
    }

    fn request_in(&mut self, netns: Netns, batch: &Batch) -> Request {
        match batch.method {
            ResetMethod::Destroy => {
                let target = |e: &Expired| SocketId::of(e.cookie, &e.session);
                let slow = match batch.is_turn {
                    true => Vec::new(),
                    false => self.slow.owners_in(batch.netns_cookie, monotonic_ns()),
                };
                Request::Destroy {
                    netns,
                    targets: batch.sessions.iter().map(target).collect(),
                    slow,
                }
            }
            ResetMethod::Disconnect | ResetMethod::ByCookie => Request::Disconnect {
                netns,
                sessions: batch.sessions.iter().map(|e| self.held(e, batch)).collect(),
            },
        }
    }

    fn held(&mut self, expired: &Expired, batch: &Batch) -> Held {
        let session = &expired.session;
        Held {
            target: SocketId::of(expired.cookie, session),
            how: if batch.method == ResetMethod::ByCookie {
                Disconnect::ByCookie
            } else if session.is_mptcp_subflow() {
                Disconnect::Mptcp(self.extent(expired))
            } else {
                Disconnect::Tcp
            },
            holder: self.take_holder(expired),
        }
    }

    /// What to reset for an MPTCP subflow. A subflow can be idle in a busy connection, so only the subflow is reset. If
    /// its lifetime is over, the connection is reset, which is at least as old.
    fn extent(&self, expired: &Expired) -> Extent {
        let limits = &self.rule_set.rules[usize::from(expired.session.rule)].limits;
        if expired.reason == Reason::Admin {
            return Extent::Connection;
        }
        match expiry(&expired.session, &only_lifetime(limits), monotonic_ns()) {
            Expiry::Expired { .. } => Extent::Connection,
            Expiry::Alive { .. } => Extent::Subflow,
        }
    }
}
