//! The daemon's operations on the session table. The daemon runs this unattached program with `BPF_PROG_TEST_RUN`; one
//! system call handles many sessions, and each operation is complete.

use core::{ffi::c_void, ptr};

use aya_ebpf::helpers::bpf_loop;
use session_enforcer_common::table::{MAX_REQUESTS, TableOp, TableRequest, answer};

use crate::{capacity::Refusal, maps::EXCHANGES, slots};

/// Answers the first `requests` requests of the buffer.
#[inline(always)]
pub(crate) fn run(requests: u64) {
    let requests = (requests as u32).min(MAX_REQUESTS);
    // SAFETY: the callback has the signature that the helper expects and needs no context.
    unsafe { bpf_loop(requests, one as *mut c_void, ptr::null_mut(), 0) };
}

/// Returns 0 to continue the loop.
extern "C" fn one(index: u32, _context: *mut c_void) -> i64 {
    if let Some(request) = EXCHANGES.get_ptr_mut(index) {
        // SAFETY: the map lookup returned the pointer; the daemon waits until the program has ended.
        let request = unsafe { &mut *request };
        request.answer = answer_to(request);
    }
    0
}

#[inline(always)]
fn answer_to(request: &mut TableRequest) -> u32 {
    let cookie = request.cookie;
    if request.op == TableOp::Adopt as u32 {
        return match slots::insert(cookie, &request.session) {
            Ok(()) => answer::DONE,
            Err(Refusal::Present) => answer::PRESENT,
            Err(Refusal::Full) => answer::FULL,
            Err(Refusal::RuleFull) => answer::RULE_FULL,
        };
    }
    let is_done = if request.op == TableOp::Remove as u32 {
        slots::remove(cookie, request.session.established_ns)
    } else if request.op == TableOp::Update as u32 {
        slots::update(cookie, &mut request.session)
    } else if request.op == TableOp::Decide as u32 {
        let (rule, generation) = (request.session.rule, request.session.generation);
        slots::decide(cookie, request.session.established_ns, rule, generation)
    } else if request.op == TableOp::Shut as u32 {
        slots::set_gate(cookie, request.session.established_ns, false)
    } else if request.op == TableOp::Reopen as u32 {
        slots::set_gate(cookie, request.session.established_ns, true)
    } else {
        slots::read_whole(cookie, &raw mut request.session)
    };
    if is_done {
        answer::DONE
    } else {
        answer::MISSING
    }
}
