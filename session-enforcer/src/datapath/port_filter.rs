//! The port filters (`PORTS` in the programs), by which the programs ignore connections that no rule can match.

use aya::maps::{Array, MapData};
use session_enforcer_common::{MatchEntry, PortFilter, PortFilters};

use super::{BpfError, Datapath, map_error};

/// The section of the programs' object that becomes the map.
pub(super) const SECTION: &str = ".bss.ports";

/// The filters, and their map of one element.
pub(super) struct Ports {
    map: Array<MapData, PortFilters>,
    filters: Box<PortFilters>,
}

impl Ports {
    pub(super) fn new(map: Array<MapData, PortFilters>) -> Self {
        Self {
            map,
            filters: Box::new(PortFilters::NONE),
        }
    }

    /// The filters of programs that will replace others: they accept every packet until a policy is announced.
    pub(super) fn seeing_all(map: Array<MapData, PortFilters>) -> Result<Self, BpfError> {
        let mut ports = Self::new(map);
        ports.filters.of_packets = PortFilter::ALL;
        ports.filters.of_tables.fill(PortFilter::ALL);
        ports.write()?;
        Ok(ports)
    }

    /// Must be called before the match table with this index is filled and activated. From now on the programs see
    /// every packet, so that sessions of the previous policy are stamped until they are redecided.
    pub(super) fn announce(&mut self, table: u32, entries: &[MatchEntry]) -> Result<(), BpfError> {
        self.filters.of_packets = PortFilter::ALL;
        self.filters.of_tables[table as usize] = PortFilter::of(entries);
        self.write()
    }

    /// The kernel does not copy the element atomically. This is safe: a bit that is set in both the old and the new
    /// filter never changes.
    fn write(&mut self) -> Result<(), BpfError> {
        let written = self.map.set(0, self.filters.as_ref(), 0);
        written.map_err(map_error(SECTION))
    }
}

/// A packet filter that is being built.
pub struct Narrowing {
    filter: Box<PortFilter>,
    /// Number of the policy that the filter belongs to.
    policy: u64,
}

impl Datapath {
    /// Starts to build a packet filter for the active rules.
    pub fn begin_narrowing(&self) -> Narrowing {
        Narrowing {
            filter: Box::new(self.ports.filters.of_tables[self.active as usize]),
            policy: self.policies_put,
        }
    }

    /// Adds the ports of sessions that no active rule can match but that are still in the table, because their owner
    /// could not be resolved. If their packets were ignored, they would seem idle.
    ///
    /// # Errors
    ///
    /// Fails if the session table cannot be read.
    pub fn keep_ports(&self, narrowing: &mut Narrowing, cookies: &[u64]) -> Result<(), BpfError> {
        let filter = &mut narrowing.filter;
        for session in self.sessions(cookies)?.into_iter().flatten() {
            if !filter.may_match(session.local_port, session.remote_port) {
                filter.add_local(session.local_port);
            }
        }
        Ok(())
    }

    /// Activates the packet filter, so that the programs ignore packets that no active rule can match. Call it after
    /// the sessions of the previous policy were redecided. The ports of sessions that remain without a possible rule
    /// must be [kept](Self::keep_ports). Does nothing if another policy has come into force since the filter was begun;
    /// that policy gets its own filter.
    ///
    /// # Errors
    ///
    /// Fails if the map cannot be written; the programs then continue to see every packet.
    pub fn narrow_ports(&mut self, narrowing: &Narrowing) -> Result<(), BpfError> {
        if narrowing.policy != self.policies_put {
            return Ok(());
        }
        self.ports.filters.of_packets = *narrowing.filter;
        self.ports.write()
    }
}
