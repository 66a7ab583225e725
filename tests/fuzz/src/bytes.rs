//! Values out of an input: what it does not hold is zero.

use aya::Pod;

/// What is left of an input.
pub struct Bytes<'a>(pub &'a [u8]);

impl Bytes<'_> {
    /// The next value, byte for byte as it would lie in a map.
    pub fn value<T: Pod>(&mut self) -> T {
        let (now, rest) = self.0.split_at(self.0.len().min(size_of::<T>()));
        self.0 = rest;
        let mut value = std::mem::MaybeUninit::<T>::zeroed();
        // SAFETY: no more bytes than the value has, from elsewhere. All of its bytes are set, those
        // after the copied ones to zero, and a `Pod` is valid with any bits.
        unsafe {
            std::ptr::copy_nonoverlapping(now.as_ptr(), value.as_mut_ptr().cast(), now.len());
            value.assume_init()
        }
    }

    /// One of some choices.
    pub fn choice<T: Copy, const N: usize>(&mut self, choices: [T; N]) -> T {
        choices[usize::from(self.value::<u8>()) % N]
    }
}
