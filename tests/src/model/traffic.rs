//! The connections: performs the planned operations and records the observations.

use std::{
    io::{self, Read as _, Write as _},
    mem,
    net::{Shutdown, TcpStream},
    os::fd::{AsFd as _, AsRawFd as _},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
};

use super::{
    book::{End, FEW_PORT, FEW_PORTS, Scarce},
    field::Field,
    history::{Connection, Event, Fate, Payload},
    plan::{Act, Opening, Operation, SLOTS},
    timeline::Span,
};
use crate::{
    locked::Locked,
    options::{last_error, reset_on_close, tcp_info},
    random::Random,
    repair::Saved,
};

/// The maximum number of unread bytes at an end, so that its window never closes.
const MOST_UNREAD: u64 = 16 << 10;

/// The number of checks for the arrival of sent payload, with growing pauses. Payload that arrives does so
/// long before the last check.
const LOOKS: u32 = 6;

/// The TCP state of an ended socket (`linux/tcp_states.h`).
const TCP_CLOSE: u8 = 7;

/// The maximum number of locked connections, which is below the number of resets that may hang in one cgroup.
const MOST_LOCKED: usize = 2;

/// A connection and its sockets.
struct Live {
    history: Connection,
    opening: Opening,
    /// `None` if the socket was closed or has ended.
    sockets: [Option<TcpStream>; 2],
    /// Whether both directions are shut down here while a FIN is still in flight. poll(2) then reports it all
    /// the time.
    shut: [bool; 2],
    /// The number of bytes that the test wrote at each end, and read at each end.
    written: [u64; 2],
    read: [u64; 2],
    /// Bytes that a lock sent, which have the value 0: the sending end and the position.
    blank: Vec<(End, u64)>,
}

/// A connection with a locked end. Calls on its socket would block, so it is neither used nor checked.
struct Held {
    slot: usize,
    live: Live,
    end: End,
    lock: Locked,
    from: Duration,
    until: Duration,
}

/// All connections of a run.
pub(super) struct Traffic {
    field: Field,
    /// If it is a rule, every third slot opens connections to the port of that rule. If it is the table, all slots open
    /// connections to a few ports, with a session at the server's end.
    scarce: Scarce,
    start: Instant,
    slots: Vec<Option<Live>>,
    /// Connections with one ended and one open end.
    ending: Vec<Live>,
    ended: Vec<Connection>,
    held: Vec<Held>,
    /// The time of the last check of all open connections.
    looked: Duration,
    pub(super) operations: usize,
    /// The number of forged segments.
    pub(super) spoofed: usize,
}

impl Traffic {
    pub(super) fn new(field: Field, start: Instant, scarce: Scarce) -> Self {
        Self {
            field,
            scarce,
            start,
            slots: (0..SLOTS).map(|_| None).collect(),
            ending: Vec::new(),
            ended: Vec::new(),
            held: Vec::new(),
            looked: start.elapsed(),
            operations: 0,
            spoofed: 0,
        }
    }

    /// Performs one operation and checks all connections until the next one.
    pub(super) fn perform(&mut self, operation: &Operation) -> Result<()> {
        self.operations += 1;
        let is_held = self.held.iter().any(|held| held.slot == operation.slot);
        match (self.slots[operation.slot].take(), operation.action) {
            (None, _) if is_held => {}
            (None, _) => {
                let mut opening = operation.opening;
                match self.scarce {
                    Scarce::Rule if operation.slot.is_multiple_of(3) => opening.port = FEW_PORT,
                    Scarce::Table => {
                        opening.port %= FEW_PORTS;
                        opening.inside[End::Server as usize] = true;
                    }
                    Scarce::Nothing | Scarce::Rule => {}
                }
                self.open(operation.slot, &opening)?;
            }
            (Some(live), Act::Lock(end, time)) => self.lock(operation.slot, live, end, time)?,
            (Some(mut live), Act::Spoof(end, numbers)) => {
                let begun = self.start.elapsed();
                if let [Some(_), Some(_)] = &live.sockets
                    && let Some(from) = &live.sockets[end.peer() as usize]
                {
                    self.field.spoof(&live.opening, end.peer(), from, numbers)?;
                    let (from, to) = (begun, self.start.elapsed());
                    let forged = Event::Forged(end, Span { from, to });
                    live.history.events.push(forged);
                    self.spoofed += 1;
                }
                self.put(operation.slot, live);
            }
            (Some(mut live), Act::Restore) => {
                // If there may be no slot, it is unknown whether the kernel programs stored the clocks.
                let may_be_left_out = match self.scarce {
                    Scarce::Table => true,
                    Scarce::Rule => live.opening.port == FEW_PORT,
                    Scarce::Nothing => false,
                };
                if !may_be_left_out {
                    live.restore(&self.field, self.start)?;
                }
                self.put(operation.slot, live);
            }
            (Some(mut live), _) => {
                live.act(operation.action, self.start, self.looked)?;
                self.put(operation.slot, live);
            }
        }
        self.look(operation.pause)
    }

