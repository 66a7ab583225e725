//! Owners of connections: the user and the cgroup of the process that created the socket. For an accepted connection
//! that is the process that created the listening socket.

/// The owner of a socket at the socket's creation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Owner {
    /// Cgroup id: the inode number of the cgroup's directory. 0 if the owner is not known.
    pub cgroup_id: u64,
    /// User id in the initial user namespace.
    pub uid: u32,
    /// Always 0.
    pub unused: u32,
}

impl Owner {
    /// The value for an unknown owner.
    pub const UNKNOWN: Self = Self {
        cgroup_id: 0,
        uid: 0,
        unused: 0,
    };

    /// Whether the cgroup and the user are known.
    #[inline(always)]
    pub const fn is_known(&self) -> bool {
        self.cgroup_id != 0
    }
}

/// Maximum depth below the root of a cgroup that rules can name.
pub const MAX_CGROUP_LEVELS: usize = 16;

/// Maximum number of cgroups whose [`Ancestors`] the kernel remembers, more than a large host has with sockets at once.
pub const MAX_CGROUPS: u32 = 8_192;

/// The ids of a cgroup and its ancestors without the root, from the top down, padded with zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Ancestors(pub [u64; MAX_CGROUP_LEVELS]);

impl Ancestors {
    /// The value for a socket whose cgroup is not known.
    pub const UNKNOWN: Self = Self([0; MAX_CGROUP_LEVELS]);

    /// The ancestors with these ids; ids beyond [`MAX_CGROUP_LEVELS`] are ignored.
    pub fn of(ids: &[u64]) -> Self {
        let mut ancestors = Self::UNKNOWN;
        for (place, id) in ancestors.0.iter_mut().zip(ids) {
            *place = *id;
        }
        ancestors
    }

    /// Whether `cgroup_id`, which must not be 0, is among them.
    #[inline(always)]
    pub const fn contains(&self, cgroup_id: u64) -> bool {
        let mut found = false;
        let mut level = 0;
        // All are compared, so that the verifier has no branches to follow.
        while level < MAX_CGROUP_LEVELS {
            found |= self.0[level] == cgroup_id;
            level += 1;
        }
        found
    }
}

const _: () = {
    assert!(size_of::<Owner>() == 16 && align_of::<Owner>() == 8);
    assert!(size_of::<Ancestors>() == 128 && align_of::<Ancestors>() == 8);
};

// SAFETY: integers only, no padding (the sizes are asserted above), any bit pattern is valid.
#[cfg(feature = "user")]
unsafe impl aya::Pod for Owner {}
// SAFETY: as above.
#[cfg(feature = "user")]
unsafe impl aya::Pod for Ancestors {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_owner_with_a_cgroup_is_known() {
        assert!(!Owner::UNKNOWN.is_known());
        let of = |cgroup_id| Owner {
            cgroup_id,
            ..Owner::UNKNOWN
        };
        assert!(of(1).is_known() && of(u64::MAX).is_known());
        // Only the cgroup id marks an owner as known, because uid 0 is root.
        let user = Owner {
            uid: 1000,
            ..Owner::UNKNOWN
        };
        assert!(!user.is_known());
    }

    #[test]
    fn every_level_is_found_and_nothing_else() {
        let ids: Vec<u64> = (1..=MAX_CGROUP_LEVELS as u64).collect();
        let ancestors = Ancestors::of(&ids);
        assert!(ids.iter().all(|id| ancestors.contains(*id)));
        assert!(!ancestors.contains(MAX_CGROUP_LEVELS as u64 + 1));
        assert!(!Ancestors::of(&[4]).contains(5));
    }

    #[test]
    fn more_levels_than_are_kept_are_cut() {
        let ids: Vec<u64> = (1..=MAX_CGROUP_LEVELS as u64 + 3).collect();
        assert_eq!(
            Ancestors::of(&ids),
            Ancestors::of(&ids[..MAX_CGROUP_LEVELS])
        );
    }
}
