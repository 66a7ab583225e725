//! Kernel and daemon decide alike: the programs decide about real connections, and the functions of
//! the daemon decide about the same facts. Policies, connections and payloads are random.
//!
//! `SESSION_ENFORCER_SEED` repeats a run. Each case depends only on the seed and the number of the
//! case.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::AsRawFd as _,
};

use anyhow::{Context as _, Result};
use nix::sys::socket::{SockaddrStorage, bind};
use session_enforcer::{
    datapath::Datapath,
    host::{cgroup::Cgroup, clock::monotonic_ns},
};
use session_enforcer_common::{
    Address, Ancestors, Direction, ErrorKind, Facts, Limits, MAX_MATCH_ENTRIES, MatchEntry,
    PortFilter, PortRange, Prefix, RULE_EXEMPT, Session, matches,
};
use session_enforcer_tests::{
    Agent, Cgroup as CgroupOfTest, Lab, Listener, Netns, Pair, Place, Random, SEED, cookie,
    eventually, patience, reset_on_close, seed, set_option, tcp_info,
};

use crate::{load, turn};

const AGENT: &str = env!("CARGO_BIN_EXE_session-enforcer-test-agent");

/// Connections with two sessions each.
const CONNECTIONS: u64 = 10_000;
/// Connections with payload, and the number of payloads on each.
const TALKS: u64 = 300;
const PAYLOADS: usize = 6;

/// The number of rules.
const RULES: u16 = 8;

/// IPv6 addresses of the test's namespace. Some differ in one bit, and one resembles an IPv4-mapped
/// address.
const IPV6: [Ipv6Addr; 5] = [
    Ipv6Addr::LOCALHOST,
    Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 1),
    Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 3),
    Ipv6Addr::new(0xfd77, 0, 0, 0x8000, 0, 0, 0, 1),
    Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0xffff, 0x7f00, 1),
];

/// Ports of the IPv4 listeners and of the dual-stack listeners. They include both ends of the range
/// and differ from the clients' ports.
const IPV4_PORTS: [u16; 2] = [1, 5432];
const DUAL_PORTS: [u16; 2] = [5433, u16::MAX];
/// Ports of listeners that are older than the programs. The owner of a connection that they accept
/// is unknown.
const UNKNOWN_PORTS: [u16; 2] = [5432, u16::MAX];
const CLIENT_PORTS: [u16; 2] = [6000, 60_000];

/// The users that create the sockets.
const CLIENT_UID: u32 = 4_000_000_000;
const SERVER_UID: u32 = 12_345;

/// The two ends of a new connection.
#[derive(Clone, Copy, Debug)]
struct Ends {
    client: SocketAddr,
    server: SocketAddr,
}

impl Ends {
    /// IPv4 over an IPv4 socket, IPv4 over an IPv6 socket (mapped addresses), or IPv6.
    fn random(random: &mut Random) -> Self {
        let ip = match random.below(3) {
            0 => |random: &mut Random| IpAddr::V4(random_ipv4(random)),
            1 => |random: &mut Random| IpAddr::V6(random_ipv4(random).to_ipv6_mapped()),
            _ => |random: &mut Random| IpAddr::V6(random.one_of(&IPV6)),
        };
        let (client, server) = (ip(random), ip(random));
        let is_ipv4 = Address::from(server).is_ipv4();
        let ports = if is_ipv4 && random.once_in(2) {
            IPV4_PORTS
        } else {
            DUAL_PORTS
        };
        let [first, count] = CLIENT_PORTS;
        let client_port = first + random.below(u64::from(count - first)) as u16;
        Self {
            client: SocketAddr::new(client, client_port),
            server: SocketAddr::new(server, random.one_of(&ports)),
        }
    }

