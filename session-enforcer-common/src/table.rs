//! Layout of the session table: the slots that the session of a cookie can have.
//!
//! The kernel's hash map costs a packet several kernel function calls, while the verifier inlines an array lookup as a
//! few instructions. The table therefore consists of two arrays: *buckets* of [`WAYS`] tags, and the records, one for
//! each tag. A tag is the cookie of the session in the record, or 0 if the record is free.
//!
//! A cookie has two buckets. The first follows the order of the cookies, which the kernel counts up, so sockets created
//! one after another share cache lines. The second results from a hash with a random key. A session goes into the first
//! bucket if at least half of it is free, else into the emptier one. The buckets fill so evenly that both buckets of a
//! cookie are almost never full while the table has room: in a simulated table of 262,144 sessions that was always full
//! to the last slot, this happened to 4 of 20 million insertions (28 with two hashed buckets).

use crate::Session;

/// Tags in a bucket: two cache lines.
pub const WAYS: u32 = 16;

/// Consecutive cookies with the same first bucket. Fewer would share less of the cache; with 8 (half a bucket) more
/// insertions find both buckets full.
pub const IN_A_ROW: u32 = 4;

/// The tag of a record that a program is writing. No cookie has this value: the kernel counts cookies up from 1, and
/// some down from 2^64 - 1 (`gen_cookie_next` in `linux/cookie.h`).
pub const CLAIMED: u64 = 1 << 63;

/// 1 if the tag is that of a free slot, else 0. Computed with a borrow, because the compiler would turn a comparison
/// into a branch.
#[inline(always)]
pub const fn is_free(tag: u64) -> u32 {
    ((tag.wrapping_sub(1) & !tag) >> 63) as u32
}

/// The tags of one bucket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Bucket(pub [u64; WAYS as usize]);

/// Head of a session table, the only element of its map.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct TableHead {
    /// Number of sessions. Only the kernel programs change it.
    pub sessions: u64,
    /// Maximum number of sessions.
    pub capacity: u64,
    /// Key of the assignment of cookies to buckets.
    pub key: Key,
}

/// Random key of a table, so that nobody can choose sockets whose buckets are full.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(transparent)]
pub struct Key(pub u64);

impl Key {
    /// The two buckets of a cookie in a table of `buckets` buckets. They differ if the table has at least two.
    #[inline(always)]
    pub const fn buckets(self, cookie: u64, buckets: u32) -> [u32; 2] {
        let order = cookie.wrapping_add(self.0) / IN_A_ROW as u64;
        let first = match order.checked_rem(buckets as u64) {
            Some(first) => first as u32,
            None => 0,
        };
        // Two rounds of `SplitMix64` without the steps that only improve the lower bits.
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

/// Scales a 32-bit hash to the range `0..of`. A product is faster than a remainder.
#[inline(always)]
const fn share(hash: u32, of: u32) -> u32 {
    ((hash as u64 * of as u64) >> 32) as u32
}

/// Whether a session goes into its second bucket, by the free slots of both.
#[inline(always)]
pub const fn prefers_second(free_in_first: u32, free_in_second: u32) -> bool {
    free_in_first < WAYS / 2 && free_in_second > free_in_first
}

/// Number of buckets for a capacity of `sessions`: 1.3 slots for each session and one more bucket, since a few buckets
/// fill less evenly. The number is odd, so cookies in steps of a power of two reach all buckets.
pub const fn buckets_for(sessions: u32) -> u32 {
    let slots = (sessions as u64 * 13).div_ceil(10);
    // At most 2^32 * 1.3 / 16: fits in 32 bits.
    (slots.div_ceil(WAYS as u64) + 1) as u32 | 1
}

/// Operations of `table_ops` on the session of a cookie. All except `Read`, `Adopt` and `Update` apply only to the
/// session with the time of establishment in the request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum TableOp {
    /// Copies the record into the request.
    Read = 0,
    /// Inserts a session that is not in the table.
    Adopt = 1,
    /// Updates a session that is in the table.
    Update = 2,
    /// Removes the session.
    Remove = 3,
    /// Shuts the gate of the session, also for payload that is in the hook: see [`Session::SHUT`].
    Shut = 4,
    /// Reopens a gate that [`Shut`](Self::Shut) has shut.
    Reopen = 5,
    /// Gives the session the rule and the generation in the request.
    Decide = 6,
}

/// Answers of `table_ops`.
pub mod answer {
    /// The operation was done.
    pub const DONE: u32 = 1;
    /// The session does not exist.
    pub const MISSING: u32 = 2;
    /// The cookie already has a session.
    pub const PRESENT: u32 = 3;
    /// The table has no free slot for the session.
    pub const FULL: u32 = 4;
    /// The rule has reached its `max_sessions`.
    pub const RULE_FULL: u32 = 5;
}

/// Maximum number of requests in one run of `table_ops`.
pub const MAX_REQUESTS: u32 = 128;

/// A request of the daemon and its answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct TableRequest {
    /// The socket cookie of the session.
    pub cookie: u64,
    /// A [`TableOp`] as a number.
    pub op: u32,
    /// One of the constants in [`answer`].
    pub answer: u32,
    /// The record to write, or the record that was read.
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
    fn only_the_tag_0_is_free() {
        for tag in [1, 2, 1 << 32, CLAIMED - 1, CLAIMED, CLAIMED + 1, u64::MAX] {
            assert_eq!(is_free(tag), 0, "{tag}");
        }
        assert_eq!(is_free(0), 1);
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

    /// Computed by an independent program. A change of these values also changes [`LAYOUT`](crate::LAYOUT).
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

    /// Inserts cookies into their buckets; returns how many found both buckets full.
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
