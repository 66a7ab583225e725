//! Notifies the service manager (`sd_notify(3)`).
//!
//! Without `NOTIFY_SOCKET` in the environment nothing is sent. Sending never blocks: if the manager's queue
//! is full, the message is lost, and the next beat repeats its state.

use std::{
    cell::Cell,
    env,
    ffi::OsStr,
    future::pending,
    io,
    os::{
        linux::net::SocketAddrExt as _,
        unix::{
            ffi::OsStrExt as _,
            net::{SocketAddr, UnixDatagram},
        },
    },
    time::Duration,
};

use tokio::time::{Interval, MissedTickBehavior, interval};

use crate::{config::Mode, host::clock::awake_ns};

/// The maximum interval of status lines.
const STATUS_PERIOD: Duration = Duration::from_secs(10);

/// The number of beats in one watchdog period, of which two may be lost.
const BEATS_PER_PERIOD: u32 = 3;

/// The connection to the service manager that started the daemon, if one did.
pub struct ServiceManager {
    link: Option<Link>,
    /// Whether the daemon enforces and no reload is in progress.
    is_ready: Cell<bool>,
}

struct Link {
    socket: UnixDatagram,
    manager: SocketAddr,
}

impl ServiceManager {
    /// Opens the socket that the environment names.
    ///
    /// # Errors
    ///
    /// Fails if `NOTIFY_SOCKET` is not a socket address, or if no socket can be opened.
    pub fn from_env() -> io::Result<Self> {
        let link = env::var_os("NOTIFY_SOCKET").map(|address| Link::new(&address));
        Ok(Self::new(link.transpose()?))
    }

    fn new(link: Option<Link>) -> Self {
        Self {
            link,
            is_ready: Cell::new(false),
        }
    }

    /// Reports that the daemon enforces, with a status line. Also ends a reload.
    pub fn ready(&self, status: impl FnOnce() -> String) {
        self.is_ready.set(true);
        self.beat(status);
    }

    /// Reports that the engine's loop is alive, with a status line.
    pub fn beat(&self, status: impl FnOnce() -> String) {
        let ready = if self.is_ready.get() { "READY=1\n" } else { "" };
        self.send(|| format!("{ready}STATUS={}\nWATCHDOG=1", status()));
    }

    /// Reports that a reload has begun. systemd requires its time (`systemd.service(5)`,
    /// `Type=notify-reload`).
    pub fn reloading(&self) {
        self.is_ready.set(false);
        self.send(|| format!("RELOADING=1\nMONOTONIC_USEC={}", awake_ns() / 1_000));
    }

    /// Reports that the daemon is stopping.
    pub fn stopping(&self) {
        self.send(|| "STOPPING=1\nSTATUS=stopping".to_owned());
    }

    fn send(&self, message: impl FnOnce() -> String) {
        let Some(link) = &self.link else { return };
        let sent = link
            .socket
            .send_to_addr(message().as_bytes(), &link.manager);
        if let Err(error) = sent {
            tracing::debug!("the service manager is not told: {error}");
        }
    }
}

impl Link {
    fn new(address: &OsStr) -> io::Result<Self> {
        let manager = match address.as_bytes().strip_prefix(b"@") {
            Some(name) => SocketAddr::from_abstract_name(name)?,
            None => SocketAddr::from_pathname(address)?,
        };
        let socket = UnixDatagram::unbound()?;
        socket.set_nonblocking(true)?;
        Ok(Self { socket, manager })
    }
}

/// The interval of the beats.
pub struct Beat(Option<Interval>);

impl Beat {
    /// Derives the interval from the environment, shorter than the watchdog period if there is one.
    pub fn from_env() -> Self {
        let is_told = env::var_os("NOTIFY_SOCKET").is_some();
        let watchdog = watchdog_period(
            env::var("WATCHDOG_USEC").ok().as_deref(),
            env::var("WATCHDOG_PID").ok().as_deref(),
        );
        Self(is_told.then(|| every(watchdog)))
    }

    /// Waits for the next beat; forever without a service manager.
    pub async fn due(&mut self) {
        match &mut self.0 {
            Some(interval) => drop(interval.tick().await),
            None => pending().await,
        }
    }
}

fn every(watchdog: Option<Duration>) -> Interval {
    let period = watchdog.map_or(STATUS_PERIOD, |period| period / BEATS_PER_PERIOD);
    let mut beat = interval(period.clamp(Duration::from_millis(1), STATUS_PERIOD));
    beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
    beat
}

