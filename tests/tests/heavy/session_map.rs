//! The session table: the daemon reads and writes it while the programs change it.

use std::{
    collections::HashSet,
    hint,
    net::Ipv4Addr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use session_enforcer::{
    datapath::{Adoption, Datapath},
    host::cgroup::Cgroup,
};
use session_enforcer_common::{Address, Direction, Limits, MatchEntry, Owner, Session, flags};
use session_enforcer_tests::{Lab, Pair, Random, cookie, patience, reset_on_close, seed};

use crate::{load, turn};

const AGENT: &str = env!("CARGO_BIN_EXE_session-enforcer-test-agent");

/// The number of lasting connections, and the duration of the churn.
const CONNECTIONS: usize = 50;
const TIME: Duration = Duration::from_secs(2);

/// The first of a range of cookies that no socket has: the kernel counts cookies up from 1.
const NOBODY: u64 = 1 << 62;

/// A session whose fields identify its number.
fn session(number: u64) -> Session {
    Session {
        last_received_ns: number,
        last_sent_ns: number,
        answered_ns: number,
        bytes_received: number,
        bytes_sent: number,
        open_until_ns: 0,
        generation: 1,
        rule: 0,
        direction: Direction::Inbound as u8,
        flags: 0,
        established_ns: number,
        netns_cookie: 1,
        local: Address::default(),
        remote: Address::default(),
        local_port: 1,
        remote_port: 2,
        ifindex: 0,
        owner: Owner {
            uid: number as u32,
            ..Owner::UNKNOWN
        },
        data_segments_sent: number as u32,
        sent_before_answer: 0,
        sent_candidate_completes_answer: 0,
        half_closed_ns: Session::NOT_HALF_CLOSED - number,
        received_candidate_ns: 0,
        sent_candidate_ns: 0,
        sent_candidate_end: 0,
    }
}

/// Fills the table. Asserts that `room` sessions fit and no more.
fn fill(kernel: &mut Datapath, room: u64) -> Result<()> {
    for number in 0..room {
        let adopted = kernel.adopt(NOBODY + number, &session(number))?;
        assert_eq!(adopted, Adoption::Inserted, "{number} of {room}");
    }
    let one_more = kernel.adopt(NOBODY + room, &session(room))?;
    assert_eq!(one_more, Adoption::Full);
    Ok(())
}

#[test]
fn a_table_holds_exactly_its_capacity() -> Result<()> {
    let _turn = turn(module_path!());
    for capacity in [1, 16, 17, 1_000, 20_000] {
        let mut kernel = load(capacity)?;
        let room = u64::from(capacity);
        fill(&mut kernel, room)?;
        assert_eq!(kernel.adopt(NOBODY, &session(7))?, Adoption::Known);
        let cookies: Vec<u64> = (NOBODY..NOBODY + room).collect();
        assert_eq!(kernel.cookies()?, cookies);
        let all = (0..room).map(|number| Some(session(number)));
        assert_eq!(kernel.sessions(&cookies)?, all.collect::<Vec<_>>());
        // Removing the last session makes room for another.
        let last = NOBODY + room - 1;
        let later = room + 9;
        assert!(kernel.update(last, &session(later))?);
        assert_eq!(kernel.session(last)?, Some(session(later)));
        assert!(
            !kernel.remove(last, 8)?,
            "removed a session of another time"
        );
        assert!(kernel.remove(last, later)? && !kernel.remove(last, later)?);
        assert!(!kernel.update(last, &session(later))?);
        assert_eq!(kernel.sessions(&[last, last + 1])?, [None, None]);
        let other = NOBODY + 2 * room;
        assert_eq!(kernel.adopt(other, &session(3))?, Adoption::Inserted);
        assert_eq!(kernel.adopt(last, &session(3))?, Adoption::Full);
    }
    Ok(())
}

/// The daemon writes back a record that it read earlier, and packets have passed since.
#[test]
fn an_update_keeps_activity_since_the_record_was_read() -> Result<()> {
    let _turn = turn(module_path!());
    let mut kernel = load(8)?;
    let read = session(10);
    assert_eq!(kernel.adopt(NOBODY, &read)?, Adoption::Inserted);
    let passed = Session {
        last_received_ns: 20,
        answered_ns: 0,
        bytes_received: 30,
        flags: flags::PEER_HAS_ENDED,
        ..read
    };
    assert!(kernel.update(NOBODY, &passed)?);
    assert!(kernel.update(NOBODY, &Session { rule: 1, ..read })?);
    assert_eq!(kernel.session(NOBODY)?, Some(Session { rule: 1, ..passed }));
    Ok(())
}

/// The daemon's decision counts a session as opened, and its close counts it as closed. A session
/// that closes at that moment is counted by both or by neither.
#[test]
fn a_session_that_closes_during_the_decision_is_counted_as_closed_only_if_opened() -> Result<()> {
    let _turn = turn(module_path!());
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let mut kernel = load(64)?;
    kernel.put_policy(1, &[MatchEntry::any(0)], &[Limits::default()])?;
    kernel.attach(&Cgroup::open(lab.cgroup.path())?)?;
    let (to_closer, pairs) = mpsc::channel::<(Pair, Arc<AtomicBool>, u64)>();
    let (tell, has_closed) = mpsc::channel();
    let mut random = Random::of(seed()?, 0);
    let wait = |turns: u64| (0..turns).for_each(|_| hint::spin_loop());
    let opened = thread::scope(|scope| -> Result<u64> {
        let closer = scope.spawn(move || {
            for (pair, go, turns) in pairs {
                while !go.load(Ordering::Acquire) {
                    hint::spin_loop();
                }
                wait(turns);
                drop(pair);
                // The receiver is gone if the other thread has failed.
                let _ = tell.send(());
            }
        });
        let mut opened = 0;
        let start = Instant::now();
        while start.elapsed() < 2 * TIME {
            let pair = Pair::open(&lab.outside, &listener)?;
            reset_on_close(&pair.client)?;
            let cookie = cookie(&pair.server)?;
            let decided = kernel.session(cookie)?.context("the session")?;
            let undecided = Session {
                generation: 0,
                ..decided
            };
            assert!(kernel.update(cookie, &undecided)?);
            let go = Arc::new(AtomicBool::new(false));
            to_closer.send((pair, Arc::clone(&go), random.below(200)))?;
            thread::yield_now();
            go.store(true, Ordering::Release);
            // About as long as a close takes.
            wait(random.below(1_500));
            opened += u64::from(kernel.update(cookie, &decided)?);
            has_closed.recv()?;
        }
        drop(to_closer);
        closer.join().expect("a thread of the test");
        Ok(opened)
    })?;
    wait_until(|| Ok(kernel.cookies()?.is_empty()))?;
    let closed: u64 = kernel.rule_counters()?.iter().map(|rule| rule.closed).sum();
    assert_eq!(closed, opened);
    assert!(opened > 0);
    Ok(())
}

/// 0 marks a free slot, another reserved value marks a slot that is being written, and the kernel
/// reserves the last value. None is a cookie.
#[test]
fn reserved_values_have_no_session() -> Result<()> {
    let _turn = turn(module_path!());
    let mut kernel = load(8)?;
    for no_cookie in [0, 1 << 63, u64::MAX] {
        assert_eq!(kernel.adopt(no_cookie, &session(1))?, Adoption::Full);
        assert_eq!(kernel.session(no_cookie)?, None);
        assert!(!kernel.remove(no_cookie, 1)?);
        assert!(!kernel.update(no_cookie, &session(1))?);
    }
    fill(&mut kernel, 8)
}

/// The kernel counts some cookies down from the end of the range.
#[test]
fn large_cookies_have_sessions_like_others() -> Result<()> {
    let _turn = turn(module_path!());
    let mut kernel = load(64)?;
    let cookies: Vec<u64> = (u64::MAX - 32..u64::MAX).collect();
    for cookie in &cookies {
        assert_eq!(
            kernel.adopt(*cookie, &session(*cookie))?,
            Adoption::Inserted
        );
    }
    assert_eq!(kernel.cookies()?, cookies);
    for cookie in &cookies {
        assert_eq!(kernel.session(*cookie)?, Some(session(*cookie)));
        assert!(kernel.update(*cookie, &session(1))? && kernel.remove(*cookie, 1)?);
    }
    fill(&mut kernel, 64)
}

/// Connections open and close on all processors while the daemon inserts and removes sessions. At
/// the end the table has exactly the open connections and room for the rest.
#[test]
fn concurrent_writes_lose_no_session_and_no_slot() -> Result<()> {
    let _turn = turn(module_path!());
    const CAPACITY: u32 = 600;
    let lab = Lab::new(AGENT)?;
    let mut kernel = load(CAPACITY)?;
    kernel.put_policy(1, &[MatchEntry::any(0)], &[Limits::default()])?;
    kernel.attach(&Cgroup::open(lab.cgroup.path())?)?;
    let done = AtomicBool::new(false);
    let kept = thread::scope(|scope| -> Result<Vec<Pair>> {
        let churn = || -> Result<Vec<Pair>> {
            let listener = lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?;
            let mut kept = Vec::new();
            while !done.load(Ordering::Relaxed) || kept.len() < CONNECTIONS {
                let pair = Pair::open(&lab.outside, &listener)?;
                if kept.len() < CONNECTIONS {
                    kept.push(pair);
                } else {
                    reset_on_close(&pair.client)?;
                }
            }
            Ok(kept)
        };
        let others = [scope.spawn(churn), scope.spawn(churn)];
        let start = Instant::now();
        let mut rounds = 0;
        while start.elapsed() < TIME {
            rounds += 1;
            for number in 0..200 {
                let adopted = kernel.adopt(NOBODY + number, &session(rounds))?;
                assert_eq!(adopted, Adoption::Inserted);
            }
            for number in 0..200 {
                assert!(kernel.update(NOBODY + number, &session(rounds))?);
                assert_eq!(kernel.session(NOBODY + number)?, Some(session(rounds)));
                assert!(kernel.remove(NOBODY + number, rounds)?);
            }
        }
        done.store(true, Ordering::Relaxed);
        let mut kept = Vec::new();
        for other in others {
            kept.extend(other.join().expect("a thread of the test")?);
        }
        Ok(kept)
    })?;
    assert_eq!(kept.len(), 2 * CONNECTIONS);
    wait_until(|| Ok(kernel.cookies()?.len() == kept.len()))?;
    let cookies = kernel.cookies()?;
    let ports: HashSet<u16> = kernel
        .sessions(&cookies)?
        .into_iter()
        .flatten()
        .map(|session| session.remote_port)
        .collect();
    for pair in &kept {
        assert!(ports.contains(&pair.client_address.port()));
    }
    let free = u64::from(CAPACITY) - kept.len() as u64;
    fill(&mut kernel, free)
}

/// Waits for `holds`. The reset of the other end may still be on its way.
fn wait_until(mut holds: impl FnMut() -> Result<bool>) -> Result<()> {
    let start = Instant::now();
    while !holds()? {
        ensure!(start.elapsed() < patience(), "it does not hold");
        thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

#[test]
fn a_session_is_listed_once_while_others_come_and_go() -> Result<()> {
    let _turn = turn(module_path!());
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let mut kernel = load(1024)?;
    kernel.put_policy(1, &[MatchEntry::any(0)], &[Limits::default()])?;
    kernel.attach(&Cgroup::open(lab.cgroup.path())?)?;
    let open = || Pair::open(&lab.outside, &listener);
    let _pairs: Vec<Pair> = (0..CONNECTIONS).map(|_| open()).collect::<Result<_>>()?;
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let churn = scope.spawn(|| -> Result<()> {
            while !done.load(Ordering::Relaxed) {
                reset_on_close(&open()?.client)?;
            }
            Ok(())
        });
        let start = Instant::now();
        let mut twice = 0;
        while start.elapsed() < TIME && !churn.is_finished() {
            let cookies = kernel.cookies()?;
            let different: HashSet<&u64> = cookies.iter().collect();
            twice += cookies.len() - different.len();
        }
        done.store(true, Ordering::Relaxed);
        churn.join().expect("churn")?;
        assert_eq!(twice, 0);
        Ok(())
    })
}
