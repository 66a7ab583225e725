//! The metrics server, and that it does not disturb the enforcement.

use std::{
    fs,
    io::{ErrorKind, Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    os::unix::net::{UnixListener, UnixStream},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use nix::errno::Errno;
use session_enforcer_tests::{Daemon, Lab, Pair, eventually, patience, scaled};

const AGENT: &str = env!("CARGO_BIN_EXE_session-enforcer-test-agent");
const LIMIT: Duration = Duration::from_secs(1);
const RULE: &str = "[[rule]]\nname = \"idle\"\nidle_timeout = \"1s\"\n";

#[test]
fn health_and_metrics_are_served_and_nothing_else() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let daemon = lab.daemon(RULE)?;
    for path in ["/healthz", "/readyz", "/metrics"] {
        assert_eq!(daemon.get(path)?.0, 200, "{path}");
    }
    assert_eq!(daemon.get("/nothing")?.0, 404);
    let info = daemon.metric("session_enforcer_build_info", &[])?;
    assert_eq!(info, 1.0);
    Ok(())
}

#[test]
fn the_html_page_shows_the_readiness_and_no_addresses_or_users() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let config = "[daemon]\nmax_sessions = 1\n[[rule]]\nname = \"idle\"\nusers = [\"root\"]\n\
                  remote = [\"127.0.0.0/8\"]\nidle_timeout = \"1h\"\n";
    let daemon = lab.daemon(config)?;
    let (status, page) = daemon.get("/")?;
    assert_eq!(status, 200);
    ensure!(page.contains("The daemon is ready: "), "{page}");
    for link in ["metrics", "readyz", "healthz"] {
        ensure!(page.contains(&format!("href=\"{link}\"")), "{page}");
        assert_eq!(daemon.get(&format!("/{link}"))?.0, 200, "{link}");
    }
    // The table has room for one session.
    let _first = Pair::open(&lab.outside, &listener)?;
    let _second = Pair::open(&lab.outside, &listener)?;
    daemon.wait_for_degraded("untracked", true)?;
    let (status, page) = daemon.get("/")?;
    assert_eq!(status, 200);
    ensure!(
        page.contains("The daemon is not ready: the session table is full"),
        "{page}"
    );
    let version = env!("CARGO_PKG_VERSION");
    ensure!(page.contains(&format!("Version {version}<")), "{page}");
    for secret in ["127.0.0.1", "root", &listener.port().to_string()] {
        ensure!(!page.contains(secret), "{secret} is on the page: {page}");
    }
    Ok(())
}

#[test]
fn clients_that_stall_block_neither_the_enforcement_nor_other_clients() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let daemon = lab.daemon(RULE)?;
    let mut still = Vec::new();
    for _ in 0..50 {
        let mut stream = TcpStream::connect(daemon.metrics_address())?;
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost")?;
        still.push(stream);
    }
    let pair = Pair::open(&lab.outside, &listener)?;
    pair.ends()?[0].assert_reset(Errno::ECONNRESET, &pair.opened, LIMIT);
    daemon.wait_for_metric("session_enforcer_terminations_total", &[], 1.0)
}

