//! The programs of the object, and where each is attached.

/// A program and its attachment.
pub(super) struct Attachable {
    /// Name in the object and of the link's pin.
    pub(super) name: &'static str,
    /// `enum bpf_attach_type` of `linux/bpf.h`.
    pub(super) attach_type: u32,
    /// bpftool's name of the attach type.
    pub(super) attach_name: &'static str,
    /// Whether every daemon needs it.
    pub(super) is_always_wanted: bool,
}

impl Attachable {
    const fn always(name: &'static str, attach_type: u32, attach_name: &'static str) -> Self {
        Self {
            name,
            attach_type,
            attach_name,
            is_always_wanted: true,
        }
    }
}

/// All programs in the order of attachment. `note_owner` is first, so that a connection is only matched when its owner
/// could be recorded. The packet programs precede `track_lifecycle`, so that every session in the table is stamped.
pub(super) const PROGRAMS: [Attachable; 4] = [
    Attachable {
        is_always_wanted: false,
        ..Attachable::always(NOTE_OWNER, 2, "cgroup_inet_sock_create")
    },
    Attachable::always("track_ingress", 0, "cgroup_inet_ingress"),
    Attachable::always("track_egress", 1, "cgroup_inet_egress"),
    LIFECYCLE,
];

/// The program for establishments and closes.
pub(super) const LIFECYCLE: Attachable =
    Attachable::always("track_lifecycle", 3, "cgroup_sock_ops");

/// The program that records socket owners.
pub(super) const NOTE_OWNER: &str = "note_owner";

/// The program that the daemon runs itself; it is not attached.
pub(super) const TABLE_OPS: &str = "table_ops";
