//! What is done to words that others change at the same time.
//!
//! Copies and zeros are written word by word, volatile. What the compiler would make of an assignment
//! goes byte by byte or by way of the stack, or, from a program's context, in words that the verifier
//! refuses.

use core::intrinsics::{AtomicOrdering::SeqCst, atomic_cxchg};

/// Puts `after` where `before` is, in one step; whether that was there. A barrier.
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