    /// The facts at each end: first the end that dials, then the end that accepts.
    fn facts(&self, above: &[Ancestors; 2]) -> [Known; 2] {
        let (client, server) = (
            Address::from(self.client.ip()),
            Address::from(self.server.ip()),
        );
        let outbound = Facts {
            direction: Direction::Outbound,
            local: client,
            remote: server,
            local_port: self.client.port(),
            remote_port: self.server.port(),
            uid: CLIENT_UID,
            known: Facts::UID | Facts::CGROUP,
        };
        let is_known = !UNKNOWN_PORTS.contains(&self.server.port());
        let inbound = Facts {
            direction: Direction::Inbound,
            local: server,
            remote: client,
            local_port: self.server.port(),
            remote_port: self.client.port(),
            uid: if is_known { SERVER_UID } else { 0 },
            known: if is_known {
                Facts::UID | Facts::CGROUP
            } else {
                0
            },
        };
        let [client, server] = *above;
        let ancestors = [client, if is_known { server } else { Ancestors::UNKNOWN }];
        [(outbound, ancestors[0]), (inbound, ancestors[1])]
            .map(|(facts, ancestors)| Known { facts, ancestors })
    }
}

/// The facts at one end.
#[derive(Clone, Copy, Debug)]
struct Known {
    facts: Facts,
    ancestors: Ancestors,
}

/// An address of 127.0.0.0/8, in half of the cases with few bits set.
fn random_ipv4(random: &mut Random) -> Ipv4Addr {
    let bits = random.next() as u32;
    let bits = if random.once_in(2) {
        bits & 0x0103
    } else {
        bits
    };
    Ipv4Addr::from_bits(0x7f00_0000 | (bits & 0x00ff_ffff).max(1))
}

/// A policy as the daemon gives it to the kernel.
struct Book {
    generation: u32,
    entries: Vec<MatchEntry>,
    policies: Vec<Limits>,
}

impl Book {
    /// A policy whose conditions match these connections or just miss them.
    fn random(random: &mut Random, known: &[Known; 2], generation: u32) -> Self {
        // How often a condition misses. It decides whether the first entry applies, a later one, or
        // none.
        let strictness = random.one_of(&[2, 8, 32]);
        let length = if random.once_in(100) { 400 } else { 12 };
        let count = random.below(length + 1);
        let entry = |_| random_entry(random, known, strictness);
        let entries = (0..count).map(entry).collect();
        let limits = |_| Limits {
            generation,
            min_payload: random_minimum(random),
            ..Limits::default()
        };
        let policies = (0..RULES).map(limits).collect();
        Self {
            generation,
            entries,
            policies,
        }
    }

    /// The same policy in a full match table, with its entries last.
    fn filled(mut self) -> Self {
        let before = MAX_MATCH_ENTRIES as usize - self.entries.len();
        self.entries.splice(0..0, vec![nothing(); before]);
        self
    }

    /// Puts the policy into force. In half of the cases it also narrows the port filter, which must
    /// not change any decision.
    fn put_and_narrow(&self, kernel: &mut Datapath, random: &mut Random) -> Result<()> {
        kernel.put_policy(self.generation, &self.entries, &self.policies)?;
        if random.once_in(2) {
            let mut narrowing = kernel.begin_narrowing();
            kernel.keep_ports(&mut narrowing, &kernel.cookies()?)?;
            kernel.narrow_ports(&narrowing)?;
        }
        Ok(())
    }

    /// Whether the port filter lets the programs see the connection. The filter leaves out ports
    /// that only exempting entries name, even if the owner is unknown.
    fn sees(&self, known: &Known) -> bool {
        let Facts {
            local_port,
            remote_port,
            ..
        } = known.facts;
        PortFilter::of(&self.entries).may_match(local_port, remote_port)
    }

    /// The decision of the first entry that applies, exempting entries included.
    fn decision(&self, known: &Known) -> Option<Decision> {
        let Known { facts, ancestors } = known;
        let mut entries = self.entries.iter();
        let entry = entries.find(|entry| matches(facts, ancestors, entry))?;
        Some(match (entry.needs_owner(facts), entry.rule) {
            (true, _) => Decision::Open,
            (_, RULE_EXEMPT) => Decision::Exempt,
            (_, rule) => Decision::Rule(rule),
        })
    }
}

