//! The cgroups that the rules name. Reapers look them up: a directory can have any number of entries, and whoever may
//! create a cgroup in it decides how often it must be read.

use std::rc::Rc;

use anyhow::Result;

use super::{
    Reload,
    context::Context,
    owner_search,
    reload::{narrow_ports, redecide_below},
    sync,
};
use crate::{engine::owner_resolver::FoundCgroups, host::watch::Watch};

/// Maximum number of lookups in a row until all directories in which such a cgroup can appear are watched.
const MAX_ROUNDS: usize = 8;

/// Looks up the cgroups of the active rules, watches for others, and handles those that have come.
///
/// # Errors
///
/// Fails if the session table or the policy cannot be read or written.
pub(super) async fn follow(context: &Rc<Context>, reload: &Reload, watch: &Watch) -> Result<()> {
    let (names, generation) = {
        let state = context.state();
        (
            state.owner_resolver.cgroup_names(),
            state.rule_set.generation,
        )
    };
    let mut found = FoundCgroups::default();
    for _ in 0..MAX_ROUNDS {
        let looked_up = owner_search::look_up(context, &names).await;
        let Some(looked_up) = looked_up else {
            reload.has_changed.set(true);
            return Ok(());
        };
        found = looked_up;
        match watch.set(&found.watch_directories) {
            // Another one may have come before its directory was watched.
            Ok(is_new) => {
                context.state().note_watch(None);
                if !is_new {
                    break;
                }
            }
            Err(error) => {
                // The next lookup tries again, and finds what has come meanwhile.
                context.state().note_watch(Some(&error));
                reload.has_changed.set(true);
                break;
            }
        }
    }
    let come = {
        let mut state = context.state();
        if state.rule_set.generation != generation {
            // A reload has looked them up since, for other rules.
            return Ok(());
        }
        state.owner_resolver.refresh(&found)
    };
    if come.is_empty() {
        return Ok(());
    }
    let followed = have_come(context, reload, &come).await;
    reload.has_changed.set(true);
    followed
}

/// Handles new cgroups: matches their sockets from now on, adopts their existing connections, and redecides connections
/// that a later rule has taken meanwhile.
async fn have_come(context: &Rc<Context>, reload: &Reload, come: &[u64]) -> Result<()> {
    // Sessions opened earlier must be known before the adoption.
    context.read_events()?;
    {
        let mut state = context.state();
        let state = &mut *state;
        // The policy keeps its generation, so decisions about other sessions stay valid.
        let config = reload.config.borrow();
        state
            .rule_set
            .set_owners(&config, state.owner_resolver.owners());
        let (entries, limits_of_rules) =
            (&state.rule_set.entries, state.rule_set.limits_of_rules());
        state
            .datapath
            .put_policy(state.rule_set.generation, entries, &limits_of_rules)?;
    }
    let redecided = redecide_below(context, come).await?;
    narrow_ports(context).await?;
    let aim = sync::Aim {
        adopts: true,
        ..sync::Aim::default()
    };
    let adopted = sync::sync(context, aim).await?;
    tracing::info!(
        "a cgroup that a rule names was created; {redecided} connections were matched again, {adopted} adopted"
    );
    Ok(())
}
