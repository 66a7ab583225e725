//! What a decision about a connection costs in the kernel, by the number of match entries.
//!
//! `cargo build --release -p session-enforcer-tests --example matching_cost --bin
//! session-enforcer-test-agent`, then run `target/release/examples/matching_cost` as root. It measures
//! the programs that it attaches to a cgroup of its own, whatever is attached elsewhere; what else
//! runs shows in the spread. Everything runs on one CPU; the tables take turns, and each figure is
//! the median over the rounds with the spread. The kernel itself measures (`BPF_ENABLE_STATS`), so
//! every run of a program has the cost of two looks at the clock in it; the differences do not.

use std::{
    fs,
    net::Ipv4Addr,
    os::fd::{AsFd as _, AsRawFd as _},
};

use anyhow::{Context as _, Result, bail};
use aya::{
    programs::{ProgramInfo, loaded_programs},
    sys::{Stats, enable_stats},
};
use nix::{
    sched::{CpuSet, sched_setaffinity},
    unistd::Pid,
};
use session_enforcer::datapath::{Datapath, Options};
use session_enforcer_common::{Address, MatchEntry, PortRange, Prefix, RULE_EXEMPT};
use session_enforcer_tests::{Cgroup, Lab, Netns, Pair, Place, reset_on_close};

const ROUNDS: usize = 15;
const CONNECTIONS: u64 = 1_000;
const COUNTS: [usize; 4] = [0, 1, 16, 256];

/// Entries of which none applies but the last, which exempts: what costs is the decision alone.
fn table(count: usize, other: MatchEntry) -> Vec<MatchEntry> {
    let mut entries = vec![other; count.saturating_sub(1)];
    if count > 0 {
        entries.push(MatchEntry::any(RULE_EXEMPT));
    }
    entries
}

/// Differs at the first thing that is compared after the family.
fn other_port() -> MatchEntry {
    MatchEntry {
        local_ports: PortRange { first: 1, last: 1 },
        ..MatchEntry::any(0)
    }
}

/// Differs in the last of the addresses.
fn other_prefix() -> MatchEntry {
    let address = Address::from_ipv4(u32::from_ne_bytes([10, 0, 0, 1]));
    MatchEntry {
        remote: Prefix::new(address, 128),
        ..MatchEntry::any(0)
    }
}

/// Differs in the cgroup, which is compared last.
fn other_cgroup() -> MatchEntry {
    MatchEntry {
        cgroup_id: u64::MAX,
        ..MatchEntry::any(0)
    }
}

/// Nanoseconds in the program so far, and runs.
fn spent(program: &ProgramInfo) -> Result<[u64; 2]> {
    let fd = program.fd()?;
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_fd().as_raw_fd()))?;
    let field = |name: &str| -> Result<u64> {
        let mut lines = info.lines();
        let value = lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        Ok(value.context("bpf statistics in fdinfo")?.trim().parse()?)
    };
    Ok([field("run_time_ns")?, field("run_cnt")?])
}

/// The program of this name that is attached to the cgroup, which is the measurement's own.
fn program(cgroup: &Cgroup, name: &str) -> Result<ProgramInfo> {
    let attached = cgroup.program_ids()?;
    for info in loaded_programs() {
        let info = info?;
        if attached.contains(&info.id()) && info.name_as_str() == Some(name) {
            return Ok(info);
        }
    }
    bail!("{name} is not attached to {}", cgroup.path().display())
}

/// The median, and the middle half of the values around it.
fn summary(mut values: Vec<f64>) -> String {
    values.sort_by(f64::total_cmp);
    let at = |share: usize| values[(values.len() - 1) * share / 4];
    format!("{:6.0} ns  ({:.0} to {:.0})", at(2), at(1), at(3))
}

fn main() -> Result<()> {
    let mut cpus = CpuSet::new();
    cpus.set(0)?;
    sched_setaffinity(Pid::from_raw(0), &cpus)?;
    // Until the end of this process, however it comes.
    let _stats = enable_stats(Stats::RunTime)?;
    let agent = std::env::current_exe()?;
    let target = agent.ancestors().nth(2).context("a target directory")?;
    let lab = Lab::new(target.join("session-enforcer-test-agent"))?;
    let netns = Netns::new()?;
    let place = Place::here().in_netns(&netns).in_cgroup(&lab.cgroup);
    let agent = lab.at(&place)?;
    let mut kernel = Datapath::load(
        Options {
            max_sessions: 1024,
            only_netns: None,
            notes_owners: true,
            verbose: false,
        },
        None,
    )?;
    kernel.attach(&session_enforcer::host::cgroup::Cgroup::open(
        lab.cgroup.path(),
    )?)?;
    let lifecycle = program(&lab.cgroup, "track_lifecycle")?;
    let owner = program(&lab.cgroup, "note_owner")?;
    let listener = agent.listen((Ipv4Addr::LOCALHOST, 0))?;
    let kinds = [
        ("port", other_port()),
        ("address", other_prefix()),
        ("cgroup", other_cgroup()),
    ];
    let mut generation = 0;
    let mut costs = vec![vec![Vec::new(); COUNTS.len()]; kinds.len()];
    let mut notes = Vec::new();
    for _ in 0..ROUNDS {
        for ((_, other), costs) in kinds.iter().zip(&mut costs) {
            let mut nothing = 0.0;
            for (count, costs) in COUNTS.iter().zip(costs) {
                generation += 1;
                kernel.put_policy(generation, &table(*count, *other), &[])?;
                let (start, notes_start) = (spent(&lifecycle)?, spent(&owner)?);
                for _ in 0..CONNECTIONS {
                    let pair = Pair::open(&agent, &listener)?;
                    reset_on_close(&pair.client)?;
                    reset_on_close(&pair.server)?;
                }
                let (end, notes_end) = (spent(&lifecycle)?, spent(&owner)?);
                // Both ends of each are decided about.
                let per_decision = (end[0] - start[0]) as f64 / (2 * CONNECTIONS) as f64;
                if *count == 0 {
                    nothing = per_decision;
                    costs.push(per_decision);
                } else {
                    costs.push(per_decision - nothing);
                }
                let runs = (notes_end[1] - notes_start[1]).max(1);
                notes.push((notes_end[0] - notes_start[0]) as f64 / runs as f64);
            }
        }
    }
    println!("{ROUNDS} rounds of {CONNECTIONS} connections; median (middle half)");
    println!("track_lifecycle, all its runs for one end:");
    for ((name, _), costs) in kinds.iter().zip(costs) {
        for (count, values) in COUNTS.iter().zip(costs) {
            let what = match count {
                0 => "no rule".to_owned(),
                _ => format!("+ {count} entries, differing in the {name}"),
            };
            println!("  {what:42} {}", summary(values));
        }
    }
    println!("note_owner, one run: {}", summary(notes));
    Ok(())
}