/// A policy's decision about a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Decision {
    /// This rule applies.
    Rule(u16),
    /// The connection is exempt, so it is not tracked.
    Exempt,
    /// The daemon has to resolve the owner first.
    Open,
}

/// An entry for one of the two ends.
fn random_entry(random: &mut Random, ends: &[Known; 2], strictness: u64) -> MatchEntry {
    let Known { facts, .. } = random.one_of(ends);
    let (asks_user, uid) = random_user(random, &facts, strictness);
    // All four values, including 0, which matches nothing. Most often 3, which matches everything.
    let bits = |random: &mut Random| {
        if random.once_in(3) {
            random.below(4) as u8
        } else {
            3
        }
    };
    MatchEntry {
        local: random_prefix(random, facts.local, strictness),
        remote: random_prefix(random, facts.remote, strictness),
        cgroup_id: random_cgroup(random, ends, strictness),
        uid,
        asks_user,
        reserved: [0; 7],
        local_ports: random_ports(random, facts.local_port, strictness),
        remote_ports: random_ports(random, facts.remote_port, strictness),
        rule: if random.once_in(5) {
            RULE_EXEMPT
        } else {
            random.below(u64::from(RULES)) as u16
        },
        directions: bits(random),
        families: bits(random),
    }
}

/// An entry that matches no connection.
fn nothing() -> MatchEntry {
    MatchEntry {
        remote_ports: PortRange { first: 1, last: 0 },
        ..MatchEntry::any(0)
    }
}

/// No user in most cases, otherwise the user of the end or another one.
fn random_user(random: &mut Random, facts: &Facts, strictness: u64) -> (u8, u32) {
    match (random.once_in(4), random.once_in(strictness)) {
        (false, _) => (0, random.next() as u32),
        (true, false) => (1, facts.uid),
        (true, true) => (1, facts.uid ^ (1 << random.below(32))),
    }
}

/// No cgroup in most cases, otherwise an ancestor of an end or another one.
fn random_cgroup(random: &mut Random, ends: &[Known; 2], strictness: u64) -> u64 {
    if !random.once_in(4) {
        return 0;
    }
    let above = random.one_of(ends).ancestors.0;
    let levels = above.iter().filter(|id| **id != 0).count() as u64;
    if levels == 0 || random.once_in(strictness) {
        return random.next().max(1);
    }
    above[random.below(levels) as usize]
}

/// A prefix of the address, or a prefix that differs in one of its last bits.
fn random_prefix(random: &mut Random, address: Address, strictness: u64) -> Prefix {
    if random.once_in(3) {
        return Prefix::ANY;
    }
    let length = random.below(129) as u8;
    let mut bits = u128::from_be_bytes(address.octets());
    if length > 0 && random.once_in(strictness) {
        let back = random.below(u64::from(length).min(8));
        bits ^= 1 << (128 - u64::from(length) + back);
    }
    Prefix::new(Address::from_octets(bits.to_be_bytes()), length)
}

/// A range that begins or ends at the port, just misses it, or is arbitrary.
fn random_ports(random: &mut Random, port: u16, strictness: u64) -> PortRange {
    let any = random.port();
    let miss = random.once_in(strictness);
    let range = |first, last| PortRange { first, last };
    match (random.below(6), miss) {
        (0, false) => range(port, port),
        (1, false) => range(port, any.max(port)),
        (2, false) => range(any.min(port), port),
        // An empty range matches nothing.
        (0, true) => range(port.saturating_add(1), port),
        (1, true) => range(port.saturating_add(1), u16::MAX),
        (2, true) => range(0, port.saturating_sub(1)),
        (3, _) => range(any, random.port()),
        _ => PortRange::ANY,
    }
}

/// The largest payload that loopback, with its packets of 64 KiB, surely carries in one packet.
const LARGEST: u64 = 16_000;

fn random_minimum(random: &mut Random) -> u16 {
    match random.below(4) {
        0 => random.below(3) as u16,
        1 => random.below(LARGEST) as u16,
        _ => random.below(64) as u16,
    }
}

