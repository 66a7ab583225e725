//! Packet filter rules of nftables, as of a firewall.

use std::{fs, path::Path};

use anyhow::{Context as _, Result};

use super::program::{self, succeed};
use crate::{agent::Place, netns::Netns};

const TRACKING: &str = "\
table inet tracked {
    chain input { type filter hook input priority filter; ct state established,related accept; }
    chain output { type filter hook output priority filter; ct state established,related accept; }
}
";

/// Adds rules to the namespace.
///
/// # Errors
///
/// Fails if nftables is not installed, or if the kernel refuses the rules.
pub fn filter_packets(agent: &Path, netns: &Netns, rules: &str) -> Result<()> {
    let directory = tempfile::tempdir()?;
    let file = directory.path().join("rules.nft");
    fs::write(&file, rules)?;
    let nft = program::find("nft", "nftables", &[])?;
    let mut command = Place::here().in_netns(netns).command(agent, nft);
    command.arg("-f").arg(&file);
    succeed(command).context("rules of nftables")?;
    Ok(())
}

/// Makes the namespace track connections and accept packets that belong to one.
///
/// # Errors
///
/// As [`filter_packets`], and if the kernel has no connection tracking.
pub fn track_connections(agent: &Path, netns: &Netns) -> Result<()> {
    filter_packets(agent, netns, TRACKING)
}
