//! `doctor`: prints the checks of [`probe`].

use std::io::{self, Write};

use serde_json::json;

use crate::{
    commands::probe::{self, Check},
    exit::ExitStatus,
};

/// Prints all checks for a daemon that enforces all network namespaces or only its own. Returns the exit
/// status that `run` would have.
///
/// # Errors
///
/// Fails if `out` cannot be written.
pub fn doctor(
    as_json: bool,
    all_namespaces: bool,
    out: &mut impl Write,
) -> io::Result<Option<ExitStatus>> {
    let checks = probe::all(all_namespaces);
    if as_json {
        print_json(&checks, out)?;
    } else {
        print_text(&checks, out)?;
    }
    Ok(checks
        .iter()
        .find_map(|check| check.problem.as_ref())
        .map(|problem| problem.status))
}

fn print_text(checks: &[Check], out: &mut impl Write) -> io::Result<()> {
    for check in checks {
        match (&check.problem, &check.warning) {
            (Some(problem), _) => writeln!(out, "MISSING  {problem}")?,
            (None, Some(warning)) => writeln!(out, "limited  {warning}")?,
            (None, None) => writeln!(out, "ok       {}: {}", check.name, check.found)?,
        }
    }
    Ok(())
}

fn print_json(checks: &[Check], out: &mut impl Write) -> io::Result<()> {
    let object = |check: &Check| {
        json!({
            "name": check.name,
            "ok": check.problem.is_none(),
            "found": check.found,
            "warning": check.warning,
            "problem": check.problem.as_ref().map(|problem| &problem.message),
        })
    };
    let all_is_well = checks.iter().all(|check| check.problem.is_none());
    let checks: Vec<_> = checks.iter().map(object).collect();
    writeln!(out, "{:#}", json!({ "ok": all_is_well, "checks": checks }))
}
