//! Identifies the current boot of the host.

use std::fs;

/// The kernel's boot ID, which changes with each boot.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// Returns the boot ID as 32 hexadecimal digits, or an empty string if the kernel does not report it.
pub fn id() -> String {
    let id = fs::read_to_string(BOOT_ID).unwrap_or_default();
    id.trim().replace('-', "")
}

/// A number that all daemons of this boot share and that nobody outside the host knows.
pub fn key() -> u64 {
    let id = u128::from_str_radix(&id(), 16).unwrap_or_default();
    (id >> 64) as u64 ^ (id as u64).rotate_left(1)
}

/// The kernel release, as `uname -r` prints it.
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
