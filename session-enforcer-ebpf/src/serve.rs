//! What the daemon does to the session table (`BPF_PROG_TEST_RUN` of a program that is attached to
//! nothing). Many sessions in one system call, each in one go.

use core::{ffi::c_void, ptr};

use aya_ebpf::helpers::bpf_loop;
use session_enforcer_common::table::{Exchange, MAX_REQUESTS, Request, answer};

use crate::{
    maps::EXCHANGES,
    table::{self, Refusal},
};

/// Answers the first so many requests.
#[inline(always)]
pub(crate) fn serve(requests: u64) {
    let requests = (requests as u32).min(MAX_REQUESTS);
    // SAFETY: the callback has the signature that the helper asks for, and needs no context.
    unsafe { bpf_loop(requests, serve_one as *mut c_void, ptr::null_mut(), 0) };
}

/// Returns 0 to go on.
extern "C" fn serve_one(index: u32, _context: *mut c_void) -> i64 {
    if let Some(exchange) = EXCHANGES.get_ptr_mut(index) {
        // SAFETY: a pointer that the map gave; the daemon waits until the program has ended.
        let exchange = unsafe { &mut *exchange };
        exchange.answer = answer_to(exchange);
    }
    0
}

#[inline(always)]
fn answer_to(exchange: &mut Exchange) -> u32 {
    let cookie = exchange.cookie;
    if exchange.request == Request::Adopt as u32 {
        return match table::insert(cookie, &exchange.session) {
            Ok(()) => answer::DONE,
            Err(Refusal::Present) => answer::PRESENT,
            Err(Refusal::Full) => answer::FULL,
            Err(Refusal::RuleFull) => answer::RULE_FULL,
        };
    }
    let is_done = if exchange.request == Request::Remove as u32 {
        remove(cookie, exchange.session.established_ns)
    } else if exchange.request == Request::Amend as u32 {
        table::amend(cookie, &mut exchange.session)
    } else if exchange.request == Request::Decide as u32 {
        let (rule, generation) = (exchange.session.rule, exchange.session.generation);
        table::decide(cookie, exchange.session.established_ns, rule, generation)
    } else if exchange.request == Request::Shut as u32 {
        table::set_gate(cookie, exchange.session.established_ns, false)
    } else if exchange.request == Request::Reopen as u32 {
        table::set_gate(cookie, exchange.session.established_ns, true)
    } else {
        table::read_whole(cookie, &raw mut exchange.session)
    };
    if is_done {
        answer::DONE
    } else {
        answer::MISSING
    }
}

/// Takes out the session that the daemon means, and not one that has begun under its cookie since.
#[inline(always)]
fn remove(cookie: u64, established_ns: u64) -> bool {
    let Some(looked) = table::look_for(cookie) else {
        return false;
    };
    let Some(session) = looked.record() else {
        return false;
    };
    // SAFETY: a pointer that the map gave, valid while the program runs.
    let is_meant = unsafe { (*session).established_ns == established_ns };
    is_meant && table::clear_all(looked, cookie) != table::NONE_CLEARED
}
