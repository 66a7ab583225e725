//! Sessions that clients of the control socket have asked to be reset. Pure.

use std::{collections::HashMap, sync::Arc};

use session_enforcer_common::Session;
use tokio::sync::mpsc::UnboundedSender;

use crate::report::{
    audit::Requester,
    control::{KillResult, Killed},
};

/// The channel of a client for results. The number of sessions in a request is limited.
pub(super) type Results = UnboundedSender<Killed>;

/// The requested sessions. All of them are tracked, so there are never more than the session table holds.
#[derive(Debug, Default)]
pub(super) struct Kills(HashMap<u64, Kill>);

/// A session that must be reset.
#[derive(Debug)]
pub(super) struct Kill {
    established_ns: u64,
    /// When the reset was requested.
    pub(super) asked_ns: u64,
    /// The first client that requested it.
    pub(super) by: Arc<Requester>,
    waiting: Vec<Results>,
}

impl Kills {
    /// Adds a session that must be reset.
    pub(super) fn ask(
        &mut self,
        cookie: u64,
        session: &Session,
        now_ns: u64,
        by: &Arc<Requester>,
        results: &Results,
    ) {
        let established_ns = session.established_ns;
        let kill = self.0.entry(cookie).or_insert_with(|| Kill {
            established_ns,
            asked_ns: now_ns,
            by: Arc::clone(by),
            waiting: Vec::new(),
        });
        if kill.established_ns != established_ns {
            // The socket was connected again, so the requested session is gone.
            tell(cookie, &mut kill.waiting, &KillResult::Gone);
            (kill.established_ns, kill.asked_ns) = (established_ns, now_ns);
            kill.by = Arc::clone(by);
        }
        kill.waiting.push(results.clone());
    }

    /// The request for a session, if there is one.
    pub(super) fn of(&self, cookie: u64, session: &Session) -> Option<&Kill> {
        // Skips the hash: the map is usually empty.
        if self.0.is_empty() {
            return None;
        }
        let kill = self.0.get(&cookie)?;
        (kill.established_ns == session.established_ns).then_some(kill)
    }

    /// Reports the result of a session that has ended.
    pub(super) fn ended(&mut self, cookie: u64, session: &Session, result: &KillResult) {
        if self.of(cookie, session).is_some()
            && let Some(mut kill) = self.0.remove(&cookie)
        {
            tell(cookie, &mut kill.waiting, result);
        }
    }

    /// Reports that the reset has failed; it will be tried again.
    pub(super) fn failed(&mut self, cookie: u64, session: &Session, why: &str) {
        if self.of(cookie, session).is_some()
            && let Some(kill) = self.0.get_mut(&cookie)
        {
            tell(
                cookie,
                &mut kill.waiting,
                &KillResult::Failed(why.to_owned()),
            );
        }
    }

    /// Reports that the session of a cookie is gone, for whatever reason.
    pub(super) fn forgotten(&mut self, cookie: u64) {
        if !self.0.is_empty()
            && let Some(mut kill) = self.0.remove(&cookie)
        {
            tell(cookie, &mut kill.waiting, &KillResult::Gone);
        }
    }
}

/// Sends the result to all waiting clients. A client that has gone needs no handling.
fn tell(cookie: u64, waiting: &mut Vec<Results>, result: &KillResult) {
    for results in waiting.drain(..) {
        let _ = results.send(Killed {
            id: cookie,
            result: result.clone(),
        });
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

    use super::*;
    use crate::engine::fixtures::session;

    fn requester(pid: u32) -> Arc<Requester> {
        Arc::new(Requester {
            uid: 0,
            pid,
            command: "test".to_owned(),
        })
    }

    fn told(results: &mut UnboundedReceiver<Killed>) -> Vec<KillResult> {
        std::iter::from_fn(|| results.try_recv().ok())
            .map(|killed| killed.result)
            .collect()
    }

    #[test]
    fn each_who_asked_is_told_once_and_the_first_is_named() {
        let (mut kills, session) = (Kills::default(), session());
        let (first, mut to_first) = unbounded_channel();
        let (second, mut to_second) = unbounded_channel();
        kills.ask(7, &session, 10, &requester(1), &first);
        kills.ask(7, &session, 20, &requester(2), &second);
        let kill = kills.of(7, &session).unwrap();
        assert_eq!((kill.asked_ns, kill.by.pid), (10, 1));
        kills.failed(7, &session, "locked");
        let failed = KillResult::Failed("locked".to_owned());
        assert_eq!(told(&mut to_first), std::slice::from_ref(&failed));
        assert_eq!(told(&mut to_second), [failed]);
        // The reset is tried again; a client that asks now gets the next result.
        kills.ask(7, &session, 30, &requester(3), &second);
        kills.ended(7, &session, &KillResult::Reset);
        assert_eq!(told(&mut to_first), []);
        assert_eq!(told(&mut to_second), [KillResult::Reset]);
        assert!(kills.of(7, &session).is_none());
    }

    #[test]
    fn another_session_of_the_same_socket_is_another_one() {
        let (mut kills, first) = (Kills::default(), session());
        let second = Session {
            established_ns: first.established_ns + 1,
            ..first
        };
        let (results, mut told_of) = unbounded_channel();
        kills.ask(7, &first, 10, &requester(1), &results);
        assert!(kills.of(7, &second).is_none());
        kills.ended(7, &second, &KillResult::Reset);
        assert_eq!(told(&mut told_of), []);
        kills.ask(7, &second, 20, &requester(1), &results);
        assert_eq!(told(&mut told_of), [KillResult::Gone]);
        assert_eq!(kills.of(7, &second).unwrap().asked_ns, 20);
        kills.forgotten(7);
        assert_eq!(told(&mut told_of), [KillResult::Gone]);
    }
}
