//! Events that the kernel programs send to the daemon through the ring buffer.

/// The event of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum EventKind {
    /// The session was established, matched and inserted into the session table.
    Opened = 1,
    /// The session has closed and was removed from the session table.
    Closed = 2,
    /// A FIN or RST passed on a session whose end the kernel does not report (see
    /// [`flags::END_UNREPORTED`](crate::flags::END_UNREPORTED)). The session may end soon, so the daemon must check its
    /// socket.
    MayEnd = 3,
    /// The gate dropped payload of a session past its deadline.
    Expired = 4,
}

/// One record of the ring buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Event {
    /// The socket cookie, the key of the session table.
    pub cookie: u64,
    /// The cookie of the socket's network namespace.
    pub netns_cookie: u64,
    /// Time of establishment, in nanoseconds of `CLOCK_BOOTTIME`.
    pub established_ns: u64,
    /// Cgroup id of the session's owner; 0 if the owner is not known.
    pub cgroup_id: u64,
    /// An [`EventKind`] as a number.
    pub kind: u32,
    /// Index of the session's rule.
    pub rule: u16,
    /// The lower 16 bits of the generation of the match table that chose the rule.
    pub generation: u16,
}

const _: () = assert!(size_of::<Event>() == 40 && align_of::<Event>() == 8);

/// Why a record of the ring buffer could not be parsed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EventError {
    /// The record does not have the size of an [`Event`].
    Length(usize),
    /// The record's kind is not an [`EventKind`].
    Kind(u32),
}

impl core::fmt::Display for EventError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::Length(n) => write!(f, "a record of {n} bytes instead of {}", size_of::<Event>()),
            Self::Kind(k) => write!(f, "a record of unknown kind {k}"),
        }
    }
}

impl core::error::Error for EventError {}

impl Event {
    /// Parses a record of the ring buffer.
    ///
    /// # Errors
    ///
    /// Fails if the programs of this version do not write records of this length or kind.
    pub fn parse(record: &[u8]) -> Result<(EventKind, Self), EventError> {
        let whole: &[u8; size_of::<Self>()] = record
            .try_into()
            .map_err(|_| EventError::Length(record.len()))?;
        let eight = |at: usize| {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(&whole[at..at + 8]);
            u64::from_ne_bytes(bytes)
        };
        let event = Self {
            cookie: eight(0),
            netns_cookie: eight(8),
            established_ns: eight(16),
            cgroup_id: eight(24),
            kind: u32::from_ne_bytes([whole[32], whole[33], whole[34], whole[35]]),
            rule: u16::from_ne_bytes([whole[36], whole[37]]),
            generation: u16::from_ne_bytes([whole[38], whole[39]]),
        };
        let kind = match event.kind {
            1 => EventKind::Opened,
            2 => EventKind::Closed,
            3 => EventKind::MayEnd,
            4 => EventKind::Expired,
            other => return Err(EventError::Kind(other)),
        };
        Ok((kind, event))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(kind: u32) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(7u64.to_ne_bytes());
        bytes.extend(8u64.to_ne_bytes());
        bytes.extend(9u64.to_ne_bytes());
        bytes.extend(6u64.to_ne_bytes());
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(3u16.to_ne_bytes());
        bytes.extend(5u16.to_ne_bytes());
        bytes
    }

    #[test]
    fn a_whole_record_is_read_field_by_field() {
        let (kind, event) = Event::parse(&record(2)).unwrap();
        assert_eq!(kind, EventKind::Closed);
        assert_eq!((event.cookie, event.netns_cookie), (7, 8));
        assert_eq!((event.established_ns, event.rule), (9, 3));
        assert_eq!((event.generation, event.cgroup_id), (5, 6));
    }

    #[test]
    fn a_cut_long_or_unknown_record_is_refused() {
        let whole = record(1);
        assert_eq!(Event::parse(&whole[..39]), Err(EventError::Length(39)));
        assert_eq!(Event::parse(&[0; 41]), Err(EventError::Length(41)));
        assert_eq!(Event::parse(&record(0)), Err(EventError::Kind(0)));
        assert_eq!(Event::parse(&record(5)), Err(EventError::Kind(5)));
    }

    #[test]
    fn a_refusal_says_what_was_there() {
        let told = |error: EventError| error.to_string();
        assert_eq!(
            told(EventError::Length(39)),
            "a record of 39 bytes instead of 40"
        );
        assert_eq!(told(EventError::Kind(5)), "a record of unknown kind 5");
    }
}