/// The programs, attached to a cgroup of the test, and sockets in it.
///
/// Fields are dropped in this order: the programs are detached before the cgroup is removed.
struct Bench {
    kernel: Datapath,
    listeners: Vec<Listener>,
    agent: Agent,
    /// The ancestors of the cgroups of the clients and of the listeners.
    above: [Ancestors; 2],
    _netns: Netns,
    _cgroups: [CgroupOfTest; 3],
    _lab: Lab,
}

impl Bench {
    fn new() -> Result<Self> {
        let lab = Lab::new(AGENT)?;
        let netns = Netns::new()?;
        for address in &IPV6[1..] {
            netns.ip(&format!("addr add {address}/128 dev lo nodad"))?;
        }
        let clients = lab.cgroup.child()?;
        let outer = lab.cgroup.child()?;
        let servers = outer.child()?;
        let above = [
            Ancestors::of(&[lab.cgroup.id()?, clients.id()?]),
            Ancestors::of(&[lab.cgroup.id()?, outer.id()?, servers.id()?]),
        ];
        let place = |cgroup, uid| {
            Place::here()
                .in_netns(&netns)
                .in_cgroup(cgroup)
                .as_user(uid)
        };
        let agent = lab.at(&place(&clients, CLIENT_UID))?;
        let server = lab.at(&place(&servers, SERVER_UID))?;
        let ipv4 = IPV4_PORTS.map(|port| SocketAddr::from((Ipv4Addr::UNSPECIFIED, port)));
        let dual = DUAL_PORTS.map(|port| SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)));
        let addresses = ipv4.into_iter().chain(dual);
        let (older, newer): (Vec<_>, Vec<_>) =
            addresses.partition(|address| UNKNOWN_PORTS.contains(&address.port()));
        let listen = |address| server.listen(address);
        let mut listeners: Vec<Listener> = older.into_iter().map(listen).collect::<Result<_>>()?;
        let mut kernel = load(1024)?;
        kernel.attach(&Cgroup::open(lab.cgroup.path())?)?;
        for address in newer {
            listeners.push(server.listen(address)?);
        }
        Ok(Self {
            kernel,
            listeners,
            agent,
            above,
            _netns: netns,
            _cgroups: [clients, servers, outer],
            _lab: lab,
        })
    }

    /// Opens a connection and waits until it is established at both ends.
    fn connect(&self, ends: &Ends) -> Result<Connection> {
        let listens = |listener: &&Listener| listener.port() == ends.server.port();
        let listener = self.listeners.iter().find(listens);
        let socket = self.agent.tcp(ends.client)?;
        set_option(&socket, libc::SOL_SOCKET, libc::SO_REUSEADDR, 1)?;
        bind(socket.as_raw_fd(), &SockaddrStorage::from(ends.client))?;
        let pair = Pair::dial(
            socket,
            listener.context("no listener on this port")?,
            ends.server,
        )?;
        for end in [&pair.client, &pair.server] {
            // A reset at the close leaves no TIME_WAIT.
            reset_on_close(end)?;
        }
        // accept(2) may return a little before the state changes, and the callback comes before
        // that.
        eventually("an established connection", patience(), || {
            let state = tcp_info(&pair.server)?.tcpi_state;
            Ok((state == TCP_ESTABLISHED).then_some(()))
        })?;
        let cookies = [cookie(&pair.client)?, cookie(&pair.server)?];
        Ok(Connection { pair, cookies })
    }

    fn sessions(&self, connection: &Connection) -> Result<[Option<Session>; 2]> {
        let [client, server] = connection.cookies;
        Ok([self.kernel.session(client)?, self.kernel.session(server)?])
    }

    /// Asserts that the programs counted no error and that no session is left. Lost events are
    /// allowed, because nothing reads them here.
    fn assert_clean(&self) -> Result<()> {
        for kind in ErrorKind::ALL {
            if kind != ErrorKind::EventLost {
                assert_eq!(self.kernel.error_count(kind)?, 0, "{kind:?}");
            }
        }
        eventually("the end of all sessions", patience(), || {
            Ok(self.kernel.cookies()?.is_empty().then_some(()))
        })
    }
}

