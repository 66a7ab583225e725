//! The session table's order of memory accesses, as a model that `loom` checks over all interleavings, and over all
//! values that a read may give on a weakly ordered processor.
//!
//! What the programs do with words (`session-enforcer-ebpf`, `table.rs`, `activity.rs`, `gate.rs`) is written again
//! here: a mere read or write is relaxed; an exchange, where it succeeds, and `words::order` are full barriers. Each
//! test whose name ends in `unordered` leaves out an `order` and has to fail.

use std::array;

use loom::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed, Ordering::SeqCst, fence},
    },
    thread,
};
use session_enforcer_common::{Session, table::CLAIMED};

/// Two sessions, each by its cookie.
const FIRST: u64 = 3;
const SECOND: u64 = 7;

/// Whether `words::order` is a barrier.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Order {
    Full,
    Missing,
}

impl Order {
    fn order(self) {
        if self == Self::Full {
            fence(SeqCst);
        }
    }
}

/// An exchange is a full barrier where it succeeds, and none where it fails.
fn exchange(word: &AtomicU64, before: u64, after: u64) -> bool {
    fence(SeqCst);
    let succeeds = word
        .compare_exchange(before, after, Relaxed, Relaxed)
        .is_ok();
    if succeeds {
        fence(SeqCst);
    }
    succeeds
}

fn swap(word: &AtomicU64, after: u64) {
    fence(SeqCst);
    word.swap(after, Relaxed);
    fence(SeqCst);
}

/// A record, as far as it matters. The order of the words is that of [`Session`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Record {
    open_until_ns: u64,
    established_ns: u64,
}

impl Record {
    /// Of a session: nothing else tells whose it is.
    const fn of(cookie: u64, established_ns: u64) -> Self {
        Self {
            open_until_ns: cookie * 100,
            established_ns,
        }
    }
}

/// A slot of the table.
struct Slot {
    tag: AtomicU64,
    open_until_ns: AtomicU64,
    established_ns: AtomicU64,
    order: Order,
}

impl Slot {
    fn new(tag: u64, record: Record, order: Order) -> Arc<Self> {
        Arc::new(Self {
            tag: AtomicU64::new(tag),
            open_until_ns: AtomicU64::new(record.open_until_ns),
            established_ns: AtomicU64::new(record.established_ns),
            order,
        })
    }

    /// `slots::put_once`
    fn put(&self, cookie: u64, record: Record) -> bool {
        if !exchange(&self.tag, 0, CLAIMED) {
            return false;
        }
        self.open_until_ns.store(record.open_until_ns, Relaxed);
        self.established_ns.store(record.established_ns, Relaxed);
        swap(&self.tag, cookie);
        true
    }

    /// `slots::clear`
    fn clear(&self, cookie: u64) {
        if exchange(&self.tag, cookie, CLAIMED) {
            swap(&self.tag, 0);
        }
    }

    /// `slots::is_at`
    fn is_at(&self, cookie: u64) -> bool {
        self.tag.load(Relaxed) == cookie
    }

    /// `slots::find`, `slots::slot_or_none`
    fn find(&self, cookie: u64) -> bool {
        let is_found = self.is_at(cookie);
        self.order.order();
        is_found
    }

    /// `words::copy`, in any order.
    fn copy(&self) -> Record {
        Record {
            established_ns: self.established_ns.load(Relaxed),
            open_until_ns: self.open_until_ns.load(Relaxed),
        }
    }

    /// The end of `slots::read_whole`, and of `SessionReader::session`.
    fn read(&self, cookie: u64, found: Order) -> Option<Record> {
        let is_found = self.is_at(cookie);
        found.order();
        let copy = self.copy();
        self.order.order();
        (is_found && self.is_at(cookie)).then_some(copy)
    }

    /// `slots::set_gate`
    fn shut(&self, cookie: u64, established_ns: u64, tag_first: bool) {
        let is_meant = || self.established_ns.load(Relaxed) == established_ns;
        if !self.find(cookie) || !is_meant() {
            return;
        }
        swap(&self.open_until_ns, Session::SHUT);
        let is_there = !tag_first || self.is_at(cookie);
        self.order.order();
        if !is_there || !is_meant() {
            exchange(&self.open_until_ns, Session::SHUT, 0);
        }
    }
}

fn found_record_is_whole(order: Order) {
    loom::model(move || {
        let slot = Slot::new(0, Record::of(FIRST, FIRST), order);
        let program = Arc::clone(&slot);
        let other = thread::spawn(move || program.put(SECOND, Record::of(SECOND, SECOND)));
        if slot.find(SECOND) {
            assert_eq!(slot.copy(), Record::of(SECOND, SECOND));
        }
        assert!(other.join().expect("it does not panic"));
    });
}

#[test]
fn a_found_tag_shows_the_complete_record() {
    found_record_is_whole(Order::Full);
}

#[test]
#[should_panic(expected = "assertion")]
fn a_found_tag_shows_the_complete_record_unordered() {
    found_record_is_whole(Order::Missing);
}

fn copy_is_of_the_session(order: Order) {
    loom::model(move || {
        let slot = Slot::new(FIRST, Record::of(FIRST, FIRST), order);
        let program = Arc::clone(&slot);
        let other = thread::spawn(move || {
            program.clear(FIRST);
            program.put(SECOND, Record::of(SECOND, SECOND))
        });
        if let Some(copy) = slot.read(FIRST, Order::Full) {
            assert_eq!(copy, Record::of(FIRST, FIRST));
        }
        assert!(other.join().expect("it does not panic"));
    });
}

