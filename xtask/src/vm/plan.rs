//! What the virtual machine is told to do, and what it answers: files in the folder that it shares.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

/// The file that says what to do.
pub(super) const PLAN: &str = "plan.json";
/// The file that gets a line of JSON for each program that has ended, an [`Outcome`].
pub(super) const OUTCOMES: &str = "outcomes.json";
/// The file that says how many boots have begun.
pub(super) const BOOTS: &str = "boots";
/// The file that gets what the kernel, or the guest, reports of faults of its own; there is none without any.
pub(super) const FAULTS: &str = "faults.txt";
/// What this machine's kernel command line says of it. The tests of whole hosts ask for it.
pub(super) const MARK: &str = "session_enforcer.vm=1";

/// Everything that one virtual machine does.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Plan {
    /// The folder of the kernel's modules, which becomes `/lib/modules`.
    pub(super) modules: PathBuf,
    /// What the programs find in their environment, and nothing else.
    pub(super) environment: Vec<(String, String)>,
    /// One after the other, with a restart of the machine between.
    pub(super) boots: Vec<Boot>,
}

impl Plan {
    /// The number of the boot that is to come next, where so many have begun and so many programs
    /// have ended. None while one runs, and after the last.
    pub(super) fn awaited(&self, begun: usize, ended: usize) -> Option<usize> {
        let of_begun = self.boots.get(..begun)?.iter();
        let programs: usize = of_begun.map(|boot| boot.programs.len()).sum();
        (begun < self.boots.len() && ended >= programs).then_some(begun)
    }
}

/// What happens between two starts of the machine.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Boot {
    /// Where cgroup v2 is.
    pub(super) hierarchy: Hierarchy,
    /// Whether bpffs is mounted.
    pub(super) bpffs: bool,
    /// Whether `tcp_diag` can destroy sockets.
    pub(super) sock_destroy: bool,
    /// How many programs run at the same time.
    pub(super) at_once: usize,
    /// The test programs.
    pub(super) programs: Vec<Program>,
}

/// How the cgroup file systems are mounted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Hierarchy {
    /// cgroup v2 alone, at `/sys/fs/cgroup`.
    Unified,
    /// cgroup v1 controllers, and cgroup v2 without any below them.
    Hybrid,
}

/// A test program and its arguments.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Program {
    /// Names its output: `NAME.log`.
    pub(super) name: String,
    pub(super) path: PathBuf,
    pub(super) arguments: Vec<String>,
    /// After this it is killed, in seconds.
    pub(super) limit_seconds: u64,
}

impl Program {
    /// Where what it writes is, in the shared folder.
    pub(super) fn log(&self, shared: &Path) -> PathBuf {
        shared.join(format!("{}.log", self.name))
    }
}

/// How a program ended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Outcome {
    pub(super) name: String,
    pub(super) end: End,
    pub(super) seconds: f64,
}

/// The end of a program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum End {
    /// By itself, with this status.
    Exit(i32),
    /// By this signal, which it did not get from here.
    Signal(i32),
    /// Killed when its time was over.
    TimeLimit,
}

/// Reads the outcomes so far.
pub(super) fn outcomes(text: &str) -> Result<Vec<Outcome>> {
    // The last line may be half written.
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
