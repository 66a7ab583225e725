//! Limits on hanging resets: for one cgroup, for a second-level cgroup, and in total. Pure.
//!
//! Each hanging reset occupies a reaper until the kernel releases it. Whoever keeps sockets locked must reach a limit
//! before others are affected.

use std::collections::HashMap;

use session_enforcer_common::Ancestors;

/// Maximum number of hanging resets for one cgroup.
const MAX_OF_CGROUP: usize = 4;

/// Maximum number of hanging resets for everything below one second-level cgroup, which is a user's slice, a service or
/// a container.
const MAX_BELOW: usize = 32;

/// Maximum number of hanging resets in total.
const MAX_IN_ALL: usize = 256;

/// The cgroups that a reset is counted under.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Culprit {
    cgroup_id: u64,
    /// Its second-level ancestor, or the cgroup itself.
    below: u64,
}

impl Culprit {
    /// The culprit for a session in this cgroup.
    pub(super) fn of(cgroup_id: u64, ancestors: &Ancestors) -> Self {
        // The first level has the system's slices. 0 if the cgroup is not deep enough.
        let second = ancestors.0[1];
        Self {
            cgroup_id,
            below: if second == 0 { cgroup_id } else { second },
        }
    }
}

/// Whether another reset may be started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Room {
    /// A reset may be started.
    Free,
    /// A limit is reached.
    Taken {
        /// When a reset began or ended last within this limit.
        since_ns: u64,
    },
}

/// The hanging resets within a limit.
#[derive(Clone, Copy, Debug, Default)]
struct Occupancy {
    count: usize,
    /// When a reset began or ended last.
    changed_ns: u64,
}

impl Occupancy {
    fn begin(&mut self, now_ns: u64) {
        self.count += 1;
        self.changed_ns = now_ns;
    }

    fn end(&mut self, now_ns: u64) {
        self.count -= 1;
        self.changed_ns = now_ns;
    }
}

/// The resets that do not return at once.
#[derive(Debug, Default)]
pub(super) struct Hanging {
    of_cgroup: HashMap<u64, Occupancy>,
    below: HashMap<u64, Occupancy>,
    in_all: Occupancy,
    /// Whether `sock_diag` as a whole does not answer.
    pub(super) is_diag_blocked: bool,
}

impl Hanging {
    /// Counts a reset that hangs from now on.
    pub(super) fn begin(&mut self, culprit: Culprit, now_ns: u64) {
        let of_cgroup = self.of_cgroup.entry(culprit.cgroup_id).or_default();
        of_cgroup.begin(now_ns);
        self.below.entry(culprit.below).or_default().begin(now_ns);
        self.in_all.begin(now_ns);
    }

    /// Counts a reset that has returned.
    pub(super) fn end(&mut self, culprit: Culprit, now_ns: u64) {
        for (occupied, id) in [
            (&mut self.of_cgroup, culprit.cgroup_id),
            (&mut self.below, culprit.below),
        ] {
            if let Some(occupancy) = occupied.get_mut(&id) {
                occupancy.end(now_ns);
                if occupancy.count == 0 {
                    occupied.remove(&id);
                }
            }
        }
        self.in_all.end(now_ns);
    }

    /// Whether a reset of the cgroup hangs. Its sessions then go to separate reapers.
    pub(super) fn is_suspect(&self, cgroup_id: u64) -> bool {
        self.of_cgroup.contains_key(&cgroup_id)
    }

    /// Whether another reset may be started for the culprit. A session whose cgroup is not known (0) counts only in all:
    /// it may be anybody's.
    pub(super) fn room(&self, culprit: Culprit) -> Room {
        let of = |occupied: &HashMap<u64, Occupancy>, id| {
            let occupancy = occupied.get(&id).filter(|_| id != 0);
            occupancy.copied()
        };
        let limits = [
            (of(&self.of_cgroup, culprit.cgroup_id), MAX_OF_CGROUP),
            (of(&self.below, culprit.below), MAX_BELOW),
            (Some(self.in_all), MAX_IN_ALL),
        ];
        let mut reached = limits.into_iter().filter_map(|(occupancy, limit)| {
            let occupancy = occupancy?;
            (occupancy.count >= limit).then_some(occupancy.changed_ns)
        });
        reached
            .next()
            .map_or(Room::Free, |since_ns| Room::Taken { since_ns })
    }

