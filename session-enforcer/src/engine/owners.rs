//! Whose the sessions are, where the kernel does not know: sockets older than the programs, and
//! cgroups that come while the daemon runs.

use anyhow::Result;
use session_enforcer_common::{Ancestors, Owner, Session};

use super::{
    enforcer::{Enforcer, MAX_PASS, RETRY_NS},
    takeover::MAX_COMPARISONS,
};
use crate::{
    adopt::{self, Listeners},
    bpf::BpfError,
    cgroup::{Cgroup, CgroupError},
    clock::monotonic_ns,
    config::Config,
    disconnect,
    processes::{Holder, Processes},
    schedule::Group,
    sock_diag::{Socket, Target, state},
};

/// What the kernel's socket table says of a session's owner.
enum Found {
    /// The owner.
    Owner(Owner),
    /// There is no such socket any more.
    Gone,
    /// The table cannot be asked.
    Unreachable,
}

/// What became of a session's record when it was compared with its socket.
enum Compared {
    /// It says what the socket says.
    Agrees(Session),
    /// It did not, and was written.
    Written(Session),
    /// The session has ended, and was dealt with.
    Ended,
}

impl Enforcer {
    /// The cgroups above one, the kernel's word first: it remembers those that are no more.
    pub(super) fn ancestors_of(&self, cgroup_id: u64) -> Ancestors {
        match self.kernel.ancestors(cgroup_id) {
            Ok(Some(ancestors)) => ancestors,
            _ => self.directory.ancestors(cgroup_id),
        }
    }

    /// The rule of a session; none where no rule matches it any more, or an exempting one does.
    pub(super) fn rule_of(&self, session: &Session) -> Option<u16> {
        self.book.rule_of(session, |id| self.ancestors_of(id))
    }

    /// The same as far as it is known now: of a session whose owner is still to be found, a rule
    /// that there is.
    pub(super) fn provisional_rule(&self, session: &Session) -> Option<u16> {
        if self.book.needs_owner_of(session) {
            return Some(0);
        }
        self.rule_of(session)
    }

    /// Notes where a cgroup is while it is there, for the audit, and what is above it, for the
    /// kernel.
    pub(super) fn note_cgroup(&mut self, cgroup_id: u64) -> Result<(), BpfError> {
        self.directory.remember(cgroup_id);
        if self.kernel.ancestors(cgroup_id)?.is_none() {
            let ancestors = self.directory.ancestors(cgroup_id);
            self.kernel.note_ancestors(cgroup_id, &ancestors)?;
        }
        Ok(())
    }

    /// Notes the owners of sockets that listen, for those that they will accept.
    pub(super) fn note_listeners(
        &mut self,
        listeners: &[Socket],
        processes: &mut Processes,
    ) -> Result<()> {
        let alone = Listeners::default();
        for socket in listeners {
            let Some(holder) = processes.descriptors().holder(socket.inode) else {
                continue;
            };
            let owner = Owner {
                pid: holder.pid,
                comm: holder.comm,
                ..adopt::owner(socket, &alone)
            };
            if !owner.is_known() {
                continue;
            }
            self.note_cgroup(owner.cgroup_id)?;
            if let Err(error) = self.note_listener(socket, holder, &owner) {
                // What it accepts is asked about one by one.
                tracing::debug!(
                    "the owner of the listener on port {} is not noted: {error:#}",
                    socket.target.local_port
                );
            }
        }
        Ok(())
    }

    /// By the time that it is looked at, the process may have closed the listener, and the number of
    /// its descriptor stand for another file. Of an MPTCP listener it stands for the MPTCP socket, from
    /// which no connection inherits anything.
    fn note_listener(&mut self, socket: &Socket, holder: Holder, owner: &Owner) -> Result<()> {
        let fd = holder.duplicate()?;
        let cookie = disconnect::cookie(&fd)?;
        anyhow::ensure!(
            cookie == socket.target.cookie,
            "its descriptor is another's"
        );
        Ok(self.kernel.note_owner(&fd, owner)?)
    }

