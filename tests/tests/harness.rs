//! The harness: objects that it creates are in the right place and disappear.

use anyhow::Result;
use nix::errno::Errno;
use session_enforcer_tests::{Lab, Locked, Netns, Pair, Place, Veth, patience, run_to_end};

const AGENT: &str = env!("CARGO_BIN_EXE_session-enforcer-test-agent");

#[test]
fn a_lab_leaves_nothing_behind() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let path = lab.cgroup.path().to_owned();
    assert!(
        std::fs::read_to_string(path.join("cgroup.procs"))?
            .lines()
            .count()
            == 1
    );
    assert_eq!(lab.cgroup.attached_programs()?, 0);
    drop(lab);
    assert!(!path.exists());
    Ok(())
}

#[test]
fn sockets_belong_to_the_namespace_of_their_agent() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let [left, right] = [Netns::new()?, Netns::new()?];
    let veth = Veth::between(&left, &right)?;
    let [left, right] = [lab.inside_in(&left)?, lab.outside_in(&right)?];
    for address in [Veth::RIGHT, Veth::RIGHT_V6] {
        let listener = right.listen((address, 0))?;
        Pair::open(&left, &listener)?.round_trip()?;
    }
    let listener = right.listen((std::net::Ipv6Addr::UNSPECIFIED, 0))?;
    let to = veth.right_link_local(listener.port());
    Pair::dial(left.tcp(to)?, &listener, to)?.round_trip()?;
    let other_family = lab
        .inside
        .socket(libc::AF_INET, libc::SOCK_STREAM, libc::IPPROTO_UDP);
    assert_eq!(
        other_family.unwrap_err().downcast_ref(),
        Some(&Errno::EPROTONOSUPPORT)
    );
    Ok(())
}

#[test]
fn a_socket_that_sends_nothing_is_not_taken_for_locked() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen((std::net::Ipv4Addr::LOCALHOST, 0))?;
    let pair = Pair::open(&lab.outside, &listener)?;
    Locked::new(&pair.client)?;
    pair.client.shutdown(std::net::Shutdown::Write)?;
    let refused = Locked::new(&pair.client).map(drop).unwrap_err();
    assert_eq!(refused.downcast_ref(), Some(&Errno::EPIPE));
    Ok(())
}

#[test]
fn a_program_runs_in_its_cgroup_and_namespace() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let netns = Netns::new()?;
    let place = Place::here().in_cgroup(&lab.cgroup).in_netns(&netns);
    let mut command = place.command(lab.agent_binary(), "sh");
    command.args(["-c", "cat /proc/self/cgroup; readlink /proc/self/ns/net"]);
    let printed = run_to_end(command, patience())?.stdout;
    let cgroup = lab
        .cgroup
        .path()
        .file_name()
        .unwrap_or_default()
        .to_string_lossy();
    assert!(printed.contains(&format!("0::/{cgroup}\n")), "{printed}");
    let inode = std::os::unix::fs::MetadataExt::ino(&std::fs::metadata(netns.path())?);
    assert!(printed.contains(&format!("net:[{inode}]")), "{printed}");
    Ok(())
}
