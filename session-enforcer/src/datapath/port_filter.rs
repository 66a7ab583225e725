//! The filters by which the programs leave alone what no rule can be about (`PORTS` of the programs).

use aya::maps::{Array, MapData};
use session_enforcer_common::{MatchEntry, PortFilter, PortFilters};

use super::{BpfError, Datapath, map_error};

/// The section of the programs' object that is the map.
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

    /// Those of programs that will take the place of others: they see everything until a policy is announced.
    pub(super) fn seeing_all(map: Array<MapData, PortFilters>) -> Result<Self, BpfError> {
        let mut ports = Self::new(map);
        ports.filters.of_packets = PortFilter::ALL;
        ports.filters.of_tables.fill(PortFilter::ALL);
        ports.write()?;
        Ok(ports)
    }

    /// Before the match table of this index is filled and comes into force. From now on the programs
    /// see every packet: sessions of the policy before stay what they are until they are decided
    /// about.
    pub(super) fn announce(&mut self, table: u32, entries: &[MatchEntry]) -> Result<(), BpfError> {
        self.filters.of_packets = PortFilter::ALL;
        self.filters.of_tables[table as usize] = PortFilter::of(entries);
        self.write()
    }

    /// The kernel does not copy an element in one piece. What the filters before and after both say
    /// yes for is seen all the same: a bit that is in both never changes.
    fn write(&mut self) -> Result<(), BpfError> {
        let written = self.map.set(0, self.filters.as_ref(), 0);
        written.map_err(map_error(SECTION))
    }
}

/// A filter for packets in the making.
pub struct Narrowing {
    filter: Box<PortFilter>,
    /// The policy that it is of.
    policy: u64,
}

impl Datapath {
    /// Begins a filter for packets that no rule in force can be about.
    pub fn begin_narrowing(&self) -> Narrowing {
        Narrowing {
            filter: Box::new(self.ports.filters.of_tables[self.active as usize]),
            policy: self.policies_put,
        }
    }

    /// Has it say yes for sessions that are in the map although no rule can be about them, since it could not be found
    /// out whose they are: one whose packets were not seen would seem to be idle.
    ///
    /// # Errors
    ///
    /// Where the map cannot be read.
    pub fn keep_ports(&self, narrowing: &mut Narrowing, cookies: &[u64]) -> Result<(), BpfError> {
        let filter = &mut narrowing.filter;
        for session in self.sessions(cookies)?.into_iter().flatten() {
            if !filter.may_match(session.local_port, session.remote_port) {
                filter.add_local(session.local_port);
            }
        }
        Ok(())
    }

    /// Has the programs leave packets alone that no rule in force can be about, once it was decided
    /// about the sessions of the policy before. Those that are still in the map although none can be
    /// about them must be [kept](Self::keep_ports). Nothing where another policy has come into force since
    /// the filter was begun: that has its own.
    ///
    /// # Errors
    ///
    /// Where a map cannot be written; the programs see every packet then.
    pub fn narrow_ports(&mut self, narrowing: &Narrowing) -> Result<(), BpfError> {
        if narrowing.policy != self.policies_put {
            return Ok(());
        }
        self.ports.filters.of_packets = *narrowing.filter;
        self.ports.write()
    }
}
