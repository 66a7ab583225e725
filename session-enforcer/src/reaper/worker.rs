//! The reaper's side: a process that handles one request after the other and may hang in each.
//!
//! Its standard input is the channel, its standard output the shared page. It ends with the engine: at the
//! end of the channel, or by the signal that the kernel sends when the engine ends (`PR_SET_PDEATHSIG`). A
//! reaper that hangs on a lock ends as soon as it gets the lock.

use std::{
    collections::HashSet,
    io,
    os::fd::{AsFd as _, OwnedFd},
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use nix::sys::{
    prctl,
    signal::{SigHandler, Signal, signal},
};

use super::{
    channel,
    diag::{
        Destroyed, Detail, DiagSocket, LEFT_OUT, MAX_BATCH, SockDiagError, Socket, SocketId,
        SocketOwner, state,
    },
    disconnect::{self, Answer, DisconnectError},
    inspect::{has_left_threads, inspect_each},
    namespaces::{self, FoundNamespace, NetnsError},
    processes::{Descriptors, Scanned, find_holders},
    protocol::{
        Cgroup, Disconnect, Disconnected, FoundUser, Held, Holder, MAX_MESSAGE, MAX_NUMBERS,
        MAX_PATHS, Netns, Problem, Reach, Reply, Request, Search, SearchScope, SocketKey, decode,
        encode,
    },
    shared::SharedPage,
    trial,
};
use crate::{
    exit::{ExitStatus, Failure},
    host::{
        cgroup::{CgroupError, Scope, Tree},
        clock::{monotonic_ns, processor_ns},
        grace_period, privilege,
        threads::run_aside,
        users,
    },
};

/// The number of query answers in one message. If the reaper hangs, the engine asks again for those that it
/// has not received.
const FLUSH: usize = 32;

/// Handles requests until the engine ends.
///
/// # Errors
///
/// Fails if the process was not started by the daemon.
pub fn run() -> Result<ExitCode, Failure> {
    let not_ours = |_| {
        let message = "reaper: is started by the daemon, and by nobody else; see --help";
        Failure::new(ExitStatus::Usage, message.to_owned())
    };
    let page = SharedPage::map(&io::stdout().as_fd()).map_err(not_ours)?;
    let channel = io::stdin().as_fd().try_clone_to_owned().map_err(not_ours)?;
    // The name that ps(1) and top(1) show.
    let _ = prctl::set_name(c"session-reaper");
    // These signals are meant for the engine; a reaper outlives them and ends with the engine.
    for name in [
        Signal::SIGHUP,
        Signal::SIGINT,
        Signal::SIGTERM,
        Signal::SIGUSR1,
    ] {
        // SAFETY: ignoring a signal installs no handler code.
        let _ = unsafe { signal(name, SigHandler::SigIgn) };
    }
    if let Err(error) = privilege::confine_reaper() {
        let message = format!("reaper: giving up privileges: {error}");
        return Err(Failure::new(ExitStatus::NoPermission, message));
    }
    // Set it after the last change of credentials, which would clear it.
    let _ = prctl::set_pdeathsig(Signal::SIGKILL);
    let worker = Worker {
        channel,
        page,
        own: None,
        duplicates: Vec::new(),
        failed: false,
    };
    Ok(worker.serve())
}

struct Worker {
    channel: OwnedFd,
    page: SharedPage,
    /// The cookie and the socket table of the daemon's own namespace.
    own: Option<(u64, DiagSocket)>,
    /// The sockets of other processes that the engine was given. They stay open until this process ends: that does not
    /// wait for a socket's unsent data (`SO_LINGER`), unlike a close.
    duplicates: Vec<OwnedFd>,
    /// Whether a reply could not be sent: the engine has ended.
    failed: bool,
}

/// The reasons why a request is aborted.
enum Broken {
    Problem(Problem),
    /// The engine has ended.
    Channel,
}

impl From<SockDiagError> for Broken {
    fn from(error: SockDiagError) -> Self {
        Self::Problem(Problem::Diag(error.to_string()))
    }
}

impl Worker {
    fn serve(mut self) -> ExitCode {
        let mut buffer = vec![0; MAX_MESSAGE];
        if self.reply(&Reply::Ready, None).is_err() {
            return ExitCode::SUCCESS;
        }
        loop {
            let (request, lent) = match channel::receive(&self.channel, &mut buffer) {
                Ok((0, _)) | Err(_) => return ExitCode::SUCCESS,
                Ok((length, lent)) => match decode::<Request>(&buffer[..length]) {
                    Ok(request) => (request, lent),
                    Err(_) => return ExitCode::FAILURE,
                },
            };
            if request.is_long() {
                privilege::give_way();
            }
            let began_ns = processor_ns();
            let error = match self.perform(request, lent) {
                Ok(()) => None,
                Err(Broken::Problem(problem)) => Some(problem),
                Err(Broken::Channel) => return ExitCode::SUCCESS,
            };
            let ends = has_left_threads();
            let done = Reply::Done {
                at_ns: monotonic_ns(),
                used_ns: processor_ns().saturating_sub(began_ns),
                ends,
                error,
            };
            let is_sent = !self.failed && self.reply(&done, None).is_ok();
            if !is_sent || ends {
                return ExitCode::SUCCESS;
            }
        }
    }

    fn reply(&mut self, reply: &Reply, fd: Option<&OwnedFd>) -> Result<(), Broken> {
        let sent = encode(reply).map_err(|_| Broken::Channel);
        let sent = sent.and_then(|bytes| {
            channel::send(&self.channel, &bytes, fd).map_err(|_| Broken::Channel)
        });
        self.failed |= sent.is_err();
        sent
    }

    fn perform(&mut self, request: Request, lent: Option<OwnedFd>) -> Result<(), Broken> {
        match request {
            Request::Destroy {
                netns,
                targets,
                slow,
            } => self.destroy(&netns, lent, &targets, slow),
            Request::Disconnect { netns, sessions } => self.disconnect(&netns, lent, &sessions),
            Request::Query {
                netns,
                targets,
                detail,
            } => self.query(&netns, lent, &targets, detail),
            Request::Search { netns, targets } => {
                let found = self.with(&netns, lent, |_, diag| Ok(diag.search(&targets)?))?;
                self.tell_sockets(found)
            }
            Request::Holders {
                sought,
                scope,
                budget,
            } => self.holders(&sought, &scope, budget),
            Request::Listeners { netns, port } => {
                let listening = state::bit(state::LISTEN);
                let found = self.with(&netns, lent, |_, diag| {
                    Ok(diag.listed(listening, [port, 0])?)
                })?;
                for some in found.chunks(MAX_BATCH) {
                    self.tell_sockets(some.iter().copied().map(Some).collect())?;
                }
                Ok(())
            }
            Request::Survey {
                reach,
                cgroup,
                with_holders,
            } => self.survey(reach, cgroup.as_deref(), with_holders),
            Request::Duplicate { sockets } => self.duplicate(&sockets),
            Request::Cgroups { ids } => self.cgroups(&ids),
            Request::NamedCgroups { names } => self.named_cgroups(names),
            Request::Users { names } => {
                let found = names.iter().map(|name| find_user(name)).collect();
                self.reply(&Reply::Users(found), None)
            }
            Request::GracePeriod => {
                grace_period::wait_for_programs();
                Ok(())
            }
            Request::Probe => {
                let probed = trial::try_reset();
                self.reply(&Reply::Probed(probed), None)
            }
        }
    }
}

/// Requests about sockets of one namespace.
impl Worker {
    /// Runs `act` with the socket table of a namespace.
    fn with<T>(
        &mut self,
        netns: &Netns,
        lent: Option<OwnedFd>,
        act: impl FnOnce(&mut Self, &mut DiagSocket) -> Result<T, Broken>,
    ) -> Result<T, Broken> {
        if self.own.is_none() {
            let diag = DiagSocket::open()?;
            self.own = Some((diag.netns_cookie()?, diag));
        }
        let is_own = |own: &mut (u64, DiagSocket)| own.0 == netns.cookie;
        // After an error the socket is dropped: its unread answers would be taken for answers to the next request.
        if let Some((cookie, mut diag)) = self.own.take_if(is_own) {
            let done = act(self, &mut diag)?;
            self.own = Some((cookie, diag));
            return Ok(done);
        }
        let entered = match lent {
            Some(handle) => namespaces::enter_handle(handle.as_fd()),
            None => self.find(netns),
        };
        let mut diag = entered.map_err(|error| {
            let searched = match error {
                NetnsError::NotFound(_) => netns.search,
                _ => Search::Nowhere,
            };
            let error = error.to_string();
            if self.failed {
                Broken::Channel
            } else {
                Broken::Problem(Problem::Namespace { error, searched })
            }
        })?;
        act(self, &mut diag)
    }

    fn find(&mut self, netns: &Netns) -> Result<DiagSocket, NetnsError> {
        let seen_at = netns.seen_at.as_deref();
        let found = namespaces::find(netns.cookie, seen_at, netns.search, |cookie, path| {
            let path = path.to_owned();
            let _ = self.reply(&Reply::Met { cookie, path }, None);
        })?;
        let path = found.path;
        // The next reply detects that the engine has ended.
        let _ = self.reply(&Reply::Found { path }, Some(&found.handle));
        Ok(found.diag)
    }

    fn destroy(
        &mut self,
        netns: &Netns,
        lent: Option<OwnedFd>,
        targets: &[SocketId],
        slow: Vec<SocketOwner>,
    ) -> Result<(), Broken> {
        let slow: HashSet<SocketOwner> = slow.into_iter().collect();
        self.with(netns, lent, |worker, diag| {
            for (index, target) in targets.iter().enumerate() {
                if !worker.page.claim(index) {
                    break;
                }
                let slow_owner = match slow.is_empty() {
                    true => None,
                    false => diag.query(target, Detail::Names)?,
                };
                let slow_owner = slow_owner.as_ref().map(SocketOwner::from);
                let answer = match slow_owner.filter(|owner| slow.contains(owner)) {
                    Some(owner) => Destroyed {
                        code: LEFT_OUT,
                        owner,
                        ..Destroyed::default()
                    },
                    None => diag.destroy(target)?,
                };
                worker.page.answer(index, answer);
            }
            Ok(())
        })
    }

    fn disconnect(
        &mut self,
        netns: &Netns,
        lent: Option<OwnedFd>,
        sessions: &[Held],
    ) -> Result<(), Broken> {
        if sessions.iter().all(|held| held.how == Disconnect::ByCookie) {
            return self.each(sessions, |held| {
                disconnect::reset_by_cookie(&held.target, held.holder.as_ref())
            });
        }
        self.with(netns, lent, |worker, diag| {
            worker.each(sessions, |held| {
                let (target, holder) = (&held.target, held.holder.as_ref());
                match held.how {
                    Disconnect::Tcp => disconnect::reset_tcp(diag, target, holder),
                    Disconnect::Mptcp(extent) => {
                        disconnect::reset_mptcp(diag, target, extent, holder)
                    }
                    Disconnect::ByCookie => disconnect::reset_by_cookie(target, holder),
                }
            })
        })
    }

    fn each(
        &mut self,
        sessions: &[Held],
        mut reset: impl FnMut(&Held) -> Result<Answer, DisconnectError>,
    ) -> Result<(), Broken> {
        for (index, held) in sessions.iter().enumerate() {
            if !self.page.claim(index) {
                break;
            }
            let outcome = match reset(held) {
                Ok(Answer::Reset) => Disconnected::Reset,
                Ok(Answer::Gone) => Disconnected::Gone,
                Ok(Answer::Unknown) => Disconnected::Unknown,
                Err(DisconnectError::NeedsHolder(key)) => Disconnected::NeedsHolder(key),
                Err(error) => Disconnected::Failed(error.to_string()),
            };
            let at_ns = monotonic_ns();
            self.reply(&Reply::Disconnected { outcome, at_ns }, None)?;
        }
        Ok(())
    }

    fn query(
        &mut self,
        netns: &Netns,
        lent: Option<OwnedFd>,
        targets: &[SocketId],
        detail: Detail,
    ) -> Result<(), Broken> {
        self.with(netns, lent, |worker, diag| {
            let mut found = Vec::with_capacity(FLUSH);
            for (index, target) in targets.iter().enumerate() {
                if !worker.page.claim(index) {
                    break;
                }
                found.push(diag.query(target, detail)?);
                if found.len() == FLUSH {
                    worker.tell_sockets(std::mem::take(&mut found))?;
                }
            }
            worker.tell_sockets(found)
        })
    }

    fn tell_sockets(&mut self, sockets: Vec<Option<Socket>>) -> Result<(), Broken> {
        let at_ns = monotonic_ns();
        self.reply(&Reply::Sockets { sockets, at_ns }, None)
    }
}

/// Told when the processes were not all inspected.
const TOO_MUCH: &str = "the processes have too many descriptors to read them all at once, or the kernel hangs at too many of \
                        them; a namespace may be missing, the next comparison begins at another process";

/// The error for a process at which the kernel hangs.
const HUNG: &str = "its process executes a program and does not get on with it";

/// The process of a file below `/proc`.
fn pid_of(file: &Path) -> Option<u32> {
    let pid = file.strip_prefix("/proc").ok()?.iter().next()?;
    pid.to_str()?.parse().ok()
}

/// Requests about the host.
impl Worker {
    fn survey(
        &mut self,
        reach: Reach,
        cgroup: Option<&Path>,
        with_holders: bool,
    ) -> Result<(), Broken> {
        self.tell_scope(cgroup)?;
        // The scan precedes the lists, so a socket that is opened in between has no known holder.
        let scan = with_holders.then(Descriptors::of_all_processes);
        let Scanned {
            found: holders,
            next,
            mut hung,
        } = scan.unwrap_or_default();
        if reach == Reach::Own {
            let diag = DiagSocket::open()?;
            let cookie = diag.netns_cookie()?;
            let path = PathBuf::from("/proc/self/ns/net");
            self.reply(
                &Reply::Namespace {
                    cookie,
                    path: path.clone(),
                },
                None,
            )?;
            return self.list(&path, diag, &holders);
        }
        let mut broken = Ok(());
        let mut files = if reach == Reach::Every && with_holders {
            // The scan for holders has read every descriptor already.
            let mut files = namespaces::unopened_files();
            files.extend(holders.namespaces());
            files
        } else {
            namespaces::files(reach == Reach::Every)
        };
        let is_hung = |file: &PathBuf| pid_of(file).is_some_and(|pid| hung.contains(&pid));
        files.retain(|file| !is_hung(file));
        let (errors, missed) = namespaces::visit_all(files, |cookie, found| {
            if !self.failed && broken.is_ok() {
                broken = self.visit(cookie, found, &holders);
            }
        });
        broken?;
        hung.extend(missed.hung.iter().filter_map(|file| pid_of(file)));
        hung.sort_unstable();
        hung.dedup();
        let errors = errors.iter().map(ToString::to_string);
        let is_cut = next.is_some() || !missed.rest.is_empty();
        let cut = is_cut.then(|| TOO_MUCH.to_owned());
        let hung = hung.first().map(|first| {
            format!(
                "the kernel hangs at {} process(es) that execute a program, such as PID {first}: a namespace that \
                 only they lead to may be missing; end them, or the file system that they wait for",
                hung.len()
            )
        });
        for error in errors.chain(cut).chain(hung) {
            self.reply(&Reply::Unlisted(error), None)?;
        }
        Ok(())
    }

    fn tell_scope(&mut self, cgroup: Option<&Path>) -> Result<(), Broken> {
        match cgroup.map(Scope::below) {
            Some(Ok(Scope::Only(ids))) => {
                let ids: Vec<u64> = ids.into_iter().collect();
                for some in ids.chunks(MAX_NUMBERS) {
                    let ids = some.to_vec();
                    self.reply(&Reply::Scope { ids }, None)?;
                }
                Ok(())
            }
            Some(Err(error)) => self.reply(&Reply::NoScope(error.to_string()), None),
            Some(Ok(Scope::All)) | None => Ok(()),
        }
    }

    fn visit(
        &mut self,
        cookie: u64,
        found: FoundNamespace,
        holders: &Descriptors,
    ) -> Result<(), Broken> {
        let path = found.path.clone();
        self.reply(&Reply::Namespace { cookie, path }, Some(&found.handle))?;
        if found.has_tcp_sockets() {
            return self.list(&found.path, found.diag, holders);
        }
        self.reply(&Reply::WholeNamespace, None)
    }

    fn list(
        &mut self,
        path: &Path,
        mut diag: DiagSocket,
        holders: &Descriptors,
    ) -> Result<(), Broken> {
        let listening = diag.listed(state::bit(state::LISTEN), [0, 0]);
        let listed = listening.and_then(|listening| {
            for some in listening.chunks(MAX_BATCH) {
                let found = with_holders(some, holders);
                let _ = self.reply(&Reply::Listeners(found), None);
            }
            diag.list(state::SESSIONS, [0, 0], &mut |chunk| {
                for some in chunk.chunks(MAX_BATCH) {
                    let _ = self.reply(&Reply::Sessions(some.to_vec()), None);
                }
            })
        });
        if self.failed {
            return Err(Broken::Channel);
        }
        match listed {
            Ok(()) => self.reply(&Reply::WholeNamespace, None),
            Err(error) => {
                let error = format!("network namespace {}: {error}", path.display());
                self.reply(&Reply::Unlisted(error), None)
            }
        }
    }

    fn holders(
        &mut self,
        sought: &[SocketKey],
        scope: &SearchScope,
        budget: Duration,
    ) -> Result<(), Broken> {
        let began_ns = processor_ns();
        let (found, next) = run_aside(|| find_holders(sought.to_vec(), scope, budget));
        let used_ns = processor_ns().saturating_sub(began_ns);
        let found = found.into_iter().collect();
        let reply = Reply::Holders {
            found,
            next,
            used_ns,
        };
        self.reply(&reply, None)
    }

    fn duplicate(&mut self, sockets: &[(Holder, u64)]) -> Result<(), Broken> {
        let mut found: Vec<io::Result<OwnedFd>> = sockets
            .iter()
            .map(|_| Err(io::Error::other(HUNG)))
            .collect();
        let numbered = sockets.iter().copied().enumerate().collect();
        let duplicate = |(index, (holder, cookie)): &(usize, (Holder, u64))| {
            let duplicate = disconnect::duplicate(holder).and_then(|fd| {
                // The descriptor number may meanwhile belong to another file.
                if disconnect::cookie(&fd)? != *cookie {
                    return Err(io::Error::other("its descriptor is another's"));
                }
                Ok(fd)
            });
            Some((*index, duplicate))
        };
        let take = |(index, duplicate): (usize, _)| found[index] = duplicate;
        inspect_each(numbered, 1, duplicate, take, || true);
        for found in found {
            match found {
                Ok(fd) => {
                    self.reply(&Reply::Duplicate(None), Some(&fd))?;
                    self.duplicates.push(fd);
                }
                Err(error) => self.reply(&Reply::Duplicate(Some(error.to_string())), None)?,
            }
        }
        Ok(())
    }

    fn cgroups(&mut self, ids: &[u64]) -> Result<(), Broken> {
        let tree = Tree::open().ok();
        for id in ids {
            let located = tree.as_ref().and_then(|tree| tree.locate(*id).ok());
            let (path, ancestors) = located
                .map(|located| (located.path, located.ancestors.0.to_vec()))
                .unzip();
            let found = Cgroup {
                id: *id,
                path,
                ancestors: ancestors.unwrap_or_default(),
            };
            self.reply(&Reply::Cgroup(found), None)?;
        }
        Ok(())
    }

    fn named_cgroups(&mut self, names: Vec<String>) -> Result<(), Broken> {
        let unreadable = |error: CgroupError| Problem::Cgroups(error.to_string());
        let tree = Tree::open().map_err(|error| Broken::Problem(unreadable(error)))?;
        for name in names {
            let (found, awaited) = tree.fitting(&name);
            for some in found.chunks(MAX_PATHS) {
                let (name, cgroups) = (name.clone(), some.to_vec());
                self.reply(&Reply::Matching { name, cgroups }, None)?;
            }
            for some in awaited.chunks(MAX_PATHS) {
                self.reply(&Reply::WatchDirectories(some.to_vec()), None)?;
            }
        }
        Ok(())
    }
}

fn with_holders(sockets: &[Socket], holders: &Descriptors) -> Vec<(Socket, Option<Holder>)> {
    let with_holder = |socket: &Socket| {
        let holder = (socket.inode != 0).then(|| holders.holder(socket.inode));
        (*socket, holder.flatten())
    };
    sockets.iter().map(with_holder).collect()
}

pub(crate) fn find_user(name: &str) -> FoundUser {
    match users::uid_of(name) {
        Ok(Some(uid)) => FoundUser::Uid(uid),
        Ok(None) => FoundUser::Unknown,
        Err(error) => FoundUser::Failed(error.to_string()),
    }
}