    /// Sends payload on half of the connections, in a random direction.
    pub(super) fn try_all(&mut self, random: &mut Random) -> Result<()> {
        for slot in 0..self.slots.len() {
            let end = random.one_of(&End::BOTH);
            if random.once_in(2)
                && let Some(mut live) = self.slots[slot].take()
            {
                self.operations += 1;
                live.act(Act::Send(end, 100), self.start, self.looked)?;
                self.put(slot, live);
            }
        }
        self.look(Duration::ZERO)
    }

    fn open(&mut self, slot: usize, opening: &Opening) -> Result<()> {
        let from = self.start.elapsed();
        let pair = self.field.open(opening)?;
        let opened = Span {
            from,
            to: self.start.elapsed(),
        };
        pair.client.set_nonblocking(true)?;
        pair.server.set_nonblocking(true)?;
        self.slots[slot] = Some(Live {
            opening: *opening,
            history: Connection {
                port: opening.port,
                inside: opening.inside,
                ports: [pair.client_address.port(), pair.server_address.port()],
                opened,
                events: Vec::new(),
                fates: [Fate::Open; 2],
            },
            sockets: [Some(pair.client), Some(pair.server)],
            shut: [false; 2],
            written: [0; 2],
            read: [0; 2],
            blank: Vec::new(),
        });
        Ok(())
    }

    /// Locks an end for this time, if possible. If the end was just reset, the attempt takes the error from its socket.
    fn lock(&mut self, slot: usize, mut live: Live, end: End, time: Duration) -> Result<()> {
        live.look_for_arrivals(self.start)?;
        let is_pending = End::BOTH.iter().any(|by| live.history.has_pending(*by));
        let is_open = live.history.fates == [Fate::Open; 2] && !live.is_finished(end);
        let from = self.looked;
        let socket = live.sockets[end as usize].as_ref();
        let is_allowed = is_open && !is_pending && self.held.len() < MOST_LOCKED;
        match socket.filter(|_| is_allowed).map(Locked::new) {
            Some(Ok(lock)) => self.held.push(Held {
                slot,
                live,
                end,
                lock,
                from,
                until: self.start.elapsed() + time,
            }),
            Some(Err(error)) => {
                let errno = error.downcast_ref().copied();
                ensure!(errno.is_some_and(is_of_end), error);
                live.end(end, errno, self.start, self.looked)?;
                self.put(slot, live);
            }
            None => self.put(slot, live),
        }
        Ok(())
    }

    /// Releases the locks whose time is over, or all locks.
    fn release(&mut self, all: bool) -> Result<()> {
        let now = self.start.elapsed();
        let is_over = |held: &mut Held| all || held.until <= now;
        for held in self.held.extract_if(.., is_over).collect::<Vec<_>>() {
            let (slot, from) = (held.slot, held.from);
            let mut live = held.release(self.start)?;
            live.take_ends(self.start, from)?;
            self.put(slot, live);
        }
        Ok(())
    }

    /// Stores a connection according to its state.
    fn put(&mut self, slot: usize, live: Live) {
        let broken = |fate: &Fate| matches!(fate, Fate::Ended(_) | Fate::Broken(..));
        if !live.history.is_open() {
            self.ended.push(live.history);
        } else if live.history.fates.iter().any(broken) {
            self.ending.push(live);
        } else {
            self.slots[slot] = Some(live);
        }
    }

