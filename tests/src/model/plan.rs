//! The plan of a run. The same seed gives the same operations in the same order. Pure.

use std::time::Duration;

use session_enforcer_common::PacketDirection;

use super::book::{Book, End, PORTS};
use crate::random::Random;

/// The number of simultaneous connections.
pub(super) const SLOTS: usize = 120;

/// One operation on a connection.
#[derive(Clone, Copy, Debug)]
pub(super) struct Operation {
    /// The index of the connection.
    pub(super) slot: usize,
    /// The connection to open if the slot is empty.
    pub(super) opening: Opening,
    /// The action if the slot has a connection.
    pub(super) action: Act,
    /// The pause before the next operation.
    pub(super) pause: Duration,
}

/// A connection to open.
#[derive(Clone, Copy, Debug)]
pub(super) struct Opening {
    pub(super) port: usize,
    pub(super) inside: [bool; 2],
    /// Whether it connects two network namespaces instead of using loopback.
    pub(super) far: bool,
    pub(super) is_ipv4: bool,
}

/// An action at one end of a connection.
#[derive(Clone, Copy, Debug)]
pub(super) enum Act {
    Send(End, usize),
    Read(End),
    Finish(End),
    Close(End),
    Abort(End),
    /// The process keeps the socket locked for this time.
    Lock(End, Duration),
    /// An attacker who does not see the packets sends a segment with these sequence numbers that claims to be
    /// the peer's.
    Spoof(End, [u32; 2]),
    /// Another socket takes over the connection at the server's end (`TCP_REPAIR`). The client notices nothing.
    Restore,
}

impl Operation {
    pub(super) fn random(random: &mut Random) -> Self {
        Self {
            slot: slot(random),
            opening: Opening::random(random),
            action: Act::random(random),
            pause: Duration::from_millis(random.below(11)),
        }
    }
}

/// Half of the operations use a few connections, which stay alive. Most others expire.
fn slot(random: &mut Random) -> usize {
    let among = if random.once_in(2) { SLOTS / 6 } else { SLOTS };
    random.below(among as u64) as usize
}

impl Opening {
    fn random(random: &mut Random) -> Self {
        let inside = match random.below(20) {
            0 => [false, false],
            1..=8 => [false, true],
            9..=13 => [true, false],
            _ => [true, true],
        };
        Self {
            port: random.below(PORTS as u64) as usize,
            inside,
            far: random.once_in(3),
            is_ipv4: !random.once_in(3),
        }
    }
}

impl Act {
    fn random(random: &mut Random) -> Self {
        let end = random.one_of(&End::BOTH);
        if random.once_in(60) {
            return Self::Lock(end, Duration::from_millis(300 + random.below(1_200)));
        }
        if random.once_in(40) {
            return Self::Spoof(
                end,
                [random.below(1 << 32) as u32, random.below(1 << 32) as u32],
            );
        }
        if random.once_in(40) {
            return Self::Restore;
        }
        match random.below(100) {
            0..4 => Self::Finish(end),
            4..7 => Self::Close(end),
            7..9 => Self::Abort(end),
            9..24 => Self::Read(end),
            24..60 => Self::Send(end, 1 + random.below(99) as usize),
            _ => Self::Send(end, 100 + random.below(1_400) as usize),
        }
    }
}

/// A blow to the daemon.
#[derive(Clone, Debug)]
pub(super) enum Blow {
    /// The daemon is stopped for this time.
    Freeze(Duration),
    /// The daemon is killed while it runs or is stopped. The next one starts after this time, possibly with
    /// another policy.
    Kill {
        frozen: bool,
        down: Duration,
        next: Option<Book>,
    },
    /// The daemon is stopped normally. The next one starts after this time.
    Stop { down: Duration, next: Option<Book> },
    /// The policy changes. All reapers are killed this long after the signal to the daemon.
    Reload {
        book: Book,
        kill_after: Option<Duration>,
    },
    /// The new configuration is invalid.
    WrongReload,
    /// Reapers are killed this number of times. If the daemon was stopped before, they have much work then.
    KillReapers {
        which: Which,
        times: u64,
        pause: Duration,
        frozen: Option<Duration>,
    },
    /// Reapers are stopped and not continued.
    StopReapers(Which),
    /// Another program drops packets with more than a little payload for this time, after the daemon's
    /// programs.
    Drop(PacketDirection, Duration),
}

/// The reapers that a blow hits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Which {
    All,
    /// The one with this index, modulo their number.
    One(usize),
}

impl Which {
    fn random(random: &mut Random) -> Self {
        let place = random.below(64) as usize;
        if random.once_in(2) {
            Self::All
        } else {
            Self::One(place)
        }
    }

    pub(super) fn of<T: Copy>(self, all: &[T]) -> Vec<T> {
        match self {
            Self::One(place) if !all.is_empty() => vec![all[place % all.len()]],
            _ => all.to_vec(),
        }
    }
}

impl Blow {
    /// The blow with this number and the pause before it. The first blows are the same kinds in every run.
    pub(super) fn random(random: &mut Random, number: usize, book: &Book) -> (Duration, Self) {
        let mut ms = |from: u64, below: u64| Duration::from_millis(from + random.below(below));
        let (pause, long, down) = (ms(300, 1_200), ms(1_000, 2_000), ms(0, 2_000));
        let (times, pause_us) = (1 + random.below(8), random.below(3_000));
        let next = random.once_in(3).then(|| book.changed(random));
        let kind = match number {
            0 => 0,
            1 => 6,
            2 => 20,
            3 => 26,
            _ => random.below(34),
        };
        let blow = match kind {
            0..6 => Self::Freeze(long),
            6..11 => Self::Kill {
                frozen: random.once_in(3),
                down,
                next,
            },
            11..13 => Self::Stop { down, next },
            13..18 => Self::Reload {
                book: book.changed(random),
                kill_after: random
                    .once_in(2)
                    .then(|| Duration::from_micros(random.below(8_000))),
            },
            18..20 => Self::WrongReload,
            20..26 => Self::KillReapers {
                which: Which::random(random),
                times,
                pause: Duration::from_micros(pause_us),
                frozen: random.once_in(2).then_some(long),
            },
            26..30 => Self::StopReapers(Which::random(random)),
            _ => Self::Drop(random.one_of(&PacketDirection::ALL), pause / 3),
        };
        (pause, blow)
    }
}
