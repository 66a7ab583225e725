//! The clients of the show: what each does, and the expected outcome.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use session_enforcer_tests::Veth;

pub(super) const IDLE_TIMEOUT: Duration = Duration::from_secs(3);
pub(super) const MAX_LIFETIME: Duration = Duration::from_secs(6);
const BUSY_FOR: Duration = Duration::from_secs(7);
/// A duration longer than the show.
const FOR_EVER: Duration = Duration::from_secs(3600);

/// The behaviour of a client after its first message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Habit {
    Silent,
    /// The client is silent, but its kernel sends keepalive probes.
    Probing,
    /// The client sends a message every half second for this long.
    Busy(Duration),
}

/// The expected outcome of a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    /// The client is reset when it reaches the idle timeout.
    ResetWhenIdle,
    /// The client is reset when it reaches the maximum lifetime.
    ResetWhenOld,
    /// The client is only recorded when it reaches the idle timeout.
    Recorded,
    /// The client is neither reset nor recorded.
    Untouched,
}

/// The description of one client.
#[derive(Debug)]
pub(super) struct Role {
    pub(super) name: &'static str,
    server: IpAddr,
    port: u16,
    pub(super) rule: &'static str,
    pub(super) habit: Habit,
    pub(super) fate: Fate,
    /// The description in the list of connected clients.
    pub(super) story: &'static str,
}

impl Role {
    pub(super) fn server(&self) -> SocketAddr {
        (self.server, self.port).into()
    }
}

/// This client connects before the daemon starts.
pub(super) const OLDER: Role = Role {
    name: "older",
    server: Veth::RIGHT,
    port: 5432,
    rule: "idle-demo",
    habit: Habit::Silent,
    fate: Fate::ResetWhenIdle,
    story: "came before the daemon, said hello, is silent",
};

/// These clients connect after the daemon has started.
pub(super) const NEWER: [Role; 6] = [
    Role {
        name: "idle",
        story: "said hello, is silent",
        ..OLDER
    },
    Role {
        name: "probing",
        server: Veth::RIGHT_V6,
        habit: Habit::Probing,
        story: "the same with a TCP keepalive every second",
        ..OLDER
    },
    Role {
        name: "busy",
        habit: Habit::Busy(BUSY_FOR),
        story: "sends every half second, for 7 seconds",
        ..OLDER
    },
    Role {
        name: "over-age",
        server: Veth::RIGHT_V6,
        port: 6000,
        rule: "age-demo",
        habit: Habit::Busy(FOR_EVER),
        fate: Fate::ResetWhenOld,
        story: "sends every half second, never stops",
    },
    Role {
        name: "observed",
        port: 8080,
        rule: "observe-demo",
        fate: Fate::Recorded,
        story: "said hello, is silent",
        ..OLDER
    },
    Role {
        name: "exempt",
        port: 6379,
        rule: "exempt-demo",
        fate: Fate::Untouched,
        story: "said hello, is silent",
        ..OLDER
    },
];

/// The configuration of the daemon.
pub(super) fn config() -> String {
    let (idle, old) = (IDLE_TIMEOUT.as_secs(), MAX_LIFETIME.as_secs());
    format!(
        r#"[[rule]]
name = "idle-demo"
local_ports = [5432]
idle_timeout = "{idle}s"

[[rule]]
name = "age-demo"
local_ports = [6000]
max_lifetime = "{old}s"

[[rule]]
name = "observe-demo"
local_ports = [8080]
action = "observe"
idle_timeout = "{idle}s"

[[rule]]
name = "exempt-demo"
local_ports = [6379]
action = "exempt"
"#
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_client_is_under_the_rule_of_its_port() {
        let config = config();
        for role in NEWER.iter().chain([&OLDER]) {
            let rule = format!("name = \"{}\"\nlocal_ports = [{}]", role.rule, role.port);
            assert!(config.contains(&rule), "{role:?}");
        }
    }
}
