//! Activation of policies: the first one and reloads.

use std::{
    collections::{BTreeSet, HashMap},
    rc::Rc,
};

use anyhow::{Context as _, Result};
use session_enforcer_common::Session;

use super::{
    ask,
    context::Context,
    owner_search::{self, look_up},
    phase::{Expired, Phase},
    rule_set::{RuleSet, TooManyRules},
    state::{Change, State},
    sync::{Aim, sync},
    tracker::group_of,
};
use crate::{
    config::{Config, OnFull, User},
    datapath::BpfError,
    engine::{
        owner_resolver::{FoundCgroups, UserError, Users, cgroup_names},
        schedule::Group,
    },
    host::clock::monotonic_ns,
    reaper::{
        diag::MAX_BATCH,
        protocol::{FoundUser, Reply, Request},
    },
    report::audit::{RequestedBy, Requester},
};

/// Why the program that records owners could not be attached. The engine has no right any more to ask for the others.
const NO_OWNERS: &str = "a rule names users or cgroups, which needs one more program on the cgroup; \
                         a program that was attached without BPF_F_ALLOW_MULTI forbids it \
                         (`bpftool cgroup show`)";

/// The effect of a policy change on the sessions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Redecided {
    /// Sessions that are still tracked.
    pub(super) kept: usize,
    /// Sessions that were tracked and that no rule matches any more.
    pub(super) released: usize,
    /// Sessions that were past a limit.
    pub(super) expired: usize,
}

/// Queries the uids of the user names in a configuration.
pub(super) async fn find_users(context: &Rc<Context>, config: &Config) -> Users {
    let names = config.rules.iter().flat_map(|rule| &rule.users);
    let names = names.filter_map(|user| match user {
        User::Name(name) => Some(name.clone()),
        User::Uid(_) => None,
    });
    let names: Vec<String> = names.collect::<BTreeSet<_>>().into_iter().collect();
    let mut users = HashMap::new();
    for some in names.chunks(MAX_BATCH) {
        let request = Request::Users {
            names: some.to_vec(),
        };
        match ask::ask(context, &request, None).await {
            Ok(replies) => {
                for (reply, _) in replies {
                    if let Reply::Users(found) = reply {
                        users.extend(some.iter().cloned().zip(found));
                    }
                }
            }
            Err(error) => {
                let failed = |name: &String| (name.clone(), FoundUser::Failed(error.clone()));
                users.extend(some.iter().map(failed));
            }
        }
    }
    users
}

/// Whether the error of [`change_policy`] refuses the policy, so that nothing has changed.
pub(super) fn is_refusal(error: &anyhow::Error) -> bool {
    let is_of_program =
        |error: &BpfError| matches!(error, BpfError::Attach { .. } | BpfError::Taken { .. });
    error.is::<TooManyRules>()
        || error.is::<UserError>()
        || error.downcast_ref().is_some_and(is_of_program)
}

/// Activates another policy and redecides every tracked session. The audit record names the requester.
///
/// # Errors
///
/// Fails if there are too many rules, a user does not exist, or the kernel refuses the policy; nothing has changed
/// then. Also fails if the session table cannot be read.
pub(super) async fn change_policy(
    context: &Rc<Context>,
    config: &Config,
    by: Option<&Requester>,
) -> Result<Redecided> {
    let users = find_users(context, config).await;
    let cgroups = look_up(context, &cgroup_names(config)).await;
    context.read_events()?;
    {
        let mut state = context.state();
        let (asked, asks) = (state.datapath.notes_owners(), config.asks_owner());
        // Attached before a rule needs it, so that the owners of all new sockets are recorded.
        let noted = state.datapath.note_owners(asked || asks, &context.cgroup);
        noted.context(NO_OWNERS)?;
        let before = state.put_policy(config, &users, cgroups.as_ref());
        let asks = if before.is_ok() { asks } else { asked };
        state.datapath.note_owners(asks, &context.cgroup)?;
        let before = before?;
        let user = by.and_then(|by| state.owner_resolver.user_name(by.uid));
        let user = user.map(str::to_owned);
        let by = by.map(|requester| RequestedBy {
            requester,
            user: user.as_deref(),
        });
        state.records.policy_loaded(config, by);
        state.records.audit.flush();
        let at_ns = monotonic_ns();
        state.change = Some(Change { before, at_ns });
    }
    let redecided = redecide(context).await;
    context.state().change = None;
    narrow_ports(context).await?;
    context.wake.notify_one();
    redecided
}

/// Activates the packet filter of the active rules, after the sessions of the previous policy were redecided.
///
/// # Errors
///
/// Fails if a map cannot be read or written.
pub(super) async fn narrow_ports(context: &Rc<Context>) -> Result<()> {
    let (mut narrowing, cookies) = {
        let state = context.state();
        (state.datapath.begin_narrowing(), state.datapath.cookies()?)
    };
    for some in cookies.chunks(MAX_BATCH) {
        context.state().datapath.keep_ports(&mut narrowing, some)?;
        tokio::task::yield_now().await;
    }
    Ok(context.state().datapath.narrow_ports(&narrowing)?)
}

/// Adopts connections that no rule of the previous policy matched. Those past a limit are late by the policy change.
///
/// # Errors
///
/// See [`sync`].
pub(super) async fn adopt_by_change(context: &Rc<Context>) -> Result<usize> {
    let aim = Aim {
        adopts: true,
        is_thorough: true,
        by_change: true,
        ..Aim::default()
    };
    sync(context, aim).await
}

