//! The adoption of the connections that are older than the daemon.

use std::{collections::HashMap, path::PathBuf};

use anyhow::Result;
use session_enforcer_common::{Ancestors, MatchEntry, Policy, Session};

use super::enforcer::Enforcer;
use crate::{
    adopt::{self, Adoptee, Adopter},
    bpf::Adoption,
    cgroup::{Cgroup, Scope},
    clock::monotonic_ns,
    health::Trouble,
    metrics::Untracked,
    netns::{self, Seen},
    processes::Processes,
    sock_diag::{Socket, state},
};

/// What the adoption in all namespaces has in common.
pub(super) struct Adopting {
    pub(super) scope: Scope,
    entries: Vec<MatchEntry>,
    policies: Vec<Policy>,
    generation: u32,
    /// By cgroup, those above it.
    ancestors: HashMap<u64, Ancestors>,
    processes: Processes,
}

impl Adopting {
    pub(super) fn adopter(&self) -> Adopter<'_> {
        Adopter {
            entries: &self.entries,
            policies: &self.policies,
            generation: self.generation,
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
    ) -> Result<HashMap<u64, Session>> {
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
        let mut seen = Seen::default();
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
        for netns_cookie in &namespaces {
            self.confirm_sessions(&mut adopting, *netns_cookie, &mut adopted)?;
        }
        for (cookie, session) in &adopted {
            self.add_adopted(*cookie, session);
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

    /// The sessions that a namespace has now; `None`, after it was counted and logged, where it
    /// cannot be listed.
    fn list(&mut self, adopting: &mut Adopting, netns_cookie: u64) -> Result<Option<Vec<Adoptee>>> {
        let Some(sockets) = self.dump(netns_cookie, adopt::STATES) else {
            return Ok(None);
        };
        let now_ns = monotonic_ns();
        self.note_cgroups(adopting, &sockets)?;
        if !self.listeners_noted {
            let is_ours =
                |s: &&Socket| s.state == state::LISTEN && adopting.scope.contains(s.cgroup_id);
            let listeners: Vec<Socket> = sockets.iter().filter(is_ours).copied().collect();
            self.note_listeners(&listeners, &mut adopting.processes)?;
        }
        let adopter = adopting.adopter();
        Ok(Some(adopter.sessions(&sockets, netns_cookie, now_ns)))
    }

    /// The sockets of a namespace that are in one of these states; `None`, after it was counted and
    /// logged, where it cannot be listed.
    pub(super) fn dump(&mut self, netns_cookie: u64, states: u32) -> Option<Vec<Socket>> {
        let listed = self
            .namespaces
            .get(netns_cookie)
            .map_err(anyhow::Error::from)
            .and_then(|diag| Ok(diag.dump(states)?));
        match listed {
            Ok(sockets) => Some(sockets),
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
        adopted: &mut HashMap<u64, Session>,
    ) -> Result<()> {
        let mut refused = 0;
        for adoptee in self.list(adopting, netns_cookie)?.unwrap_or_default() {
            let (cookie, mut session) = (adoptee.cookie, adoptee.session);
            if self.schedule.contains(cookie) {
                continue;
            }
            if let Some(holder) = adopting.processes.holder(adoptee.inode) {
                (session.owner.pid, session.owner.comm) = (holder.pid, holder.comm);
            }
            match self.kernel.adopt(cookie, &session)? {
                Adoption::Inserted => drop(adopted.insert(cookie, session)),
                Adoption::Known => {}
                Adoption::Full => {
                    refused += 1;
                    self.metrics.untracked(Untracked::MapFull);
                }
            }
        }
        if refused > 0 {
            tracing::error!(
                "{refused} connections are not tracked, the session map is full: raise \
                 daemon.max_sessions"
            );
            self.missed.left_out += refused;
        }
        Ok(())
    }

    /// Lists once more. A packet between the first list and the insertion was stamped by nobody,
    /// and a socket that closed between them would stay in the map.
    fn confirm_sessions(
        &mut self,
        adopting: &mut Adopting,
        netns_cookie: u64,
        adopted: &mut HashMap<u64, Session>,
    ) -> Result<()> {
        let Some(adoptees) = self.list(adopting, netns_cookie)? else {
            return Ok(());
        };
        let now = adoptees.iter().map(|a| (a.cookie, a.session));
        let now: HashMap<u64, Session> = now.collect();
        let mut gone = Vec::new();
        for (cookie, session) in adopted.iter_mut() {
            if session.netns_cookie != netns_cookie {
                continue;
            }
            if !self.confirm(*cookie, session, now.get(cookie))? {
                gone.push(*cookie);
            }
        }
        for cookie in gone {
            adopted.remove(&cookie);
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
            self.kernel.remove(cookie)?;
            return Ok(false);
        };
        if !adopt::was_active_between(session, now) {
            return Ok(true);
        }
        // Counted as active at this moment: later than that packet, so never early.
        let now_ns = monotonic_ns();
        *session = Session {
            last_received_ns: now_ns,
            last_sent_ns: now_ns,
            owner: session.owner,
            ..*now
        };
        self.kernel.remove(cookie)?;
        if self.kernel.adopt(cookie, session)? == Adoption::Full {
            // Another session took its place in the map.
            self.metrics.untracked(Untracked::MapFull);
            self.missed.left_out += 1;
            return Ok(false);
        }
        Ok(true)
    }
}
