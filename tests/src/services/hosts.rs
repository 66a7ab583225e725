//! Two hosts with a cable between them, for a server and its clients.

use std::{ffi::OsStr, process::Command};

use anyhow::Result;

use crate::{
    agent::Place,
    lab::Lab,
    netns::{Netns, Veth},
};

/// Where a program runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Host {
    /// On the server's host and in the cgroup.
    Server,
    /// On the server's host, beside the cgroup.
    Near,
    /// On the other host.
    Far,
}

/// Two network namespaces, of which the first has the address [`Veth::LEFT`], the second [`Veth::RIGHT`]. Every port is free.
#[derive(Debug)]
pub struct Hosts {
    /// The server's.
    pub near: Netns,
    /// The other.
    pub far: Netns,
}

impl Hosts {
    /// Makes them.
    ///
    /// # Errors
    ///
    /// Where `ip` refuses.
    pub fn new() -> Result<Self> {
        let (near, far) = (Netns::new()?, Netns::new()?);
        Veth::between(&near, &far)?;
        Ok(Self { near, far })
    }

    /// A command that runs a program on one of them.
    pub fn command(&self, lab: &Lab, host: Host, program: impl AsRef<OsStr>) -> Command {
        let place = match host {
            Host::Server => Place::here().in_cgroup(&lab.cgroup).in_netns(&self.near),
            Host::Near => Place::here().in_netns(&self.near),
            Host::Far => Place::here().in_netns(&self.far),
        };
        place.command(lab.agent_binary(), program)
    }
}
