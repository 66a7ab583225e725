//! Empty library target: cargo rebuilds the daemon when it changes, see `aya-build`.
#![no_std]
