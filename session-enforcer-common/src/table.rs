//! The session table: where the session of a cookie lies.
//!
//! The kernel's hash map costs a packet several calls of kernel functions. The look-up in an array is a
//! handful of instructions, which the verifier puts into the program. So the table is made of two
//! arrays: *buckets* of [`WAYS`] tags, and the records, one for each tag. A tag is the cookie of the
//! session whose record it stands for, 0 where the record is free.
//!
//! A cookie has two buckets. The first follows the order of the cookies, which the kernel counts up, so
//! that sockets that are made one after the other share the memory that the processor has at hand. The
//! second comes of a hash with a random key. A session is put into the first while that is half empty at
//! least, else into the emptier of both. That keeps them so evenly filled that while the table has room
//! nobody finds both full: in a table of 262,144 sessions that was always full to the last slot, 4 of
//! 20 million insertions did, by simulation; 28 with two buckets by hash.

use crate::Session;

/// Tags in a bucket: two cache lines.
pub const WAYS: u32 = 16;

/// Cookies that follow each other and have the same first bucket. Fewer would share less; with half a
/// bucket more insertions find both buckets full.
pub const IN_A_ROW: u32 = 4;

/// The tag of a record that a program writes at this moment. The kernel counts cookies up from 1, and some
/// down from 2^64 - 1 (`gen_cookie_next` in `linux/cookie.h`): none of them comes here.
pub const CLAIMED: u64 = 1 << 63;

/// 1 where two tags are the same, else 0. By a carry and not by a comparison, of which the compiler would
/// make a branch.
#[inline(always)]
pub const fn is_same(tag: u64, other: u64) -> u32 {
    let difference = tag ^ other;
    let differs = (difference & !CLAIMED).wrapping_add(!CLAIMED) | difference;
    (differs >> 63) as u32 ^ 1
}

/// The tags of one bucket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Bucket(pub [u64; WAYS as usize]);

/// What a table needs to know of itself, the only element of a map of its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct TableHead {
    /// Sessions in the table. Only the kernel programs change it.
    pub sessions: u64,
    /// Sessions that it may have.
    pub capacity: u64,
    /// Where cookies lie in this table.
    pub key: Key,
}

/// Chosen at random when the table is made, so that nobody can choose sockets whose sessions find
/// their buckets full.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(transparent)]
pub struct Key(pub u64);

impl Key {
    /// The two buckets, of so many, in which the session of a cookie can be. They differ where there
    /// are two.
    #[inline(always)]
    pub const fn buckets(self, cookie: u64, buckets: u32) -> [u32; 2] {
        let order = cookie.wrapping_add(self.0) / IN_A_ROW as u64;
        let first = match order.checked_rem(buckets as u64) {
            Some(first) => first as u32,
            None => 0,
        };
        // Two rounds of `SplitMix64` without what only improves the lower bits.
        let hash = (cookie ^ self.0).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let hash = (hash ^ (hash >> 32)).wrapping_mul(0x94d0_49bb_1331_11eb);
        let distance = share((hash >> 16) as u32, buckets.saturating_sub(1)) + 1;
        let second = first + distance;
        if second < buckets {
            [first, second]
        } else {
            [first, second.saturating_sub(buckets)]
        }
    }
}

/// So many `of` as the hash is of all hashes: by a product, which is faster than a remainder.
#[inline(always)]
const fn share(hash: u32, of: u32) -> u32 {
    ((hash as u64 * of as u64) >> 32) as u32
}

/// Whether a session is put into the second of its buckets, by the slots that are free in both.
#[inline(always)]
pub const fn prefers_second(free_in_first: u32, free_in_second: u32) -> bool {
    free_in_first < WAYS / 2 && free_in_second > free_in_first
}

/// Buckets of a table that is to hold so many sessions: 1.3 slots for each, and a bucket more, since
/// the few of a small table are less evenly filled. Their number is odd: what comes in steps of a power
/// of two comes to all of them.
pub const fn buckets_for(sessions: u32) -> u32 {
    let slots = (sessions as u64 * 13).div_ceil(10);
    // At most 2^32 * 1.3 / 16: no cut.
    (slots.div_ceil(WAYS as u64) + 1) as u32 | 1
}

/// What the daemon asks of a program about the session of a cookie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum TableOp {
    /// A copy of the record.
    Read = 0,
    /// To put in a session that is not there.
    Adopt = 1,
    /// To write a session that is there.
    Update = 2,
    /// To take it out, where it is the one that was established at the time in the record.
    Remove = 3,
    /// To shut the gate of the session that was established at that time, to payload that is on its way
    /// too: see [`Session::SHUT`].
    Shut = 4,
    /// To undo that.
    Reopen = 5,
    /// To give the session that was established at that time the rule and the generation in the record.
    Decide = 6,
}

/// What a program answers.
pub mod answer {
    /// It is done.
    pub const DONE: u32 = 1;
    /// There is no such session.
    pub const MISSING: u32 = 2;
    /// There is such a session.
    pub const PRESENT: u32 = 3;
    /// There is no room.
    pub const FULL: u32 = 4;
    /// The sessions of the rule have as many slots as it allows them.
    pub const RULE_FULL: u32 = 5;
}

/// Requests that a program answers at a time.
pub const MAX_REQUESTS: u32 = 128;

/// A request of the daemon's, and the answer to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct TableRequest {
    /// Whose session.
    pub cookie: u64,
    /// [`TableOp`] as a number.
    pub op: u32,
    /// One of [`answer`].
    pub answer: u32,
    /// What is to be written, or was read.
    pub session: Session,
}

