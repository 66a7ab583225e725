//! The sessions that an earlier daemon left: brought up to date, scheduled, and compared with the
//! sockets.

use std::collections::{BTreeMap, HashMap, HashSet};

use anyhow::Result;
use session_enforcer_common::Session;

use super::enforcer::{Enforcer, Look};
use crate::{
    adopt::caught_up,
    bpf::{BpfError, Inherited},
    cgroup::Cgroup,
    clock::monotonic_ns,
    metrics::Repair,
    netns::{self, Seen},
    processes::Descriptors,
    schedule::Group,
    sock_diag::{Socket, state},
};

/// How often sessions are compared with their sockets while packets pass. Each time fewer differ:
/// those that had a packet in the moment of the comparison.
pub(super) const MAX_COMPARISONS: usize = 8;

/// Sessions that a daemon begins with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Begun {
    /// Of the earlier daemon.
    pub taken_over: usize,
    /// Of no daemon.
    pub adopted: usize,
}

/// What the socket table of a namespace says.
enum Sockets {
    /// The sessions that there are, by cookie.
    Listed(HashMap<u64, Socket>),
    /// The namespace is no more, and its sockets with it.
    Gone,
    /// It could not be asked.
    Unknown,
}

/// Which namespaces there are.
struct Known {
    /// All of them, if each could be entered: others are no more.
    every: Option<HashSet<u64>>,
    /// The only one that matters.
    only: Option<u64>,
    /// When they were looked for: later ones are not among them.
    since_ns: u64,
    /// Whether the kernel has reported the ends of sessions all the time.
    are_ends_reported: bool,
}

impl Known {
    fn is_wanted(&self, netns_cookie: u64) -> bool {
        self.only.is_none_or(|only| only == netns_cookie)
    }

    fn is_gone(&self, netns_cookie: u64) -> bool {
        let every = self.every.as_ref();
        every.is_some_and(|every| !every.contains(&netns_cookie))
    }

    /// Whether a session of a namespace that is not among them has ended. One in a namespace that only
    /// sockets keep alive is found nowhere, and lives.
    fn tells_of(&self, session: &Session) -> bool {
        session.established_ns < self.since_ns
            && (session.end_is_unreported() || !self.are_ends_reported)
    }
}

impl Enforcer {
    /// Attaches the programs, takes over the sessions of an earlier daemon, and adopts those
    /// connections that have none. From the attachment on each new connection below the cgroup is
    /// tracked.
    ///
    /// # Errors
    ///
    /// Where the kernel refuses a program, a map or a pin.
    pub fn begin(&mut self, cgroup: &Cgroup, all_namespaces: bool) -> Result<Begun> {
        let inherited = self.kernel.inherited();
        if inherited == Inherited::Nothing {
            self.kernel.attach(cgroup)?;
            let adopted = self.adopt(cgroup, all_namespaces)?;
            self.kernel.commit()?;
            self.kernel.narrow_ports()?;
            return Ok(Begun {
                taken_over: 0,
                adopted,
            });
        }
        let known = self.known_namespaces(all_namespaces);
        self.attach(cgroup, &known)?;
        let taken_over = self.schedule_inherited(&known)?;
        let adopted = self.adopt(cgroup, all_namespaces)?;
        if inherited == Inherited::Running {
            (0..adopted).for_each(|_| self.metrics.repaired(Repair::Missed));
        }
        self.compare_with_sockets(cgroup, &known)?;
        self.kernel.commit()?;
        self.kernel.narrow_ports()?;
        Ok(Begun {
            taken_over,
            adopted,
        })
    }

    /// Attaches the programs. Where nothing was attached since the earlier daemon ended, its
    /// sessions are brought up to date before, so that no packet meets one with the stamps of that
    /// time.
    fn attach(&mut self, cgroup: &Cgroup, known: &Known) -> Result<()> {
        let stopped = self.kernel.inherited() == Inherited::Stopped;
        if stopped {
            self.catch_up(known)?;
        }
        self.kernel.attach(cgroup)?;
        self.kernel.compare_sessions()?;
        if stopped {
            // What passed between the list of the sockets and the attachment, and whatever was
            // stamped while a record was written.
            for _ in 0..MAX_COMPARISONS {
                self.kernel.wait_for_programs();
                if self.catch_up(known)? == 0 {
                    break;
                }
            }
        }
        Ok(())
    }

