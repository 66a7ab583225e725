//! The version of the records in the maps that outlive a daemon.

use core::mem::offset_of;

use crate::{
    Ancestors, JournalEntry, Owner, Session, Table,
    table::{Bucket, CLAIMED, Key, TableHead, buckets_for},
};

/// Must be raised if a field of a record below changes its meaning but keeps its name and offset.
const MEANING: u32 = 4;

/// The name under which a field is hashed. A field that was renamed without another change keeps its first name here, so
/// that the sessions of the version before continue.
macro_rules! hashed_name {
    ($field:ident) => {
        stringify!($field)
    };
    ($field:ident $first:literal) => {
        $first
    };
}

/// Extends a hash with a record's name, fields and size. Omitting a field is a compile error.
macro_rules! layout {
    ($hash:expr, $record:ident { $($field:ident $(was $first:literal)?),* $(,)? }) => {{
        const _: fn(&$record) = |record| { let $record { $($field: _),* } = record; };
        let hash = text($hash, stringify!($record));
        $(let hash = number(text(hash, hashed_name!($field $($first)?)), offset_of!($record, $field));)*
        number(hash, size_of::<$record>())
    }};
}

/// Identifies the layout of the records in pinned maps. It changes if a field is added, moved or resized, or renamed
/// without its first name. A daemon only reads records of its own layout.
pub const LAYOUT: u32 = {
    let hash = number(0x811c_9dc5, MEANING as usize);
    let hash = layout!(
        hash,
        Session {
            last_received_ns,
            last_sent_ns,
            answered_ns,
            bytes_received,
            bytes_sent,
            received_candidate_ns was "came_ns",
            sent_candidate_ns was "went_ns",
            open_until_ns,
            established_ns,
            netns_cookie,
            local,
            remote,
            local_port,
            remote_port,
            ifindex,
            generation,
            rule,
            direction,
            flags,
            owner,
            data_segments_sent,
            half_closed_ns,
            sent_before_answer,
            sent_candidate_completes_answer was "went_is_answer",
            sent_candidate_end was "went_until",
        }
    );
    let hash = layout!(
        hash,
        Owner {
            cgroup_id,
            uid,
            unused
        }
    );
    let hash = number(hash, size_of::<Ancestors>());
    let hash = number(hash, size_of::<Bucket>());
    let hash = layout!(
        hash,
        TableHead {
            sessions,
            capacity,
            key
        }
    );
    // The assignment of cookies to buckets is part of the layout.
    let hash = number(hash, buckets_for(1_000) as usize);
    let hash = number(hash, (CLAIMED >> 48) as usize);
    let hash = places(hash, Key(0x0123_4567_89ab_cdef));
    let hash = layout!(
        hash,
        JournalEntry {
            session,
            cookie,
            deadline_ns,
            reached_ns,
            limit_ns,
            idle_since_ns,
            answered_ns,
            is_used,
            reason,
            was_gone,
            rule,
        }
    );
    layout!(
        hash,
        Table {
            generation,
            entries,
            share,
            reserve,
        }
    )
};

/// Hashes the buckets of the cookies 1 to 64.
const fn places(mut hash: u32, key: Key) -> u32 {
    let mut cookie = 1;
    while cookie <= 64 {
        let [first, second] = key.buckets(cookie, 60_000);
        hash = number(number(hash, first as usize), second as usize);
        cookie += 1;
    }
    hash
}

/// One step of FNV-1a.
const fn byte(hash: u32, byte: u8) -> u32 {
    (hash ^ byte as u32).wrapping_mul(0x0100_0193)
}

const fn text(mut hash: u32, text: &str) -> u32 {
    let bytes = text.as_bytes();
    let mut at = 0;
    while at < bytes.len() {
        hash = byte(hash, bytes[at]);
        at += 1;
    }
    // Terminates a name, so different lists of names never hash the same text.
    byte(hash, 0)
}

const fn number(hash: u32, number: usize) -> u32 {
    // Two bytes suffice: no record is larger than 64 KiB.
    let [low, high, ..] = (number as u32).to_le_bytes();
    byte(byte(hash, low), high)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A daemon continues the sessions of the version before if this number is the same. A change of a record changes
    /// the number here too.
    #[test]
    fn the_records_are_those_of_the_version_before() {
        assert_eq!(LAYOUT, 0xc0e6_4029);
    }

    /// Those test vectors of 32-bit FNV-1a that these functions accept.
    #[test]
    fn the_hash_is_fnv() {
        const BEGINNING: u32 = 0x811c_9dc5;
        assert_eq!(byte(BEGINNING, b'a'), 0xe40c_292c);
        let foobar = b"foobar".iter().fold(BEGINNING, |hash, b| byte(hash, *b));
        assert_eq!(foobar, 0xbf9c_f968);
        assert_eq!(text(BEGINNING, "foobar"), byte(foobar, 0));
        // A number is hashed as its lower two bytes, in little-endian order.
        let both = byte(byte(BEGINNING, b'f'), b'o');
        assert_eq!(number(BEGINNING, 0x1_6f66), both);
    }

    #[test]
    fn the_layout_covers_the_buckets_of_cookies() {
        let key = Key(7);
        let lie = (1..=64).flat_map(|cookie| key.buckets(cookie, 60_000));
        let hash = lie.fold(5, |hash, bucket| number(hash, bucket as usize));
        assert_eq!(places(5, key), hash);
    }

    #[test]
    fn names_and_places_make_the_hash() {
        let of = |name, offset| number(text(7, name), offset);
        assert_ne!(of("a", 0), of("b", 0));
        assert_ne!(of("a", 0), of("a", 8));
        assert_ne!(text(text(7, "ab"), "c"), text(text(7, "a"), "bc"));
    }
}
