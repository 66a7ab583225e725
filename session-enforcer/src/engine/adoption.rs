//! The adoption of the connections that are older than the daemon.

use std::{
    collections::{HashMap, HashSet},
    path::PathBuf,
    sync::mpsc,
    thread,
};

use anyhow::{Result, anyhow};
use session_enforcer_common::{Ancestors, MatchEntry, Policy, Session};

use super::enforcer::{Enforcer, Look};
use crate::{
    adopt::{self, Adoptee, Adopter, Listeners},
    bpf::Adoption,
    cgroup::{Cgroup, Scope},
    clock::monotonic_ns,
    health::Trouble,
    metrics::Untracked,
    netns::{self, Seen},
    processes::Processes,
    sock_diag::{Detail, MAX_BATCH, Socket, state},
};

/// Bits of a list that may wait for the engine.
const WAITING: usize = 4;

/// What the adoption in all namespaces has in common.
pub(super) struct Adopting {
    pub(super) scope: Scope,
    entries: Vec<MatchEntry>,
    policies: Vec<Policy>,
    generation: u32,
    lag_ns: u64,
    /// By cgroup, those above it.
    ancestors: HashMap<u64, Ancestors>,
    processes: Processes,
}

/// A session that is new in the session map.
pub(super) struct Adopted {
    pub(super) session: Session,
    /// Whether the second list has it.
    is_confirmed: bool,
}

impl Adopting {
    pub(super) fn adopter(&self) -> Adopter<'_> {
        Adopter {
            entries: &self.entries,
            policies: &self.policies,
            generation: self.generation,
            lag_ns: self.lag_ns,
            scope: &self.scope,
            ancestors: &self.ancestors,
        }
    }
}

impl Enforcer {
    /// Adopts the connections below the cgroup that are not tracked and that a rule matches: those
    /// that are older than the programs' attachment, and those whose cgroup has come to be one of the
    /// rules. Returns how many.
    ///
    /// # Errors
    ///
    /// Where the session map refuses. Namespaces that cannot be entered are counted and reported
    /// instead: the others are enforced.
    pub fn adopt(&mut self, cgroup: &Cgroup, all_namespaces: bool) -> Result<usize> {
        Ok(self.adopt_all(cgroup, all_namespaces)?.len())
    }

    /// The same, with the sessions that are new.
    pub(super) fn adopt_all(
        &mut self,
        cgroup: &Cgroup,
        all_namespaces: bool,
    ) -> Result<HashMap<u64, Adopted>> {
        let mut adopting = self.adopting(cgroup.scope()?);
        if all_namespaces || !self.listeners_noted {
            // For the namespaces that are held open, and at the start there is nearly always a socket
            // that asks. Sockets are listed meanwhile.
            adopting.processes = Processes::ahead();
        }
        // What a comparison finds by the policy before would be wrong: it begins anew.
        self.missed.events |= self.comparison.take().is_some();
        let refused = self.missed.begin_adoption();
        let mut adopted = HashMap::new();
        let mut seen = Seen::none();
        let mut namespaces = vec![self.namespaces.own()];
        if all_namespaces {
            self.open_namespaces(&netns::unopened_files(), &mut seen);
            namespaces = self.namespaces.open();
        }
        for netns_cookie in &namespaces {
            self.insert_sessions(&mut adopting, *netns_cookie, &mut adopted)?;
        }
        if all_namespaces {
            let files = adopting.processes.descriptors().namespaces();
            let held_open = self.open_namespaces(files, &mut seen);
            for netns_cookie in &held_open {
                self.insert_sessions(&mut adopting, *netns_cookie, &mut adopted)?;
            }
            namespaces.extend(held_open);
        }
        if !adopted.is_empty() {
            // A packet that came before its session was there may not be counted by the socket yet.
            self.kernel.wait_for_programs();
        }
        let mut listed = HashSet::new();
        for netns_cookie in &namespaces {
            if self.confirm_sessions(&mut adopting, *netns_cookie, &mut adopted)? {
                listed.insert(*netns_cookie);
            }
        }
        self.settle_unconfirmed(&mut adopted, &listed)?;
        for (cookie, adopted) in &adopted {
            self.add_adopted(*cookie, &adopted.session);
        }
        for netns_cookie in namespaces {
            self.close_if_unused(netns_cookie);
        }
        self.listeners_noted = true;
        self.health.set(Trouble::NotAdopted, None);
        self.missed.end(refused);
        self.note_missed();
        Ok(adopted)
    }

    pub(super) fn adopting(&self, scope: Scope) -> Adopting {
        Adopting {
            scope,
            entries: self.book.entries.clone(),
            policies: self.book.policies(),
            generation: self.book.generation,
            lag_ns: self.lag_ns,
            ancestors: HashMap::new(),
            processes: Processes::default(),
        }
    }

