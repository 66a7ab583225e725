//! The worker's side.

use std::{
    io::{self, Read as _, Write as _},
    net::{Ipv4Addr, TcpListener, TcpStream},
    os::fd::AsFd as _,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::{
    epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout},
    resource::{Resource, getrlimit, setrlimit},
};
use session_enforcer_tests::Random;

/// The limit of open files of a worker.
const FILES: u64 = 20_000;

/// The number of bytes of one write and read of a transfer.
const CHUNK: usize = 256 << 10;

/// The time limit for the end of a connection.
const PATIENCE: Duration = Duration::from_secs(120);

/// Both ends of a connection, and its start.
struct Pair {
    client: TcpStream,
    server: TcpStream,
    begun: Instant,
}

/// Answers requests until the input ends.
pub(crate) fn serve() -> Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, FILES, hard.max(FILES))?;
    let mut worker = Serving::default();
    for line in io::stdin().lines() {
        let answer = match worker.perform(&line?) {
            Ok(numbers) => {
                let words: Vec<String> = numbers.iter().map(f64::to_string).collect();
                format!("ok {}", words.join(" "))
            }
            Err(error) => format!("error {error:#}"),
        };
        println!("{answer}");
    }
    Ok(())
}

#[derive(Default)]
struct Serving {
    listener: Option<TcpListener>,
    /// The clients' destination port: that of the listener or of a proxy.
    port: u16,
    pairs: Vec<Pair>,
}

impl Serving {
    fn perform(&mut self, request: &str) -> Result<Vec<f64>> {
        let mut words = request.split(' ');
        let what = words.next().unwrap_or_default();
        let numbers = words.map(str::parse).collect::<Result<Vec<usize>, _>>()?;
        let nanoseconds = |time: Duration| vec![time.as_nanos() as f64];
        match (what, numbers.as_slice()) {
            ("listen", &[port]) => self.listen(port as u16).map(|()| vec![0.0]),
            ("dial", &[port]) => {
                self.port = port as u16;
                Ok(vec![0.0])
            }
            ("open", &[count]) => self.open(count, Duration::ZERO).map(nanoseconds),
            ("spread", &[count, milliseconds]) => {
                let spread = Duration::from_millis(milliseconds as u64);
                self.open(count, spread).map(nanoseconds)
            }
            ("ping", &[count, among]) => self.ping(count, among).map(nanoseconds),
            ("connect", &[count]) => self.connect(count).map(nanoseconds),
            ("transfer", &[mebibytes]) => self.transfer(mebibytes << 20).map(nanoseconds),
            ("ends", &[]) => self.ends(),
            ("close", &[]) => {
                self.pairs.clear();
                Ok(vec![0.0])
            }
            _ => bail!("the request {request:?} is not known"),
        }
    }

    fn listen(&mut self, port: u16) -> Result<()> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port));
        self.listener = Some(listener.with_context(|| format!("listening on {port}"))?);
        self.port = port;
        Ok(())
    }

    /// Opens connections to this worker's listener, spread evenly over some time. Returns the time that it
    /// took.
    fn open(&mut self, count: usize, spread: Duration) -> Result<Duration> {
        let start = Instant::now();
        for n in 0..count {
            let due = spread.mul_f64(n as f64 / count as f64);
            thread::sleep(due.saturating_sub(start.elapsed()));
            self.pairs.push(self.pair()?);
        }
        // Shuffle, because the sockets lie in memory in the order of their creation.
        Random::of(count as u64, 0).shuffle(&mut self.pairs);
        Ok(start.elapsed())
    }

    fn pair(&self) -> Result<Pair> {
        let begun = Instant::now();
        let client = self.dial()?;
        let (server, _) = self.listener()?.accept()?;
        client.set_nodelay(true)?;
        server.set_nodelay(true)?;
        Ok(Pair {
            client,
            server,
            begun,
        })
    }

    fn dial(&self) -> Result<TcpStream> {
        let client = TcpStream::connect((Ipv4Addr::LOCALHOST, self.port));
        client.with_context(|| format!("connecting to {}", self.port))
    }

    fn listener(&self) -> Result<&TcpListener> {
        self.listener.as_ref().context("nothing listens")
    }

    /// Makes this number of round trips of one byte, in turn over the first `among` connections.
    fn ping(&self, count: usize, among: usize) -> Result<Duration> {
        let pairs = self.pairs.get(..among).context("so many connections")?;
        ensure!(!pairs.is_empty(), "no connection to send on");
        let start = Instant::now();
        for pair in pairs.iter().cycle().take(count) {
            pass(&pair.client, &pair.server)?;
            pass(&pair.server, &pair.client)?;
        }
        Ok(start.elapsed())
    }

    /// Makes this number of connections in a row. Each is established, transfers one byte, and is closed by
    /// the client and then by the server.
    fn connect(&self, count: usize) -> Result<Duration> {
        let listener = self.listener()?;
        let start = Instant::now();
        for _ in 0..count {
            let mut client = self.dial()?;
            client.write_all(&[1])?;
            let (mut server, _) = listener.accept()?;
            let mut byte = [0; 2];
            server.read_exact(&mut byte[..1])?;
            drop(client);
            ensure!(server.read(&mut byte)? == 0, "one byte and no more");
        }
        Ok(start.elapsed())
    }

    /// Sends this number of bytes over the first connection, from the client to the server.
    fn transfer(&self, bytes: usize) -> Result<Duration> {
        let pair = self.pairs.first().context("no connection to send on")?;
        let start = Instant::now();
        thread::scope(|scope| {
            let sender = scope.spawn(|| send(&pair.client, bytes));
            receive(&pair.server, bytes)?;
            sender.join().ok().context("the sender panicked")?
        })?;
        Ok(start.elapsed())
    }

    /// Waits until every connection has ended at the client. Returns the lifetime of each in nanoseconds.
    fn ends(&mut self) -> Result<Vec<f64>> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        for (n, pair) in self.pairs.iter().enumerate() {
            // epoll reports errors and the end of both directions without a request.
            epoll.add(
                pair.client.as_fd(),
                EpollEvent::new(EpollFlags::empty(), n as u64),
            )?;
        }
        let mut lives = Vec::with_capacity(self.pairs.len());
        let mut events = [EpollEvent::empty(); 512];
        while lives.len() < self.pairs.len() {
            let found = epoll.wait(&mut events, EpollTimeout::try_from(PATIENCE)?)?;
            ensure!(found > 0, "{} have ended", lives.len());
            let now = Instant::now();
            for event in &events[..found] {
                let pair = &self.pairs[event.data() as usize];
                lives.push((now - pair.begun).as_nanos() as f64);
                epoll.delete(pair.client.as_fd())?;
            }
        }
        self.pairs.clear();
        Ok(lives)
    }
}

fn pass(mut from: &TcpStream, mut to: &TcpStream) -> Result<()> {
    let mut byte = [1];
    from.write_all(&byte).context("sending a byte")?;
    to.read_exact(&mut byte).context("receiving a byte")
}

fn send(mut to: &TcpStream, bytes: usize) -> Result<()> {
    let chunk = vec![1; CHUNK];
    for _ in 0..bytes / CHUNK {
        to.write_all(&chunk)?;
    }
    Ok(())
}

fn receive(mut from: &TcpStream, bytes: usize) -> Result<()> {
    let mut buffer = vec![0; CHUNK];
    let mut left = bytes;
    while left > 0 {
        let read = from.read(&mut buffer)?;
        ensure!(read > 0, "the connection has ended");
        left -= read;
    }
    Ok(())
}
