//! A datagram of the kernel's socket table: read to its end or refused, and what it lists can be
//! adopted.

use std::collections::HashMap;

use session_enforcer::{
    engine::adopt::{Adopter, Listeners},
    host::cgroup::Scope,
    reaper::diag::{
        Socket,
        wire::{Body, next_message},
    },
};
use session_enforcer_common::{Limits, MatchEntry};

/// The least length of a message: that of its header.
const HEADER: usize = 16;

/// Reads the input as a datagram.
///
/// # Panics
///
/// Where the reading does not come nearer to the end with each message.
pub fn run(data: &[u8]) {
    let mut rest = data;
    let mut sockets = Vec::new();
    loop {
        let before = rest.len();
        match next_message(&mut rest) {
            Ok(Some(message)) => {
                assert!(rest.len() + HEADER <= before, "a message of no length");
                if let Body::Socket(socket) = message.body {
                    sockets.push(socket);
                }
            }
            Ok(None) => {
                assert!(before == 0, "{before} bytes were left");
                break;
            }
            Err(error) => {
                assert_eq!(rest.len(), before, "an error takes nothing");
                assert!(!error.to_string().is_empty());
                break;
            }
        }
    }
    adopt(&sockets);
}

fn adopt(sockets: &[Socket]) {
    let limits = Limits {
        idle_timeout_ns: 1_000_000_000,
        response_timeout_ns: 2_000_000_000,
        half_closed_timeout_ns: 1_000_000_000,
        ..Limits::default()
    };
    let adopter = Adopter {
        entries: &[MatchEntry::any(0)],
        limits_of_rules: &[limits],
        generation: 1,
        lag_ns: 8_000_000,
        scope: &Scope::All,
        ancestors: &HashMap::new(),
    };
    let listeners = Listeners::among(sockets);
    for now_ns in [0, u64::MAX] {
        let adopted = |socket| adopter.session(socket, &listeners, 1, now_ns);
        for session in sockets.iter().filter_map(adopted) {
            // 0 is no time in a record.
            let latest_ns = now_ns.max(1);
            assert!(session.last_received_ns <= latest_ns && session.last_sent_ns <= latest_ns);
            assert!(session.established_ns <= session.last_activity_ns());
        }
    }
}
