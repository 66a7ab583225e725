//! Network namespaces of the test, and veth pairs between them.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6},
    path::{Path, PathBuf},
    sync::Once,
};

use anyhow::{Context as _, Result};

use crate::{
    names,
    process::{output_of, require_root},
};

const MOUNTS: &str = "/run/netns";

/// A new network namespace with loopback enabled. Dropping it deletes its name. The namespace ends with its
/// last process and socket.
#[derive(Debug)]
pub struct Netns {
    name: String,
}

impl Netns {
    /// Creates a namespace.
    ///
    /// # Errors
    ///
    /// Fails without root's privileges or without iproute2.
    pub fn new() -> Result<Self> {
        static SWEEP: Once = Once::new();
        require_root()?;
        SWEEP.call_once(sweep);
        let name = names::unique();
        ip(&["netns", "add", &name])?;
        let netns = Self { name };
        netns.ip("link set lo up")?;
        Ok(netns)
    }

    /// The name for iproute2.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The file of the namespace.
    pub fn path(&self) -> PathBuf {
        Path::new(MOUNTS).join(&self.name)
    }

    /// Runs `ip` in the namespace with these arguments.
    ///
    /// # Errors
    ///
    /// Fails if `ip` fails.
    pub fn ip(&self, words: &str) -> Result<String> {
        let mut args = vec!["-n", &self.name];
        args.extend(words.split_whitespace());
        ip(&args)
    }

    /// Sets a `/proc/sys/net` parameter of the namespace.
    ///
    /// # Errors
    ///
    /// Fails if the kernel refuses.
    pub fn set_parameter(&self, name: &str, value: &str) -> Result<()> {
        let write = format!("echo {value} > /proc/sys/net/{name}");
        ip(&["netns", "exec", &self.name, "sh", "-c", &write]).map(drop)
    }

    /// Deletes the name now.
    ///
    /// # Errors
    ///
    /// Fails if `ip` fails.
    pub fn delete(self) -> Result<()> {
        let name = self.name.clone();
        std::mem::forget(self);
        ip(&["netns", "delete", &name]).map(drop)
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        if let Err(error) = ip(&["netns", "delete", &self.name]) {
            eprintln!(
                "the network namespace {} is left behind: {error:#}",
                self.name
            );
        }
    }
}

fn encapsulating_route(to: IpAddr, segment: IpAddr) -> String {
    let interface = Veth::INTERFACE;
    format!("route replace {to} encap seg6 mode encap segs {segment} dev {interface}")
}

fn ip(args: &[&str]) -> Result<String> {
    output_of("ip", "iproute2", args)
}

fn sweep() {
    for name in names::left_behind(Path::new(MOUNTS)) {
        // Another run may sweep at the same time, so a failure does not matter.
        let _ = ip(&["netns", "delete", &name]);
    }
}

/// A veth pair between two namespaces: the interface `veth0` in each, with IPv4 and IPv6 addresses. It ends
/// with either namespace.
#[derive(Clone, Copy, Debug)]
pub struct Veth {
    /// The index of the left interface, which is the scope of its link-local addresses.
    left_index: u32,
}

impl Veth {
    /// The interface's name at both ends.
    pub const INTERFACE: &str = "veth0";
    /// The IPv4 address of the left end.
    pub const LEFT: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 77, 0, 1));
    /// The IPv4 address of the right end.
    pub const RIGHT: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 77, 0, 2));
    /// The IPv6 address of the left end.
    pub const LEFT_V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 1));
    /// The IPv6 address of the right end.
    pub const RIGHT_V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 2));

    /// An IPv4 address behind the right end; see [`Self::lay_on`].
    pub const BEYOND: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 78, 0, 1));
    /// An IPv6 address behind the right end.
    pub const BEYOND_V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd78, 0, 0, 0, 0, 0, 0, 1));

    /// Adds the addresses behind the right end, which removes `SRv6` encapsulations.
    ///
    /// # Errors
    ///
    /// Fails if `ip` or the kernel refuses.
    pub fn lay_on(left: &Netns, right: &Netns) -> Result<()> {
        for interface in ["all", "lo", Self::INTERFACE] {
            right.set_parameter(&format!("ipv6/conf/{interface}/seg6_enabled"), "1")?;
        }
        for (address, by) in [
            (Self::BEYOND, Self::RIGHT),
            (Self::BEYOND_V6, Self::RIGHT_V6),
        ] {
            right.ip(&format!("addr add {address} dev lo"))?;
            left.ip(&format!("route add {address} via {by}"))?;
        }
        Ok(())
    }

    /// Makes the left end encapsulate packets to those addresses in this number of `SRv6` headers.
    ///
    /// # Errors
    ///
    /// Fails if `ip` or the kernel refuses.
    pub fn encapsulate(left: &Netns, right: &Netns, depth: u8) -> Result<()> {
        let mut segment = Self::RIGHT_V6;
        for number in 1..depth {
            let next = IpAddr::V6(Ipv6Addr::new(0xfd79, 0, 0, 0, 0, 0, 0, number.into()));
            right.ip(&format!("addr add {next} dev lo"))?;
            left.ip(&encapsulating_route(next, segment))?;
            segment = next;
        }
        for address in [Self::BEYOND, Self::BEYOND_V6] {
            left.ip(&encapsulating_route(address, segment))?;
        }
        Ok(())
    }

    /// Creates a veth pair.
    ///
    /// # Errors
    ///
    /// Fails if `ip` fails.
    pub fn between(left: &Netns, right: &Netns) -> Result<Self> {
        let interface = Self::INTERFACE;
        left.ip(&format!(
            "link add {interface} type veth peer name {interface} netns {}",
            right.name
        ))?;
        for (end, number) in [(left, 1), (right, 2)] {
            // Use only the test's addresses, and use them at once.
            end.ip(&format!("link set {interface} addrgenmode none up"))?;
            end.ip(&format!("addr add 10.77.0.{number}/24 dev {interface}"))?;
            end.ip(&format!("addr add fd77::{number}/64 dev {interface} nodad"))?;
            end.ip(&format!("addr add fe80::{number}/64 dev {interface} nodad"))?;
        }
        let shown = left.ip(&format!("-o link show {interface}"))?;
        let index = shown
            .split(':')
            .next()
            .context("`ip link show` names no index")?;
        Ok(Self {
            left_index: index.parse()?,
        })
    }

    /// The right end's link-local address, as the left end connects to it.
    pub fn right_link_local(&self, port: u16) -> SocketAddr {
        let address = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 2);
        SocketAddrV6::new(address, port, 0, self.left_index).into()
    }
}
