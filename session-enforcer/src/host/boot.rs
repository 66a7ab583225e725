//! Which boot of the host this is.

use std::fs;

/// The kernel's name of this boot, another after each.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// The name of this boot, 32 hexadecimal digits; empty where the kernel does not tell.
pub fn id() -> String {
    let id = fs::read_to_string(BOOT_ID).unwrap_or_default();
    id.trim().replace('-', "")
}

/// A number that is the same for every daemon of this boot, and that nobody beyond the host knows.
pub fn key() -> u64 {
    let id = u128::from_str_radix(&id(), 16).unwrap_or_default();
    (id >> 64) as u64 ^ (id as u64).rotate_left(1)
}

/// The kernel's release, as `uname -r` prints it.
pub fn kernel_release() -> String {
    nix::sys::utsname::uname()
        .map(|names| names.release().to_string_lossy().into_owned())
        .unwrap_or_else(|_| "unknown".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_boot_has_a_name_and_a_key_that_stay() {
        assert_eq!((id().len(), id(), key()), (32, id(), key()));
        assert_ne!(key(), 0);
    }
}
