//! Which sockets there are, in every network namespace: listed by a thread of its own, which takes as
//! long as it takes. The engine takes in what it finds bit by bit, and enforces meanwhile.

use std::{
    io,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use nix::time::{ClockId, clock_gettime};
use tokio::sync::mpsc::{Receiver, Sender, channel};

use crate::{
    cgroup::{Cgroup, CgroupError, Scope},
    netns,
    sock_diag::{Detail, DiagSocket, SockDiagError, Socket, state},
};

/// Bits that may wait for the engine. The thread waits, and with it the kernel's list.
const WAITING: usize = 4;

/// What the thread found.
#[derive(Debug)]
pub enum Found {
    /// Whose sockets are meant; comes first.
    Scope(Result<Scope, CgroupError>),
    /// A network namespace; its sessions follow.
    Namespace {
        /// Its cookie.
        cookie: u64,
        /// Where it was found.
        path: PathBuf,
        /// The sockets that listen in it.
        listeners: Vec<Socket>,
    },
    /// Some of its sessions, without what passed in them.
    Sessions(Vec<Socket>),
    /// All of its sessions were there.
    WholeNamespace,
    /// A namespace could not be listed, or not to its end: this went wrong.
    Unlisted(String),
    /// There is no more.
    End {
        /// How long the thread has used a processor.
        used: Duration,
    },
}

/// Which network namespaces are looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// The daemon's own.
    Own,
    /// Those that a process is in or that are mounted: nearly all, at little cost.
    Usual,
    /// Also those that are held by a single thread or by an open file.
    Every,
}

/// A survey that is under way.
#[derive(Debug)]
pub struct Survey {
    found: Receiver<Found>,
}

impl Survey {
    /// Starts one.
    ///
    /// # Errors
    ///
    /// Where there can be no thread.
    pub fn start(cgroup: &Cgroup, reach: Reach) -> io::Result<Self> {
        let (sender, found) = channel(WAITING);
        let cgroup = cgroup.try_clone()?;
        let work = move || {
            Surveyor { found: sender }.survey(&cgroup, reach);
        };
        thread::Builder::new()
            .name("survey".to_owned())
            .spawn(work)?;
        Ok(Self { found })
    }

    /// What was found next; none where the thread ended before its time.
    pub async fn next(&mut self) -> Option<Found> {
        self.found.recv().await
    }
}

/// The thread's side. What it finds after the engine has lost interest is lost.
struct Surveyor {
    found: Sender<Found>,
}

impl Surveyor {
    fn survey(&self, cgroup: &Cgroup, reach: Reach) {
        self.tell(Found::Scope(cgroup.scope()));
        match reach {
            Reach::Own => self.list_own(),
            Reach::Usual => self.list_all(false),
            Reach::Every => self.list_all(true),
        }
        // Without a reading it is as if it had cost nothing.
        let used = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID);
        let used = used.map_or(Duration::ZERO, Duration::from);
        self.tell(Found::End { used });
    }

    fn tell(&self, found: Found) {
        // Nobody listens where the daemon stops, or has begun anew.
        let _ = self.found.blocking_send(found);
    }

    fn list_all(&self, thorough: bool) {
        let list = |cookie, path: &Path, diag| self.list(cookie, path, diag);
        for error in netns::visit_all(thorough, list) {
            self.tell(Found::Unlisted(error.to_string()));
        }
    }

    fn list_own(&self) {
        let opened = DiagSocket::open().and_then(|diag| Ok((diag.netns_cookie()?, diag)));
        match opened {
            Ok((cookie, diag)) => self.list(cookie, Path::new("/proc/self/ns/net"), diag),
            Err(error) => self.tell(Found::Unlisted(error.to_string())),
        }
    }

    fn list(&self, cookie: u64, path: &Path, mut diag: DiagSocket) {
        if self.found.is_closed() {
            return;
        }
        match self.list_sockets(cookie, path, &mut diag) {
            Ok(()) => self.tell(Found::WholeNamespace),
            Err(error) => {
                let path = path.display();
                self.tell(Found::Unlisted(format!(
                    "network namespace {path}: {error}"
                )));
            }
        }
    }

    fn list_sockets(
        &self,
        cookie: u64,
        path: &Path,
        diag: &mut DiagSocket,
    ) -> Result<(), SockDiagError> {
        let listeners = diag.dump(state::bit(state::LISTEN))?;
        self.tell(Found::Namespace {
            cookie,
            path: path.to_owned(),
            listeners,
        });
        diag.in_bits(state::SESSIONS, Detail::Names, &mut |bit| {
            self.tell(Found::Sessions(bit));
        })?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;
    use crate::{cgroup, sock_diag::BIT};

    fn survey(reach: Reach) -> Vec<Found> {
        let cgroup = Cgroup::open(&cgroup::mount_point().unwrap()).unwrap();
        let mut survey = Survey::start(&cgroup, reach).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .unwrap();
        let mut all = Vec::new();
        loop {
            let next = runtime.block_on(async {
                tokio::time::timeout(Duration::from_secs(60), survey.next()).await
            });
            let found = next.unwrap().unwrap();
            let is_end = matches!(found, Found::End { .. });
            all.push(found);
            if is_end {
                return all;
            }
        }
    }

    #[test]
    fn a_socket_of_the_own_namespace_is_found_after_its_listener() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        // Both ends of each are sockets of this host: more than one bit of them.
        let open = |_| {
            (
                TcpStream::connect(address).unwrap(),
                listener.accept().unwrap(),
            )
        };
        let pairs: Vec<_> = (0..=BIT / 2).map(open).collect();
        let port = address.port();
        let found = survey(Reach::Own);
        assert!(matches!(found[0], Found::Scope(Ok(_))));
        let Found::Namespace { listeners, .. } = &found[1] else {
            panic!("{:?}", found[1]);
        };
        assert!(listeners.iter().any(|s| s.target.local_port == port));
        let bits = found.iter().filter_map(|found| match found {
            Found::Sessions(bit) => Some(bit),
            _ => None,
        });
        let to_port = bits.flatten().filter(|s| s.target.remote_port == port);
        assert!(to_port.count() >= pairs.len());
        assert!(matches!(found[found.len() - 2], Found::WholeNamespace));
    }
}
