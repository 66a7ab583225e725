//! The harness of the privileged tests and of the demo.
//!
//! A test creates a [`Lab`]: a child cgroup, and an [`Agent`] in it whose sockets belong to that cgroup. It
//! starts the real daemon on the cgroup ([`Daemon`]), opens connections ([`Pair`]), and compares the sockets'
//! state and the audit with its own clock ([`Moment`]). Dropping removes everything that the test has
//! created, also after a panic.
//!
//! The tests do not disturb the machine: the daemon is only attached to a cgroup of the test, and the traffic
//! uses loopback or network namespaces of the test.

mod agent;
mod audit;
mod big_tcp;
pub mod bpf_calls;
mod cgroup;
mod clock;
mod containers;
mod daemon;
mod holders;
mod interpose;
mod lab;
mod locked;
mod machine;
mod metrics;
pub mod model;
mod names;
mod netns;
mod options;
mod pace;
mod pins;
mod process;
mod programs;
mod random;
mod raw;
mod recipe;
mod repair;
pub mod services;
mod stop;
mod tcp;
mod terminal;

pub use agent::{Agent, Place, enter, serve};
pub use audit::Record;
pub use big_tcp::{allow_big_tcp, has_ipv4_big_tcp};
pub use cgroup::{Cgroup, PROGRAMS, path_of};
pub use clock::{Moment, Time, eventually};
pub use containers::ContainerHost;
pub use daemon::{
    BINARY, Daemon, Launch, daemon_command, idle_rule, records, state_of, whole_answer,
};
pub use holders::{Cgroups, Holders};
pub use interpose::{Call, Fate, Interposer, ask_about_calls};
pub use lab::{Lab, TrackedPair};
pub use locked::{Locked, is_kernel_before};
pub use machine::Machine;
pub use metrics::Metrics;
pub use netns::{Netns, Veth};
pub use options::{
    bind_to_device, cookie, keep_alive, last_error, option, reset_on_close, set_bytes_option,
    set_option, tcp_info,
};
pub use pace::{late_ticks, longer_than_a_start, patience, scaled, unhurried};
pub use pins::{Pins, plant_map, without_bpffs};
pub use process::{
    Finished, block_signals, die_with_parent, keep_capabilities, pin_to_cpu, run_to_end,
};
pub use programs::{
    Allow, OtherProgram, Passing, PlainProgram, attach_other, detach_by_force, drop_packets,
    overwrite_callback_flags,
};
pub use random::{Random, SEED, seed};
pub use raw::{Packet, RawTcp, Sequence, Sniffer};
pub use recipe::Recipe;
pub use repair::Saved;
pub use stop::{Interrupted, Stop};
pub use tcp::{End, Listener, Pair, assert_all_reset, dial, disconnect, ends_of};
pub use terminal::run_on_terminal;