    /// Checks for ended connections during this time or until one ends.
    pub(super) fn look(&mut self, within: Duration) -> Result<()> {
        self.release(false)?;
        let before = self.start.elapsed();
        let lives = self.slots.iter().flatten().chain(&self.ending);
        let any_shut = lives.clone().any(|live| live.shut.contains(&true));
        let sockets = lives.flat_map(Live::sockets_to_poll);
        // Without requested events poll(2) reports only errors and the end of both directions.
        let mut fds: Vec<_> = sockets
            .map(|socket| PollFd::new(socket.as_fd(), PollFlags::empty()))
            .collect();
        let found = poll(&mut fds, PollTimeout::try_from(within)?)?;
        drop(fds);
        if found > 0 || any_shut {
            self.take_ends(found > 0)?;
        }
        self.looked = before;
        Ok(())
    }

    /// Records ended sockets: of all connections, or only of those that are shut down here and therefore not
    /// polled.
    fn take_ends(&mut self, of_all: bool) -> Result<()> {
        for slot in 0..self.slots.len() {
            let is_due = |live: &mut Live| of_all || live.shut.contains(&true);
            if let Some(mut live) = self.slots[slot].take_if(is_due) {
                live.take_ends(self.start, self.looked)?;
                self.put(slot, live);
            }
        }
        for mut live in mem::take(&mut self.ending) {
            live.take_ends(self.start, self.looked)?;
            if live.history.is_open() {
                self.ending.push(live);
            } else {
                self.ended.push(live.history);
            }
        }
        Ok(())
    }

    /// The connections that have not ended.
    pub(super) fn open_connections(&self) -> Vec<&Connection> {
        let held = self.held.iter().map(|held| &held.live);
        let open = self.slots.iter().flatten().chain(&self.ending);
        open.chain(held).map(|live| &live.history).collect()
    }

    /// All connections, including ended ones.
    pub(super) fn connections(&self) -> impl Iterator<Item = &Connection> {
        self.open_connections().into_iter().chain(&self.ended)
    }

    /// Checks all connections until `done` returns true for the open ones, or until the time is over.
    pub(super) fn look_until(
        &mut self,
        bound: Duration,
        done: impl Fn(&[&Connection]) -> bool,
    ) -> Result<()> {
        let end = Instant::now() + bound;
        while Instant::now() < end {
            self.look(Duration::from_millis(20))?;
            if done(&self.open_connections()) {
                break;
            }
        }
        Ok(())
    }

    /// Passes a byte in each direction of the open connections.
    pub(super) fn pass_a_byte(&mut self) -> Result<()> {
        self.release(true)?;
        for slot in 0..self.slots.len() {
            for end in End::BOTH {
                if let Some(mut live) = self.slots[slot].take() {
                    live.act(Act::Send(end, 1), self.start, self.looked)?;
                    self.put(slot, live);
                }
            }
        }
        self.look(Duration::from_millis(100))
    }

    /// All connections with their final observations.
    pub(super) fn finish(mut self) -> Result<Vec<Connection>> {
        for live in self.slots.iter_mut().flatten().chain(&mut self.ending) {
            live.look_for_arrivals(self.start)?;
        }
        let open = self.slots.into_iter().flatten().chain(self.ending);
        self.ended.extend(open.map(|live| live.history));
        Ok(self.ended)
    }
}

impl Live {
    fn act(&mut self, act: Act, start: Instant, looked: Duration) -> Result<()> {
        self.look_for_arrivals(start)?;
        match act {
            Act::Send(end, bytes) => self.send(end, bytes, start, looked),
            Act::Read(end) => self.read_all(end),
            Act::Finish(end) => self.shut(end, start),
            Act::Close(end) => self.close(end, start),
            Act::Abort(end) => self.abort(end, start),
            // `Traffic::perform` handles these actions.
            Act::Lock(..) | Act::Spoof(..) | Act::Restore => Ok(()),
        }
    }

    fn is_finished(&self, end: End) -> bool {
        let finished = |event: &Event| matches!(event, Event::Finished(by, _) if *by == end);
        self.history.events.iter().any(finished)
    }

    fn send(&mut self, end: End, bytes: usize, start: Instant, looked: Duration) -> Result<()> {
        let way = end as usize;
        if self.is_finished(end) {
            return Ok(());
        }
        let Some(mut socket) = self.sockets[way].as_ref() else {
            return Ok(());
        };
        let data: Vec<u8> = (0..bytes as u64)
            .map(|n| self.byte(end, self.written[way] + n))
            .collect();
        let from = start.elapsed();
        let sent = socket.write(&data);
        let written = Span {
            from,
            to: start.elapsed(),
        };
        match sent {
            Ok(bytes) => self.has_sent(end, bytes as u64, written, start),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            Err(error) => self.end(end, errno(&error)?, start, looked),
        }
    }

