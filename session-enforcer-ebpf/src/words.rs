//! Access to memory that other processors change concurrently.
//!
//! Copies and zeroing use volatile accesses, one word at a time. An assignment may compile to byte accesses, to a copy
//! through the stack, or to context accesses of a width that the verifier refuses.
//!
//! x86-64 keeps the order of reads and the order of writes. On other processors [`order`] is needed;
//! `docs/design/session-table.md` lists each place and its reason.

use core::{
    arch::asm,
    intrinsics::{AtomicOrdering::SeqCst, atomic_cxchg},
};

use session_enforcer_common::Session;

/// A full memory barrier on other processors than x86-64. On x86-64 it emits nothing: volatile accesses are already
/// ordered there, except a read after a write.
///
/// The eBPF instruction set has no barrier that all kernels since 6.1 accept. An atomic addition that returns the old
/// value is a full barrier (kernel documentation, `atomic_t.txt`). It adds 0 to a word on the program's own stack, so
/// it causes no contention. It is written in assembly because the compiler may replace an addition of 0 with a plain
/// read.
#[inline(always)]
pub(crate) fn order() {
    if cfg!(bpf_target_arch = "x86_64") {
        return;
    }
    let mut word = 0_u64;
    // SAFETY: adds 0 to a local variable.
    unsafe {
        asm!(
            "{nothing} = atomic_fetch_add((u64 *)({word} + 0), {nothing})",
            nothing = inout(reg) 0_u64 => _,
            word = in(reg) &raw mut word,
        );
    }
}

/// Replaces `before` with `after` by compare-and-exchange; returns whether it succeeded. A successful exchange is a
/// full barrier, see [`order`].
#[inline(always)]
pub(crate) fn exchange(word: *mut u64, before: u64, after: u64) -> bool {
    // SAFETY: the callers pass a pointer into an element that a map lookup returned.
    unsafe { atomic_cxchg::<u64, { SeqCst }, { SeqCst }>(word, before, after).1 }
}

/// Copies a value in words of type `W`. The size of the value must be a multiple of the word size.
///
/// # Safety
///
/// `from` must be readable and `to` writable for the whole value, and both must be aligned for `W`. Other processors
/// may change either of them during the copy.
#[inline(always)]
pub(crate) unsafe fn copy<W, T>(from: *const T, to: *mut T) {
    const { assert!(size_of::<T>().is_multiple_of(size_of::<W>())) };
    let (from, to) = (from.cast::<W>(), to.cast::<W>());
    for word in 0..size_of::<T>() / size_of::<W>() {
        // SAFETY: see the function's contract.
        unsafe { to.add(word).write_volatile(from.add(word).read_volatile()) };
    }
}

/// Zeroes a value in words of type `W`. The size of the value must be a multiple of the word size.
///
/// # Safety
///
/// `to` must be writable for the whole value and aligned for `W`.
#[inline(always)]
pub(crate) unsafe fn clear<W: From<u8>, T>(to: *mut T) {
    const { assert!(size_of::<T>().is_multiple_of(size_of::<W>())) };
    let to = to.cast::<W>();
    for word in 0..size_of::<T>() / size_of::<W>() {
        // SAFETY: see the function's contract.
        unsafe { to.add(word).write_volatile(W::from(0)) };
    }
}

/// The word of a record that holds its choice: generation, rule, direction and flags.
#[inline(always)]
pub(crate) fn choice_word(record: *mut Session) -> *mut u64 {
    // SAFETY: within the record; the fields from here on form one aligned word.
    unsafe { (&raw mut (*record).generation).cast() }
}
