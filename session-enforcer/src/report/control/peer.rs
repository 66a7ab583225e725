//! Identifies the client of a connection through the kernel and decides whether it may send requests.

use std::{
    fs, io,
    os::fd::{AsRawFd, RawFd},
};

use nix::unistd::geteuid;
use tokio::net::UnixStream;

use crate::report::audit::Requester;

/// The maximum number of groups of a process (`NGROUPS_MAX`).
const MAX_GROUPS: usize = 65_536;

/// The initial size of the group buffer.
const FEW_GROUPS: usize = 64;

/// The clients that may send requests.
#[derive(Clone, Copy, Debug)]
pub struct Admission {
    own_uid: u32,
    gid: Option<u32>,
}

impl Admission {
    /// Admits root, this process's user, and the members of this group.
    pub fn new(gid: Option<u32>) -> Self {
        Self {
            own_uid: geteuid().as_raw(),
            gid,
        }
    }

    /// Identifies the client of a connection.
    ///
    /// # Errors
    ///
    /// The reason why the client is not admitted.
    pub(super) fn admit(&self, stream: &UnixStream) -> Result<Requester, String> {
        let peer = stream
            .peer_cred()
            .map_err(|error| format!("SO_PEERCRED: {error}"))?;
        let (uid, gid) = (peer.uid(), peer.gid());
        let is_admitted = uid == 0
            || uid == self.own_uid
            || self.gid.is_some_and(|wanted| {
                gid == wanted || groups(stream.as_raw_fd()).is_ok_and(|all| all.contains(&wanted))
            });
        if !is_admitted {
            return Err(format!(
                "user {uid} may not ask: root, the daemon's user and the members of control.group may"
            ));
        }
        let pid = peer.pid().and_then(|pid| u32::try_from(pid).ok());
        let pid = pid.unwrap_or(0);
        Ok(Requester {
            uid,
            pid,
            command: command(pid),
        })
    }
}

/// The program name of a process. A process cannot block this read, as it can for its arguments.
fn command(pid: u32) -> String {
    let name = fs::read(format!("/proc/{pid}/comm")).unwrap_or_default();
    let name = String::from_utf8_lossy(&name);
    name.trim_end_matches('\n').to_owned()
}

/// The supplementary groups that the client had when it connected (`SO_PEERGROUPS`).
fn groups(socket: RawFd) -> io::Result<Vec<u32>> {
    let mut groups: Vec<u32> = vec![0; FEW_GROUPS];
    loop {
        let size = groups.len() * size_of::<u32>();
        let mut length = libc::socklen_t::try_from(size).map_err(io::Error::other)?;
        // SAFETY: the kernel writes at most `length` bytes, which fit into the buffer, and updates `length`.
        let status = unsafe {
            libc::getsockopt(
                socket,
                libc::SOL_SOCKET,
                libc::SO_PEERGROUPS,
                groups.as_mut_ptr().cast(),
                &raw mut length,
            )
        };
        let error = io::Error::last_os_error();
        if status == 0 {
            groups.truncate(length as usize / size_of::<u32>());
            return Ok(groups);
        }
        if error.raw_os_error() != Some(libc::ERANGE) || groups.len() >= MAX_GROUPS {
            return Err(error);
        }
        groups.resize(MAX_GROUPS, 0);
    }
}

#[cfg(test)]
mod tests {
    use nix::unistd::{getegid, getgroups};

    use super::*;

    #[tokio::test]
    async fn one_s_own_process_is_named_and_its_groups_are_those_that_it_has() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let requester = Admission::new(None).admit(&ours).unwrap();
        assert_eq!(requester.uid, geteuid().as_raw());
        assert_eq!(requester.pid, std::process::id());
        let own = fs::read_to_string("/proc/self/comm").unwrap();
        assert_eq!(requester.command, own.trim_end());
        let mut found = groups(ours.as_raw_fd()).unwrap();
        let mut wanted: Vec<u32> = getgroups().unwrap().iter().map(|g| g.as_raw()).collect();
        found.sort_unstable();
        wanted.sort_unstable();
        assert_eq!(found, wanted);
    }

    #[tokio::test]
    async fn others_are_refused_but_for_members_of_the_group() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let of = |gid| Admission {
            own_uid: u32::MAX,
            gid,
        };
        // Root is always admitted.
        assert_eq!(of(None).admit(&ours).is_ok(), geteuid().is_root());
        assert!(of(Some(getegid().as_raw())).admit(&ours).is_ok());
    }

    #[test]
    fn a_process_that_has_gone_has_no_name() {
        assert_eq!(command(u32::MAX), "");
    }
}