    fn has_sent(&mut self, end: End, bytes: u64, written: Span, start: Instant) -> Result<()> {
        let alone = !self.history.has_pending(end);
        self.written[end as usize] += bytes;
        self.history.events.push(Event::Payload(Payload {
            from: end,
            bytes,
            through: self.written[end as usize],
            alone,
            written,
            arrived: None,
        }));
        self.wait_for_arrival(end, start)
    }

    /// The byte at a position of a direction. It allows the receiver to verify the position.
    fn byte(&self, from: End, place: u64) -> u8 {
        if self.blank.contains(&(from, place)) {
            return 0;
        }
        let [client, _] = self.history.ports;
        (place.wrapping_mul(31) as u8) ^ (client as u8) ^ (from as u8)
    }

    fn wait_for_arrival(&mut self, from: End, start: Instant) -> Result<()> {
        for look in 0..LOOKS {
            self.look_for_arrivals(start)?;
            if !self.history.has_pending(from) || self.sockets[from.peer() as usize].is_none() {
                break;
            }
            thread::sleep(Duration::from_micros(100 << look));
        }
        Ok(())
    }

    /// Records which payload has arrived.
    fn look_for_arrivals(&mut self, start: Instant) -> Result<()> {
        for to in End::BOTH {
            let Some(socket) = &self.sockets[to as usize] else {
                continue;
            };
            let unread = unread(socket)?;
            let arrived = self.read[to as usize] + unread;
            let now = start.elapsed();
            for event in &mut self.history.events {
                if let Event::Payload(payload) = event
                    && payload.from == to.peer()
                    && payload.arrived.is_none()
                    && payload.through <= arrived
                {
                    payload.arrived = Some(now);
                }
            }
            if unread > MOST_UNREAD {
                self.read_all(to)?;
            }
        }
        Ok(())
    }

    fn read_all(&mut self, end: End) -> Result<()> {
        let Some(mut socket) = self.sockets[end as usize].as_ref() else {
            return Ok(());
        };
        let mut data = [0; 4096];
        loop {
            // The check for ended sockets detects errors.
            let waiting = unread(socket)?.min(data.len() as u64) as usize;
            if waiting == 0 {
                return Ok(());
            }
            let bytes = socket.read(&mut data[..waiting]).context("reading")?;
            for byte in &data[..bytes] {
                let place = self.read[end as usize];
                ensure!(
                    *byte == self.byte(end.peer(), place),
                    "a wrong byte arrived at place {place}: {}",
                    self.history
                );
                self.read[end as usize] += 1;
            }
        }
    }

    fn shut(&mut self, end: End, start: Instant) -> Result<()> {
        let Some(socket) = self.sockets[end as usize].as_ref() else {
            return Ok(());
        };
        let from = start.elapsed();
        match socket.shutdown(Shutdown::Write) {
            Ok(()) => {}
            // The socket was just reset; the next check detects that.
            Err(error) if error.kind() == io::ErrorKind::NotConnected => return Ok(()),
            Err(error) => return Err(error).context("shutting one direction"),
        }
        let to = start.elapsed();
        self.history
            .events
            .push(Event::Finished(end, Span { from, to }));
        Ok(())
    }

    fn close(&mut self, end: End, start: Instant) -> Result<()> {
        let Some(socket) = &self.sockets[end as usize] else {
            return Ok(());
        };
        // Closing a socket with unread data resets the connection.
        if unread(socket)? > 0 {
            return self.abort(end, start);
        }
        let when = self.drop_socket(end, start);
        self.history.events.push(Event::Closed(end, when));
        Ok(())
    }

    fn abort(&mut self, end: End, start: Instant) -> Result<()> {
        let Some(socket) = &self.sockets[end as usize] else {
            return Ok(());
        };
        reset_on_close(socket)?;
        self.drop_socket(end, start);
        self.history.events.push(Event::Aborted);
        Ok(())
    }