/// Redecides all sessions. Late ones become due, and the following passes terminate them.
async fn redecide(context: &Rc<Context>) -> Result<Redecided> {
    let mut redecided = Redecided::default();
    let cookies = context.state().datapath.cookies()?;
    let mut open = Vec::new();
    for some in cookies.chunks(MAX_BATCH) {
        {
            let mut state = context.state();
            let now_ns = monotonic_ns();
            let mut read = Vec::with_capacity(some.len());
            for (cookie, session) in some.iter().zip(state.datapath.sessions(some)?) {
                let Some(session) = session else {
                    continue;
                };
                read.push((*cookie, session));
                if state.is_in_other_hands(*cookie, &session) {
                    redecided.kept += 1;
                    continue;
                }
                state.reschedule(*cookie, &session);
                if state.needs_owner(*cookie, &session) {
                    open.push((*cookie, session));
                    continue;
                }
                let expired = state.judge(*cookie, Some(session), now_ns)?;
                state.note_redecided(&mut redecided, *cookie, expired);
            }
            state.write_rules(read)?;
        }
        context.wake.notify_one();
        tokio::task::yield_now().await;
    }
    let asked = open.len();
    let resolved = owner_search::resolve(context, open).await?;
    // Sessions that have ended meanwhile.
    redecided.released += asked - resolved.len();
    for (cookie, session) in resolved {
        let mut state = context.state();
        let now_ns = monotonic_ns();
        let Some(now) = state.still_there(cookie, &session)? else {
            state.forget_unless_another(cookie, &session)?;
            redecided.released += 1;
            continue;
        };
        let expired = state.judge(cookie, Some(now), now_ns)?;
        state.note_redecided(&mut redecided, cookie, expired);
    }
    Ok(redecided)
}

/// Redecides the sessions of these cgroups and their descendants; returns their number.
///
/// # Errors
///
/// Fails if the session table cannot be read or written.
pub(super) async fn redecide_below(context: &Rc<Context>, cgroups: &[u64]) -> Result<usize> {
    let cookies = context.state().datapath.cookies()?;
    let mut open = Vec::new();
    for some in cookies.chunks(MAX_BATCH) {
        {
            let state = context.state();
            for (cookie, session) in some.iter().zip(state.datapath.sessions(some)?) {
                let Some(session) = session else {
                    continue;
                };
                let above = state.ancestors_of(session.owner.cgroup_id);
                let is_below = |id: &u64| above.is_some_and(|above| above.contains(*id));
                if cgroups.iter().any(is_below) && !state.is_in_other_hands(*cookie, &session) {
                    open.push((*cookie, session));
                }
            }
        }
        tokio::task::yield_now().await;
    }
    let count = open.len();
    for (cookie, _) in owner_search::resolve(context, open).await? {
        context.state().tracker.rearm(cookie, 0);
    }
    context.wake.notify_one();
    Ok(count)
}

impl State {
    /// Activates the rules of a configuration completely or not at all; returns the previous policy.
    ///
    /// # Errors
    ///
    /// Fails if there are too many rules, a user does not exist, or the kernel refuses the policy.
    pub(super) fn put_policy(
        &mut self,
        config: &Config,
        users: &Users,
        cgroups: Option<&FoundCgroups>,
    ) -> Result<RuleSet> {
        let found = self.owner_resolver.resolve(config, users, cgroups)?;
        let next = self.rule_set.next(config, &found.owners)?;
        self.datapath
            .put_policy(next.generation, &next.entries, &next.limits_of_rules())?;
        self.owner_resolver.keep(found);
        self.records.metrics.set_rules(&next.names());
        self.in_force_since_ns = monotonic_ns();
        self.backlog.set_interval(config.reconcile_interval);
        self.backlog.resets = config.on_full == OnFull::Reset;
        Ok(std::mem::replace(&mut self.rule_set, next))
    }

    /// Writes the rules of sessions into records that still have the previous policy, because the programs count
    /// sessions by the rule in the record.
    pub(super) fn write_rules(&mut self, mut sessions: Vec<(u64, Session)>) -> Result<()> {
        let generation = self.rule_set.generation;
        sessions.retain_mut(|(_, session)| {
            let is_of_before = session.generation != 0 && session.generation != generation;
            if !is_of_before || self.rule_set.needs_owner_of(session) {
                return false;
            }
            let rule = self.rule_of(session);
            (session.rule, session.generation) = (rule.unwrap_or_default(), generation);
            rule.is_some()
        });
        Ok(self.datapath.decide(&sessions)?)
    }

    /// Whether a reaper or a sync is handling the session.
    fn is_in_other_hands(&self, cookie: u64, session: &Session) -> bool {
        let phase = self.tracker.phase(cookie, session);
        phase.is_some_and(Phase::is_in_other_hands)
    }

    /// Counts the result for a session; a late one becomes due.
    fn note_redecided(&mut self, redecided: &mut Redecided, cookie: u64, expired: Option<Expired>) {
        match expired {
            Some(expired) => {
                redecided.expired += 1;
                self.make_due(&expired);
            }
            None if self.tracker.contains(cookie) => redecided.kept += 1,
            None => redecided.released += 1,
        }
    }

    fn make_due(&mut self, expired: &Expired) {
        if expired.reason == session_enforcer_common::Reason::Policy {
            let late = Phase::LateByPolicy {
                changed_ns: expired.deadline_ns,
                reached_ns: expired.reached_ns,
            };
            self.tracker
                .set_phase(expired.cookie, &expired.session, late);
        }
        self.tracker.rearm(expired.cookie, 0);
    }

    /// Moves a session to its current rule, without a due time.
    fn reschedule(&mut self, cookie: u64, session: &Session) {
        let before = self.tracker.group(cookie).map(|group| group.rule);
        let rule = self.provisional_rule(session).or(before);
        let rule = rule.unwrap_or(session.rule);
        let group = Group {
            rule,
            ..group_of(session)
        };
        self.tracker.add(cookie, group, u64::MAX);
    }
}
