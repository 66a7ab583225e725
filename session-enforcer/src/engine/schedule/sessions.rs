//! The sessions by cookie: each has a slot, a number by which other parts of the schedule know it.

use hashbrown::HashTable;

/// The sessions, in slots that are numbered from 0 without a gap: the session in the last slot
/// takes that of one that is removed. So no slot is empty, and memory can be given back.
///
/// The hash table holds the slots only, and compares cookies where they are.
#[derive(Debug, Default)]
pub(super) struct Sessions {
    slots: HashTable<u32>,
    cookies: Vec<u64>,
    /// By slot, the number of the group.
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

    /// Every session with the number of its group.
    pub(super) fn iter(&self) -> impl Iterator<Item = (u64, u32)> {
        let groups = self.groups.iter().copied();
        self.cookies.iter().copied().zip(groups)
    }

    /// Adds a session that there is not yet, in the slot that follows the last.
    pub(super) fn push(&mut self, cookie: u64, group: u32) {
        // The session map's capacity is an u32 too.
        let slot = self.cookies.len() as u32;
        self.refill();
        self.cookies.push(cookie);
        self.groups.push(group);
        let cookies = &self.cookies;
        let hash = |slot: &u32| mixed(cookies[*slot as usize]);
        self.slots.insert_unique(mixed(cookie), slot, hash);
    }

    /// Moves a session to another group; the number of the one that it leaves.
    pub(super) fn regroup(&mut self, slot: u32, group: u32) -> u32 {
        std::mem::replace(&mut self.groups[slot as usize], group)
    }

    /// Removes a session; its slot, which the session in the last slot has now, and its group.
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

    /// Fills the table anew where removals have used up its free buckets: one amid full ones is not
    /// free when it is left, and with none free the table would double. It may where nearly all are
    /// full, since the next filling would follow soon.
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

    /// For how many sessions there is memory.
    pub(super) fn capacity(&self) -> usize {
        self.cookies.capacity()
    }

    /// Gives back memory that was for many more sessions.
    pub(super) fn shrink_to(&mut self, capacity: usize) {
        self.cookies.shrink_to(capacity);
        self.groups.shrink_to(capacity);
        let cookies = &self.cookies;
        let hash = |slot: &u32| mixed(cookies[*slot as usize]);
        self.slots.shrink_to(capacity, hash);
    }
}

/// The hash of a cookie: the last step of `SplitMix64`, in which every bit of the cookie changes
/// half of the bits, since the table takes some from either end.
///
/// It needs no secret. The kernel counts the cookies up, so whoever makes connections can only
/// close those that do not suit: for each that is in the way of another, as many connections as
/// the table has buckets.
fn mixed(cookie: u64) -> u64 {
    let once = (cookie ^ (cookie >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let twice = (once ^ (once >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    twice ^ (twice >> 31)
}

#[cfg(test)]
impl Sessions {
    /// Bytes that table and vectors have for their elements.
    pub(super) fn allocated(&self) -> usize {
        self.slots.allocation_size() + 8 * self.cookies.capacity() + 4 * self.groups.capacity()
    }

    /// Checks that every session is found in its slot, and nothing else.
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
