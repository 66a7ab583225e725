//! Batches of late sessions: how each is reset, and the request to the reaper.

use std::{os::fd::OwnedFd, path::PathBuf, rc::Rc};

use session_enforcer_common::{Expiry, Reason, Session, expiry};

use super::{
    handles::Searching,
    in_progress::SearchUnderWay,
    judge::{Expired, only_lifetime},
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
    /// Present if the whole host is searched for the namespace.
    pub(super) search: Option<SearchUnderWay>,
    pub(super) sessions: Vec<Expired>,
}

impl State {
    pub(super) fn method_for(&self, session: &Session, now_ns: u64) -> ResetMethod {
        let (netns_cookie, existed_ns) = (session.netns_cookie, session.established_ns);
        let searching = self.handles.search(netns_cookie, existed_ns, now_ns);
        if self.hanging.is_diag_blocked || searching == Searching::InVain {
            ResetMethod::ByCookie
        } else if self.has_no_destroy || session.is_mptcp_subflow() {
            ResetMethod::Disconnect
        } else {
            ResetMethod::Destroy
        }
    }

    /// The request to reset a batch, the namespace descriptor that goes with it, and whether the reaper may search for
    /// the namespace.
    pub(super) fn request(&self, batch: &Batch) -> (Request, Option<Rc<OwnedFd>>, bool) {
        let (mut netns, handle) = self.handles.netns(batch.netns_cookie);
        if batch.search.is_some() {
            netns.search = Search::Everywhere;
        }
        let may_search = handle.is_none() && netns.search != Search::Nowhere;
        (self.request_in(netns, batch), handle, may_search)
    }

    fn request_in(&self, netns: Netns, batch: &Batch) -> Request {
        match batch.method {
            ResetMethod::Destroy => {
                let target = |e: &Expired| SocketId::of(e.cookie, &e.session);
                Request::Destroy {
                    netns,
                    targets: batch.sessions.iter().map(target).collect(),
                }
            }
            ResetMethod::Disconnect | ResetMethod::ByCookie => Request::Disconnect {
                netns,
                sessions: batch.sessions.iter().map(|e| self.held(e, batch)).collect(),
            },
        }
    }

    fn held(&self, expired: &Expired, batch: &Batch) -> Held {
        let session = &expired.session;
        Held {
            target: SocketId::of(expired.cookie, session),
            how: if batch.method == ResetMethod::ByCookie {
                let everywhere = batch.search.is_some() || self.hanging.is_diag_blocked;
                Disconnect::ByCookie { everywhere }
            } else if session.is_mptcp_subflow() {
                Disconnect::Mptcp(self.extent(expired))
            } else {
                Disconnect::Tcp
            },
            cgroup: self.cgroup_of(session),
        }
    }

    fn cgroup_of(&self, session: &Session) -> Option<PathBuf> {
        self.owner_resolver
            .cgroup_directory(session.owner.cgroup_id)
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