    /// Brings the sessions up to date with what the sockets tell of a time in which nobody stamped
    /// them, and removes those that have ended; how many it changed.
    fn catch_up(&mut self, known: &Known) -> Result<usize, BpfError> {
        let mut changed = 0;
        for (netns_cookie, sessions) in self.sessions_by_namespace()? {
            if !known.is_wanted(netns_cookie) {
                continue;
            }
            let sockets = self.sockets_of(netns_cookie, known);
            let now_ns = monotonic_ns();
            for (cookie, session) in sessions {
                if self.has_ended(cookie, &session, &sockets, known) {
                    let removed = self.kernel.remove(cookie, session.established_ns)?;
                    changed += usize::from(removed);
                    self.metrics.repaired(Repair::Stale);
                    continue;
                }
                let Sockets::Listed(sockets) = &sockets else {
                    continue;
                };
                let Some(socket) = sockets.get(&cookie) else {
                    continue;
                };
                let rule = self.rule_of(&session);
                let policy = rule.and_then(|rule| self.book.rule(rule)).map(|r| r.policy);
                let now = caught_up(&session, socket, policy.as_ref(), now_ns, self.lag_ns);
                if now != session && self.kernel.amend(cookie, &now)? {
                    changed += 1;
                    self.metrics.repaired(Repair::Behind);
                }
            }
        }
        Ok(changed)
    }

    /// Schedules every session in the map; what no rule matches any more is let go.
    fn schedule_inherited(&mut self, known: &Known) -> Result<usize> {
        let mut taken_over = 0;
        for cookie in self.kernel.cookies()? {
            let Some(session) = self.kernel.session(cookie)? else {
                continue;
            };
            if session.generation == 0 {
                // The earlier daemon had not decided about it. It is adopted in a moment, as every
                // connection that nobody has decided about.
                self.kernel.remove(cookie, session.established_ns)?;
                continue;
            }
            let netns_cookie = session.netns_cookie;
            let rule = self.provisional_rule(&session);
            let Some(rule) = rule.filter(|_| known.is_wanted(netns_cookie)) else {
                self.kernel.remove(cookie, session.established_ns)?;
                continue;
            };
            taken_over += 1;
            // Due at once: the first look works out the deadline, and ends what came due meanwhile.
            self.add(cookie, Group { netns_cookie, rule }, 0);
        }
        self.metrics.taken_over(taken_over);
        Ok(taken_over)
    }

    /// Drops the sessions that have no socket, or one that is not below the cgroup.
    fn compare_with_sockets(&mut self, cgroup: &Cgroup, known: &Known) -> Result<()> {
        let scope = cgroup.scope()?;
        for (netns_cookie, sessions) in self.sessions_by_namespace()? {
            let sockets = self.sockets_of(netns_cookie, known);
            for (cookie, session) in sessions {
                if self.has_ended(cookie, &session, &sockets, known) {
                    // The kernel's report may have come first.
                    if self.kernel.session(cookie)?.is_some() {
                        self.drop_stale(cookie, &session)?;
                    }
                    continue;
                }
                let Sockets::Listed(sockets) = &sockets else {
                    continue;
                };
                let elsewhere = |socket: &Socket| !scope.contains(socket.cgroup_id);
                if sockets.get(&cookie).is_some_and(elsewhere) {
                    self.release(cookie, &session)?;
                }
            }
            self.close_if_unused(netns_cookie);
        }
        Ok(())
    }

    /// Whether the session has no socket any more.
    fn has_ended(
        &mut self,
        cookie: u64,
        session: &Session,
        sockets: &Sockets,
        known: &Known,
    ) -> bool {
        match sockets {
            Sockets::Gone => known.tells_of(session),
            Sockets::Unknown => false,
            Sockets::Listed(sockets) => {
                // It may have begun after the list was made.
                !sockets.contains_key(&cookie)
                    && matches!(self.look(cookie, session), Some(Look::Gone))
            }
        }
    }

    fn sessions_by_namespace(&self) -> Result<BTreeMap<u64, Vec<(u64, Session)>>, BpfError> {
        let mut sessions: BTreeMap<u64, Vec<(u64, Session)>> = BTreeMap::new();
        let cookies = self.kernel.cookies()?;
        for (cookie, session) in cookies.iter().zip(self.kernel.sessions(&cookies)?) {
            if let Some(session) = session {
                let of_namespace = sessions.entry(session.netns_cookie).or_default();
                of_namespace.push((*cookie, session));
            }
        }
        Ok(sessions)
    }

    fn known_namespaces(&mut self, all: bool) -> Known {
        let since_ns = monotonic_ns();
        let are_ends_reported = self.kernel.inherited() == Inherited::Running;
        if !all {
            return Known {
                every: None,
                only: Some(self.namespaces.own()),
                since_ns,
                are_ends_reported,
            };
        }
        let mut files = netns::unopened_files();
        files.extend_from_slice(Descriptors::of_all_processes().namespaces());
        let (_, errors) = self.namespaces.open_each(&files, &mut Seen::none());
        let every = errors.is_empty();
        let every = every.then(|| self.namespaces.open().into_iter().collect());
        Known {
            every,
            only: None,
            since_ns,
            are_ends_reported,
        }
    }

    fn sockets_of(&mut self, netns_cookie: u64, known: &Known) -> Sockets {
        if known.is_gone(netns_cookie) {
            return Sockets::Gone;
        }
        let Some(sockets) = self.dump(netns_cookie, state::SESSIONS) else {
            return Sockets::Unknown;
        };
        let sessions = sockets.into_iter().filter(|socket| !socket.is_mini);
        Sockets::Listed(sessions.map(|s| (s.target.cookie, s)).collect())
    }
}
