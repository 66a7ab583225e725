//! Parses values that are written as text in the file and on the command line: ports, prefixes, times,
//! addresses, and the target of the audit.

use std::net::{IpAddr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use session_enforcer_common::{PortRange, SHORTEST_LIMIT_NS};

use super::error::quoted;
use super::{AuditTarget, ControlSocket, JOURNALD, MetricsListen, Problem};

pub(super) const ALLOWED_PORT: &str =
    "a port from 1 to 65535, or a range of ports such as \"6000-6010\"";
pub(super) const ALLOWED_PREFIX: &str =
    "an address or a prefix such as \"10.0.0.0/8\" or \"2001:db8::/32\"";
pub(super) const ALLOWED_TIME: &str = "a time such as \"90s\", \"15m\", \"12h\" or \"1h30m\"";
pub(super) const ALLOWED_LISTEN: &str = "an IP address and a port such as \"127.0.0.1:9847\", a Unix socket such as \
     \"unix:/run/session-enforcer/metrics.sock\", or \"\" for none";
pub(super) const ALLOWED_PIN_DIR: &str = "the absolute path of a directory on bpffs such as \"/sys/fs/bpf/session-enforcer\", or \"\" for none";
pub(super) const ALLOWED_CONTROL_SOCKET: &str = "the absolute path of a Unix socket such as \"/run/session-enforcer/control.sock\", or \"\" for none";
pub(super) const ALLOWED_GROUP: &str = "the name of a group such as \"netops\", or \"\" for none";
pub(super) const ALLOWED_AUDIT: &str = "\"-\" for standard output, \"journald\", or a file's absolute path such as \"/var/log/sessions.json\"";

/// The longest path of a Unix socket: `sun_path` of unix(7) has 108 bytes, with a zero byte at the end.
pub(super) const MAX_SOCKET_PATH: usize = 107;

/// The shortest limit of a rule. Below it, the tick granularity of an adopted session's age would be
/// noticeable.
pub const MIN_LIMIT: Duration = Duration::from_nanos(SHORTEST_LIMIT_NS);

/// The longest limit of a rule, 36500d. A hundred years in nanoseconds fit in 63 bits, so the sum of a limit
/// and a time stamp never overflows.
pub const MAX_LIMIT: Duration = Duration::from_secs(36_500 * 86_400);

/// Units of time in milliseconds, longest first. There is no month and no year: `M` could be confused with
/// `m`, and neither has a fixed length.
const UNITS: [(&str, u64); 5] = [
    ("d", 86_400_000),
    ("h", 3_600_000),
    ("m", 60_000),
    ("s", 1_000),
    ("ms", 1),
];

fn not_allowed(text: &str, allowed: &'static str) -> Problem {
    let found = quoted(text);
    Problem::NotAllowed { found, allowed }
}

/// Parses a port or a range of ports, as in `5432` and `6000-6010`.
///
/// # Errors
///
/// Fails if the text is neither, a port is 0 or above 65535, or the range runs backwards.
pub fn parse_ports(text: &str) -> Result<PortRange, Problem> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let (Some(first), Some(last)) = (port(first), port(last)) else {
        return Err(not_allowed(text, ALLOWED_PORT));
    };
    if first > last {
        return Err(Problem::BackwardRange { first, last });
    }
    Ok(PortRange { first, last })
}

fn port(text: &str) -> Option<u16> {
    // `u16::from_str` would also accept a sign.
    let digits = text.bytes().all(|b| b.is_ascii_digit());
    let number = text.parse().ok()?;
    (digits && number > 0).then_some(number)
}

