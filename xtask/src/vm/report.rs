//! The results of each test on each kernel, as a table and as JSON.

use std::fmt::Write as _;

use serde::Serialize;

use super::plan::{End, Outcome};

/// The results of one kernel.
#[derive(Debug, Serialize)]
pub(super) struct Results {
    /// The kernel's name in the matrix.
    pub(super) kernel: String,
    /// The kernel's `uname -r`.
    pub(super) release: String,
    /// Whether a failure on this kernel fails the run.
    pub(super) must_pass: bool,
    /// The reason if results are missing.
    pub(super) error: Option<String>,
    /// The duration from the start of the machine to its end.
    pub(super) seconds: f64,
    pub(super) programs: Vec<Ran>,
}

impl Results {
    /// The result for a kernel that could not be fetched.
    pub(super) fn unfetched(name: &str, must_pass: bool, error: &anyhow::Error) -> Self {
        Self::untried(name, format!("{name} (not fetched)"), must_pass, error)
    }

    /// The result for a kernel on which nothing could be tested.
    pub(super) fn untried(
        name: &str,
        release: String,
        must_pass: bool,
        error: &anyhow::Error,
    ) -> Self {
        Self {
            kernel: name.to_owned(),
            release,
            must_pass,
            error: Some(format!("{error:#}")),
            seconds: 0.0,
            programs: Vec::new(),
        }
    }
}

/// The results of one program.
#[derive(Debug, Serialize)]
pub(super) struct Ran {
    pub(super) name: String,
    pub(super) seconds: f64,
    /// How it ended, if the results of its tests do not explain it.
    pub(super) end: Option<String>,
    pub(super) passed: Vec<String>,
    pub(super) failed: Vec<String>,
}

impl Results {
    /// Whether all programs ran and passed.
    pub(super) fn is_green(&self) -> bool {
        self.error.is_none() && self.programs.iter().all(Ran::is_green)
    }

    fn counts(&self) -> (usize, usize) {
        let count = |of: fn(&Ran) -> usize| self.programs.iter().map(of).sum();
        (count(|ran| ran.passed.len()), count(Ran::failures))
    }
}

impl Ran {
    /// Combines the output of a program with its exit.
    pub(super) fn new(outcome: &Outcome, log: &str) -> Self {
        // Of a module, all have its name before theirs.
        let module = format!("{}::", outcome.name);
        let of = |result: &str| -> Vec<String> {
            log.lines()
                .filter_map(|line| test_of(line, result))
                .map(|test| match test.strip_prefix(&module) {
                    Some(name) => name.to_owned(),
                    None => test,
                })
                .collect()
        };
        let (passed, failed) = (of("ok"), of("FAILED"));
        let told = match outcome.end {
            End::Exit(0) => {
                failed.is_empty() && !passed.is_empty() && log.contains("test result: ok")
            }
            // libtest exits with this status if a test failed.
            End::Exit(101) => !failed.is_empty(),
            _ => false,
        };
        Self {
            name: outcome.name.clone(),
            seconds: outcome.seconds,
            end: (!told).then(|| {
                if passed.is_empty() && outcome.end == End::Exit(0) {
                    "no test ran: none has such a name".to_owned()
                } else {
                    shown(outcome.end)
                }
            }),
            passed,
            failed,
        }
    }

    fn is_green(&self) -> bool {
        self.failures() == 0
    }

    fn failures(&self) -> usize {
        self.failed.len().max(usize::from(self.end.is_some()))
    }
}

/// The test for which a line of libtest reports this result.
fn test_of(line: &str, result: &str) -> Option<String> {
    let (name, said) = line.strip_prefix("test ")?.rsplit_once(" ... ")?;
    // libtest appends a note to the name of a test that must panic.
    let name = name.split(" - ").next().unwrap_or(name);
    (said == result).then(|| name.to_owned())
}

fn shown(end: End) -> String {
    match end {
        End::Exit(status) => format!("exit status {status}"),
        End::Signal(signal) => format!("killed by signal {signal}"),
        End::TimeLimit => "not finished in its time".to_owned(),
    }
}

/// The results of one program in one line.
pub(super) fn line(ran: &Ran) -> String {
    let summary = summary(ran.passed.len(), ran.failures());
    format!("{} {summary} ({:.0} s)", ran.name, ran.seconds)
}

