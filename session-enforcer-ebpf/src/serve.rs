//! What the daemon does to the session table (`BPF_PROG_TEST_RUN` of a program that is attached to
//! nothing). Many sessions in one system call, each in one go.

use core::{ffi::c_void, ptr};

use aya_ebpf::helpers::bpf_loop;
use session_enforcer_common::{
    Session,
    table::{Exchange, MAX_REQUESTS, Request, answer},
};

use crate::{
    maps::EXCHANGES,
    table::{self, Refusal},
};

/// Copies of a record that are made in search of one that is whole. A record that changes so often is not
/// that of an idle session, and no copy of it says so.
const MAX_COPIES: usize = 8;

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
        };
    }
    if exchange.request == Request::Remove as u32 {
        return if table::remove(cookie) {
            answer::DONE
        } else {
            answer::MISSING
        };
    }
    let Some(session) = table::find_apart(cookie) else {
        return answer::MISSING;
    };
    if exchange.request == Request::Amend as u32 {
        // SAFETY: a pointer that the map gave, valid while the program runs.
        unsafe { table::copy(&raw const exchange.session, session) };
    } else {
        copy_whole(session, &raw mut exchange.session);
    }
    answer::DONE
}

/// The record as it was at one moment. Packets change it meanwhile: an answer that passes could show the
/// stamps from before and the debt as paid. A copy that the record still agrees with was made when
/// nothing passed.
#[inline(always)]
fn copy_whole(session: *const Session, copy: *mut Session) {
    for _ in 0..MAX_COPIES {
        // SAFETY: a pointer that the map gave, valid while the program runs.
        unsafe { table::copy(session, copy) };
        if agrees(session, copy) {
            return;
        }
    }
}

#[inline(never)]
fn agrees(session: *const Session, copy: *const Session) -> bool {
    let (words, copied) = (session.cast::<u64>(), copy.cast::<u64>());
    for word in 0..size_of::<Session>() / size_of::<u64>() {
        // SAFETY: within both records. Volatile: the record is to be read a second time.
        let differs =
            unsafe { words.add(word).read_volatile() != copied.add(word).read_volatile() };
        if differs {
            return false;
        }
    }
    true
}