    /// Opens the namespaces of these files; which were not open.
    fn open_namespaces(&mut self, files: &[PathBuf], seen: &mut Seen) -> Vec<u64> {
        let (opened, errors) = self.namespaces.open_each(files, seen);
        for error in errors {
            self.unreached();
            tracing::warn!("connections of a network namespace are not adopted: {error}");
        }
        opened
    }

    /// Hands over the sessions that a namespace has now, while a thread lists them; where its list is
    /// repeated, they come again. Returns whether it could be listed: else that is counted and logged.
    fn list(
        &mut self,
        adopting: &mut Adopting,
        netns_cookie: u64,
        mut take: impl FnMut(&mut Self, &mut Adopting, Adoptee) -> Result<()>,
    ) -> Result<bool> {
        // First, since they tell whose and of which direction the sessions are.
        let Some(listeners) = self.dump(netns_cookie, state::bit(state::LISTEN)) else {
            return Ok(false);
        };
        self.note_cgroups(adopting, &listeners)?;
        if !self.listeners_noted {
            let in_scope = |s: &&Socket| adopting.scope.contains(s.cgroup_id);
            let ours: Vec<Socket> = listeners.iter().filter(in_scope).copied().collect();
            self.note_listeners(&ours, &mut adopting.processes)?;
        }
        let listeners = Listeners::among(&listeners);
        let listed = self.while_listed(netns_cookie, |this, bit, now_ns| {
            this.note_cgroups(adopting, &bit)?;
            let adopter = adopting.adopter();
            for adoptee in adopter.sessions(&bit, &listeners, netns_cookie, now_ns) {
                take(this, adopting, adoptee)?;
            }
            Ok(())
        })?;
        Ok(self.was_listed(netns_cookie, listed).is_some())
    }

    /// Has a thread list the sessions of a namespace, and hands over each bit with the time at which
    /// it was whole.
    fn while_listed(
        &mut self,
        netns_cookie: u64,
        mut take: impl FnMut(&mut Self, Vec<Socket>, u64) -> Result<()>,
    ) -> Result<Result<()>> {
        let mut diag = match self.namespaces.lend(netns_cookie) {
            Ok(diag) => diag,
            Err(error) => return Ok(Err(error.into())),
        };
        let table = &mut diag;
        let listed = thread::scope(|scope| {
            let (sender, bits) = mpsc::sync_channel(WAITING);
            let list = move || {
                table.in_bits(state::SESSIONS, Detail::Activity, &mut |bit| {
                    // Nobody takes it where the session map refuses.
                    let _ = sender.send((bit, monotonic_ns()));
                })
            };
            let lister = thread::Builder::new().name("sockets".to_owned());
            let lister = match lister.spawn_scoped(scope, list) {
                Ok(lister) => lister,
                Err(error) => return Ok(Err(error.into())),
            };
            for (bit, now_ns) in bits {
                take(self, bit, now_ns)?;
            }
            let listed = lister.join();
            let listed = listed.map_err(|_| anyhow!("the thread that lists sockets panicked"))?;
            Ok(listed.map_err(Into::into))
        });
        self.namespaces.take_back(netns_cookie, diag);
        listed
    }

    /// The sockets of a namespace that are in one of these states; `None`, after it was counted and
    /// logged, where it cannot be listed.
    pub(super) fn dump(&mut self, netns_cookie: u64, states: u32) -> Option<Vec<Socket>> {
        let listed = self
            .namespaces
            .get(netns_cookie)
            .map_err(anyhow::Error::from)
            .and_then(|diag| Ok(diag.dump(states)?));
        self.was_listed(netns_cookie, listed)
    }

    fn was_listed<T>(&mut self, netns_cookie: u64, listed: Result<T>) -> Option<T> {
        match listed {
            Ok(listed) => Some(listed),
            Err(error) => {
                self.unreached();
                tracing::warn!("listing the sockets of namespace {netns_cookie}: {error:#}");
                None
            }
        }
    }

    /// Counts a namespace, or sockets of one, that cannot be asked about.
    pub(super) fn unreached(&mut self) {
        self.missed.unreached += 1;
        self.metrics.untracked(Untracked::Namespace);
    }

    pub(super) fn note_cgroups(
        &mut self,
        adopting: &mut Adopting,
        sockets: &[Socket],
    ) -> Result<()> {
        for id in sockets.iter().filter_map(|socket| socket.cgroup_id) {
            if !adopting.ancestors.contains_key(&id) && adopting.scope.contains(Some(id)) {
                self.note_cgroup(id)?;
                adopting.ancestors.insert(id, self.ancestors_of(id));
            }
        }
        Ok(())
    }

