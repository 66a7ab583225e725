//! Limits on hanging resets: for one cgroup, for each cgroup above it, and in total. Pure.
//!
//! Each hanging reset occupies a reaper until the kernel releases it. Whoever keeps sockets locked must reach a limit
//! before others are affected, whoever that is: a process, a user's slice, a pod, or all pods of a class. So the cgroups
//! below one cgroup share its room: each may take half of what the others have left.

use std::collections::HashMap;

use session_enforcer_common::Ancestors;

/// Maximum number of hanging resets for one cgroup.
const MAX_OF_CGROUP: usize = 4;

/// Maximum number of hanging resets in total.
const MAX_IN_ALL: usize = 256;

/// The cgroups whose limits a reset counts against, topmost first: the cgroups above its session, that of the session, and
/// the processes of that cgroup. Cgroups that are not known share one in place of those above them.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct HangScope(Vec<Level>);

/// In place of the id of a cgroup above those that are not known, or whose ancestors are not: one user can have many.
const UNKNOWN: u64 = 0;

/// What shares the room of a cgroup.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Level {
    /// A cgroup with all below it.
    Subtree(u64),
    /// The processes of a cgroup.
    Own(u64),
}

impl HangScope {
    /// The scope of a session in this cgroup.
    pub(super) fn of(cgroup_id: u64, ancestors: &Ancestors) -> Self {
        let known = ancestors.0.into_iter().filter(|id| *id != 0);
        let mut all: Vec<Level> = known.map(Level::Subtree).collect();
        if all.is_empty() {
            all.push(Level::Subtree(UNKNOWN));
        }
        if cgroup_id != 0 {
            all.push(Level::Own(cgroup_id));
        }
        Self(all)
    }
}

/// The resets that do not return at once.
#[derive(Debug, Default)]
pub(super) struct Hanging {
    /// Number of them by level.
    levels: HashMap<Level, usize>,
    in_all: usize,
    /// Number of silent reapers by cgroup.
    silent: HashMap<u64, usize>,
    /// Whether `sock_diag` as a whole does not answer.
    pub(super) is_diag_blocked: bool,
    /// Whether no reaper is free and none can be started.
    pub(super) is_short: bool,
}

impl Hanging {
    /// Counts a reset, or a query, that may hang from now on.
    pub(super) fn begin(&mut self, scope: &HangScope) {
        for level in &scope.0 {
            *self.levels.entry(*level).or_default() += 1;
        }
        self.in_all += 1;
    }

    /// Counts a reset or query that has returned.
    pub(super) fn end(&mut self, scope: &HangScope) {
        for level in &scope.0 {
            if let Some(count) = self.levels.get_mut(level) {
                *count -= 1;
                if *count == 0 {
                    self.levels.remove(level);
                }
            }
        }
        self.in_all -= 1;
    }

    /// Notes that a reaper is silent at a socket of the cgroup.
    pub(super) fn note_silent(&mut self, cgroup_id: u64) {
        *self.silent.entry(cgroup_id).or_default() += 1;
    }

    /// Notes that such a reaper has returned.
    pub(super) fn note_returned(&mut self, cgroup_id: u64) {
        if let Some(count) = self.silent.get_mut(&cgroup_id) {
            *count -= 1;
            if *count == 0 {
                self.silent.remove(&cgroup_id);
            }
        }
    }

    /// Whether nothing hangs.
    pub(super) fn is_empty(&self) -> bool {
        self.in_all == 0
    }

    /// Whether a reaper is silent at a socket of the cgroup. Its sessions then go to separate reapers.
    pub(super) fn is_suspect(&self, cgroup_id: u64) -> bool {
        cgroup_id != 0 && self.silent.contains_key(&cgroup_id)
    }

    /// Whether another reset may be started in the scope.
    pub(super) fn has_room(&self, scope: &HangScope) -> bool {
        self.full_part(scope).is_none()
    }

    /// The part of the scope in which no other reset may be started: down to the lowest level that is full and has hanging
    /// resets, so that there are at most as many such parts as hanging resets. `None` if one may be started.
    pub(super) fn full_part(&self, scope: &HangScope) -> Option<HangScope> {
        let (mut limit, mut above) = (MAX_IN_ALL, self.in_all);
        let mut full = (above >= limit).then_some(0);
        for (index, level) in scope.0.iter().enumerate() {
            let here = self.levels.get(level).copied().unwrap_or(0);
            // Resets that began before the ancestors were known count for this cgroup only.
            let of_others = above.saturating_sub(here);
            limit = limit.saturating_sub(of_others).div_ceil(2);
            if let Level::Own(_) = level {
                limit = limit.min(MAX_OF_CGROUP);
            }
            if here >= limit && (here > 0 || full.is_none()) {
                full = Some(index + 1);
            }
            above = here;
        }
        full.map(|count| HangScope(scope.0[..count].to_vec()))
    }