const TCP_ESTABLISHED: u8 = 1;

/// A connection and the cookies of the end that dialled and of the end that accepted.
struct Connection {
    pair: Pair,
    cookies: [u64; 2],
}

/// How often each outcome occurred. The test asserts a mixture, since a run with one outcome would
/// show nothing.
#[derive(Debug, Default)]
struct Outcomes {
    /// By direction and family: the numbers of sessions not tracked and tracked.
    by_kind: HashMap<(Direction, bool), [u32; 2]>,
    /// Not tracked because of an exempting entry.
    exempt: u32,
    /// Left to the daemon, which has to resolve the owner.
    open: u32,
    /// Decided by an entry with a user or a cgroup.
    by_owner: u32,
    /// Decided by an entry after the first.
    later: u32,
    /// Skipped by the port filter.
    unseen: u32,
}

impl Outcomes {
    fn count(&mut self, known: &Known, book: &Book) {
        let Known { facts, ancestors } = known;
        let decision = book.decision(known);
        let tracked = decision.is_some_and(|decision| decision != Decision::Exempt);
        let kind = (facts.direction, facts.remote.is_ipv4());
        self.by_kind.entry(kind).or_default()[usize::from(tracked)] += 1;
        self.exempt += u32::from(decision == Some(Decision::Exempt));
        self.open += u32::from(decision == Some(Decision::Open));
        let applies = |entry: &&MatchEntry| matches(facts, ancestors, entry);
        let asks = |entry: &MatchEntry| entry.asks_user != 0 || entry.cgroup_id != 0;
        let decider = book.entries.iter().find(applies);
        let closed = decision != Some(Decision::Open);
        self.by_owner += u32::from(closed && decider.is_some_and(asks));
        let first = book.entries.first().is_some_and(|entry| applies(&entry));
        self.later += u32::from(decision.is_some() && !first);
        self.unseen += u32::from(!book.sees(known));
    }

    fn assert_mixed(&self) {
        println!("{self:?}");
        assert_eq!(self.by_kind.len(), 4, "{self:?}");
        for [untracked, tracked] in self.by_kind.values() {
            let all = untracked + tracked;
            assert!(*untracked > all / 5 && *tracked > all / 5, "{self:?}");
        }
        let all: u32 = self.by_kind.values().flatten().sum();
        assert!(self.exempt > all / 20 && self.later > all / 10, "{self:?}");
        assert!(self.open > all / 20 && self.by_owner > all / 20, "{self:?}");
        assert!(self.unseen > all / 20, "{self:?}");
    }
}

#[test]
fn kernel_and_daemon_find_the_same_rule_for_every_connection() -> Result<()> {
    let _turn = turn(module_path!());
    let seed = seed()?;
    let mut bench = Bench::new()?;
    let mut outcomes = Outcomes::default();
    for case in 0..CONNECTIONS {
        let mut random = Random::of(seed, case);
        let ends = Ends::random(&mut random);
        let known = ends.facts(&bench.above);
        let mut book = Book::random(&mut random, &known, case as u32 + 1);
        if random.once_in(200) {
            book = book.filled();
        }
        book.put_and_narrow(&mut bench.kernel, &mut random)?;
        let connection = bench
            .connect(&ends)
            .with_context(|| format!("{case}: {ends:?}"))?;
        for (known, session) in known.iter().zip(bench.sessions(&connection)?) {
            outcomes.count(known, &book);
            let facts = Facts {
                known: known.facts.known & Facts::UID,
                ..known.facts
            };
            let of_host = match book.decision(known) {
                Some(Decision::Rule(rule)) => Some((facts, rule, book.generation)),
                Some(Decision::Open) if book.sees(known) => Some((facts, 0, 0)),
                _ => None,
            };
            let told = |session: Session| (Facts::of(&session), session.rule, session.generation);
            assert_eq!(
                session.map(told),
                of_host,
                "kernel and host differ: {SEED}={seed}, case {case}, {ends:?}, {:#?}",
                book.entries
            );
        }
    }
    outcomes.assert_mixed();
    bench.assert_clean()
}