/// Parses a prefix as in `10.0.0.0/8`. An address alone is the prefix that contains only it. A prefix of
/// IPv4-mapped addresses becomes the IPv4 prefix.
///
/// # Errors
///
/// Fails if the text is neither, or if a bit after the prefix is set.
pub fn parse_prefix(text: &str) -> Result<IpNet, Problem> {
    let net = match (text.parse::<IpNet>(), text.parse::<IpAddr>()) {
        (Ok(net), _) => net,
        (_, Ok(address)) => IpNet::from(address),
        _ => return Err(not_allowed(text, ALLOWED_PREFIX)),
    };
    if net != net.trunc() {
        return Err(Problem::HostBits(net));
    }
    Ok(unmapped(net))
}

fn unmapped(net: IpNet) -> IpNet {
    let IpNet::V6(v6) = net else { return net };
    ipv4_of(v6).map_or(net, IpNet::V4)
}

fn ipv4_of(net: Ipv6Net) -> Option<Ipv4Net> {
    let length = net.prefix_len().checked_sub(96)?;
    Ipv4Net::new(net.addr().to_ipv4_mapped()?, length).ok()
}

/// Parses a time as in `90s`, `15m`, `12h` or `1h30m`: whole numbers with the units `d`, `h`, `m`, `s` or
/// `ms`, longer units first.
///
/// # Errors
///
/// Fails if the text is no such time, has no unit, or is longer than [`MAX_LIMIT`].
pub fn parse_duration(text: &str) -> Result<Duration, Problem> {
    if !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit()) {
        let number = text.to_owned();
        return Err(Problem::NoUnit { number });
    }
    let parts = time_parts(text).ok_or_else(|| not_allowed(text, ALLOWED_TIME))?;
    let too_long = || Problem::LongLimit {
        found: quoted(text),
    };
    let add = |sum: u64, (number, unit_ms): (&str, u64)| {
        sum.checked_add(number.parse::<u64>().ok()?.checked_mul(unit_ms)?)
    };
    let sum = parts.into_iter().try_fold(0, add).ok_or_else(too_long)?;
    let duration = Duration::from_millis(sum);
    if duration > MAX_LIMIT {
        return Err(too_long());
    }
    Ok(duration)
}

/// The numbers of a time with the milliseconds of their units. `None` if the text is not a time.
fn time_parts(text: &str) -> Option<Vec<(&str, u64)>> {
    let mut units = UNITS.iter();
    let mut parts = Vec::new();
    let mut rest = text;
    while !rest.is_empty() || parts.is_empty() {
        let (number, after) = split_at_first(rest, |c| !c.is_ascii_digit())?;
        let (unit, after) = split_at_first(after, |c| !c.is_ascii_alphabetic())?;
        // The iterator continues after the last unit, so each unit occurs once and longer units come first.
        let (_, unit_ms) = units.find(|(name, _)| *name == unit)?;
        parts.push((number, *unit_ms));
        rest = after.strip_prefix(' ').unwrap_or(after);
    }
    Some(parts)
}

/// Splits the text before the first such character. `None` if nothing precedes it.
fn split_at_first(text: &str, stop: impl Fn(char) -> bool) -> Option<(&str, &str)> {
    let at = text.find(stop).unwrap_or(text.len());
    (at > 0).then(|| text.split_at(at))
}

/// What to write for no limit.
pub(super) const NO_LIMIT: &str = "for no limit, leave it out";

/// Parses a limit.
///
/// # Errors
///
/// Fails as [`parse_time`] does.
pub fn parse_limit(text: &str) -> Result<Duration, Problem> {
    parse_time(text, NO_LIMIT)
}

/// Parses a time that is a valid limit of a rule: [`MIN_LIMIT`] to [`MAX_LIMIT`].
///
/// # Errors
///
/// Fails as [`parse_duration`] does, and if the time is shorter than [`MIN_LIMIT`].
pub(super) fn parse_time(text: &str, otherwise: &'static str) -> Result<Duration, Problem> {
    let duration = parse_duration(text)?;
    if duration < MIN_LIMIT {
        let found = quoted(text);
        return Err(Problem::ShortLimit { found, otherwise });
    }
    Ok(duration)
}