/// A table with one column per kernel and one row per program, followed by the names of failures.
pub(super) fn table(all: &[Results]) -> String {
    let mut names: Vec<&str> = Vec::new();
    for ran in all.iter().flat_map(|results| &results.programs) {
        if !names.contains(&ran.name.as_str()) {
            names.push(&ran.name);
        }
    }
    names.sort_unstable();
    let first = names
        .iter()
        .map(|name| name.len())
        .max()
        .unwrap_or(0)
        .max(8);
    let mut text = row("", first, all.iter().map(|results| short(&results.release)));
    for name in names {
        let cells = all.iter().map(|results| cell(results, name));
        text += &row(name, first, cells);
    }
    let sums = all.iter().map(|results| {
        let (passed, failed) = results.counts();
        summary(passed, failed)
    });
    text += &row("all", first, sums);
    let times = all
        .iter()
        .map(|results| format!("{:.0} s", results.seconds));
    text += &row("time", first, times);
    text + &failures(all)
}

fn row(name: &str, first: usize, cells: impl Iterator<Item = String>) -> String {
    let mut line = format!("{name:<first$}");
    for cell in cells {
        write!(line, "  {cell:>14}").expect("a String takes everything");
    }
    line + "\n"
}

/// `6.12.107+deb13-cloud-amd64` without the part that all releases share.
fn short(release: &str) -> String {
    let version = release.split("-cloud-").next();
    version.unwrap_or(release).to_owned()
}

fn cell(results: &Results, name: &str) -> String {
    let ran = results.programs.iter().find(|ran| ran.name == name);
    ran.map_or_else(
        || "-".to_owned(),
        |ran| summary(ran.passed.len(), ran.failures()),
    )
}

fn summary(passed: usize, failed: usize) -> String {
    if failed == 0 {
        format!("{passed} ok")
    } else {
        format!("{passed} ok, {failed} bad")
    }
}

fn failures(all: &[Results]) -> String {
    let mut text = String::new();
    for results in all {
        let mut say = |what: &str| {
            writeln!(text, "{}: {what}", short(&results.release))
                .expect("a String takes everything");
        };
        if let Some(error) = &results.error {
            say(error);
        }
        for ran in &results.programs {
            for test in &ran.failed {
                say(&format!("{}::{test} failed", ran.name));
            }
            if let Some(end) = &ran.end {
                say(&format!("{}: {end}", ran.name));
            }
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(end: End) -> Outcome {
        Outcome {
            name: "gate".to_owned(),
            end,
            seconds: 1.0,
        }
    }

    const LOG: &str = "\nrunning 2 tests\ntest gate::a_thing ... ok\ntest gate::another - should panic ... FAILED\n\n\
                       test result: FAILED. 1 passed; 1 failed;\n";

    #[test]
    fn a_failed_test_is_named_and_the_exit_status_explained_by_it() {
        let ran = Ran::new(&outcome(End::Exit(101)), LOG);
        assert_eq!(
            (ran.passed.len(), &ran.failed[..]),
            (1, &["another".to_owned()][..])
        );
        assert_eq!(ran.end, None);
        assert!(!ran.is_green());
    }

    #[test]
    fn a_program_whose_exit_contradicts_its_tests_has_failed() {
        let green = "test a_thing ... ok\n\ntest result: ok. 1 passed;\n";
        assert!(Ran::new(&outcome(End::Exit(0)), green).is_green());
        for (end, log) in [
            (End::Exit(0), "test a_thing ... ok\n"),
            (End::Exit(0), "\ntest result: ok. 0 passed;\n"),
            (End::Exit(101), green),
            (End::Signal(11), green),
            (End::TimeLimit, "test a_thing ... ok\n"),
        ] {
            assert!(!Ran::new(&outcome(end), log).is_green(), "{end:?}");
        }
    }

    #[test]
    fn the_table_has_a_column_a_kernel_and_names_what_failed() {
        let results = |release: &str, ran| Results {
            kernel: String::new(),
            release: release.to_owned(),
            must_pass: true,
            error: None,
            seconds: 61.0,
            programs: vec![ran],
        };
        let all = [
            results(
                "6.1.0-50-cloud-amd64",
                Ran::new(&outcome(End::Exit(101)), LOG),
            ),
            results(
                "7.3-cloud-amd64",
                Ran::new(
                    &outcome(End::Exit(0)),
                    "test a_thing ... ok\ntest result: ok.",
                ),
            ),
        ];
        assert_eq!(
            table(&all),
            "                6.1.0-50             7.3\n\
             gate         1 ok, 1 bad            1 ok\n\
             all          1 ok, 1 bad            1 ok\n\
             time                61 s            61 s\n\
             6.1.0-50: gate::another failed\n"
        );
    }
}
