//! What is done to words that others change at the same time.
//!
//! Copies and zeros are written word by word, volatile. What the compiler would make of an assignment
//! goes byte by byte or by way of the stack, or, from a program's context, in words that the verifier
//! refuses.
//!
//! x86-64 shows the reads of a processor in their order, and its writes. Others do so where an operation in between
//! orders them ([`order`]); `docs/design/session-table.md` names each place that needs it.

use core::{
    arch::asm,
    intrinsics::{AtomicOrdering::SeqCst, atomic_cxchg},
};

/// Nothing that this program reads or writes after this comes before what it reads and writes ahead of it, for
/// whoever looks from another processor. On x86-64 nothing: what is volatile has that order, but for a read after a write.
///
/// The instruction set has no barrier that every kernel from 6.1 on takes. An atomic addition that returns what was
/// there is a full one (kernel documentation, `atomic_t.txt`). The word is the program's own: nobody waits for it.
/// Written out, since the compiler may take an addition of nothing for a mere read.
#[inline(always)]
pub(crate) fn order() {
    if cfg!(bpf_target_arch = "x86_64") {
        return;
    }
    let mut word = 0_u64;
    // SAFETY: adds 0 to a variable.
    unsafe {
        asm!(
            "{nothing} = atomic_fetch_add((u64 *)({word} + 0), {nothing})",
            nothing = inout(reg) 0_u64 => _,
            word = in(reg) &raw mut word,
        );
    }
}

/// Puts `after` where `before` is, in one step; whether that was there. [Orders](order) what is before and after
/// where it was.
#[inline(always)]
pub(crate) fn exchange(word: *mut u64, before: u64, after: u64) -> bool {
    // SAFETY: the callers have it from an element that a map gave.
    unsafe { atomic_cxchg::<u64, { SeqCst }, { SeqCst }>(word, before, after).1 }
}

/// Copies a value in words of the type `W`, of which its size is a multiple.
///
/// # Safety
///
/// `from` must be readable and `to` writable for the whole of it, and both aligned as `W` is. Others may
/// change either meanwhile.
#[inline(always)]
pub(crate) unsafe fn copy<W, T>(from: *const T, to: *mut T) {
    const { assert!(size_of::<T>().is_multiple_of(size_of::<W>())) };
    let (from, to) = (from.cast::<W>(), to.cast::<W>());
    for word in 0..size_of::<T>() / size_of::<W>() {
        // SAFETY: the caller's promise.
        unsafe { to.add(word).write_volatile(from.add(word).read_volatile()) };
    }
}

/// Writes zeros in words of the type `W`, of which the value's size is a multiple.
///
/// # Safety
///
/// `to` must be writable for the whole of it, and aligned as `W` is.
#[inline(always)]
pub(crate) unsafe fn clear<W: From<u8>, T>(to: *mut T) {
    const { assert!(size_of::<T>().is_multiple_of(size_of::<W>())) };
    let to = to.cast::<W>();
    for word in 0..size_of::<T>() / size_of::<W>() {
        // SAFETY: the caller's promise.
        unsafe { to.add(word).write_volatile(W::from(0)) };
    }
}
