//! Packets of more than 64 KiB (BIG TCP), which a network device must be told to allow.

use std::os::fd::AsRawFd as _;

use anyhow::{Context as _, Result, ensure};
use nix::{
    errno::Errno,
    sys::socket::{MsgFlags, recv, send},
};

use crate::{
    agent::Agent,
    netns::{Netns, Veth},
};

/// The most that is allowed then, payload and headers.
const SIZE: u32 = 180_000;

/// Allows them on the namespace's end of the cable. The agent is one of that namespace.
///
/// # Errors
///
/// Where the kernel refuses; for IPv4 it needs Linux 6.3.
pub fn allow_big_tcp(netns: &Netns, agent: &Agent) -> Result<()> {
    let interface = Veth::INTERFACE;
    netns.ip(&format!(
        "link set {interface} gso_max_size {SIZE} gro_max_size {SIZE}"
    ))?;
    let shown = netns.ip(&format!("-o link show {interface}"))?;
    let index = shown
        .split(':')
        .next()
        .context("`ip link show` names no index")?
        .parse()?;
    // iproute2 has had words for these since 6.3 only.
    const GSO_IPV4_MAX_SIZE: u16 = 63;
    const GRO_IPV4_MAX_SIZE: u16 = 64;
    set_link(
        agent,
        index,
        &[(GSO_IPV4_MAX_SIZE, SIZE), (GRO_IPV4_MAX_SIZE, SIZE)],
    )
    .context("allowing packets of more than 64 KiB for IPv4, which needs Linux 6.3")
}

/// Sets attributes of a network device, whose values are numbers (rtnetlink(7)).
fn set_link(agent: &Agent, index: i32, attributes: &[(u16, u32)]) -> Result<()> {
    const NLM_F_REQUEST_AND_ACK: u16 = 5;
    let mut body = vec![0; 4];
    body.extend(index.to_ne_bytes());
    body.extend([0; 8]);
    for (kind, value) in attributes {
        body.extend(8u16.to_ne_bytes());
        body.extend(kind.to_ne_bytes());
        body.extend(value.to_ne_bytes());
    }
    let mut message = (16 + body.len() as u32).to_ne_bytes().to_vec();
    message.extend(libc::RTM_NEWLINK.to_ne_bytes());
    message.extend(NLM_F_REQUEST_AND_ACK.to_ne_bytes());
    message.extend([0; 8]);
    message.extend(body);
    let socket = agent.socket(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_ROUTE)?;
    send(socket.as_raw_fd(), &message, MsgFlags::empty())?;
    let mut answer = [0; 1024];
    let length = recv(socket.as_raw_fd(), &mut answer, MsgFlags::empty())?;
    ensure!(length >= 20, "an answer of {length} bytes");
    // The header, and then a negative error number or 0.
    let code = i32::from_ne_bytes([answer[16], answer[17], answer[18], answer[19]]);
    ensure!(code == 0, "{}", Errno::from_raw(-code));
    Ok(())
}
