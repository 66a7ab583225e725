//! Records the owner of each new TCP socket (cgroup `sock_create`) in socket storage, until the connection is
//! established.
//!
//! Only during the system call that creates a socket can a program read the calling process. An accepted socket
//! inherits the storage of its listener.

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

/// Records the owner of the socket.
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
    // SAFETY: the map is a socket storage map with values of this type, and the socket is the context's.
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

/// Records the ancestor cgroups of the current process, unless the map has them already.
#[inline(always)]
fn note_ancestors(cgroup_id: u64) {
    if ANCESTORS.get_ptr(cgroup_id).is_some() {
        return;
    }
    let mut ancestors = Ancestors::UNKNOWN;
    for (place, level) in ancestors.0.iter_mut().zip(1..=MAX_CGROUP_LEVELS as i32) {
        // SAFETY: no precondition; the helper returns 0 below the cgroup's own level.
        *place = unsafe { bpf_get_current_ancestor_cgroup_id(level) };
    }
    if ANCESTORS
        .insert(cgroup_id, ancestors, u64::from(BPF_ANY))
        .is_err()
    {
        count::error(ErrorKind::OwnerNotKept);
    }
}

/// Moves the owner from the established socket's storage into the session and deletes the storage, which is larger than
/// a session. `owner` stays unchanged if the socket has no storage, because it or its listener is older than the
/// programs.
#[inline(always)]
pub(crate) fn take(ctx: &SockOpsContext, owner: &mut Owner) {
    // SAFETY: the context of a program of this type; socket and storage are checked before use.
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

/// Deletes the storage of an established socket that no rule can match.
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
