//! `cargo xtask bench`: measures the cost and the precision of session-enforcer, compared with its peers.
//!
//! Every figure is the median over several rounds, with the quartiles. In each round the compared programs
//! take turns, and ratios are computed within a round. Slow results do not fail the run: the table shows
//! whether a budget is met, and the exit status only whether everything ran.

mod bpf;
mod crowd;
mod crowded;
mod exact;
mod idle;
mod live;
mod machine;
mod party;
mod per_packet;
mod process;
mod report;
mod start;
mod statistics;
mod traffic;
mod worker;

use std::{env, fs, path::PathBuf, process::ExitCode, time::Instant};

use anyhow::{Context as _, Result, bail};
use serde_json::json;
use session_enforcer_tests::{Interrupted, Stop};

use crate::{
    machine::Machine,
    report::{Row, Section},
};

/// A benchmark: its name, its description, its function.
struct Benchmark {
    name: &'static str,
    about: &'static str,
    run: fn(&Bench) -> Result<Vec<Row>>,
}

const fn benchmark(
    name: &'static str,
    about: &'static str,
    run: fn(&Bench) -> Result<Vec<Row>>,
) -> Benchmark {
    Benchmark { name, about, run }
}

const ALL: [Benchmark; 12] = [
    benchmark(
        "per-packet",
        "time of one program run, in ns above a null program on the same hook",
        per_packet::run,
    ),
    benchmark(
        "round-trip",
        "one byte in each direction over one connection, all on one processor",
        traffic::round_trips,
    ),
    benchmark(
        "connect",
        "establish a connection, send one byte and close it, all on one processor",
        traffic::connections,
    ),
    benchmark(
        "bulk",
        "data in one direction over one connection, all on one processor",
        traffic::bulk,
    ),
    benchmark(
        "lateness",
        "sessions with deadlines spread evenly over some seconds",
        exact::lateness,
    ),
    benchmark(
        "instant",
        "20,000 sessions with the same deadline",
        exact::instant,
    ),
    benchmark("idle", "cost of sessions without traffic", idle::run),
    benchmark(
        "start",
        "time from the daemon's start until it has attached and adopted everything",
        start::start,
    ),
    benchmark(
        "reload",
        "time from SIGHUP until the new policy is in force for all sessions",
        start::reload,
    ),
    benchmark(
        "live",
        "`list` and `top` of 100,000 sessions while others reach their deadlines",
        live::run,
    ),
    benchmark(
        "growth",
        "sessions that reach their deadlines while the session table grows",
        live::growth,
    ),
    benchmark(
        "crowded",
        "starts, reloads and resets on a host with 180,000 descriptors, 1,000 network namespaces, 16,000 cgroups",
        crowded::run,
    ),
];

/// The common parameters of all benchmarks.
pub(crate) struct Bench {
    /// The path of the agent's binary.
    pub(crate) agent: PathBuf,
    /// Whether to run the short version.
    pub(crate) quick: bool,
    /// The processor for everything whose latency is compared.
    pub(crate) cpu: usize,
    /// Ctrl-C.
    pub(crate) stop: Stop,
}

impl Bench {
    /// Returns the first value in the short version, otherwise the second.
    pub(crate) fn pick<T>(&self, quick: T, full: T) -> T {
        if self.quick { quick } else { full }
    }
}

#[derive(Default)]
struct Args {
    quick: bool,
    list: bool,
    json: Option<PathBuf>,
    names: Vec<String>,
}

impl Args {
    fn parse(mut words: impl Iterator<Item = String>) -> Result<Self> {
        let mut args = Self::default();
        while let Some(word) = words.next() {
            match word.as_str() {
                "--quick" => args.quick = true,
                "--list" => args.list = true,
                "--json" => args.json = Some(words.next().context("--json needs a FILE")?.into()),
                flag if flag.starts_with('-') => bail!("unknown flag {flag}"),
                _ => args.names.push(word),
            }
        }
        Ok(args)
    }

