//! Attachments of the programs: created, taken over from an earlier daemon, detached.

use std::{
    collections::HashMap,
    io, iter,
    os::{fd::OwnedFd, unix::fs::MetadataExt as _},
    sync::{Mutex, PoisonError},
};

use aya::{
    Ebpf,
    programs::{Program, ProgramError, ProgramFd},
};

use super::{
    BpfError, Datapath,
    attachable::{Attachable, LIFECYCLE, NOTE_OWNER, PROGRAMS, TABLE_OPS},
    bpf_error::Holder,
    inherit::Pins,
    pinned_set::FoundLink,
    sys,
};
use crate::host::{cgroup::Cgroup, threads::run_parallel};

// Attach flags (`linux/bpf.h`).
const BPF_F_ALLOW_OVERRIDE: u32 = 1;
const BPF_F_ALLOW_MULTI: u32 = 2;

/// An attachment of this daemon. Unless it is pinned, it ends with the descriptor.
pub(super) struct Attached {
    name: &'static str,
    link: OwnedFd,
}

/// Loads the programs into the kernel, two at a time. Each of the larger ones occupies the verifier for as long as the
/// rest of a start takes.
pub(super) fn load(ebpf: &mut Ebpf) -> Result<(), BpfError> {
    let mut found: HashMap<_, _> = ebpf.programs_mut().collect();
    let mut waiting = Vec::new();
    for name in iter::once(TABLE_OPS).chain(PROGRAMS.map(|program| program.name)) {
        let program = found.remove(name).ok_or(BpfError::Missing(name))?;
        waiting.push((name, program));
    }
    let waiting = Mutex::new(waiting);
    // Taken from the end; the small program is loaded last.
    let next = || waiting.lock().unwrap_or_else(PoisonError::into_inner).pop();
    let load_some = || {
        while let Some((name, program)) = next() {
            load_one(name, program)?;
        }
        Ok(())
    };
    run_parallel("load", 1, load_some).into_iter().collect()
}

fn load_one(name: &'static str, program: &mut Program) -> Result<(), BpfError> {
    let loaded = match program {
        Program::SockOps(program) => program.load(),
        Program::CgroupSkb(program) => program.load(),
        Program::CgroupSock(program) => program.load(),
        Program::RawTracePoint(program) => program.load(),
        _ => Err(ProgramError::UnexpectedProgramType),
    };
    loaded.map_err(|source| BpfError::Program { name, source })
}

impl Datapath {
    /// The ids of programs of other daemons (with another pin directory or without one) that are attached to the
    /// cgroup. Empty if this process may not query them (`CAP_SYS_ADMIN`).
    pub fn others(&self, cgroup: &Cgroup) -> Vec<u32> {
        let found = sys::attached_programs(cgroup.file(), LIFECYCLE.attach_type);
        let mut ids = found.unwrap_or_default().ids;
        let pinned = self.pins.as_ref().map(Pins::pinned_programs);
        let pinned = pinned.unwrap_or_default();
        let is_another = |id: &u32| {
            !pinned.contains(id) && sys::program_name(*id).is_ok_and(|name| name == LIFECYCLE.name)
        };
        ids.retain(is_another);
        ids
    }

    /// Attaches the programs to the cgroup. From then on each new connection below it is tracked. An earlier daemon's
    /// programs on that cgroup are replaced one by one, without a gap.
    ///
    /// # Errors
    ///
    /// Fails if the kernel refuses an attachment. Earlier attachments of this call are detached on drop, except those
    /// that have replaced an earlier daemon's programs.
    pub fn attach(&mut self, cgroup: &Cgroup) -> Result<(), BpfError> {
        let metadata = cgroup.file().metadata().map_err(BpfError::Cgroup)?;
        let in_place = match &mut self.pins {
            Some(pins) => pins.decide(metadata.ino(), self.load_options.capacity)?,
            None => false,
        };
        for program in &PROGRAMS {
            let name = program.name;
            if !program.is_always_wanted && !self.options.notes_owners {
                self.pins.iter().try_for_each(|pins| pins.unpin(name))?;
                continue;
            }
            let loaded = program_fd(&self.ebpf, name)?;
            let found = self.pins.as_mut().and_then(|pins| pins.take_link(name));
            let link = match found {
                Some(found) if in_place => {
                    sys::update_link(&found.link, loaded)
                        .map_err(|source| BpfError::Attach { name, source })?;
                    found.link
                }
                found => self.attach_anew(program, cgroup, found)?,
            };
            self.attached.push(Attached { name, link });
        }
        Ok(())
    }

    /// Replaces the programs of all links with those of another object.
    pub(super) fn update_links(&self, ebpf: &Ebpf) -> Result<(), BpfError> {
        for Attached { name, link } in &self.attached {
            sys::update_link(link, program_fd(ebpf, name)?)
                .map_err(|source| BpfError::Attach { name, source })?;
        }
        Ok(())
    }

