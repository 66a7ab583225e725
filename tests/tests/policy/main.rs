//! Which rule decides about which session: its conditions, cgroups, owners and network namespaces, what `explain` says of
//! that, and a policy that only observes.

mod cgroups;
mod explain;
mod namespaces;
mod observe;
mod owner_cases;
mod rules;
