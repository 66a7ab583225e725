//! What the daemon reads of the session map while the kernel changes it.

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
    datapath::{Adoption, Datapath, Options},
    host::cgroup::Cgroup,
    reaper::disconnect,
};
use session_enforcer_common::{Address, Direction, Limits, MatchEntry, Owner, Session, flags};
use session_enforcer_tests::{Lab, Pair, Random, patience, reset_on_close, seed};

use crate::turn;

const AGENT: &str = env!("CARGO_BIN_EXE_session-enforcer-test-agent");

/// Connections that stay, and how long others come and go beside them.
const CONNECTIONS: usize = 50;
const TIME: Duration = Duration::from_secs(2);

/// The kernel counts cookies up from 1: these are no socket's.
const NOBODY: u64 = 1 << 62;

fn load(max_sessions: u32) -> Result<Datapath> {
    let options = Options {
        max_sessions,
        only_netns: None,
        notes_owners: true,
        verbose: false,
    };
    Ok(Datapath::load(options, None)?)
}

/// A session that its number can be told by.
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
        went_is_answer: 0,
        half_closed_ns: Session::NOT_HALF_CLOSED - number,
        came_ns: 0,
        went_ns: 0,
        went_until: 0,
    }
}

/// Fills the map up; whether exactly so many had room.
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
fn a_map_takes_as_many_as_it_is_made_for_and_keeps_each_apart() -> Result<()> {
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
        // The last makes room for another.
        let last = NOBODY + room - 1;
        let later = room + 9;
        assert!(kernel.update(last, &session(later))?);
        assert_eq!(kernel.session(last)?, Some(session(later)));
        assert!(!kernel.remove(last, 8)?, "one that began at another time");
        assert!(kernel.remove(last, later)? && !kernel.remove(last, later)?);
        assert!(!kernel.update(last, &session(later))?);
        assert_eq!(kernel.sessions(&[last, last + 1])?, [None, None]);
        let other = NOBODY + 2 * room;
        assert_eq!(kernel.adopt(other, &session(3))?, Adoption::Inserted);
        assert_eq!(kernel.adopt(last, &session(3))?, Adoption::Full);
    }
    Ok(())
}

/// The daemon writes what it read a while ago, and packets have passed since.
#[test]
fn an_amendment_keeps_what_has_passed_since_the_record_was_read() -> Result<()> {
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

/// A session that was decided about is counted as opened by whoever decided, and as closed by its end;
/// one that closes in that very moment by both or by none.
#[test]
fn what_closes_while_it_is_decided_about_is_closed_if_it_was_opened() -> Result<()> {
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
                // Nobody listens any more where the other thread has failed.
                let _ = tell.send(());
            }
        });
        let mut opened = 0;
        let start = Instant::now();
        while start.elapsed() < 2 * TIME {
            let pair = Pair::open(&lab.outside, &listener)?;
            reset_on_close(&pair.client)?;
            let cookie = disconnect::cookie(&pair.server)?;
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
            // About as long as the end takes from its system call on.
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

/// A free place has the tag 0, one that is being written another that no socket has, and the kernel takes
/// the last for none.
#[test]
fn what_is_no_cookie_has_no_session() -> Result<()> {
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

/// The kernel counts some cookies down from the end.
#[test]
fn large_cookies_have_sessions_as_others() -> Result<()> {
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

/// Connections are opened and closed on every processor while the daemon puts in and takes out: in the
/// end there is what is there, and room for the rest.
#[test]
fn nothing_is_lost_and_no_place_either_while_all_write_at_once() -> Result<()> {
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

/// The other end's reset may be on its way.
fn wait_until(mut holds: impl FnMut() -> Result<bool>) -> Result<()> {
    let start = Instant::now();
    while !holds()? {
        ensure!(start.elapsed() < patience(), "it does not hold");
        thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

#[test]
fn a_session_is_listed_once_however_the_others_come_and_go() -> Result<()> {
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