/// The watchdog period if it is meant for this process (`sd_watchdog_enabled(3)`).
fn watchdog_period(usec: Option<&str>, pid: Option<&str>) -> Option<Duration> {
    let is_own = pid.is_none_or(|pid| pid.parse() == Ok(std::process::id()));
    let usec = usec?.parse().ok().filter(|usec| *usec > 0 && is_own)?;
    Some(Duration::from_micros(usec))
}

/// The content of a status line.
pub struct Standing {
    /// The mode of the policy.
    pub mode: Mode,
    /// The number of rules in force.
    pub rules: usize,
    /// The number of tracked sessions.
    pub sessions: usize,
    /// The number of sessions that this daemon has reset.
    pub resets: u64,
    /// Whether the last configuration that was read was refused.
    pub is_refused: bool,
    /// The present degradations, if any.
    pub problem: Option<String>,
}

impl Standing {
    /// The status line, as `systemctl status` shows it.
    pub fn line(&self) -> String {
        let mode = match self.mode {
            Mode::Enforce => "enforcing",
            Mode::Observe => "observing",
        };
        let mut line = format!(
            "{mode} {} rule(s), {} session(s), {} reset",
            self.rules, self.sessions, self.resets
        );
        if self.is_refused {
            line += "; the configuration file is refused, what was in force before stays";
        }
        if let Some(problem) = &self.problem {
            // A newline would begin another field of the message.
            line += &format!("; degraded: {}", problem.replace('\n', " "));
        }
        line
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn received(socket: &UnixDatagram) -> String {
        let mut buffer = [0; 4096];
        let length = socket.recv(&mut buffer).unwrap();
        String::from_utf8(buffer[..length].to_vec()).unwrap()
    }

    #[test]
    fn the_manager_is_told_at_a_path_and_at_an_abstract_name() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("notify");
        let name = format!("session-enforcer-test-{}", std::process::id());
        let abstract_name = SocketAddr::from_abstract_name(&name).unwrap();
        let sockets = [
            (UnixDatagram::bind(&path).unwrap(), path.into_os_string()),
            (
                UnixDatagram::bind_addr(&abstract_name).unwrap(),
                format!("@{name}").into(),
            ),
        ];
        for (socket, address) in sockets {
            let manager = ServiceManager::new(Some(Link::new(&address).unwrap()));
            manager.beat(|| "starting".to_owned());
            assert_eq!(received(&socket), "STATUS=starting\nWATCHDOG=1");
            manager.ready(|| "well".to_owned());
            assert_eq!(received(&socket), "READY=1\nSTATUS=well\nWATCHDOG=1");
            manager.reloading();
            let text = received(&socket);
            let usec = text.strip_prefix("RELOADING=1\nMONOTONIC_USEC=").unwrap();
            assert!(usec.parse::<u64>().unwrap() > 0);
            manager.stopping();
            assert!(received(&socket).starts_with("STOPPING=1\n"));
        }
    }

    #[test]
    fn a_manager_that_reads_nothing_holds_nobody_up() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("notify");
        let _unread = UnixDatagram::bind(&path).unwrap();
        let manager = ServiceManager::new(Some(Link::new(path.as_os_str()).unwrap()));
        // This exceeds net.unix.max_dgram_qlen.
        for _ in 0..2_000 {
            manager.ready(String::new);
        }
    }

    #[tokio::test]
    async fn three_beats_come_within_the_watchdog_s_period() {
        let interval = every(Some(Duration::from_millis(30)));
        assert_eq!(interval.period(), Duration::from_millis(10));
        let mut beat = Beat(Some(interval));
        beat.due().await;
        beat.due().await;
        assert_eq!(every(None).period(), STATUS_PERIOD);
    }

    #[test]
    fn the_watchdog_of_another_process_is_none() {
        let own = std::process::id().to_string();
        let period = Some(Duration::from_secs(30));
        assert_eq!(watchdog_period(Some("30000000"), None), period);
        assert_eq!(watchdog_period(Some("30000000"), Some(&own)), period);
        assert_eq!(watchdog_period(Some("30000000"), Some("1")), None);
        assert_eq!(watchdog_period(Some("0"), None), None);
        assert_eq!(watchdog_period(None, Some(&own)), None);
    }

    #[test]
    fn the_status_is_one_line() {
        let mut standing = Standing {
            mode: Mode::Enforce,
            rules: 2,
            sessions: 120,
            resets: 7,
            is_refused: false,
            problem: None,
        };
        let line = "enforcing 2 rule(s), 120 session(s), 7 reset";
        assert_eq!(standing.line(), line);
        standing.is_refused = true;
        standing.problem = Some("the disk\nis full".to_owned());
        let more = "; the configuration file is refused, what was in force before stays; \
                    degraded: the disk is full";
        assert_eq!(standing.line(), format!("{line}{more}"));
    }
}
