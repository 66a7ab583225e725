//! Growth of the session table while the programs run: when the table is half full, a larger one replaces it.
//! `docs/design/session-table.md` describes the steps.

use std::{rc::Rc, time::Duration};

use anyhow::Result;
use tokio::time::sleep;

use super::{ask, context::Context, reload};
use crate::{exit, reaper::diag::MAX_BATCH};

/// Number of copies of the sessions before the larger table is used. The second copy transfers what passed during the
/// first.
const COPIES: usize = 2;

/// Pause after a failed attempt to grow.
const REST: Duration = Duration::from_secs(60);

/// Starts the growth if the table is half full.
pub(super) fn begin_if_half_full(context: &Rc<Context>) {
    let is_due = {
        let state = context.state();
        let is_half_full = 2 * state.tracker.len() > state.datapath.capacity();
        state.is_enforcing && is_half_full && state.datapath.can_grow()
    };
    if is_due && !context.is_growing.replace(true) {
        let grown = grow(Rc::clone(context));
        context.spawn(grown);
    }
}

async fn grow(context: Rc<Context>) -> Result<()> {
    while let Err(error) = fill_larger(&context).await {
        tracing::warn!(
            "the session table could not grow; the daemon tries again in a minute: {}",
            exit::causes(&error)
        );
        if let Err(error) = context.state().datapath.give_up_growth() {
            tracing::warn!("the unfinished larger session table could not be removed: {error}");
        }
        // During the pause the table counts as one that cannot grow, so a full table is reported as full.
        sleep(REST).await;
    }
    change_over(&context).await?;
    context.is_growing.set(false);
    Ok(())
}

/// Creates a larger table and copies the sessions to it. The table in use is not changed.
async fn fill_larger(context: &Rc<Context>) -> Result<()> {
    let loading = {
        let state = context.state();
        let sessions = state.tracker.len();
        tracing::info!(
            "the session table is made larger: {sessions} sessions are half of its room"
        );
        state.datapath.load_larger()?
    };
    let larger = loading.finished().await?;
    context.state().datapath.begin_growth(larger)?;
    for _ in 0..COPIES {
        let cookies = context.state().datapath.cookies()?;
        for some in cookies.chunks(MAX_BATCH) {
            context.state().datapath.copy_to_larger(some)?;
            tokio::task::yield_now().await;
        }
    }
    Ok(())
}

/// Replaces the table in use with the larger one. If that fails, the engine fails, and the next daemon continues with
/// the existing records.
async fn change_over(context: &Rc<Context>) -> Result<()> {
    {
        let mut state = context.state();
        state.put_gates(false)?;
        state.datapath.change_over()?;
    }
    // A program of the previous table may still be processing a packet.
    ask::wait_for_programs(context).await;
    merge_previous(context).await?;
    {
        let mut state = context.state();
        state.datapath.end_growth()?;
        state.put_gates(true)?;
        // The kernel has not reported sessions that ended before they were in the new table; a sync finds them.
        state.backlog.events = true;
        let capacity = state.datapath.capacity();
        tracing::info!("the session table has room for {capacity} sessions now");
    }
    reload::narrow_ports(context).await?;
    context.wake.notify_one();
    Ok(())
}

async fn merge_previous(context: &Rc<Context>) -> Result<()> {
    let cookies = context.state().datapath.cookies_before()?;
    for some in cookies.chunks(MAX_BATCH) {
        context.state().datapath.merge_previous(some)?;
        tokio::task::yield_now().await;
    }
    Ok(())
}