    /// Whether the session cannot be judged before its owner is [settled](Self::settle_owner).
    pub(super) fn asks_for_owner(&self, cookie: u64, session: &Session) -> bool {
        !self.was_reset(cookie, session) && self.book.needs_owner_of(session)
    }

    /// Finds the owner of a session, if that is not known, and the rule that is then its own, and puts
    /// both into the session map. What is returned is scheduled without a time, and to be
    /// [compared](Self::compared_with_sockets) before it is judged. None, after it was dealt with, where the
    /// session is not to be judged now.
    pub(super) fn settle_owner(
        &mut self,
        cookie: u64,
        session: &Session,
    ) -> Result<Option<(u64, Session)>> {
        let owner = match self.find_owner(cookie, session) {
            // The kernel's word tells the process too.
            Found::Owner(_) if session.owner.is_known() => session.owner,
            Found::Owner(owner) => owner,
            Found::Gone => {
                self.release(cookie, session)?;
                return Ok(None);
            }
            Found::Unreachable => {
                // One that a rule limits meanwhile is looked at when that says.
                if self.book.needs_owner_of(session) {
                    self.schedule.rearm(cookie, monotonic_ns() + RETRY_NS);
                }
                return Ok(None);
            }
        };
        self.note_cgroup(owner.cgroup_id)?;
        // The record may say more by now.
        let Some(session) = self.still_there(cookie, session)? else {
            // It has ended, and its event is still to be read.
            self.schedule.rearm(cookie, monotonic_ns() + RETRY_NS);
            return Ok(None);
        };
        let mut settled = Session {
            owner,
            // The gate has not looked at it under the rule to be found, which is not that of before.
            open_until_ns: 0,
            generation: 0,
            ..session
        };
        let Some(rule) = self.rule_of(&settled) else {
            self.release(cookie, &session)?;
            return Ok(None);
        };
        (settled.rule, settled.generation) = (rule, self.book.generation);
        if !self.amend(cookie, &settled)? {
            return Ok(None);
        }
        // From here on its end is counted, whoever sees it.
        if session.generation == 0 {
            self.metrics.opened(usize::from(rule));
        }
        let group = Group {
            netns_cookie: settled.netns_cookie,
            rule,
        };
        self.add(cookie, group, u64::MAX);
        Ok(Some((cookie, settled)))
    }

    fn find_owner(&mut self, cookie: u64, session: &Session) -> Found {
        let found = self.socket_of(cookie, session).and_then(|socket| {
            let Some(socket) = socket else {
                return Ok(Found::Gone);
            };
            let diag = self.namespaces.get(session.netns_cookie)?;
            let listeners = Listeners::among(&diag.dump(state::bit(state::LISTEN))?);
            let owner = adopt::owner(&socket, &listeners);
            anyhow::ensure!(owner.is_known(), "the kernel does not tell its cgroup");
            Ok(Found::Owner(owner))
        });
        found.unwrap_or_else(|error| {
            tracing::warn!("looking for the owner of session {cookie}: {error:#}");
            self.namespaces.reopen(session.netns_cookie);
            Found::Unreachable
        })
    }

    /// The socket of a session; none where it has closed, which one in TIME-WAIT has.
    fn socket_of(&mut self, cookie: u64, session: &Session) -> Result<Option<Socket>> {
        let namespaces = &mut self.namespaces;
        let diag = namespaces.get_existing(session.netns_cookie, session.established_ns)?;
        let socket = diag.look(&Target::of(cookie, session))?;
        Ok(socket.filter(|socket| !socket.is_mini))
    }

    /// The records of sessions that were written, once they say all that their sockets tell: what passed
    /// while a record was moved may have left its stamp where nobody reads it. Without those that have
    /// ended meanwhile, which were dealt with.
    pub(super) fn compared_with_sockets(
        &mut self,
        mut written: Vec<(u64, Session)>,
    ) -> Result<Vec<(u64, Session)>> {
        let mut whole = Vec::new();
        for _ in 0..MAX_COMPARISONS {
            if written.is_empty() {
                break;
            }
            // A packet that met the record where it was may not be counted by its socket yet.
            self.kernel.wait_for_programs();
            for (cookie, session) in std::mem::take(&mut written) {
                match self.compared_with_socket(cookie, session)? {
                    Compared::Agrees(session) => whole.push((cookie, session)),
                    Compared::Written(session) => written.push((cookie, session)),
                    Compared::Ended => {}
                }
            }
        }
        whole.append(&mut written);
        Ok(whole)
    }

