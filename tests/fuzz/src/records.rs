//! Records of the ring buffer and the maps with any bits in them: nothing overflows, nothing panics,
//! and the decisions hold together.

use std::{sync::LazyLock, time::Duration};

use serde_json::Value;
use session_enforcer::{
    config::{Config, Mode, Owners},
    engine::RuleSet,
    host::clock::WallClock,
    reaper::diag::{Queued, SocketId, wire},
    report::audit::{End, Process, RecordId, Termination},
};
use session_enforcer_common::{
    Ancestors, Event, Expiry, Facts, Limits, MatchEntry, Reason, Session, expiry, matches,
};

use super::bytes::Bytes;

/// Reads the input as a record of the ring buffer, and as values of the maps.
///
/// # Panics
///
/// Where a decision contradicts itself or an audit record is no line of JSON.
pub fn run(data: &[u8]) {
    event(data);
    let mut bytes = Bytes(data);
    let session: Session = bytes.value();
    let limits: Limits = bytes.value();
    let entry: MatchEntry = bytes.value();
    let now_ns: u64 = bytes.value();
    decide(&session, &limits, now_ns);
    let facts = Facts::of(&session);
    let ancestors: Ancestors = bytes.value();
    if matches(&facts, &ancestors, &entry) {
        assert!(entry.local_ports.contains(session.local_port));
        let asks = entry.asks_user != 0 || entry.cgroup_id != 0;
        assert!(asks || !entry.needs_owner(&facts));
    }
    assert!(
        matches(&facts, &ancestors, &MatchEntry::any(0)),
        "every session is some connection"
    );
    find_rule(&session, now_ns);
    audit(&session, &mut bytes, now_ns);
    destroy(&session, now_ns);
}

fn event(data: &[u8]) {
    match Event::parse(data) {
        Ok((kind, event)) => {
            assert_eq!(data.len(), size_of::<Event>());
            assert_eq!(kind as u32, event.kind);
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

fn decide(session: &Session, limits: &Limits, now_ns: u64) {
    match expiry(session, limits, now_ns) {
        Expiry::Alive { recheck_ns } => {
            if let Some(before) = recheck_ns.checked_sub(1).filter(|at| *at > now_ns) {
                let still = expiry(session, limits, before);
                assert!(
                    matches!(still, Expiry::Alive { .. }),
                    "{session:?} {limits:?}"
                );
            }
        }
        Expiry::Expired { deadline_ns, .. } => {
            assert!(deadline_ns <= now_ns);
            let later = expiry(session, limits, u64::MAX);
            assert_eq!(
                later,
                expiry(session, limits, now_ns),
                "a session does not rise again"
            );
        }
    }
    assert!(limits.lifetime_ns(session) <= limits.max_lifetime_ns);
    let first = limits.first_deadline_ns(now_ns);
    assert!(first >= now_ns);
    assert!(limits.next_activity_deadline_ns(now_ns) >= now_ns);
}

/// Two rules. Made once, since that takes longer than all the rest.
static RULE_SET: LazyLock<RuleSet> = LazyLock::new(|| {
    let text = "[[rule]]\nname = 'a'\nlocal_ports = [22]\nidle_timeout = '1s'\n\
                [[rule]]\nname = 'b'\nmax_lifetime = '1s'\n";
    let config = Config::parse("fuzz.toml", text).expect("the configuration is valid");
    let rule_set = RuleSet::default().next(&config, &Owners::default());
    rule_set.expect("two rules have ids")
});

/// The rule that decides exists, whichever rule the record names.
fn find_rule(session: &Session, now_ns: u64) {
    let ancestors = |_| Some(Ancestors::UNKNOWN);
    let rule = RULE_SET.rule_of(session, ancestors);
    assert!(rule.expect("the last rule matches everything") < 2);
    RULE_SET.lets_live(session, now_ns, ancestors);
}

fn audit(session: &Session, bytes: &mut Bytes<'_>, answered_ns: u64) {
    let name = String::from_utf8_lossy(bytes.0).into_owned();
    let termination = Termination {
        cookie: bytes.value(),
        session,
        rule: &name,
        reason: bytes.choice(Reason::ALL),
        mode: bytes.choice([Mode::Enforce, Mode::Observe]),
        end: bytes.choice([
            End::Reset(None),
            End::Reset(Some(Queued {
                send: u32::MAX,
                receive: 0,
            })),
            End::Gone,
            End::Failed(name.as_str()),
            End::Observed,
        ]),
        limit: bytes.choice([None, Some(Duration::MAX), Some(Duration::ZERO)]),
        deadline_ns: bytes.value(),
        idle_since_ns: bytes.value(),
        answered_ns,
        process: bytes.choice([
            None,
            Some(Process {
                pid: 1,
                name: [0xff; 16],
            }),
        ]),
        cgroup: bytes.choice([None, Some(name.as_str())]),
        user: bytes.choice([None, Some(name.as_str())]),
        requested_by: None,
    };
    let record_id = RecordId {
        boot: "b007",
        run_ns: 1,
        sequence: 1,
    };
    let mut out = Vec::new();
    termination.write_json(&record_id, &WallClock::now(), &mut out);
    let line = String::from_utf8(out).expect("a record is text");
    assert_eq!(line.find('\n'), Some(line.len() - 1), "{line:?}");
    let record: Value = serde_json::from_str(&line).expect("a record is JSON");
    assert_eq!(record["session_enforcer"]["id"], termination.cookie);
    assert_eq!(record["rule"]["name"], name);
    for end in ["source", "destination"] {
        assert!(
            record[end]["ip"].is_string() && record[end]["bytes"].is_u64(),
            "{line}"
        );
    }
}

fn destroy(session: &Session, cookie: u64) {
    let mut request = Default::default();
    wire::put_destroy(&mut request, 1, &SocketId::of(cookie, session));
    let length = (request.len() as u32).to_ne_bytes();
    assert!(
        request.starts_with(&length),
        "a request says how long it is"
    );
}