/// Keeps 300 unfinished requests open. A connection that the daemon closes is opened again.
fn hold_half_requests(address: SocketAddr, is_done: &AtomicBool) -> Result<()> {
    let open = || -> Result<TcpStream> {
        let mut stream = TcpStream::connect(address)?;
        stream.set_nonblocking(true)?;
        stream.write_all(b"GET /metr")?;
        Ok(stream)
    };
    let is_open = |mut stream: &TcpStream| {
        let read = stream.read(&mut [0]);
        read.is_err_and(|error| error.kind() == ErrorKind::WouldBlock)
    };
    let mut held = Vec::new();
    while !is_done.load(Ordering::Relaxed) {
        held.retain(is_open);
        while held.len() < 300 {
            held.push(open()?);
        }
        thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

fn answered_in_time(daemon: &Daemon, path: &str) -> Result<()> {
    let began = Instant::now();
    ensure!(daemon.get(path)?.0 == 200, "{path}");
    let took = began.elapsed();
    ensure!(took < scaled(Duration::from_secs(1)), "{path}: {took:?}");
    Ok(())
}

#[test]
fn clients_that_keep_sending_unfinished_requests_do_not_block_others() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let daemon = lab.daemon(RULE)?;
    let is_done = AtomicBool::new(false);
    let address = daemon.metrics_address();
    thread::scope(|scope| {
        let holder = scope.spawn(|| hold_half_requests(address, &is_done));
        let answered = (0..100).try_for_each(|_| {
            thread::sleep(Duration::from_millis(20));
            answered_in_time(&daemon, "/healthz")?;
            answered_in_time(&daemon, "/metrics")
        });
        is_done.store(true, Ordering::Relaxed);
        holder.join().expect("the thread does not panic")?;
        answered
    })
}

/// Scrapes the metrics in a loop.
fn flood(address: SocketAddr, is_done: &AtomicBool) -> Result<()> {
    while !is_done.load(Ordering::Relaxed) {
        let mut stream = TcpStream::connect(address)?;
        stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n")?;
        stream.read_to_end(&mut Vec::new())?;
    }
    Ok(())
}

#[test]
fn a_flood_of_scrapes_delays_no_reset() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let daemon = lab.daemon(RULE)?;
    let is_done = AtomicBool::new(false);
    let address = daemon.metrics_address();
    thread::scope(|scope| {
        let floods: Vec<_> = (0..8)
            .map(|_| scope.spawn(|| flood(address, &is_done)))
            .collect();
        let ended = (0..3).try_for_each(|_| -> Result<()> {
            let pair = Pair::open(&lab.outside, &listener)?;
            let record = daemon.wait_for_termination_of(&pair)?;
            record.assert_reset("idle_timeout", &pair.opened, LIMIT);
            Ok(())
        });
        is_done.store(true, Ordering::Relaxed);
        for flood in floods {
            flood.join().expect("the thread does not panic")?;
        }
        ended
    })
}

#[test]
fn metrics_are_served_on_a_unix_socket_even_after_a_kill_left_it_behind() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let directory = tempfile::tempdir()?;
    let path = directory.path().join("metrics.sock");
    let listen = format!("unix:{}", path.display());
    let args = ["--metrics-listen", &listen];
    let get = || -> Result<String> {
        let mut stream = UnixStream::connect(&path)?;
        stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    };
    for _ in 0..2 {
        let mut daemon = lab.launch().config(RULE).args(&args).spawn()?;
        let answer = eventually("metrics on the socket", patience(), || Ok(get().ok()))?;
        ensure!(
            answer.contains("\nsession_enforcer_build_info{"),
            "{answer}"
        );
        daemon.kill()?;
        ensure!(
            fs::metadata(&path).is_ok(),
            "the killed daemon removed its socket"
        );
    }
    Ok(())
}

#[test]
fn a_metrics_address_that_others_can_reach_causes_a_warning() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let args = ["--metrics-listen", "0.0.0.0:0"];
    let mut daemon = lab.launch().config(RULE).args(&args).start_unready()?;
    daemon.wait_for_log("--metrics-listen: whoever reaches 0.0.0.0:0 reads the metrics")?;
    daemon.stop()?;
    let quiet = lab.daemon(RULE)?;
    let log = quiet.log();
    ensure!(!log.contains("reads the metrics"), "{log}");
    Ok(())
}

/// Starts a daemon whose address of the metrics is in use, asserts that it enforces, frees the address, and
/// waits until the metrics are served there.
fn enforces_while_in_use(listen: &str, served: &str, taken: impl Sized) -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let args = ["--metrics-listen", listen];
    let mut daemon = lab.launch().config(RULE).args(&args).spawn()?;
    daemon.wait_for_log(&format!("metrics.listen: {listen}: Address already in use"))?;
    daemon.wait_for_log("enforcing 1 rule(s)")?;
    let pair = Pair::open(&lab.outside, &listener)?;
    let record = daemon.wait_for_termination_of(&pair)?;
    record.assert_reset("idle_timeout", &pair.opened, LIMIT);
    ensure!(!daemon.log().contains(served), "{}", daemon.log());
    drop(taken);
    daemon.wait_for_log(served)?;
    daemon.stop()
}

#[test]
fn while_another_program_has_the_metrics_port_the_daemon_enforces_without_metrics() -> Result<()> {
    let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let listen = taken.local_addr()?.to_string();
    let served = format!("metrics at http://{listen}/metrics");
    enforces_while_in_use(&listen, &served, taken)
}

#[test]
fn while_another_program_has_the_metrics_socket_the_daemon_enforces_without_metrics() -> Result<()>
{
    let directory = tempfile::tempdir()?;
    let path = directory.path().join("metrics.sock");
    let taken = UnixListener::bind(&path)?;
    let listen = format!("unix:{}", path.display());
    let served = format!("metrics at {}, a Unix socket", path.display());
    enforces_while_in_use(&listen, &served, taken)
}
