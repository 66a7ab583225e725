//! Finds conditions of a rule that no connection can meet, and limits that none can reach, independent of other rules.

use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::{Doubt, Rule};

/// Addresses that no endpoint of a TCP connection has: unspecified, multicast, broadcast.
const NO_ENDS: [IpNet; 5] = [
    IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::UNSPECIFIED, 32)),
    IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::new(224, 0, 0, 0), 4)),
    IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::BROADCAST, 32)),
    IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::UNSPECIFIED, 128)),
    IpNet::V6(Ipv6Net::new_assert(
        Ipv6Addr::new(0xff00, 0, 0, 0, 0, 0, 0, 0),
        8,
    )),
];

/// Characters of other pattern languages that systemd and container runtimes never use in cgroup names.
const PATTERN: [&str; 5] = ["**", "?", "[", "]", "{"];

/// The rule's conditions that can never match, and its limits that no session reaches.
pub(super) fn doubts(rule: &Rule) -> Vec<Doubt> {
    let ends = [("local", &rule.local), ("remote", &rule.remote)];
    let ends = ends.into_iter().flat_map(|(key, nets)| {
        let never = nets.iter().filter(|net| is_no_end(net));
        never.map(move |net| Doubt::NoEnd { key, net: *net })
    });
    let has_pattern = |path: &&String| PATTERN.iter().any(|part| path.contains(part));
    let patterns = rule.cgroups.iter().filter(has_pattern);
    let patterns = patterns.map(|path| Doubt::NoPattern { path: path.clone() });
    let limits = [
        ("idle_timeout", rule.idle_timeout),
        ("response_timeout", rule.response_timeout),
        ("half_closed_timeout", rule.half_closed_timeout),
    ];
    let beyond = limits.into_iter().filter_map(|(key, limit)| {
        let lifetime = rule.max_lifetime?;
        (limit? >= lifetime).then_some(Doubt::BeyondLifetime { key, lifetime })
    });
    ends.chain(patterns).chain(beyond).collect()
}

fn is_no_end(net: &IpNet) -> bool {
    NO_ENDS.iter().any(|never| never.contains(net))
}

#[cfg(test)]
mod tests {
    use super::super::Config;

    #[test]
    fn a_rule_that_never_matches_is_a_warning_and_one_that_may_is_none() {
        let text = "[[rule]]\nname = 'a'\nidle_timeout = '1m'\n\
                    local = ['0.0.0.0', '10.0.0.0/8', '0.0.0.0/1', '239.1.0.0/16']\n\
                    remote = ['0.0.0.0/0', '192.0.2.255', '::', 'fe80::/10']\n\
                    cgroups = ['/a/b-[0-9].scope', '/a/**', '/system.slice/docker-*.scope', '/a@b\\x2d:1']\n";
        let config = Config::parse("x.toml", text).unwrap();
        let warnings: Vec<_> = config.warnings.iter().map(ToString::to_string).collect();
        assert_eq!(
            warnings,
            [
                "x.toml:1:1: rule \"a\": local: \"0.0.0.0\" matches nothing: no connection has this \
                 address; for all of its kind write \"0.0.0.0/0\", or leave it out",
                "x.toml:1:1: rule \"a\": local: \"239.1.0.0/16\" matches nothing: no TCP connection has a \
                 multicast or broadcast address; remove it",
                "x.toml:1:1: rule \"a\": remote: \"::\" matches nothing: no connection has this \
                 address; for all of its kind write \"::/0\", or leave it out",
                "x.toml:1:1: rule \"a\": cgroups: \"/a/b-[0-9].scope\" hardly matches what it is meant to: \
                 only a single * within one name is a pattern, other characters stand for themselves",
                "x.toml:1:1: rule \"a\": cgroups: \"/a/**\" hardly matches what it is meant to: only a \
                 single * within one name is a pattern, other characters stand for themselves",
            ]
        );
    }

    #[test]
    fn a_limit_that_the_lifetime_hides_is_a_warning() {
        let text = "[[rule]]\nname = 'a'\nidle_timeout = '1h'\nresponse_timeout = '59m'\n\
                    half_closed_timeout = '2h'\nmax_lifetime = '1h'\n";
        let config = Config::parse("x.toml", text).unwrap();
        let warnings: Vec<_> = config.warnings.iter().map(ToString::to_string).collect();
        let warning = |key| {
            format!(
                "x.toml:1:1: rule \"a\": {key} is never reached, because no session lives longer than \
                 max_lifetime, 1h; shorten it, lengthen max_lifetime, or remove one of them"
            )
        };
        assert_eq!(
            warnings,
            [warning("idle_timeout"), warning("half_closed_timeout")]
        );
    }
}
