//! What the kernel programs count, each in a per-CPU map that the daemon sums when it is scraped.

/// Sessions of one rule.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct RuleCounters {
    /// Sessions that were established under the rule.
    pub opened: u64,
    /// Sessions of the rule that the kernel saw end.
    pub closed: u64,
}

// SAFETY: integers only, no padding, any bit pattern is valid.
#[cfg(feature = "user")]
unsafe impl aya::Pod for RuleCounters {}

/// Which hook sees a packet. The number is the index in the map of the packets that the gate dropped.
///
/// Not a [`Direction`](crate::Direction), which says who dialled: packets of a session pass both ways.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum PacketDirection {
    /// To a socket of this host.
    Ingress = 0,
    /// From a socket of this host.
    Egress = 1,
}

impl PacketDirection {
    /// Both, in the order of their numbers.
    pub const ALL: [Self; 2] = [Self::Ingress, Self::Egress];

    /// Number of ways, the size of the map.
    pub const COUNT: u32 = Self::ALL.len() as u32;

    /// The name in metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ingress => "ingress",
            Self::Egress => "egress",
        }
    }
}

/// What can go wrong in the kernel programs. The number is the index in the error map.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum ErrorKind {
    /// The session table has no place for the rule's sessions, or both buckets of the cookie are full; the session
    /// is not tracked.
    MapFull = 0,
    /// The ring buffer was full; the event was not delivered.
    EventLost = 1,
    /// A packet's headers could not be read; activity was taken from the socket's counters.
    HeaderUnreadable = 2,
    /// A tracked packet had no TCP socket to compare with.
    NoTcpSocket = 3,
    /// The close callback could not be asked for; the end of the session will not be seen.
    CallbackRefused = 4,
    /// A map of the programs themselves could not be read.
    TableUnreadable = 5,
    /// The owner of a socket could not be kept; the daemon has to find it out.
    OwnerNotKept = 6,
    /// The sessions of the rule have as many places as it allows them; the session is not tracked.
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

    /// Number of kinds, the size of the error map.
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
