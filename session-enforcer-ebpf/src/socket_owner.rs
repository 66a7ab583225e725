//! Whose a socket is (cgroup `sock_create`): kept with the socket until it is established.
//!
//! Only here, in the system call that makes the socket, does the kernel tell a program who asks. An
//! accepted socket inherits the facts of the socket that listens.

use core::ptr;

use aya_ebpf::{
    bindings::{BPF_ANY, BPF_SK_STORAGE_GET_F_CREATE, bpf_sock},
    helpers::{
        bpf_get_current_ancestor_cgroup_id, bpf_get_current_cgroup_id, bpf_get_current_uid_gid,
        bpf_sk_storage_delete, bpf_sk_storage_get,
    },
    programs::{SockContext, SockOpsContext},
};
use session_enforcer_common::{Ancestors, ErrorKind, MAX_CGROUP_LEVELS, Owner};

use crate::{
    count,
    maps::{ANCESTORS, OWNERS},
    words,
};

const SOCK_STREAM: u32 = 1;
const IPPROTO_TCP: u32 = 6;

/// Notes who makes the socket.
#[inline(always)]
pub(crate) fn note(ctx: &SockContext) {
    let socket: *mut bpf_sock = ctx.sock;
    // SAFETY: the context of a program of this type.
    let is_tcp = unsafe { (*socket).type_ == SOCK_STREAM && (*socket).protocol == IPPROTO_TCP };
    if !is_tcp {
        return;
    }
    let mut owner = current();
    note_ancestors(owner.cgroup_id);
    // SAFETY: the map is one of socket storage with values of this type, and the socket is that of
    // the context.
    let stored = unsafe {
        bpf_sk_storage_get(
            OWNERS.as_ptr(),
            socket.cast(),
            ptr::from_mut(&mut owner).cast(),
            u64::from(BPF_SK_STORAGE_GET_F_CREATE),
        )
    };
    if stored.is_null() {
        count::error(ErrorKind::OwnerNotKept);
    }
}

#[inline(always)]
fn current() -> Owner {
    // SAFETY: no argument, no precondition.
    let cgroup_id = unsafe { bpf_get_current_cgroup_id() };
    Owner {
        cgroup_id,
        uid: bpf_get_current_uid_gid() as u32,
        unused: 0,
    }
}

/// Notes the cgroups above that of the current process, where that was not done before.
#[inline(always)]
fn note_ancestors(cgroup_id: u64) {
    if ANCESTORS.get_ptr(cgroup_id).is_some() {
        return;
    }
    let mut ancestors = Ancestors::UNKNOWN;
    for (place, level) in ancestors.0.iter_mut().zip(1..=MAX_CGROUP_LEVELS as i32) {
        // SAFETY: no precondition; 0 below the cgroup's own level.
        *place = unsafe { bpf_get_current_ancestor_cgroup_id(level) };
    }
    if ANCESTORS
        .insert(cgroup_id, ancestors, u64::from(BPF_ANY))
        .is_err()
    {
        count::error(ErrorKind::OwnerNotKept);
    }
}

/// Takes the owner from an established socket, which needs it no longer: the storage is larger than
/// a session. What is there stays where the socket, or the one that listens, is older than the
/// programs.
#[inline(always)]
pub(crate) fn take(ctx: &SockOpsContext, owner: &mut Owner) {
    // SAFETY: the context of a program of this type; the socket is checked before it is used, and so is
    // what is stored.
    unsafe {
        let socket = (*ctx.ops).__bindgen_anon_2.sk;
        if socket.is_null() {
            return;
        }
        let stored = bpf_sk_storage_get(OWNERS.as_ptr(), socket.cast(), ptr::null_mut(), 0);
        if stored.is_null() {
            return;
        }
        words::copy::<u64, Owner>(stored.cast(), owner);
        bpf_sk_storage_delete(OWNERS.as_ptr(), socket.cast());
    }
}

/// Deletes what was kept of the owner of an established socket that no rule can match.
#[inline(always)]
pub(crate) fn forget(ctx: &SockOpsContext) {
    // SAFETY: the context of a program of this type; the socket is checked before it is used.
    unsafe {
        let socket = (*ctx.ops).__bindgen_anon_2.sk;
        if !socket.is_null() {
            bpf_sk_storage_delete(OWNERS.as_ptr(), socket.cast());
        }
    }
}