/// A session as the functions of the daemon compute it.
struct Expected {
    session: Session,
    known: Known,
    /// The numbers of payloads that counted and that did not.
    counted: [u32; 2],
    /// How often another rule applied after a change of the policy.
    matched_again: u32,
}

/// The times just before and after an action.
struct Stamp([u64; 2]);

impl Expected {
    /// Applies a payload of this length to the session. Returns whether it counts as activity.
    fn pass(&mut self, received: bool, length: u64, book: &Book) -> bool {
        let counts = length >= self.minimum(book);
        let session = &mut self.session;
        let total = if received {
            &mut session.bytes_received
        } else {
            &mut session.bytes_sent
        };
        *total += length;
        self.counted[usize::from(!counts)] += 1;
        counts
    }

    /// The smallest payload that counts, after the session has been matched against the new policy
    /// if necessary.
    fn minimum(&mut self, book: &Book) -> u64 {
        let session = &mut self.session;
        if session.generation == 0 {
            // The daemon decides about this session first.
            return 0;
        }
        if session.generation != book.generation {
            match book.decision(&self.known) {
                // The daemon releases the session or resolves its owner. Until then every payload
                // counts.
                None | Some(Decision::Exempt | Decision::Open) => return 0,
                Some(Decision::Rule(rule)) => {
                    self.matched_again += u32::from(rule != session.rule);
                    (session.rule, session.generation) = (rule, book.generation);
                }
            }
        }
        u64::from(book.policies[usize::from(session.rule)].min_payload)
    }

    /// Asserts that the session in the kernel equals the expected one. Time stamps that the payload
    /// moved are taken from the kernel if they lie within `at`.
    fn compare(&mut self, received: bool, counts: bool, found: &Session, at: &Stamp) {
        let session = &mut self.session;
        let inbound = session.direction == Direction::Inbound as u8;
        if counts && received {
            session.last_received_ns = at.of(found.last_received_ns);
            session.sent_before_answer = session.bytes_sent as u32;
            if inbound {
                session.answered_ns = 0;
            }
        } else if counts {
            session.last_sent_ns = at.of(found.last_sent_ns);
            if session.owes_answer() {
                session.answered_ns = at.of(found.answered_ns);
            }
        }
        // These fields are internal to the gate and are not compared.
        session.open_until_ns = found.open_until_ns;
        (session.received_candidate_ns, session.sent_candidate_ns) =
            (found.received_candidate_ns, found.sent_candidate_ns);
        session.sent_candidate_end = found.sent_candidate_end;
        session.sent_candidate_completes_answer = found.sent_candidate_completes_answer;
        session.data_segments_sent = found.data_segments_sent;
        assert_eq!(found, session, "kernel (left) and host differ");
    }
}

impl Stamp {
    #[track_caller]
    fn of(&self, stamp: u64) -> u64 {
        let Self([from, to]) = self;
        assert!(
            (from..=to).contains(&&stamp),
            "{stamp} is not within {from} and {to}"
        );
        stamp
    }
}

/// A connection and its sessions, if they are tracked.
struct Talk {
    connection: Connection,
    known: [Known; 2],
    expected: [Option<Expected>; 2],
    book: Book,
}

impl Talk {
    fn begin(bench: &mut Bench, random: &mut Random, generation: u32) -> Result<Self> {
        let ends = Ends::random(random);
        let known = ends.facts(&bench.above);
        let book = Book::random(random, &known, generation).and_the_rest(random);
        book.put_and_narrow(&mut bench.kernel, random)?;
        let connection = bench.connect(&ends)?;
        let expect = |(session, known): (Option<Session>, Known)| {
            session.map(|session| Expected {
                session,
                known,
                counted: [0; 2],
                matched_again: 0,
            })
        };
        let [client, server] = bench.sessions(&connection)?;
        let expected = [(client, known[0]), (server, known[1])].map(expect);
        Ok(Self {
            connection,
            known,
            expected,
            book,
        })
    }

