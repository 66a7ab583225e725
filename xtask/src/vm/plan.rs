//! The plan of a virtual machine and its results, as files in the shared folder.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

/// The file of the plan.
pub(super) const PLAN: &str = "plan.json";
/// The file with an [`Outcome`] as a line of JSON for each ended program.
pub(super) const OUTCOMES: &str = "outcomes.json";
/// The file with the number of started boots.
pub(super) const BOOTS: &str = "boots";
/// The file with faults of the kernel or the guest. It exists only after a fault.
pub(super) const FAULTS: &str = "faults.txt";
/// The mark on this machine's kernel command line, which the tests of whole hosts require.
pub(super) const MARK: &str = "session_enforcer.vm=1";

/// The plan of one virtual machine.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Plan {
    /// The folder of the kernel's modules, which becomes `/lib/modules`.
    pub(super) modules: PathBuf,
    /// The complete environment of the programs.
    pub(super) environment: Vec<(String, String)>,
    /// The boots in order, with a restart of the machine after each.
    pub(super) boots: Vec<Boot>,
}

impl Plan {
    /// The number of the next boot, given the numbers of started boots and of ended programs. `None` while a
    /// boot runs, and after the last one.
    pub(super) fn awaited(&self, begun: usize, ended: usize) -> Option<usize> {
        let of_begun = self.boots.get(..begun)?.iter();
        let programs: usize = of_begun.map(|boot| boot.programs.len()).sum();
        (begun < self.boots.len() && ended >= programs).then_some(begun)
    }
}

/// One boot of the machine.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Boot {
    /// The cgroup mounts.
    pub(super) hierarchy: Hierarchy,
    /// Whether bpffs is mounted.
    pub(super) bpffs: bool,
    /// Whether `tcp_diag` can destroy sockets.
    pub(super) sock_destroy: bool,
    /// The number of programs that run at the same time.
    pub(super) at_once: usize,
    /// The test programs.
    pub(super) programs: Vec<Program>,
}

/// The layout of the cgroup file systems.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Hierarchy {
    /// Only cgroup v2, at `/sys/fs/cgroup`.
    Unified,
    /// cgroup v1 controllers, and cgroup v2 without controllers below them.
    Hybrid,
}

/// A test program and its arguments.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Program {
    /// The name of its output: `NAME.log`.
    pub(super) name: String,
    pub(super) path: PathBuf,
    pub(super) arguments: Vec<String>,
    /// The time limit in seconds, after which it is killed.
    pub(super) limit_seconds: u64,
}

impl Program {
    /// The path of its output in the shared folder.
    pub(super) fn log(&self, shared: &Path) -> PathBuf {
        shared.join(format!("{}.log", self.name))
    }
}

/// The result of a program.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Outcome {
    pub(super) name: String,
    pub(super) end: End,
    pub(super) seconds: f64,
}

/// The end of a program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum End {
    /// The program exited with this status.
    Exit(i32),
    /// Another process's signal killed the program.
    Signal(i32),
    /// The program was killed at its time limit.
    TimeLimit,
}

/// Parses the outcomes so far.
pub(super) fn outcomes(text: &str) -> Result<Vec<Outcome>> {
    // The last line may be incomplete.
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    whole
        .lines()
        .map(|line| serde_json::from_str(line).with_context(|| format!("no outcome: {line}")))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outcomes_are_read_as_they_are_written_and_a_half_line_is_left_for_later() {
        let outcome = Outcome {
            name: "idle".to_owned(),
            end: End::Exit(101),
            seconds: 1.5,
        };
        let line = serde_json::to_string(&outcome).expect("an outcome is JSON");
        let read = outcomes(&format!("{line}\n{}", &line[..7])).expect("one whole line");
        assert_eq!(read, [outcome]);
        assert!(outcomes("").expect("no line").is_empty());
        assert!(outcomes("{}\n").is_err());
    }

    #[test]
    fn a_boot_is_waited_for_once_all_programs_of_those_before_have_ended() {
        let boot = |programs: usize| {
            let program = Program {
                name: "idle".to_owned(),
                path: "/idle".into(),
                arguments: Vec::new(),
                limit_seconds: 1,
            };
            Boot {
                hierarchy: Hierarchy::Unified,
                bpffs: true,
                sock_destroy: true,
                at_once: 1,
                programs: vec![program; programs],
            }
        };
        let plan = Plan {
            modules: "/modules".into(),
            environment: Vec::new(),
            boots: vec![boot(2), boot(1)],
        };
        assert_eq!(plan.awaited(0, 0), Some(0));
        assert_eq!(plan.awaited(1, 1), None);
        assert_eq!(plan.awaited(1, 2), Some(1));
        assert_eq!(plan.awaited(2, 2), None);
        assert_eq!(plan.awaited(2, 3), None);
    }
}