    fn insert_sessions(
        &mut self,
        adopting: &mut Adopting,
        netns_cookie: u64,
        adopted: &mut HashMap<u64, Adopted>,
    ) -> Result<()> {
        let mut refused = HashSet::new();
        let mut waiting = Vec::with_capacity(MAX_BATCH);
        let listed = self.list(adopting, netns_cookie, |this, adopting, adoptee| {
            let (cookie, mut session) = (adoptee.cookie, adoptee.session);
            if this.schedule.contains(cookie) || adopted.contains_key(&cookie) {
                return Ok(());
            }
            if let Some(holder) = adopting.processes.holder(adoptee.inode) {
                (session.owner.pid, session.owner.comm) = (holder.pid, holder.comm);
            }
            waiting.push((cookie, session));
            if waiting.len() == MAX_BATCH {
                this.insert_waiting(&mut waiting, adopted, &mut refused)?;
            }
            Ok(())
        });
        // What was listed before it broke off is there.
        self.insert_waiting(&mut waiting, adopted, &mut refused)?;
        listed?;
        if !refused.is_empty() {
            let refused = refused.len();
            tracing::error!(
                "{refused} connections are not tracked, the session map is full: raise \
                 daemon.max_sessions"
            );
            self.missed.left_out += refused;
        }
        Ok(())
    }

    fn insert_waiting(
        &mut self,
        waiting: &mut Vec<(u64, Session)>,
        adopted: &mut HashMap<u64, Adopted>,
        refused: &mut HashSet<u64>,
    ) -> Result<()> {
        let answers = self.kernel.adopt_all(waiting)?;
        for ((cookie, session), answer) in waiting.drain(..).zip(answers) {
            match answer {
                Adoption::Inserted => {
                    let is_confirmed = false;
                    let new = Adopted {
                        session,
                        is_confirmed,
                    };
                    adopted.insert(cookie, new);
                }
                Adoption::Known => {}
                Adoption::Full => {
                    if refused.insert(cookie) {
                        self.metrics.untracked(Untracked::MapFull);
                    }
                }
            }
        }
        Ok(())
    }

    /// Lists once more. A packet between the first list and the insertion was stamped by nobody.
    /// Returns whether the namespace could be listed.
    fn confirm_sessions(
        &mut self,
        adopting: &mut Adopting,
        netns_cookie: u64,
        adopted: &mut HashMap<u64, Adopted>,
    ) -> Result<bool> {
        self.list(adopting, netns_cookie, |this, _, adoptee| {
            let cookie = adoptee.cookie;
            let Some(known) = adopted.get_mut(&cookie) else {
                return Ok(());
            };
            known.is_confirmed = true;
            if !this.confirm(cookie, &mut known.session, Some(&adoptee.session))? {
                adopted.remove(&cookie);
            }
            Ok(())
        })
    }

    /// Decides about those that the second list of their namespace does not have. A socket that closed
    /// between the first list and the insertion would stay in the map; but a list may leave out one
    /// that lives, and may have broken off.
    fn settle_unconfirmed(
        &mut self,
        adopted: &mut HashMap<u64, Adopted>,
        listed: &HashSet<u64>,
    ) -> Result<()> {
        let unconfirmed = adopted.iter().filter(|(_, adopted)| !adopted.is_confirmed);
        let unconfirmed: Vec<_> = unconfirmed
            .map(|(cookie, a)| (*cookie, a.session))
            .collect();
        for (cookie, mut session) in unconfirmed {
            // The socket may have been connected again, under the same cookie: the kernel tracks it.
            let is_ours = self.still_there(cookie, &session)?.is_some();
            let is_gone = is_ours
                && listed.contains(&session.netns_cookie)
                && matches!(self.look(cookie, &session), Some(Look::Gone));
            if is_gone {
                self.kernel.remove(cookie, session.established_ns)?;
            }
            if is_ours && !is_gone && self.count_as_active(cookie, &mut session)? {
                adopted
                    .entry(cookie)
                    .and_modify(|adopted| adopted.session = session);
            } else {
                adopted.remove(&cookie);
            }
        }
        Ok(())
    }

    /// Compares a session that was adopted with what the socket tells `now`, if it is there still.
    /// Whether the session is in the map then.
    pub(super) fn confirm(
        &mut self,
        cookie: u64,
        session: &mut Session,
        now: Option<&Session>,
    ) -> Result<bool> {
        let Some(now) = now else {
            self.kernel.remove(cookie, session.established_ns)?;
            return Ok(false);
        };
        // What was stamped since the list stays.
        match adopt::told_anew(session, now) {
            Some(told) => {
                Ok(self.kernel.amend(cookie, &told)? && self.count_as_active(cookie, session)?)
            }
            None => Ok(true),
        }
    }

    /// Counts a session as active at this moment: later than any packet that was not stamped, so never
    /// early. Whether it is in the map then, as `session` says.
    pub(super) fn count_as_active(&mut self, cookie: u64, session: &mut Session) -> Result<bool> {
        // Before the record is read: what is stamped after that is later, and stays.
        let now_ns = monotonic_ns();
        let Some(found) = self.still_there(cookie, session)? else {
            return Ok(false);
        };
        *session = Session {
            last_received_ns: found.last_received_ns.max(now_ns),
            last_sent_ns: found.last_sent_ns.max(now_ns),
            ..found
        };
        Ok(self.kernel.amend(cookie, session)?)
    }
}
