//! Tests of ports, prefixes and times as text.

use proptest::prelude::*;

use super::*;

#[test]
fn ports_are_numbers_or_ranges() {
    let range = |first, last| PortRange { first, last };
    for (text, expected) in [
        ("1", range(1, 1)),
        ("65535", range(65535, 65535)),
        ("6000-6010", range(6000, 6010)),
        ("7-7", range(7, 7)),
        ("1-65535", range(1, 65535)),
    ] {
        assert_eq!(parse_ports(text).unwrap(), expected);
    }
    let mixed = rule("idle_timeout = '1s'\nlocal_ports = [0x16, '23', '1-2']");
    assert_eq!(
        mixed.local_ports,
        [range(22, 22), range(23, 23), range(1, 2)]
    );
}

#[test]
fn an_ipv4_mapped_prefix_is_its_ipv4_prefix() {
    for (text, expected) in [
        ("10.0.0.0/8", "10.0.0.0/8"),
        ("10.0.0.1", "10.0.0.1/32"),
        ("::1", "::1/128"),
        ("2001:db8::/32", "2001:db8::/32"),
        ("::ffff:10.0.0.0/104", "10.0.0.0/8"),
        ("::ffff:10.0.0.1", "10.0.0.1/32"),
        ("::ffff:0:0/96", "0.0.0.0/0"),
        ("::fffe:0:0/95", "::fffe:0:0/95"),
        ("::10.0.0.1", "::10.0.0.1/128"),
    ] {
        let expected: IpNet = expected.parse().unwrap();
        assert_eq!(parse_prefix(text).unwrap(), expected, "{text}");
    }
}

#[test]
fn times_are_numbers_with_units() {
    for (text, milliseconds) in [
        ("90s", 90_000),
        ("15m", 900_000),
        ("12h", 43_200_000),
        ("7d", 604_800_000),
        ("1h30m", 5_400_000),
        ("1h 30m", 5_400_000),
        ("1d2h3m4s5ms", 93_784_005),
        ("5ms", 5),
        ("0s", 0),
        ("36500d", 3_153_600_000_000),
    ] {
        assert_eq!(
            parse_duration(text).unwrap(),
            Duration::from_millis(milliseconds),
            "{text}"
        );
    }
}

#[test]
fn times_are_printed_in_the_fewest_units() {
    for (milliseconds, text) in [
        (0, "0s"),
        (5, "5ms"),
        (90_000, "1m30s"),
        (900_000, "15m"),
        (43_200_000, "12h"),
        (86_400_000, "1d"),
    ] {
        assert_eq!(format_duration(Duration::from_millis(milliseconds)), text);
    }
}

proptest! {
    #[test]
    fn a_printed_time_reads_the_same(milliseconds in 0..=MAX_LIMIT.as_millis() as u64) {
        let duration = Duration::from_millis(milliseconds);
        prop_assert_eq!(parse_duration(&format_duration(duration)).unwrap(), duration);
    }

    /// Any text of a stranger gives a one-line error or a configuration.
    #[test]
    fn no_text_is_a_panic_or_two_lines(text in "(?s).{0,200}") {
        if let Err(error) = Config::parse("x.toml", &text) {
            prop_assert!(!error.to_string().contains(char::is_control));
        }
    }

    /// The same with values that pass the TOML parser.
    #[test]
    fn no_value_is_a_panic_or_two_lines(
        key in "(cgroup|mode|max_sessions|pin_dir|network_namespaces|reconcile_interval|listen|path|name|direction|local_ports\
                |remote_ports|local|remote|action|idle_timeout|max_lifetime|users|cgroups|control|x)",
        table in r"(|\[daemon\]|\[metrics\]|\[audit\]|\[\[rule\]\]|\[\[rule\]\]\nname = 'a')",
        value in "(-?[0-9]{1,30}|true|[0-9]{1,3}\\.5|\"[^\"\\\\\\x00-\\x1f\\x7f]{0,80}\"\
                  |\\[[0-9]{1,6}\\]|\\['[0-9a-f:./-]{0,40}'\\]|'[0-9]{1,20}[dhms]{1,2}'|\\{\\})",
    ) {
        let text = format!("{table}\n{key} = {value}\n");
        if let Err(error) = Config::parse("x.toml", &text) {
            let message = error.to_string();
            prop_assert!(!message.contains(char::is_control), "{:?}", message);
            prop_assert!(message.starts_with("x.toml:"), "{:?}", message);
        }
    }
}