    /// Compares the record of one with its socket, once, and writes it again where they differ.
    fn compared_with_socket(&mut self, cookie: u64, mut session: Session) -> Result<Compared> {
        let socket = match self.socket_of(cookie, &session) {
            Ok(Some(socket)) => socket,
            Ok(None) => {
                self.release(cookie, &session)?;
                return Ok(Compared::Ended);
            }
            Err(error) => {
                tracing::warn!("comparing session {cookie} with its socket: {error:#}");
                if self.count_as_active(cookie, &mut session)? {
                    return Ok(Compared::Agrees(session));
                }
                self.forget(cookie);
                return Ok(Compared::Ended);
            }
        };
        // Read after the socket has told: what passes in between is in the record alone.
        let Some(now) = self.still_there(cookie, &session)? else {
            self.forget(cookie);
            return Ok(Compared::Ended);
        };
        let policy = self.book.rule(now.rule).map(|rule| rule.policy);
        let caught_up =
            adopt::caught_up(&now, &socket, policy.as_ref(), monotonic_ns(), self.lag_ns);
        if caught_up == now {
            return Ok(Compared::Agrees(now));
        }
        Ok(if self.amend(cookie, &caught_up)? {
            Compared::Written(caught_up)
        } else {
            Compared::Ended
        })
    }

    fn amend(&mut self, cookie: u64, session: &Session) -> Result<bool> {
        let is_there = self.kernel.amend(cookie, session)?;
        if !is_there {
            self.forget(cookie);
        }
        Ok(is_there)
    }

    /// Looks whether cgroups that the rules name have come. The sockets of one that has are matched
    /// from now on, those that it has already are adopted, and those that a rule further down has
    /// taken meanwhile are decided about anew.
    ///
    /// # Errors
    ///
    /// Where the kernel's maps refuse.
    pub fn cgroups_changed(
        &mut self,
        config: &Config,
        cgroup: &Cgroup,
        all_namespaces: bool,
    ) -> Result<()> {
        let come = self.directory.look_again();
        if come.is_empty() {
            return Ok(());
        }
        // The same policy, of the same generation: what was decided about other sessions stands.
        self.book.set_owners(config, self.directory.owners());
        self.kernel.put_policy(
            self.book.generation,
            &self.book.entries,
            &self.book.policies(),
        )?;
        let redecided = self.redecide_below(&come)?;
        self.kernel.narrow_ports()?;
        let adopted = match self.adopt(cgroup, all_namespaces) {
            // The watched cgroup was removed, say: sessions are enforced to their end.
            Err(error) if error.is::<CgroupError>() => {
                self.unreached();
                tracing::warn!("connections are not adopted: {error:#}");
                0
            }
            adopted => adopted?,
        };
        tracing::info!(
            "a cgroup of the rules has come; {redecided} connections decided about anew, {adopted} \
             adopted"
        );
        Ok(())
    }

    /// Decides anew about the sessions of these cgroups and of those below; how many.
    fn redecide_below(&mut self, cgroups: &[u64]) -> Result<usize> {
        let mut count = 0;
        for some in self.kernel.cookies()?.chunks(MAX_PASS) {
            let mut settled = Vec::new();
            for cookie in some {
                let Some(session) = self.kernel.session(*cookie)? else {
                    continue;
                };
                let above = self.ancestors_of(session.owner.cgroup_id);
                if !cgroups.iter().any(|id| above.contains(*id)) {
                    continue;
                }
                count += 1;
                settled.extend(self.settle_owner(*cookie, &session)?);
            }
            for (cookie, _) in self.compared_with_sockets(settled)? {
                self.schedule.rearm(cookie, 0);
            }
        }
        Ok(count)
    }

    /// The directories of the cgroups that the rules name.
    pub fn cgroup_directories(&self) -> Vec<std::path::PathBuf> {
        self.directory.directories()
    }
}
