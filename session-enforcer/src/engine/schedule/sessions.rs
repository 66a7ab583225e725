//! The sessions by cookie. Each has a slot, the number by which the other parts of the schedule identify it.

use hashbrown::HashTable;

/// The sessions, in slots numbered from 0 without gaps. If a session is removed, the session in the last slot takes its
/// slot. So no slot is empty, and memory can be released.
///
/// The hash table holds only slots; cookies are compared in `cookies`.
#[derive(Debug, Default)]
pub(super) struct Sessions {
    slots: HashTable<u32>,
    cookies: Vec<u64>,
    /// Group number by slot.
    groups: Vec<u32>,
}

impl Sessions {
    /// Number of sessions.
    pub(super) fn len(&self) -> usize {
        self.cookies.len()
    }

    /// The slot of a session.
    pub(super) fn slot(&self, cookie: u64) -> Option<u32> {
        let is_it = |slot: &u32| self.cookies[*slot as usize] == cookie;
        self.slots.find(mixed(cookie), is_it).copied()
    }

    /// The session in a slot.
    pub(super) fn cookie(&self, slot: u32) -> u64 {
        self.cookies[slot as usize]
    }

    /// The number of a session's group.
    pub(super) fn group(&self, slot: u32) -> u32 {
        self.groups[slot as usize]
    }

    /// All sessions with their group numbers.
    pub(super) fn iter(&self) -> impl Iterator<Item = (u64, u32)> {
        let groups = self.groups.iter().copied();
        self.cookies.iter().copied().zip(groups)
    }

    /// Adds a session that is not scheduled yet, in the slot after the last.
    pub(super) fn push(&mut self, cookie: u64, group: u32) {
        // The capacity of the session table is a u32 too.
        let slot = self.cookies.len() as u32;
        self.refill();
        self.cookies.push(cookie);
        self.groups.push(group);
        let cookies = &self.cookies;
        let hash = |slot: &u32| mixed(cookies[*slot as usize]);
        self.slots.insert_unique(mixed(cookie), slot, hash);
    }

    /// Moves a session to another group; returns the number of its previous group.
    pub(super) fn regroup(&mut self, slot: u32, group: u32) -> u32 {
        std::mem::replace(&mut self.groups[slot as usize], group)
    }

    /// Removes a session. Returns its slot, which the session of the last slot now has, and its group number.
    pub(super) fn swap_remove(&mut self, cookie: u64) -> Option<(u32, u32)> {
        let Self {
            slots,
            cookies,
            groups,
        } = self;
        let is_it = |slot: &u32| cookies[*slot as usize] == cookie;
        let (slot, _) = slots.find_entry(mixed(cookie), is_it).ok()?.remove();
        let last = cookies.len() as u32 - 1;
        if let Some(moved) = slots.find_mut(mixed(cookies[last as usize]), |s| *s == last) {
            *moved = slot;
        }
        cookies.swap_remove(slot as usize);
        Some((slot, groups.swap_remove(slot as usize)))
    }

    /// Rebuilds the table if removals have used up its free buckets. A bucket that is freed between full ones stays
    /// marked as used, and without free buckets the table would double. It is allowed to double if nearly all buckets
    /// are really full, because the next rebuild would follow soon.
    fn refill(&mut self) {
        let Self { slots, cookies, .. } = self;
        let buckets = slots.num_buckets();
        let left = (buckets / 8 * 7).saturating_sub(slots.len());
        if slots.len() == slots.capacity() && left > buckets / 16 {
            slots.clear();
            let hash = |slot: &u32| mixed(cookies[*slot as usize]);
            for slot in 0..cookies.len() as u32 {
                slots.insert_unique(hash(&slot), slot, hash);
            }
        }
    }

    /// Number of sessions for which memory is allocated.
    pub(super) fn capacity(&self) -> usize {
        self.cookies.capacity()
    }

    /// Releases memory beyond `capacity` sessions.
    pub(super) fn shrink_to(&mut self, capacity: usize) {
        self.cookies.shrink_to(capacity);
        self.groups.shrink_to(capacity);
        let cookies = &self.cookies;
        let hash = |slot: &u32| mixed(cookies[*slot as usize]);
        self.slots.shrink_to(capacity, hash);
    }
}

/// The hash of a cookie: the finalizer of `SplitMix64`. Each bit of the cookie changes half of the hash bits; the table
/// uses bits of both ends.
///
/// No secret is needed. The kernel counts cookies up, so an attacker can only open many connections and close those
/// with unsuitable cookies. Each collision then costs as many connections as the table has buckets.
fn mixed(cookie: u64) -> u64 {
    let once = (cookie ^ (cookie >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let twice = (once ^ (once >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    twice ^ (twice >> 31)
}

#[cfg(test)]
impl Sessions {
    /// Allocated bytes of table and vectors.
    pub(super) fn allocated(&self) -> usize {
        self.slots.allocation_size() + 8 * self.cookies.capacity() + 4 * self.groups.capacity()
    }

    /// Checks that the table finds exactly the sessions, each in its slot.
    pub(super) fn assert_sound(&self) {
        assert_eq!(self.slots.len(), self.cookies.len());
        assert_eq!(self.groups.len(), self.cookies.len());
        for (slot, cookie) in self.cookies.iter().enumerate() {
            assert_eq!(self.slot(*cookie), Some(slot as u32));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_session_in_the_last_slot_takes_that_of_one_that_is_removed() {
        let mut sessions = Sessions::default();
        for cookie in 10..14 {
            sessions.push(cookie, cookie as u32 + 100);
        }
        assert_eq!(sessions.swap_remove(11), Some((1, 111)));
        assert_eq!(sessions.swap_remove(11), None);
        sessions.assert_sound();
        assert_eq!(sessions.slot(13), Some(1));
        assert_eq!((sessions.cookie(1), sessions.group(1)), (13, 113));
        assert_eq!(sessions.swap_remove(12), Some((2, 112)));
        sessions.assert_sound();
        assert!(sessions.iter().eq([(10, 110), (13, 113)]));
    }

    #[test]
    fn cookies_that_follow_one_another_share_no_bits_of_their_hashes() {
        let buckets = |shift: u32| {
            let mut seen = [0; 128];
            (0..12_800).for_each(|cookie| seen[(mixed(cookie) >> shift) as usize % 128] += 1);
            seen
        };
        for count in [buckets(0), buckets(57)].concat() {
            assert!((50..150).contains(&count), "{count}");
        }
    }

    #[test]
    fn a_table_from_which_sessions_come_and_go_stays_as_large_as_it_was() {
        for count in [40_000, 60_000, 100_000] {
            let mut sessions = Sessions::default();
            (0..count).for_each(|cookie| sessions.push(cookie, 0));
            let allocated = sessions.allocated();
            for cookie in 0..200_000 {
                sessions.swap_remove(cookie);
                sessions.push(cookie + count, 0);
            }
            assert_eq!(sessions.allocated(), allocated, "{count}");
            sessions.assert_sound();
        }
    }
}