    /// Makes another socket take over the connection at the server's end. Does nothing if data is in flight or an end
    /// is shut down or closed.
    fn restore(&mut self, field: &Field, start: Instant) -> Result<()> {
        self.look_for_arrivals(start)?;
        self.read_all(End::Server)?;
        // A packet that arrives while the connection has no socket would reset it.
        let is_quiet = |end: End| {
            let Some(socket) = &self.sockets[end as usize] else {
                return anyhow::Ok(false);
            };
            let is_acknowledged = tcp_info(socket)?.tcpi_unacked == 0;
            Ok(is_acknowledged && !self.history.has_pending(end) && !self.is_finished(end))
        };
        if !is_quiet(End::Client)? || !is_quiet(End::Server)? {
            return Ok(());
        }
        let from = start.elapsed();
        let place = &mut self.sockets[End::Server as usize];
        let Some(socket) = place else {
            return Ok(());
        };
        let saved = Saved::of_open(socket);
        if tcp_info(socket)?.tcpi_state == TCP_CLOSE {
            // The socket was just reset; the next check detects that.
            return Ok(());
        }
        *place = None;
        let saved = saved?;
        let socket = place.insert(field.establish(&self.opening, &saved)?);
        let completed = saved.complete(socket);
        // An overdue session may be reset before its options are restored.
        if tcp_info(socket)?.tcpi_state != TCP_CLOSE {
            completed?;
        }
        socket.set_nonblocking(true)?;
        let to = start.elapsed();
        self.history.events.push(Event::Restored(Span { from, to }));
        Ok(())
    }

    fn drop_socket(&mut self, end: End, start: Instant) -> Span {
        let from = start.elapsed();
        self.sockets[end as usize] = None;
        self.shut[end as usize] = false;
        let to = start.elapsed();
        self.history.fates[end as usize] = Fate::Closed(Span { from, to });
        Span { from, to }
    }

    /// Records which ends have ended.
    fn take_ends(&mut self, start: Instant, looked: Duration) -> Result<()> {
        for end in End::BOTH {
            let Some(socket) = &self.sockets[end as usize] else {
                continue;
            };
            if tcp_info(socket)?.tcpi_state == TCP_CLOSE {
                let error = last_error(socket)?;
                self.end(end, error, start, looked)?;
            } else {
                let mut fds = [PollFd::new(socket.as_fd(), PollFlags::empty())];
                self.shut[end as usize] = poll(&mut fds, PollTimeout::ZERO)? > 0;
            }
        }
        Ok(())
    }

    fn sockets_to_poll(&self) -> impl Iterator<Item = &TcpStream> {
        let sockets = self.sockets.iter().zip(&self.shut);
        sockets.filter_map(|(socket, shut)| socket.as_ref().filter(|_| !shut))
    }

    /// Records that an end has ended, by an error or normally.
    fn end(
        &mut self,
        end: End,
        error: Option<Errno>,
        start: Instant,
        looked: Duration,
    ) -> Result<()> {
        let to = start.elapsed();
        self.look_for_arrivals(start)?;
        self.sockets[end as usize] = None;
        self.shut[end as usize] = false;
        self.history.fates[end as usize] = match error {
            Some(error) => Fate::Broken(error, Span { from: looked, to }),
            None => Fate::Ended(Span { from: looked, to }),
        };
        Ok(())
    }
}

impl Held {
    /// Releases the lock. The locked send proceeds now.
    fn release(self, start: Instant) -> Result<Live> {
        let Self {
            mut live,
            end,
            lock,
            from,
            ..
        } = self;
        let released = start.elapsed();
        drop(lock);
        let to = start.elapsed();
        live.history
            .events
            .push(Event::Locked(end, Span { from, to }));
        let written = Span { from: released, to };
        live.blank.push((end, live.written[end as usize]));
        live.has_sent(end, 1, written, start)?;
        Ok(live)
    }
}

/// Whether a send fails with this error because its connection has ended.
const fn is_of_end(errno: Errno) -> bool {
    matches!(
        errno,
        Errno::ECONNABORTED | Errno::ECONNRESET | Errno::EPIPE
    )
}

fn errno(error: &io::Error) -> Result<Option<Errno>> {
    let code = error.raw_os_error().context("an error without a number")?;
    Ok(Some(Errno::from_raw(code)))
}

/// The number of bytes that have arrived and are unread.
fn unread(socket: &TcpStream) -> Result<u64> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: the kernel writes a number into a value of that size.
    let status = unsafe { libc::ioctl(socket.as_raw_fd(), libc::FIONREAD, &raw mut bytes) };
    Errno::result(status).context("asking for what is unread")?;
    Ok(u64::try_from(bytes)?)
}
