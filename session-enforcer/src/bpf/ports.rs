//! The filters by which the programs leave alone what no rule can be about (`PORTS`).

use aya::maps::{Array, MapData};
use session_enforcer_common::{MatchEntry, PortFilter};

use super::{BpfError, Kernel, map_error};

/// The map of filters.
pub(super) struct Ports {
    map: Array<MapData, PortFilter>,
    /// That of the match table in force.
    in_force: Box<PortFilter>,
}

impl Ports {
    pub(super) fn new(map: Array<MapData, PortFilter>) -> Self {
        Self {
            map,
            in_force: Box::new(PortFilter::of(&[])),
        }
    }

    /// Before the match table of this index is filled and comes into force. From now on the programs
    /// see every packet: sessions of the policy before stay what they are until they are decided
    /// about.
    pub(super) fn announce(&mut self, table: u32, entries: &[MatchEntry]) -> Result<(), BpfError> {
        self.set(PortFilter::OF_PACKETS, &PortFilter::ALL)?;
        let filter = Box::new(PortFilter::of(entries));
        self.set(table, &filter)?;
        self.in_force = filter;
        Ok(())
    }

    /// The kernel does not copy an element in one piece. What the filters before and after both say
    /// yes for is seen all the same: a bit that is in both never changes.
    fn set(&mut self, index: u32, filter: &PortFilter) -> Result<(), BpfError> {
        self.map.set(index, filter, 0).map_err(map_error("PORTS"))
    }
}

impl Kernel {
    /// Has the programs leave packets alone that no rule in force can be about, once it was decided
    /// about the sessions of the policy before. Those that are still in the map although none can be
    /// about them, since it could not be found out whose they are, are seen on: a session whose
    /// packets were not seen would seem to be idle.
    ///
    /// # Errors
    ///
    /// Where a map cannot be read or written; the programs see every packet then.
    pub fn narrow_ports(&mut self) -> Result<(), BpfError> {
        let mut filter = self.ports.in_force.clone();
        for cookie in self.cookies()? {
            if let Some(session) = self.session(cookie)?
                && !filter.may_match(session.local_port, session.remote_port)
            {
                filter.add_local(session.local_port);
            }
        }
        self.ports.set(PortFilter::OF_PACKETS, &filter)
    }
}