    /// A length near the minimum of one end, or an arbitrary one.
    fn length(&mut self, random: &mut Random) -> u64 {
        let place = random.below(u64::from(RULES)) as usize;
        let rules = self.known.map(|known| match self.book.decision(&known) {
            Some(Decision::Rule(rule)) => usize::from(rule),
            _ => place,
        });
        let rule = random.one_of(&rules);
        let policy = self.book.policies.get(rule);
        let minimum = policy.map_or(1, |policy| u64::from(policy.min_payload));
        match random.below(4) {
            0 => minimum.saturating_sub(1).max(1),
            1 => minimum.max(1),
            2 => minimum + 1,
            _ => 1 + random.below(LARGEST),
        }
    }

    /// Sends a payload and compares both sessions with the expected ones.
    fn pass(&mut self, bench: &Bench, random: &mut Random) -> Result<()> {
        let to_server = random.once_in(2);
        let length = self.length(random);
        let payload = vec![b'x'; length as usize];
        let from = monotonic_ns();
        let pair = &self.connection.pair;
        if to_server {
            pair.to_server(&payload)?;
        } else {
            pair.to_client(&payload)?;
        }
        let at = Stamp([from, monotonic_ns()]);
        // With the acknowledgement, both sides know that the payload was received.
        let receiver = if to_server {
            &pair.server
        } else {
            &pair.client
        };
        set_option(receiver, libc::IPPROTO_TCP, libc::TCP_QUICKACK, 1)?;
        let found = eventually("the count of the payload", patience(), || {
            let found = bench.sessions(&self.connection)?;
            let is_settled = found
                .iter()
                .flatten()
                .all(|session| !session.has_candidate());
            Ok(is_settled.then_some(found))
        })?;
        for (end, (expected, found)) in self.expected.iter_mut().zip(found).enumerate() {
            let Some(expected) = expected else {
                // Packets never create a session.
                assert_eq!(found, None);
                continue;
            };
            let received = (end == 1) == to_server;
            let counts = expected.pass(received, length, &self.book);
            let found = found.context("the session is gone")?;
            expected.compare(received, counts, &found, &at);
        }
        Ok(())
    }
}

impl Book {
    /// Adds, in most cases, a last entry that matches all remaining connections.
    fn and_the_rest(mut self, random: &mut Random) -> Self {
        if !random.once_in(4) {
            let rule = random.below(u64::from(RULES)) as u16;
            self.entries.push(MatchEntry::any(rule));
        }
        self
    }
}

#[test]
fn kernel_and_daemon_agree_which_payload_counts_and_which_rule_applies_after_a_change() -> Result<()>
{
    let _turn = turn(module_path!());
    let seed = seed()?;
    let mut bench = Bench::new()?;
    let (mut generation, mut counted, mut matched_again) = (0, [0, 0], 0);
    for case in 0..TALKS {
        let mut random = Random::of(seed, case);
        generation += 1;
        let mut talk = Talk::begin(&mut bench, &mut random, generation)?;
        for _ in 0..PAYLOADS {
            if random.once_in(3) {
                generation += 1;
                let book = Book::random(&mut random, &talk.known, generation);
                talk.book = book.and_the_rest(&mut random);
                let kernel = &mut bench.kernel;
                talk.book.put_and_narrow(kernel, &mut random)?;
            }
            println!("case {case}, {:?}", talk.known);
            talk.pass(&bench, &mut random)?;
        }
        for expected in talk.expected.iter().flatten() {
            counted[0] += expected.counted[0];
            counted[1] += expected.counted[1];
            matched_again += expected.matched_again;
        }
    }
    println!("counted, not counted: {counted:?}; matched again: {matched_again}");
    let all = counted[0] + counted[1];
    assert!(counted.iter().all(|count| *count > all / 8), "{counted:?}");
    assert!(matched_again > 100, "{matched_again}");
    bench.assert_clean()
}
