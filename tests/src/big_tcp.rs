//! Packets of more than 64 KiB (BIG TCP), which must be enabled on a network device.

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

/// The enabled maximum size of payload and headers.
const SIZE: u32 = 180_000;

// iproute2 has had words for these since 6.3 only.
const GSO_IPV4_MAX_SIZE: u16 = 63;
const GRO_IPV4_MAX_SIZE: u16 = 64;

/// Enables BIG TCP on the namespace's end of the veth pair, also for IPv4 if the kernel supports it. The
/// agent must be in that namespace.
///
/// # Errors
///
/// Fails if the kernel refuses.
pub fn allow_big_tcp(netns: &Netns, agent: &Agent) -> Result<()> {
    let interface = Veth::INTERFACE;
    netns.ip(&format!(
        "link set {interface} gso_max_size {SIZE} gro_max_size {SIZE}"
    ))?;
    set_link(
        agent,
        index(netns)?,
        &[(GSO_IPV4_MAX_SIZE, SIZE), (GRO_IPV4_MAX_SIZE, SIZE)],
    )
    .context("allowing packets of more than 64 KiB for IPv4")
}

/// Whether the kernel supports BIG TCP for IPv4 (Linux 6.3), which the attributes of a network device show.
/// An older kernel accepts the settings of [`allow_big_tcp`] and ignores them.
///
/// # Errors
///
/// Fails if the kernel does not answer.
pub fn has_ipv4_big_tcp(netns: &Netns, agent: &Agent) -> Result<bool> {
    let link = request(agent, libc::RTM_GETLINK, index(netns)?, &[])?;
    // Skip the headers of the message and of the link.
    let mut rest = link.get(32..).context("a short answer")?;
    while let [low, high, kind_low, kind_high, ..] = *rest {
        let length = usize::from(u16::from_ne_bytes([low, high]));
        if u16::from_ne_bytes([kind_low, kind_high]) == GSO_IPV4_MAX_SIZE {
            return Ok(true);
        }
        ensure!(length >= 4, "an attribute of {length} bytes");
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(false)
}

/// The index of the namespace's end of the veth pair.
fn index(netns: &Netns) -> Result<i32> {
    let shown = netns.ip(&format!("-o link show {}", Veth::INTERFACE))?;
    let index = shown.split(':').next();
    Ok(index.context("`ip link show` names no index")?.parse()?)
}

/// Sets numeric attributes of a network device (rtnetlink(7)).
fn set_link(agent: &Agent, index: i32, attributes: &[(u16, u32)]) -> Result<()> {
    let answer = request(agent, libc::RTM_NEWLINK, index, attributes)?;
    ensure!(answer.len() >= 20, "an answer of {} bytes", answer.len());
    // After the header: a negative error number, or 0.
    let code = i32::from_ne_bytes([answer[16], answer[17], answer[18], answer[19]]);
    ensure!(code == 0, "{}", Errno::from_raw(-code));
    Ok(())
}

/// Sends a message about a network device and returns the first answer.
fn request(agent: &Agent, kind: u16, index: i32, attributes: &[(u16, u32)]) -> Result<Vec<u8>> {
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
    message.extend(kind.to_ne_bytes());
    message.extend(NLM_F_REQUEST_AND_ACK.to_ne_bytes());
    message.extend([0; 8]);
    message.extend(body);
    let socket = agent.socket(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_ROUTE)?;
    send(socket.as_raw_fd(), &message, MsgFlags::empty())?;
    let mut answer = vec![0; 16 * 1024];
    let length = recv(socket.as_raw_fd(), &mut answer, MsgFlags::empty())?;
    answer.truncate(length);
    Ok(answer)
}