    /// Describes the problem for people, if there is one; `quarantined` is the number of sessions whose reset is stuck.
    pub(super) fn trouble(&self, quarantined: usize) -> Option<String> {
        if self.is_diag_blocked {
            return Some(
                "the kernel's socket tables do not answer: a reset hangs on a socket that its process \
                 keeps locked, which blocks them all before Linux 6.9; sessions are reset through their \
                 processes meanwhile, and nothing is adopted; the audit says which session hangs"
                    .to_owned(),
            );
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

    fn culprit(ids: &[u64]) -> Culprit {
        Culprit::of(*ids.last().unwrap(), &Ancestors::of(ids))
    }

    #[test]
    fn what_hangs_is_said_and_what_blocks_everything_first() {
        let mut hanging = Hanging::default();
        assert_eq!(hanging.trouble(0), None);
        assert!(
            hanging
                .trouble(1)
                .is_some_and(|what| what.contains("locked"))
        );
        hanging.is_diag_blocked = true;
        assert!(hanging.trouble(0).is_some_and(|what| what.contains("6.9")));
    }

    #[test]
    fn what_ends_makes_room_for_one_and_leaves_the_others() {
        let mut hanging = Hanging::default();
        let of_one = culprit(&[1, 2, 3]);
        // Without a second-level ancestor the cgroup itself is used.
        assert_eq!((culprit(&[9]).below, of_one.below), (9, 2));
        hanging.begin(of_one, 1);
        hanging.begin(of_one, 2);
        hanging.end(of_one, 3);
        assert!(hanging.is_suspect(3));
        assert_eq!((hanging.in_all.count, hanging.below[&2].count), (1, 1));
        hanging.end(of_one, 4);
        assert!(hanging.of_cgroup.is_empty() && hanging.below.is_empty());
        assert_eq!(hanging.in_all.count, 0);
    }

    #[test]
    fn a_cgroup_a_user_and_all_together_have_so_much_room() {
        let mut hanging = Hanging::default();
        let first = culprit(&[1, 2, 3, 10]);
        (0..MAX_OF_CGROUP as u64).for_each(|now_ns| hanging.begin(first, now_ns));
        let since_ns = MAX_OF_CGROUP as u64 - 1;
        assert_eq!(hanging.room(first), Room::Taken { since_ns });
        assert!(hanging.is_suspect(10) && !hanging.is_suspect(11));
        // Another cgroup of the same user.
        for id in 11.. {
            let next = culprit(&[1, 2, 3, id]);
            if hanging.room(next) != Room::Free {
                assert_eq!(hanging.room(next), Room::Taken { since_ns: id - 1 });
                break;
            }
            hanging.begin(next, id);
        }
        assert_eq!(hanging.in_all.count, MAX_BELOW);
        // Another user.
        let other = culprit(&[1, 4, 10_000]);
        assert_eq!(hanging.room(other), Room::Free);
        (0..MAX_OF_CGROUP).for_each(|_| hanging.end(first, 0));
        assert!(!hanging.is_suspect(10));
        assert_eq!(hanging.room(first), Room::Free);
        // Nobody takes the room of those whose cgroup is not known.
        let unknown = Culprit::of(0, &Ancestors::UNKNOWN);
        (0..=MAX_BELOW).for_each(|_| hanging.begin(unknown, 0));
        assert_eq!(hanging.room(unknown), Room::Free);
        let mut id = 20_000;
        while hanging.room(culprit(&[id])) == Room::Free {
            hanging.begin(culprit(&[id]), id);
            id += 1;
        }
        assert_eq!(hanging.in_all.count, MAX_IN_ALL);
    }
}
