//! Counters of the kernel programs. Each lies in a per-CPU map, which the daemon sums when its metrics are read.

/// Session counters of one rule.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct RuleCounters {
    /// Sessions that were established under the rule.
    pub opened: u64,
    /// Sessions of the rule whose close the kernel programs saw.
    pub closed: u64,
}

// SAFETY: integers only, no padding, any bit pattern is valid.
#[cfg(feature = "user")]
unsafe impl aya::Pod for RuleCounters {}

/// The hook that sees a packet. The number is the index in the map of dropped packets.
///
/// This is not the [`Direction`](crate::Direction) of a session, which says which side dialled; a session has packets
/// in both packet directions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum PacketDirection {
    /// To a socket of this host.
    Ingress = 0,
    /// From a socket of this host.
    Egress = 1,
}

impl PacketDirection {
    /// All packet directions, in the order of their numbers.
    pub const ALL: [Self; 2] = [Self::Ingress, Self::Egress];

    /// Number of packet directions, the size of the map.
    pub const COUNT: u32 = Self::ALL.len() as u32;

    /// The name in metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ingress => "ingress",
            Self::Egress => "egress",
        }
    }
}

/// Errors of the kernel programs. The number is the index in the error map.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum ErrorKind {
    /// The session table has no slot for a session of the rule, or both buckets of the cookie are full. The session is
    /// not tracked.
    MapFull = 0,
    /// The ring buffer was full; the event was lost.
    EventLost = 1,
    /// A packet's headers could not be parsed; activity is taken from the socket's counters.
    HeaderUnreadable = 2,
    /// A packet of a tracked session had no TCP socket, whose counters are needed.
    NoTcpSocket = 3,
    /// The kernel refused to enable the close callback; the end of the session will not be reported.
    CallbackRefused = 4,
    /// An element of a map could not be read.
    TableUnreadable = 5,
    /// The owner of a socket could not be stored; the daemon has to resolve it.
    OwnerNotKept = 6,
    /// The rule has reached its `max_sessions`. The session is not tracked.
    RuleFull = 7,
}

impl ErrorKind {
    /// Every kind, in the order of its number.
    pub const ALL: [Self; 8] = [
        Self::MapFull,
        Self::EventLost,
        Self::HeaderUnreadable,
        Self::NoTcpSocket,
        Self::CallbackRefused,
        Self::TableUnreadable,
        Self::OwnerNotKept,
        Self::RuleFull,
    ];

    /// Number of error kinds, the size of the error map.
    pub const COUNT: u32 = Self::ALL.len() as u32;

    /// The name in metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::MapFull => "map_full",
            Self::EventLost => "event_lost",
            Self::HeaderUnreadable => "header_unreadable",
            Self::NoTcpSocket => "no_tcp_socket",
            Self::CallbackRefused => "callback_refused",
            Self::TableUnreadable => "table_unreadable",
            Self::OwnerNotKept => "owner_not_kept",
            Self::RuleFull => "rule_full",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_names_in_metrics_are_fixed() {
        assert_eq!(
            PacketDirection::ALL.map(PacketDirection::name),
            ["ingress", "egress"]
        );
        let names = [
            "map_full",
            "event_lost",
            "header_unreadable",
            "no_tcp_socket",
            "callback_refused",
            "table_unreadable",
            "owner_not_kept",
            "rule_full",
        ];
        assert_eq!(ErrorKind::ALL.map(ErrorKind::name), names);
    }

    #[test]
    fn the_lists_are_in_the_order_of_their_numbers() {
        for (index, kind) in ErrorKind::ALL.iter().enumerate() {
            assert_eq!(*kind as usize, index);
        }
        for (index, way) in PacketDirection::ALL.iter().enumerate() {
            assert_eq!(*way as usize, index);
        }
    }
}
