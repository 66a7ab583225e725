//! Random operations on real sockets, and a model that says for each session when it must end and
//! when it must not: see [`session_enforcer_tests::model`].
//!
//! `SESSION_ENFORCER_MODEL_OPERATIONS` sets the number of operations for each seed.
//! `SESSION_ENFORCER_SEED` sets the seed of the last of these tests, which otherwise uses a new one
//! each time.

use std::{
    env,
    io::{self, Write as _},
    path::Path,
};

use anyhow::{Context as _, Result};
use session_enforcer_tests::{SEED, model, seed};

const AGENT: &str = env!("CARGO_BIN_EXE_session-enforcer-test-agent");

/// The environment variable with the number of operations.
const OPERATIONS: &str = "SESSION_ENFORCER_MODEL_OPERATIONS";

fn run(seed: u64) -> Result<()> {
    let operations = match env::var(OPERATIONS) {
        Ok(text) => text.parse().context(OPERATIONS)?,
        Err(_) => model::DEFAULT_OPERATIONS,
    };
    let repeat =
        format!("{SEED}={seed} {OPERATIONS}={operations} cargo xtask test -- any_other_seed");
    let (done, showed) = model::run(Path::new(AGENT), seed, operations)
        .with_context(|| format!("to repeat this run: {repeat}"))?;
    // Writes past the output capture, because the numbers matter when the test passes, too.
    writeln!(io::stderr(), "seed {seed}, {done} operations: {showed}")?;
    Ok(())
}

#[test]
fn every_session_ends_as_the_model_says_with_the_first_seed() -> Result<()> {
    run(model::SEEDS[0])
}

#[test]
fn every_session_ends_as_the_model_says_with_the_second_seed() -> Result<()> {
    run(model::SEEDS[1])
}

#[test]
fn every_session_ends_as_the_model_says_with_the_third_seed() -> Result<()> {
    run(model::SEEDS[2])
}

#[test]
fn every_session_ends_as_the_model_says_with_any_other_seed() -> Result<()> {
    run(seed()?)
}
