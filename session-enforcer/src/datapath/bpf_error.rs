//! What can go wrong with the programs and their maps.

use std::{fmt, io, path::PathBuf};

use aya::{EbpfError, maps::MapError, programs::ProgramError};
use session_enforcer_common::{MAX_MATCH_ENTRIES, table::TableOp};
use thiserror::Error;

use super::PinError;

/// What can go wrong with the programs and their maps.
#[derive(Debug, Error)]
pub enum BpfError {
    /// The object or its maps could not be loaded.
    #[error("loading the eBPF maps: {}", chain(.0))]
    Load(#[from] EbpfError),
    /// The kernel refused a program.
    #[error("loading the eBPF program {name}: {}", chain(.source))]
    Program {
        /// The program.
        name: &'static str,
        /// What the kernel or the verifier said.
        source: ProgramError,
    },
    /// The kernel refused an attachment.
    #[error("attaching the eBPF program {name}: {source}")]
    Attach {
        /// The program.
        name: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// Another program lets none in beside it.
    #[error("attaching the eBPF program {name}: {holder}")]
    Taken {
        /// The program that is not attached.
        name: &'static str,
        /// The one that is in its way.
        holder: Holder,
    },
    /// The cgroup cannot be looked at.
    #[error("looking at the cgroup: {0}")]
    Cgroup(io::Error),
    /// Pins could not be made, read or removed.
    #[error(transparent)]
    Pins(#[from] PinError),
    /// A map could not be used.
    #[error("the eBPF map {name}: {}", chain(.source))]
    Map {
        /// The map.
        name: &'static str,
        /// What the kernel said.
        source: MapError,
    },
    /// The session table could not be read or asked about.
    #[error("the session table cannot be worked with (CONFIG_BPF_EVENTS is needed): {0}")]
    Table(io::Error),
    /// The program that works on the session table did not answer as it does.
    #[error("the session table: {op:?} was answered by {answer}, which is no answer to it")]
    NoAnswer {
        /// What it was asked.
        op: TableOp,
        /// What it answered; 0: nothing.
        answer: u32,
    },
    /// The object lacks a map or program: it was built from another version.
    #[error("the eBPF object has no {0}; build the daemon again")]
    Missing(&'static str),
    /// The object has a map of a kind that a larger table's programs cannot be given.
    #[error("the eBPF object's map {0} is of an unexpected kind; build the daemon again")]
    Unexpected(String),
    /// The thread that loads programs has ended.
    #[error("the thread that loads the programs of a larger session table has ended")]
    NoLoader,
    /// The log or event channel could not be watched.
    #[error("watching a ring buffer: {0}")]
    Watch(io::Error),
    /// More rules than a map can have.
    #[error("{0} rules are too many")]
    TooManyRules(usize),
    /// More match entries than the table holds.
    #[error("{0} match entries, the table holds {MAX_MATCH_ENTRIES}")]
    TooManyEntries(usize),
}

/// A program of somebody else that was attached without `BPF_F_ALLOW_MULTI`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// Its identity, as bpftool shows it.
    pub id: u32,
    /// Its name; empty where it has none or the kernel does not tell.
    pub name: String,
    /// The cgroup that it is attached to.
    pub cgroup: PathBuf,
    /// bpftool's name for the place.
    pub attach_name: &'static str,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (id, cgroup, place) = (self.id, self.cgroup.display(), self.attach_name);
        let name = match self.name.as_str() {
            "" => String::new(),
            name => format!("{name:?}, "),
        };
        write!(
            f,
            "another program ({name}id {id}) is attached to {cgroup} ({place}) without \
             BPF_F_ALLOW_MULTI and lets no other in beside it; have its owner attach it with that flag \
             (bpftool: multi), or take it out (bpftool cgroup detach {cgroup} {place} id {id})"
        )
    }
}

/// An error and its causes in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    // The verifier's log has many lines; its last one says why.
    text.lines()
        .filter(|line| !line.trim().is_empty())
        .collect::<Vec<_>>()
        .join(" | ")
}
