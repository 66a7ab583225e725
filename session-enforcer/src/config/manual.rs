//! What the manual page session-enforcer.toml(5) says about each key.

/// A table of the file.
pub struct Table {
    /// As it is written.
    pub header: &'static str,
    /// What it is for.
    pub about: &'static str,
    /// Its keys, in the order in which one would write them.
    pub keys: &'static [Key],
}

/// A key of a table.
pub struct Key {
    /// As it is written.
    pub name: &'static str,
    /// The value that a file without the key has, as it is written; none where there is none.
    pub default: Option<&'static str>,
    /// What it means.
    pub about: &'static str,
}

const fn key(name: &'static str, default: Option<&'static str>, about: &'static str) -> Key {
    Key {
        name,
        default,
        about,
    }
}

/// Every table and key that this version knows.
pub static MANUAL: [Table; 4] = [
    Table {
        header: "[daemon]",
        about: "The daemon as a whole.",
        keys: &[
            key(
                "cgroup",
                None,
                "Directory of the cgroup v2 control group whose sockets are enforced, with all \
                 below it. Without it: the mount of cgroup v2, which is the whole host.",
            ),
            key(
                "mode",
                Some("\"enforce\""),
                "\"enforce\" resets a connection past its limit. \"observe\" resets nothing and \
                 records what would be reset.",
            ),
            key(
                "max_sessions",
                Some("262144"),
                "Sessions that can be tracked at once, from 1 to 16777216.",
            ),
            key(
                "pin_dir",
                Some("\"/sys/fs/bpf/session-enforcer\""),
                "Directory on bpffs where sessions and programs outlive the daemon; \"\" for \
                 none.",
            ),
            key(
                "network_namespaces",
                Some("\"all\""),
                "\"all\": connections of every network namespace of the host. \"own\": those of \
                 the daemon's own.",
            ),
            key(
                "reconcile_interval",
                Some("\"15m\""),
                "How often the sessions are compared with the kernel's sockets where nothing is \
                 known to be wrong.",
            ),
        ],
    },
    Table {
        header: "[metrics]",
        about: "Prometheus metrics, and the probes /healthz and /readyz.",
        keys: &[key(
            "listen",
            Some("\"127.0.0.1:9847\""),
            "Address and port where they are served; \"\" for none.",
        )],
    },
    Table {
        header: "[audit]",
        about: "The audit, one JSON object a line with the field names of the Elastic Common \
                Schema.",
        keys: &[key(
            "path",
            Some("\"-\""),
            "A file, to whose end records are added, or \"-\" for standard output. SIGHUP and \
             SIGUSR1 open the file anew.",
        )],
    },
    Table {
        header: "[[rule]]",
        about: "A rule, once for each. The first rule that matches a connection decides; a \
                connection that no rule matches is not tracked. A rule that enforces or observes \
                has at least one of idle_timeout, max_lifetime and response_timeout.",
        keys: &[
            key(
                "name",
                None,
                "Required. Unique, of the characters a-z, 0-9, _ and -.",
            ),
            key(
                "direction",
                Some("\"any\""),
                "\"inbound\": connections accepted here. \"outbound\": connections dialled from \
                 here.",
            ),
            key(
                "local_ports",
                Some("[]"),
                "Ports of this host, such as [5432, \"6000-6010\"]. Empty: every port.",
            ),
            key(
                "remote_ports",
                Some("[]"),
                "Ports of the peer, in the same way.",
            ),
            key(
                "local",
                Some("[]"),
                "Prefixes of this host's address, such as [\"10.0.0.0/8\", \"2001:db8::/32\"]. \
                 Empty: every address. An IPv4-mapped address is its IPv4 address.",
            ),
            key(
                "remote",
                Some("[]"),
                "Prefixes of the peer's address, in the same way.",
            ),
            key(
                "cgroups",
                Some("[]"),
                "Control groups of the socket, or above it, such as \
                 ['/system.slice/postgresql.service']. Empty: every control group.",
            ),
            key(
                "users",
                Some("[]"),
                "Owners of the socket, by name or number, such as [\"postgres\", 1000]. Empty: \
                 every user.",
            ),
            key(
                "action",
                Some("\"enforce\""),
                "\"enforce\", or \"observe\": recorded and not reset, or \"exempt\": not tracked.",
            ),
            key("idle_timeout", None, "Longest time without new payload."),
            key(
                "max_lifetime",
                None,
                "Longest time since the connection was established.",
            ),
            key(
                "lifetime_jitter",
                Some("\"0%\""),
                "Each session's lifetime is up to this much shorter, evenly spread and fixed for \
                 the session's life. At most \"90%\".",
            ),
            key(
                "activity",
                Some("\"any\""),
                "Whose new payload is activity: \"any\", or \"received\" or \"sent\" by this host \
                 only.",
            ),
            key(
                "response_timeout",
                None,
                "Longest time that this host may owe an answer. Meanwhile idle_timeout does not \
                 run.",
            ),
            key(
                "min_payload",
                Some("1"),
                "Bytes of new payload that a packet must have to count as activity, from 1 to \
                 1400.",
            ),
        ],
    },
];
