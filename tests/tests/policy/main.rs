//! Which rule applies to a session: conditions, cgroups, owners, network namespaces, `explain`, and
//! observing rules.

mod cgroups;
mod explain;
mod namespaces;
mod observe;
mod owner_cases;
mod rules;