    /// The benchmarks whose names contain one of the words. Without words, all.
    fn chosen(&self) -> Vec<&'static Benchmark> {
        let is_named = |benchmark: &Benchmark| {
            let mut names = self.names.iter();
            names.any(|name| benchmark.name.contains(name.as_str()))
        };
        let mut chosen: Vec<&Benchmark> = ALL.iter().collect();
        chosen.retain(|benchmark| self.names.is_empty() || is_named(benchmark));
        chosen
    }
}

fn main() -> ExitCode {
    let mut words = env::args().skip(1).peekable();
    let done = if words.next_if_eq(worker::ARGUMENT).is_some() {
        worker::serve()
    } else {
        Args::parse(words).and_then(|args| perform(&args))
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn perform(args: &Args) -> Result<()> {
    let chosen = args.chosen();
    if args.list {
        for benchmark in chosen {
            println!("{:12} {}", benchmark.name, benchmark.about);
        }
        return Ok(());
    }
    if chosen.is_empty() {
        bail!("no benchmark has a matching name; --list prints the names");
    }
    let own = env::current_exe()?;
    let bench = Bench {
        agent: own.with_file_name("session-enforcer-test-agent"),
        quick: args.quick,
        cpu: process::pinned_cpu()?,
        stop: Stop::listen()?,
    };
    let machine = Machine::find()?;
    println!("{}\n", machine.sentence());
    let mut sections = Vec::new();
    for benchmark in chosen {
        match measure(benchmark, &bench) {
            Ok(section) => {
                println!("{}", section.table());
                sections.push(section);
            }
            // Write the measurements that were made before the interruption.
            Err(error) => {
                write_json(args, &machine, &sections)?;
                return Err(error);
            }
        }
    }
    write_json(args, &machine, &sections)?;
    let failed = sections.iter().filter(|section| section.rows.is_err());
    let failed: Vec<_> = failed.map(|section| section.name).collect();
    if !failed.is_empty() {
        bail!("these benchmarks failed: {}", failed.join(", "));
    }
    Ok(())
}

/// Runs one benchmark. Its failure becomes part of the report, and the others still run.
fn measure(benchmark: &'static Benchmark, bench: &Bench) -> Result<Section> {
    eprintln!("measuring {}", benchmark.name);
    let start = Instant::now();
    let rows = match (benchmark.run)(bench) {
        Err(error) if error.is::<Interrupted>() => return Err(error),
        rows => rows.map_err(|error| format!("{error:#}")),
    };
    bench.stop.check()?;
    Ok(Section {
        name: benchmark.name,
        about: benchmark.about,
        rows,
        seconds: start.elapsed().as_secs_f64(),
    })
}

fn write_json(args: &Args, machine: &Machine, sections: &[Section]) -> Result<()> {
    let Some(path) = &args.json else {
        return Ok(());
    };
    let sections: Vec<_> = sections.iter().map(Section::json).collect();
    let text = serde_json::to_string_pretty(&json!({
        "quick": args.quick,
        "machine": machine.json(),
        "benchmarks": sections,
    }))?;
    fs::write(path, text + "\n").with_context(|| format!("writing {}", path.display()))?;
    println!("{}", path.display());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(words: &str) -> Result<Args> {
        Args::parse(words.split_whitespace().map(str::to_owned))
    }

    fn names(args: &Args) -> Vec<&str> {
        let chosen = args.chosen();
        chosen.iter().map(|benchmark| benchmark.name).collect()
    }

    #[test]
    fn benchmarks_are_chosen_by_parts_of_their_names() {
        assert_eq!(names(&parse("--quick").unwrap()).len(), ALL.len());
        let args = parse("packet --json f late").unwrap();
        assert_eq!(names(&args), ["per-packet", "lateness"]);
        assert_eq!(args.json, Some(PathBuf::from("f")));
        assert!(names(&parse("nothing").unwrap()).is_empty());
    }

    #[test]
    fn an_unknown_argument_is_refused() {
        assert!(parse("--fast").is_err());
        assert!(parse("--json").is_err());
    }
}
