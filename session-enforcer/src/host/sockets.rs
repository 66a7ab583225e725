//! The number of TCP sockets of the host and of a network namespace, from the kernel's counters
//! (`net/ipv4/proc.c`).

use std::fs;

/// The number of TCP sockets in all network namespaces. `None` if the kernel does not report it.
///
/// `alloc` of `/proc/net/sockstat` counts the whole host, unlike `inuse` (`sockstat_seq_show` of
/// `net/ipv4/proc.c`: `proto_sockets_allocated_sum_positive`).
pub fn allocated() -> Option<u32> {
    number(
        &fs::read_to_string("/proc/self/net/sockstat").ok()?,
        "TCP:",
        "alloc",
    )
}

/// Whether the calling thread's network namespace has TCP sockets that are bound to a port. True if the
/// kernel does not report it.
///
/// The kernel keeps `inuse` per processor. The sum can miss a socket while others are opened on one processor
/// and closed on another. So a namespace counts as empty only if two reads in a row give 0.
pub fn has_tcp_sockets() -> bool {
    (0..2).any(|_| in_use() != Some(0))
}

fn in_use() -> Option<u32> {
    let of = |file: &str| fs::read_to_string(format!("/proc/thread-self/net/{file}"));
    let ipv4 = number(&of("sockstat").ok()?, "TCP:", "inuse")?;
    // The file does not exist if the kernel has no IPv6.
    let ipv6 = of("sockstat6").map_or(Some(0), |text| number(&text, "TCP6:", "inuse"))?;
    Some(ipv4 + ipv6)
}

/// The number that follows a key in the line with this prefix.
fn number(text: &str, line: &str, key: &str) -> Option<u32> {
    let tcp = text.lines().find_map(|found| found.strip_prefix(line))?;
    let mut words = tcp.split_whitespace();
    words.find(|word| *word == key)?;
    words.next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn numbers_are_found_by_line_and_key() {
        let text =
            "sockets: used 120\nTCP: inuse 5 orphan 0 tw 2 alloc 8 mem 3\nUDP: inuse 2 mem 0\n";
        assert_eq!(number(text, "TCP:", "alloc"), Some(8));
        assert_eq!(number(text, "TCP:", "inuse"), Some(5));
        assert_eq!(number("TCP6: inuse 3\n", "TCP6:", "inuse"), Some(3));
        assert_eq!(number("TCP: inuse 5", "TCP:", "alloc"), None);
        assert_eq!(number(text, "TCP6:", "inuse"), None);
        assert!(allocated().is_some());
    }

    #[test]
    fn a_namespace_with_a_listener_has_tcp_sockets() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let _listener = TcpListener::bind(address).unwrap();
            assert!(has_tcp_sockets(), "{address}");
        }
    }
}
