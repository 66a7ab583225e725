//! How many TCP sockets the host has.

use std::fs;

/// TCP sockets of all network namespaces. None where the kernel does not tell.
///
/// `alloc` of `/proc/net/sockstat` is a number of the whole host, unlike `inuse` (`sockstat_seq_show` of
/// `net/ipv4/proc.c`: `proto_sockets_allocated_sum_positive`).
pub fn allocated() -> Option<u32> {
    parse(&fs::read_to_string("/proc/self/net/sockstat").ok()?)
}

fn parse(text: &str) -> Option<u32> {
    let tcp = text.lines().find_map(|line| line.strip_prefix("TCP:"))?;
    let mut words = tcp.split_whitespace();
    words.find(|word| *word == "alloc")?;
    words.next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_number_of_all_sockets_is_found() {
        let text =
            "sockets: used 120\nTCP: inuse 5 orphan 0 tw 2 alloc 8 mem 3\nUDP: inuse 2 mem 0\n";
        assert_eq!(parse(text), Some(8));
        assert_eq!(parse("TCP: inuse 5"), None);
        assert!(allocated().is_some());
    }
}