const _: () = {
    assert!(size_of::<Bucket>() == 128 && align_of::<Bucket>() == 8);
    assert!(size_of::<TableHead>() == 24 && align_of::<TableHead>() == 8);
    assert!(size_of::<TableRequest>() == 184 && align_of::<TableRequest>() == 8);
};

#[cfg(feature = "user")]
mod pod {
    // SAFETY: integers only, no padding (the sizes are asserted above), any bit pattern is valid.
    unsafe impl aya::Pod for super::Bucket {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::TableHead {}
    // SAFETY: as above; its size is that of its array.
    unsafe impl aya::Pod for super::Key {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::TableRequest {}
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEYS: [Key; 5] = [
        Key(0),
        Key(1),
        Key(0x9e37_79b9_7f4a_7c15),
        Key(0x0123_4567_89ab_cdef),
        Key(u64::MAX),
    ];

    #[test]
    fn a_tag_is_the_same_as_itself_alone() {
        let tags = [
            0,
            1,
            2,
            1 << 32,
            CLAIMED - 1,
            CLAIMED,
            CLAIMED + 1,
            u64::MAX,
        ];
        for tag in tags {
            for other in tags {
                assert_eq!(
                    is_same(tag, other),
                    u32::from(tag == other),
                    "{tag} {other}"
                );
            }
        }
    }

    #[test]
    fn a_cookie_has_two_buckets_of_those_there_are() {
        for buckets in [2, 3, 16, 1_000, 21_301, buckets_for(u32::MAX)] {
            for cookie in (1..200_000).step_by(37).chain([u64::MAX - 1]) {
                for key in KEYS {
                    let [first, second] = key.buckets(cookie, buckets);
                    assert!(first < buckets && second < buckets && first != second);
                }
            }
        }
        assert_eq!(KEYS[2].buckets(7, 1), [0, 0]);
    }

    /// Worked out by another program. Where this changes, [`LAYOUT`](crate::LAYOUT) does.
    #[test]
    fn a_cookie_lies_where_it_did_in_the_version_before() {
        for ((key, cookie, buckets), expected) in [
            ((0x0, 1, 3), [0, 2]),
            ((0x123456789abcdef, 7, 60_000), [21_725, 24_670]),
            ((0x123456789abcdef, 8, 60_000), [21_725, 5_562]),
            ((0x9e3779b97f4a7c15, 262_144, 21_301), [7_442, 14_955]),
            ((u64::MAX, 1 << 40, 4_294_967_281), [959, 2_592_213_679]),
            ((0x5, u64::MAX - 1, 16), [0, 8]),
        ] {
            assert_eq!(Key(key).buckets(cookie, buckets), expected, "{cookie}");
        }
    }

    #[test]
    fn sockets_made_one_after_the_other_share_their_first_bucket() {
        for key in KEYS {
            let firsts = (1..=400).map(|cookie| key.buckets(cookie, 60_000)[0]);
            let firsts: std::collections::HashSet<u32> = firsts.collect();
            assert!((100..=101).contains(&firsts.len()), "{}", firsts.len());
            let seconds = (1..=400).map(|cookie| key.buckets(cookie, 60_000)[1]);
            let seconds: std::collections::HashSet<u32> = seconds.collect();
            assert!(seconds.len() > 380, "{}", seconds.len());
        }
    }

    #[test]
    fn the_first_bucket_is_chosen_until_it_is_more_than_half_full() {
        assert!(!prefers_second(WAYS, WAYS) && !prefers_second(WAYS / 2, WAYS));
        assert!(prefers_second(WAYS / 2 - 1, WAYS) && prefers_second(0, 1));
        assert!(!prefers_second(3, 3) && !prefers_second(3, 2) && !prefers_second(0, 0));
    }

    #[test]
    fn there_is_room_for_all_and_not_for_many_more() {
        for sessions in [1, 16, 100, 262_144, u32::MAX] {
            let slots = u64::from(buckets_for(sessions)) * u64::from(WAYS);
            assert!(slots * 10 >= u64::from(sessions) * 13);
            assert!(slots * 10 <= u64::from(sessions) * 13 + 3 * 10 * u64::from(WAYS));
            assert_eq!(buckets_for(sessions) % 2, 1);
        }
    }

    #[test]
    fn a_table_has_a_bucket_more_than_its_slots_take_and_an_odd_number() {
        let buckets = [1, 16, 100, 262_144].map(buckets_for);
        assert_eq!(buckets, [3, 3, 11, 21_301]);
    }

    /// Puts cookies into their buckets; how many found both full.
    fn refused(key: Key, cookies: impl Iterator<Item = u64>, sessions: u32) -> usize {
        let buckets = buckets_for(sessions);
        let mut filled = vec![0; buckets as usize];
        let mut refused = 0;
        for cookie in cookies {
            let [first, second] = key.buckets(cookie, buckets).map(|n| n as usize);
            let free = |bucket: usize| WAYS - filled[bucket];
            let chosen = if prefers_second(free(first), free(second)) {
                second
            } else {
                first
            };
            if filled[chosen] == WAYS {
                refused += 1;
            } else {
                filled[chosen] += 1;
            }
        }
        refused
    }

    #[test]
    fn a_full_table_has_taken_all() {
        for sessions in [1, 12, 100, 1_024, 20_000, 262_144] {
            for step in [1, 2, 3, 4_096] {
                for key in KEYS {
                    let cookies = (1_u64..).step_by(step).take(sessions as usize);
                    let refused = refused(key, cookies, sessions);
                    assert_eq!(refused, 0, "{sessions} by {step} with {key:x?}");
                }
            }
        }
    }
}