#[test]
fn a_copy_that_is_followed_by_the_tag_is_of_the_session() {
    copy_is_of_the_session(Order::Full);
}

#[test]
#[should_panic(expected = "assertion")]
fn a_copy_that_is_followed_by_the_tag_is_of_the_session_unordered() {
    copy_is_of_the_session(Order::Missing);
}

/// The slot of a session whose gate is shut meanwhile becomes that of another, or of the same socket that was
/// connected again.
fn gate_of_another_stays_open(order: Order, cookie: u64, tag_first: bool) {
    loom::model(move || {
        let slot = Slot::new(FIRST, Record::of(FIRST, FIRST), order);
        let next = Record::of(cookie, SECOND);
        let program = Arc::clone(&slot);
        let other = thread::spawn(move || {
            program.clear(FIRST);
            program.put(cookie, next)
        });
        slot.shut(FIRST, FIRST, tag_first);
        assert!(other.join().expect("it does not panic"));
        assert_ne!(slot.copy().open_until_ns, Session::SHUT);
    });
}

#[test]
fn the_gate_of_another_session_stays_open() {
    gate_of_another_stays_open(Order::Full, SECOND, true);
    gate_of_another_stays_open(Order::Full, FIRST, true);
}

#[test]
#[should_panic(expected = "assertion")]
fn the_gate_of_another_session_stays_open_unordered() {
    gate_of_another_stays_open(Order::Missing, FIRST, true);
}

#[test]
#[should_panic(expected = "assertion")]
fn the_time_of_establishment_alone_does_not_tell_whose_gate_was_shut() {
    gate_of_another_stays_open(Order::Full, SECOND, false);
}

#[test]
fn a_slot_is_given_to_one() {
    loom::model(|| {
        let slot = Slot::new(0, Record::of(1, 1), Order::Full);
        let program = Arc::clone(&slot);
        let other = thread::spawn(move || program.put(FIRST, Record::of(FIRST, FIRST)));
        let is_seconds = slot.put(SECOND, Record::of(SECOND, SECOND));
        assert_ne!(other.join().expect("it does not panic"), is_seconds);
        let cookie = if is_seconds { SECOND } else { FIRST };
        assert!(slot.is_at(cookie));
        assert_eq!(slot.copy(), Record::of(cookie, cookie));
    });
}

/// Words of one record that packets write one after the other.
fn words<const N: usize>() -> Arc<[AtomicU64; N]> {
    Arc::new(array::from_fn(|_| AtomicU64::new(0)))
}

/// `activity::store_sent_candidate` and `activity::has_sent`: a reader of the time also sees the end.
/// `activity::confirm_received` and `slots::read_whole` are of the same kind: a reader of the count also sees the stamp.
fn second_word_comes_with_the_first(order: Order) {
    loom::model(move || {
        let session = words::<2>();
        let packet = Arc::clone(&session);
        let other = thread::spawn(move || {
            packet[0].store(1, Relaxed);
            order.order();
            packet[1].store(1, Relaxed);
        });
        let has_second = session[1].load(Relaxed) == 1;
        order.order();
        assert!(!has_second || session[0].load(Relaxed) == 1);
        other.join().expect("it does not panic");
    });
}

#[test]
fn a_time_is_seen_with_the_end_that_it_belongs_to() {
    second_word_comes_with_the_first(Order::Full);
}

#[test]
#[should_panic(expected = "assertion")]
fn a_time_is_seen_with_the_end_that_it_belongs_to_unordered() {
    second_word_comes_with_the_first(Order::Missing);
}

/// A packet counts, stamp first; `slots::read_whole` takes a copy that it reads twice.
fn copy_is_of_one_moment(order: Order) {
    loom::model(move || {
        let session = words::<2>();
        let packet = Arc::clone(&session);
        let other = thread::spawn(move || {
            packet[1].store(1, Relaxed);
            order.order();
            packet[0].store(1, Relaxed);
        });
        let copy = || [0, 1].map(|word| session[word].load(Relaxed));
        let first = copy();
        order.order();
        if first == copy() {
            assert_ne!(first, [1, 0], "the count without the stamp");
        }
        other.join().expect("it does not panic");
    });
}

#[test]
fn a_copy_that_was_read_twice_has_no_count_without_its_stamp() {
    copy_is_of_one_moment(Order::Full);
}

#[test]
#[should_panic(expected = "the count without the stamp")]
fn a_copy_that_was_read_twice_has_no_count_without_its_stamp_unordered() {
    copy_is_of_one_moment(Order::Missing);
}

/// `gate::is_shut_meanwhile`. Where `order` is missing there is `STAMP_VISIBLE`, as on x86-64.
fn packet_is_stamped_or_dropped(order: Order) {
    loom::model(move || {
        let session = words::<2>();
        let packet = Arc::clone(&session);
        let other = thread::spawn(move || {
            packet[0].store(1, Relaxed);
            order.order();
            packet[1].load(Relaxed) == Session::SHUT
        });
        swap(&session[1], Session::SHUT);
        let is_stamped = session[0].load(Relaxed) == 1;
        let is_dropped = other.join().expect("it does not panic");
        assert!(is_stamped || is_dropped);
    });
}

#[test]
fn a_packet_is_in_the_record_or_does_not_pass() {
    packet_is_stamped_or_dropped(Order::Full);
}

#[test]
#[should_panic(expected = "assertion")]
fn a_packet_is_in_the_record_or_does_not_pass_unordered() {
    packet_is_stamped_or_dropped(Order::Missing);
}
