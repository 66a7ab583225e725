//! The start: sessions of an earlier daemon are scheduled and updated, the programs are attached, and untracked
//! connections are adopted. The loop runs meanwhile.

use std::rc::Rc;

use anyhow::Result;

use super::{
    ask,
    context::Context,
    reload,
    state::State,
    sync::{Aim, sync},
    unrecorded,
};
use crate::{
    datapath::Inherited, engine::schedule::Group, reaper::diag::MAX_BATCH,
    report::health::DegradedCause,
};

/// The sessions that a daemon starts with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Begun {
    /// Sessions of the earlier daemon.
    pub taken_over: usize,
    /// Adopted connections.
    pub adopted: usize,
}

/// Takes over the sessions of an earlier daemon and attaches the programs. From then on each new connection below the
/// cgroup is tracked, and due sessions are terminated.
///
/// # Errors
///
/// Fails if the kernel refuses a program, a map or a pin.
pub(super) async fn attach(context: &Rc<Context>) -> Result<usize> {
    let inherited = context.state().datapath.inherited();
    let is_stopped = inherited == Inherited::Stopped;
    let own = context.state().handles.own();
    let only = (!context.all_namespaces).then_some(own);
    if inherited != Inherited::Nothing {
        // Must come first: the next step releases sessions that no rule matches any more.
        unrecorded::recover(context).await?;
        context.state().schedule_inherited(only)?;
    }
    if is_stopped {
        // No program was attached since the earlier daemon ended. The records are updated so that no packet meets a
        // session with stamps of that time.
        catch_up(context).await?;
        // Packets until the attachment are not stamped, so the gate must not judge by these records.
        context.state().put_gates(false)?;
    }
    {
        let mut state = context.state();
        state.datapath.attach(&context.cgroup)?;
        state.datapath.compare_sessions()?;
    }
    if inherited != Inherited::Nothing {
        // The earlier programs may have opened sessions since, of which no event reaches this daemon.
        context.state().schedule_inherited(only)?;
        write_rules(context).await?;
    }
    if is_stopped {
        // Covers packets between the list of the sockets and the attachment.
        ask::wait_for_programs(context).await;
        catch_up(context).await?;
        context.state().put_gates(true)?;
    }
    // Sessions that had ended are not counted.
    let taken_over = {
        let mut state = context.state();
        state.is_enforcing = true;
        state.tracker.len()
    };
    context.state().records.metrics.taken_over(taken_over);
    context.wake.notify_one();
    Ok(taken_over)
}

/// Writes this daemon's rules into the inherited records. The earlier daemon's programs counted the sessions under its
/// rules; from now on this daemon's programs count them.
async fn write_rules(context: &Rc<Context>) -> Result<()> {
    let cookies = context.state().datapath.cookies()?;
    for some in cookies.chunks(MAX_BATCH) {
        {
            let mut state = context.state();
            let read = some.iter().copied().zip(state.datapath.sessions(some)?);
            let there = read.filter_map(|(cookie, session)| Some((cookie, session?)));
            let there = there.collect();
            state.write_rules(there)?;
        }
        tokio::task::yield_now().await;
    }
    Ok(())
}

async fn catch_up(context: &Rc<Context>) -> Result<()> {
    let aim = Aim {
        catches_up: true,
        is_thorough: true,
        ..Aim::default()
    };
    sync(context, aim).await.map(drop)
}

/// Adopts the untracked connections and makes this daemon's pins permanent.
///
/// # Errors
///
/// Fails if the kernel refuses a program, a map or a pin.
pub(super) async fn adopt(context: &Rc<Context>) -> Result<usize> {
    let (inherited, keeps_table) = {
        let state = context.state();
        (state.datapath.inherited(), state.datapath.keeps_table())
    };
    let aim = Aim {
        adopts: true,
        is_thorough: true,
        // No program has counted a session for which a smaller table has no room.
        repairs: inherited == Inherited::Running && keeps_table,
        releases_others: inherited != Inherited::Nothing,
        ..Aim::default()
    };
    let adopted = sync(context, aim).await?;
    context.state().datapath.commit()?;
    reload::narrow_ports(context).await?;
    let mut state = context.state();
    state.records.health.set(DegradedCause::NotAdopted, None);
    Ok(adopted)
}

impl State {
    /// Activates the current policy again, with or without gates.
    pub(super) fn put_gates(&mut self, stand: bool) -> Result<()> {
        let mut limits_of_rules = self.rule_set.limits_of_rules();
        if !stand {
            limits_of_rules
                .iter_mut()
                .for_each(|limits| limits.gate = 0);
        }
        let (generation, entries) = (self.rule_set.generation, &self.rule_set.entries);
        Ok(self
            .datapath
            .put_policy(generation, entries, &limits_of_rules)?)
    }

    /// Schedules every session in the table that is not scheduled, and releases those that no rule matches.
    fn schedule_inherited(&mut self, only_netns: Option<u64>) -> Result<()> {
        for cookie in self.datapath.cookies()? {
            if self.tracker.contains(cookie) {
                continue;
            }
            let Some(session) = self.datapath.session(cookie)? else {
                continue;
            };
            let netns_cookie = session.netns_cookie;
            let is_wanted = only_netns.is_none_or(|only| only == netns_cookie);
            let rule = self.provisional_rule(&session).filter(|_| is_wanted);
            let Some(rule) = rule else {
                self.datapath.remove(cookie, session.established_ns)?;
                self.forget(cookie);
                continue;
            };
            // Due at once: the first pass computes the deadline, terminates sessions that are already late, and has the
            // owners searched for of those that the earlier daemon had not decided about.
            self.tracker.add(cookie, Group { netns_cookie, rule }, 0);
        }
        Ok(())
    }
}
