//! Empty: cargo rebuilds the daemon when this library changes, see `aya-build`.
#![no_std]
