//! Whole hosts: what only a machine of its own can show. `cargo xtask vm` runs these in virtual
//! machines; everywhere else they fail.
