//! The `session-enforcer` program.
fn main() {}
