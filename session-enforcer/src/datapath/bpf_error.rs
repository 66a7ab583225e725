//! Errors of the programs and their maps.

use std::{fmt, io, path::PathBuf};

use aya::{EbpfError, maps::MapError, programs::ProgramError};
use session_enforcer_common::{MAX_MATCH_ENTRIES, table::TableOp};
use thiserror::Error;

use super::PinError;

/// An error of the programs or their maps.
#[derive(Debug, Error)]
pub enum BpfError {
    /// The object or its maps could not be loaded.
    #[error("loading the eBPF maps: {}", chain(.0))]
    Load(#[from] EbpfError),
    /// The kernel refused a program.
    #[error("loading the eBPF program {name}: {}", chain(.source))]
    Program {
        /// Name of the program.
        name: &'static str,
        /// The error of the kernel or the verifier.
        source: ProgramError,
    },
    /// The kernel refused an attachment.
    #[error("attaching the eBPF program {name}: {source}")]
    Attach {
        /// Name of the program.
        name: &'static str,
        /// The error of the kernel.
        source: io::Error,
    },
    /// Another program excludes further programs on the cgroup.
    #[error("attaching the eBPF program {name}: {holder}")]
    Taken {
        /// The program that could not be attached.
        name: &'static str,
        /// The program that excludes it.
        holder: Holder,
    },
    /// The cgroup could not be read.
    #[error("looking at the cgroup: {0}")]
    Cgroup(io::Error),
    /// A pin could not be created, read or removed.
    #[error(transparent)]
    Pins(#[from] PinError),
    /// A map could not be used.
    #[error("the eBPF map {name}: {}", chain(.source))]
    Map {
        /// Name of the map.
        name: &'static str,
        /// The error of the kernel.
        source: MapError,
    },
    /// The session table could not be read, or `table_ops` could not be run.
    #[error("the session table cannot be worked with: {0}")]
    Table(#[source] io::Error),
    /// `table_ops` gave an answer that does not belong to the operation.
    #[error("the session table: {op:?} was answered by {answer}, which is no answer to it")]
    NoAnswer {
        /// The requested operation.
        op: TableOp,
        /// The answer; 0 if there was none.
        answer: u32,
    },
    /// The object lacks a map or program: it is of another version.
    #[error("the eBPF object has no {0}; build the daemon again")]
    Missing(&'static str),
    /// The object has a map of a type that cannot be shared with the programs of a larger table.
    #[error("the eBPF object's map {0} is of an unexpected kind; build the daemon again")]
    Unexpected(String),
    /// The loader thread has ended.
    #[error("the thread that loads the programs of a larger session table has ended")]
    NoLoader,
    /// The log or the event ring buffer could not be watched.
    #[error("watching a ring buffer: {0}")]
    Watch(io::Error),
    /// More rules than the maps can hold.
    #[error("{0} rules are too many")]
    TooManyRules(usize),
    /// More match entries than a match table can hold.
    #[error("{0} match entries, the table holds {MAX_MATCH_ENTRIES}")]
    TooManyEntries(usize),
}

/// Another owner's program, attached without `BPF_F_ALLOW_MULTI`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// Program id, as in bpftool.
    pub id: u32,
    /// Program name; empty if it has none or the kernel does not return it.
    pub name: String,
    /// The cgroup that the program is attached to.
    pub cgroup: PathBuf,
    /// bpftool's name of the attach type.
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

/// The error and its causes in one line.
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
    // The verifier's log has many lines; the reason is in the last one.
    text.lines()
        .filter(|line| !line.trim().is_empty())
        .collect::<Vec<_>>()
        .join(" | ")
}