    fn attach_anew(
        &self,
        program: &Attachable,
        cgroup: &Cgroup,
        before: Option<FoundLink>,
    ) -> Result<OwnedFd, BpfError> {
        let name = program.name;
        let loaded = program_fd(&self.ebpf, name)?;
        let link = sys::create_link(loaded, &cgroup.file(), program.attach_type)
            .map_err(|source| refusal(program, cgroup, source))?;
        if let Some(pins) = &self.pins {
            pins.pin_link(&link, name)?;
            // The earlier link is on another cgroup. Two programs on one table would count the end of a session twice
            // or not at all, so the earlier one is detached. If it has a table of its own, it runs on until the
            // take-over is complete.
            if let Some(before) = before.filter(|_| !pins.has_previous()) {
                sys::detach_link(&before.link)
                    .map_err(|source| BpfError::Attach { name, source })?;
            }
        }
        Ok(link)
    }

    /// Whether the program that records socket owners is attached.
    pub fn notes_owners(&self) -> bool {
        self.attached
            .iter()
            .any(|attached| attached.name == NOTE_OWNER)
    }

    /// Attaches or detaches the program that records socket owners. Without it, a socket costs nothing until it is
    /// established. Before the first attachment this only sets the option.
    ///
    /// # Errors
    ///
    /// Fails if the kernel refuses the operation; nothing has changed then.
    pub fn note_owners(&mut self, is_wanted: bool, cgroup: &Cgroup) -> Result<(), BpfError> {
        if self.attached.is_empty() || self.notes_owners() == is_wanted {
            self.options.notes_owners = is_wanted;
            return Ok(());
        }
        if is_wanted {
            let program = PROGRAMS.iter().find(|program| program.name == NOTE_OWNER);
            let program = program.ok_or(BpfError::Missing(NOTE_OWNER))?;
            let link = self.attach_anew(program, cgroup, None)?;
            let name = program.name;
            self.attached.push(Attached { name, link });
        } else {
            let others = |attached: &Attached| attached.name != NOTE_OWNER;
            self.attached.retain(others);
            self.pins
                .iter()
                .try_for_each(|pins| pins.unpin(NOTE_OWNER))?;
        }
        self.options.notes_owners = is_wanted;
        Ok(())
    }

    /// Whether every program is still attached. An administrator may detach a program, and the removal of a cgroup
    /// detaches its programs.
    pub fn is_attached(&self) -> bool {
        let is_attached = |attached: &Attached| {
            // If the link cannot be read, the program counts as attached.
            sys::link_info(&attached.link).map_or(true, |info| info.cgroup_id != 0)
        };
        self.attached.iter().all(is_attached)
    }

    /// Detaches the programs. The sessions stay pinned for the next daemon.
    ///
    /// # Errors
    ///
    /// Fails if the kernel refuses an operation.
    pub fn detach(&mut self) -> Result<(), BpfError> {
        for Attached { name, link } in std::mem::take(&mut self.attached) {
            sys::detach_link(&link).map_err(|source| BpfError::Attach { name, source })?;
            self.pins.iter().try_for_each(|pins| pins.unpin(name))?;
        }
        Ok(())
    }
}

/// Distinguishes the causes of a refused attachment. The kernel returns EPERM both for a missing capability and for
/// another program's flags.
fn refusal(program: &Attachable, cgroup: &Cgroup, source: io::Error) -> BpfError {
    let name = program.name;
    if source.raw_os_error() == Some(libc::EPERM)
        && let Some(holder) = holder(cgroup, program)
    {
        return BpfError::Taken { name, holder };
    }
    BpfError::Attach { name, source }
}

/// The program that excludes others, in this cgroup or above it.
///
/// All programs of one cgroup have the same attach flags, and a program with `BPF_F_ALLOW_MULTI` can only be added to
/// programs with that flag. Further up, only the nearest cgroup that has programs counts: either flag allows programs
/// below it (`__cgroup_bpf_attach` and `hierarchy_allows_attach` of `kernel/bpf/cgroup.c`).
fn holder(cgroup: &Cgroup, program: &Attachable) -> Option<Holder> {
    let there = cgroup.path().ancestors().map(Cgroup::open);
    for (depth, there) in there.map_while(Result::ok).enumerate() {
        let found = sys::attached_programs(there.file(), program.attach_type).ok()?;
        let Some(id) = found.ids.first().copied() else {
            continue;
        };
        let allowing = match depth {
            0 => BPF_F_ALLOW_MULTI,
            _ => BPF_F_ALLOW_MULTI | BPF_F_ALLOW_OVERRIDE,
        };
        return (found.flags & allowing == 0).then(|| Holder {
            id,
            name: sys::program_name(id).unwrap_or_default(),
            cgroup: there.path().to_owned(),
            attach_name: program.attach_name,
        });
    }
    None
}

pub(super) fn program_fd<'a>(
    ebpf: &'a Ebpf,
    name: &'static str,
) -> Result<&'a ProgramFd, BpfError> {
    ebpf.program(name)
        .ok_or(BpfError::Missing(name))?
        .fd()
        .map_err(|source| BpfError::Program { name, source })
}
