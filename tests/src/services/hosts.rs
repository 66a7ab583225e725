//! Two connected hosts for a server and its clients.

use std::{ffi::OsStr, process::Command};

use anyhow::Result;

use crate::{
    agent::Place,
    lab::Lab,
    netns::{Netns, Veth},
};

/// The place of a program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Host {
    /// The server's host, inside the cgroup.
    Server,
    /// The server's host, outside the cgroup.
    Near,
    /// The other host.
    Far,
}

/// Two network namespaces. The first has the address [`Veth::LEFT`], the second [`Veth::RIGHT`]. Every port
/// is free.
#[derive(Debug)]
pub struct Hosts {
    /// The server's host.
    pub near: Netns,
    /// The other host.
    pub far: Netns,
}

impl Hosts {
    /// Creates the hosts.
    ///
    /// # Errors
    ///
    /// Fails if `ip` fails.
    pub fn new() -> Result<Self> {
        let (near, far) = (Netns::new()?, Netns::new()?);
        Veth::between(&near, &far)?;
        Ok(Self { near, far })
    }

    /// A command for a program on one of the hosts.
    pub fn command(&self, lab: &Lab, host: Host, program: impl AsRef<OsStr>) -> Command {
        let place = match host {
            Host::Server => Place::here().in_cgroup(&lab.cgroup).in_netns(&self.near),
            Host::Near => Place::here().in_netns(&self.near),
            Host::Far => Place::here().in_netns(&self.far),
        };
        place.command(lab.agent_binary(), program)
    }
}