/// Formats the time for [`parse_duration`], in whole milliseconds.
pub fn format_duration(duration: Duration) -> String {
    let mut rest = u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    let mut text = String::new();
    for (unit, unit_ms) in UNITS {
        if rest >= unit_ms {
            text += &format!("{}{unit}", rest / unit_ms);
            rest %= unit_ms;
        }
    }
    if text.is_empty() {
        return "0s".to_owned();
    }
    text
}

/// Parses the metrics' address: an address with a port, or `None` for the empty text.
///
/// # Errors
///
/// Fails if the text is neither.
pub fn parse_listen(text: &str) -> Result<Option<MetricsListen>, Problem> {
    if text.is_empty() {
        return Ok(None);
    }
    if let Some(path) = text.strip_prefix("unix:").filter(|path| is_absolute(path)) {
        return Ok(Some(MetricsListen::Unix(socket_path(path)?)));
    }
    let bare = text.trim_start_matches('[').trim_end_matches(']');
    // Such as ::1:9847, which is an address, too.
    if let Some((address, port)) = text.rsplit_once(':')
        && let (Ok(address), Ok(port)) = (address.parse::<Ipv6Addr>(), port.parse::<u16>())
    {
        return Err(Problem::NoBrackets(address, port));
    }
    if let Ok(address) = bare.parse::<IpAddr>() {
        return Err(Problem::NoPort(address));
    }
    let parsed = text.parse().map(MetricsListen::Tcp);
    parsed
        .map(Some)
        .map_err(|_| not_allowed(text, ALLOWED_LISTEN))
}

/// Parses the audit's target: `-` is standard output, `journald` the journal, anything else an absolute path.
///
/// # Errors
///
/// Fails if the path is relative.
pub fn parse_audit(text: &str) -> Result<AuditTarget, Problem> {
    match text {
        "-" => Ok(AuditTarget::Stdout),
        JOURNALD => Ok(AuditTarget::Journald),
        path if is_absolute(path) => Ok(AuditTarget::File(PathBuf::from(path))),
        other => Err(not_allowed(other, ALLOWED_AUDIT)),
    }
}

/// Parses the directory of the pins: an absolute path, or `None` for the empty text.
///
/// # Errors
///
/// Fails if the path is relative.
pub fn parse_pin_dir(text: &str) -> Result<Option<PathBuf>, Problem> {
    match text {
        "" => Ok(None),
        path if is_absolute(path) => Ok(Some(PathBuf::from(path))),
        other => Err(not_allowed(other, ALLOWED_PIN_DIR)),
    }
}

/// Parses the control socket's location: an absolute path, or "" for no socket.
///
/// # Errors
///
/// Fails if the path is relative.
pub fn parse_control_socket(text: &str) -> Result<ControlSocket, Problem> {
    match text {
        "" => Ok(ControlSocket::Nowhere),
        path if is_absolute(path) => Ok(ControlSocket::At(socket_path(path)?)),
        other => Err(not_allowed(other, ALLOWED_CONTROL_SOCKET)),
    }
}

/// Checks the length of a Unix socket's path.
fn socket_path(path: &str) -> Result<PathBuf, Problem> {
    match path.len() {
        length if length > MAX_SOCKET_PATH => Err(Problem::LongSocketPath { length }),
        _ => Ok(path.into()),
    }
}

/// Parses the name of a group, or "" for no group.
pub(super) fn parse_group(text: &str) -> Result<Option<String>, Problem> {
    let strange = |c: char| c.is_control() || c.is_whitespace() || matches!(c, ':' | ',' | '/');
    match text {
        "" => Ok(None),
        name if !name.contains(strange) => Ok(Some(name.to_owned())),
        other => Err(not_allowed(other, ALLOWED_GROUP)),
    }
}

/// Whether the text is an absolute path, which does not depend on the working directory.
pub(super) fn is_absolute(text: &str) -> bool {
    // A path with a zero byte would be cut there by the kernel.
    Path::new(text).is_absolute() && !text.contains('\0')
}
