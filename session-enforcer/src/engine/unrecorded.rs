//! Resets without an audit record. If the daemon is killed between a reset and its record, the next daemon records the
//! reset from the journal.

use std::{rc::Rc, sync::Arc, time::Duration};

use anyhow::Result;
use session_enforcer_common::{JournalEntry, MAX_RULE_NAME, Reason, Session};

use super::{
    context::Context,
    owner_search,
    phase::{Expired, Phase, Tried},
    state::State,
};
use crate::{
    config::Mode,
    datapath::{Inherited, JournalSlot},
    host::clock::monotonic_ns,
    report::audit::{End, Termination},
};

/// The number of a reason in the journal.
const fn number_of(reason: Reason) -> u16 {
    match reason {
        Reason::IdleTimeout => 0,
        Reason::MaxLifetime => 1,
        Reason::ResponseTimeout => 2,
        Reason::Policy => 3,
        Reason::HalfClosedTimeout => 4,
        Reason::Untracked => 5,
        Reason::Admin => 6,
    }
}

/// The reason with this number in the journal.
fn reason_of(number: u16) -> Option<Reason> {
    let mut all = Reason::ALL.into_iter();
    all.find(|reason| number_of(*reason) == number)
}

/// Records the resets that an earlier daemon has made but not recorded. Must run before any reset.
///
/// # Errors
///
/// Fails if a map cannot be read.
pub(super) async fn recover(context: &Rc<Context>) -> Result<()> {
    let left = context.state().datapath.journal().left();
    if left.is_empty() {
        return Ok(());
    }
    let cgroups = left.iter().map(|(_, entry)| entry.session.owner.cgroup_id);
    owner_search::note_cgroups(context, cgroups.filter(|id| *id != 0).collect()).await?;
    let mut state = context.state();
    let recorded = state.records.audit.recorded();
    let before = state.records.audit.sequence();
    for (journal_slot, entry) in left {
        let id = state
            .records
            .audit
            .id_of_end(entry.cookie, entry.session.established_ns);
        if !recorded.contains(&id) {
            state.recover(journal_slot, &entry)?;
        }
    }
    let count = state.records.audit.sequence() - before;
    state.records.audit.flush();
    tracing::info!("{count} sessions that an earlier daemon has ended are recorded now");
    Ok(())
}

impl State {
    /// Adds a session to the journal before reapers are asked to reset it.
    pub(super) fn note_reset(&mut self, expired: &Expired) {
        let rule = &self.rule_set.rules[usize::from(expired.session.rule)];
        let mut name = [0; MAX_RULE_NAME];
        for (at, byte) in name.iter_mut().zip(rule.name.bytes()) {
            *at = byte;
        }
        let entry = JournalEntry {
            session: expired.session,
            cookie: expired.cookie,
            deadline_ns: expired.deadline_ns,
            reached_ns: expired.reached_ns,
            limit_ns: expired.limit_ns,
            idle_since_ns: expired.idle_since_ns,
            answered_ns: 0,
            is_used: 1,
            reason: number_of(expired.reason),
            was_gone: 0,
            rule: name,
        };
        if let Some(tried) = self.tracker.tried(expired.cookie, &expired.session) {
            // Frees the slot of an earlier attempt first.
            tried.journal_slot = None;
            tried.journal_slot = self.datapath.journal().put(&entry);
        }
    }

    /// Handles a journal entry of an earlier daemon. An invalid entry is dropped.
    fn recover(&mut self, journal_slot: Arc<JournalSlot>, entry: &JournalEntry) -> Result<()> {
        let name = entry.rule.split(|byte| *byte == 0).next();
        let name = name.and_then(|name| std::str::from_utf8(name).ok());
        let (Some(name), Some(reason)) = (name, reason_of(entry.reason)) else {
            return Ok(());
        };
        if entry.answered_ns != 0 {
            self.record_left(entry, (name, reason), entry.answered_ns, journal_slot);
            return Ok(());
        }
        let Some(now) = self.still_there(entry.cookie, &entry.session)? else {
            self.record_left(entry, (name, reason), monotonic_ns(), journal_slot);
            return Ok(());
        };
        let is_end_seen =
            self.datapath.inherited() == Inherited::Running && !now.end_is_unreported();
        let rule = self
            .rule_set
            .rules
            .iter()
            .position(|rule| rule.name == name);
        // If its end would have been reported, the session was not reset; it is judged like every other session.
        let Some(rule) = rule.filter(|_| !is_end_seen) else {
            return Ok(());
        };
        let expired = Expired {
            cookie: entry.cookie,
            session: Session {
                rule: rule as u16,
                ..entry.session
            },
            reason,
            deadline_ns: entry.deadline_ns,
            reached_ns: entry.reached_ns,
            decided_ns: monotonic_ns(),
            limit_ns: entry.limit_ns,
            idle_since_ns: entry.idle_since_ns,
        };
        // It counts as asked without an answer; a later query of its socket shows whether it was reset.
        let tried = Phase::Tried(Box::new(Tried::unanswered(expired, journal_slot)));
        self.tracker.set_phase(entry.cookie, &now, tried);
        Ok(())
    }

    fn record_left(
        &mut self,
        entry: &JournalEntry,
        (rule, reason): (&str, Reason),
        answered_ns: u64,
        journal_slot: Arc<JournalSlot>,
    ) {
        let was_reset = entry.answered_ns != 0 && entry.was_gone == 0;
        let session = &entry.session;
        let termination = Termination {
            cookie: entry.cookie,
            session,
            rule,
            reason,
            mode: Mode::Enforce,
            end: if was_reset {
                End::Reset(None)
            } else {
                End::Gone
            },
            limit: (entry.limit_ns != 0).then(|| Duration::from_nanos(entry.limit_ns)),
            deadline_ns: entry.deadline_ns,
            idle_since_ns: entry.idle_since_ns,
            answered_ns,
            process: None,
            cgroup: self.owner_resolver.path(session.owner.cgroup_id),
            user: self.owner_resolver.user_name(session.owner.uid),
            requested_by: None,
        };
        self.records
            .termination(&termination, Some(Box::new(journal_slot)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_reason_has_a_number_of_its_own() {
        for (number, reason) in [
            Reason::IdleTimeout,
            Reason::MaxLifetime,
            Reason::ResponseTimeout,
            Reason::Policy,
            Reason::HalfClosedTimeout,
            Reason::Untracked,
            Reason::Admin,
        ]
        .into_iter()
        .enumerate()
        {
            assert_eq!(number_of(reason), number as u16);
            assert_eq!(reason_of(number as u16), Some(reason));
        }
        assert_eq!(reason_of(Reason::ALL.len() as u16), None);
    }
}