    /// Describes the problem for people, if there is one; `quarantined` is the number of sessions whose reset is stuck.
    pub(super) fn problem(&self, quarantined: usize) -> Option<String> {
        if self.is_diag_blocked {
            return Some(
                "the kernel's socket tables do not answer: a reset hangs on a socket that its process \
                 keeps locked, which blocks them all before Linux 6.9; sessions are reset through their \
                 processes meanwhile, and nothing is adopted; the audit says which session hangs"
                    .to_owned(),
            );
        }
        if self.is_short {
            let what = "no reaper is free and none can be started, so nothing is reset: leave room for processes \
                        (TasksMax=, podPidsLimit, kernel.threads-max); the log says why";
            return Some(what.to_owned());
        }
        (quarantined > 0).then(|| {
            "resets hang on sockets that their processes keep locked; those sessions stay behind the gate; \
             the audit says which"
                .to_owned()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hang_scope(ids: &[u64]) -> HangScope {
        HangScope::of(*ids.last().unwrap(), &Ancestors::of(ids))
    }

    /// Starts resets that hang in new cgroups below these, until there is no room. Returns their number.
    fn take_all(hanging: &mut Hanging, above: &[u64]) -> usize {
        let of = |id| hang_scope(&[above, &[id]].concat());
        let first = 1_000 * (1 + hanging.in_all as u64);
        let taken = (first..).take_while(|id| {
            let is_free = hanging.has_room(&of(*id));
            if is_free {
                hanging.begin(&of(*id));
            }
            is_free
        });
        taken.count()
    }

    #[test]
    fn resets_that_began_before_the_ancestors_were_known_count_for_their_cgroup() {
        let mut hanging = Hanging::default();
        let of_unknown = HangScope::of(7, &Ancestors::UNKNOWN);
        for _ in 0..MAX_OF_CGROUP {
            hanging.begin(&of_unknown);
        }
        let of_known = hang_scope(&[1, 2, 7]);
        assert!(!hanging.has_room(&of_known));
        assert!(hanging.has_room(&hang_scope(&[1, 2, 8])));
    }

    #[test]
    fn a_blocked_sock_diag_is_reported_before_hanging_resets() {
        let mut hanging = Hanging::default();
        assert_eq!(hanging.problem(0), None);
        assert!(
            hanging
                .problem(1)
                .is_some_and(|what| what.contains("locked"))
        );
        hanging.is_short = true;
        assert!(
            hanging
                .problem(1)
                .is_some_and(|what| what.contains("TasksMax="))
        );
        hanging.is_diag_blocked = true;
        assert!(hanging.problem(0).is_some_and(|what| what.contains("6.9")));
    }

    #[test]
    fn a_reset_that_ends_makes_room_for_one_other() {
        let mut hanging = Hanging::default();
        let of_one = hang_scope(&[1, 2, 3]);
        hanging.begin(&of_one);
        hanging.begin(&of_one);
        hanging.end(&of_one);
        assert!(!hanging.is_suspect(3));
        hanging.note_silent(3);
        hanging.note_silent(3);
        hanging.note_returned(3);
        assert!(hanging.is_suspect(3));
        hanging.note_returned(3);
        assert!(!hanging.is_suspect(3));
        let above = hanging.levels[&Level::Subtree(2)];
        assert_eq!((hanging.in_all, above), (1, 1));
        hanging.end(&of_one);
        assert!(hanging.levels.is_empty());
        assert_eq!(hanging.in_all, 0);
    }

    #[test]
    fn a_cgroup_has_so_much_room_of_its_own() {
        let mut hanging = Hanging::default();
        let first = hang_scope(&[1, 2, 3, 10]);
        (0..MAX_OF_CGROUP).for_each(|_| hanging.begin(&first));
        assert_eq!(hanging.full_part(&first), Some(first.clone()));
        for other in [&[1, 2, 3, 11][..], &[1, 2, 3]] {
            assert!(hanging.has_room(&hang_scope(other)));
        }
        (0..MAX_OF_CGROUP).for_each(|_| hanging.end(&first));
        assert!(hanging.has_room(&first));
    }

    #[test]
    fn each_cgroup_at_any_level_leaves_half_of_the_room_to_its_siblings() {
        let mut hanging = Hanging::default();
        // One pod of a class, then another one, then another class, then a user, then a service.
        for above in [&[1, 2, 3][..], &[1, 2, 4], &[1, 5, 6], &[7, 8], &[9]] {
            let taken = take_all(&mut hanging, above);
            assert!(taken >= 2 * MAX_OF_CGROUP, "{above:?}: {taken}");
        }
    }

    /// One user can have many: sockets that are bound again, and cgroups that he has removed.
    #[test]
    fn sessions_of_unknown_cgroups_share_half_of_the_room() {
        let mut hanging = Hanging::default();
        let unknown = HangScope::of(0, &Ancestors::UNKNOWN);
        (1..MAX_IN_ALL / 2).for_each(|_| hanging.begin(&unknown));
        let removed = HangScope::of(7, &Ancestors::UNKNOWN);
        assert!(hanging.has_room(&removed));
        hanging.begin(&removed);
        for of in [&unknown, &removed, &HangScope::of(8, &Ancestors::UNKNOWN)] {
            // They wait together, also those whose cgroup has no hanging reset.
            let is_own = hanging.levels.contains_key(of.0.last().unwrap());
            let full = if is_own { of } else { &unknown };
            assert_eq!(hanging.full_part(of).as_ref(), Some(full));
        }
        assert!(hanging.has_room(&hang_scope(&[1])));
    }
}
