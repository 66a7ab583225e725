//! The service manager's side of the daemon: `sd_notify(3)`.
//!
//! Without `NOTIFY_SOCKET` in the environment nothing is sent. A message never waits: where the
//! manager's queue is full, it is lost, and the next beat repeats what it said.

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

/// The longest time between two status lines.
const STATUS_PERIOD: Duration = Duration::from_secs(10);

/// Beats in one watchdog period: two may be lost.
const BEATS_PER_PERIOD: u32 = 3;

/// What the daemon tells the service manager that started it, if one did.
pub struct ServiceManager {
    link: Option<Link>,
    /// Whether the daemon enforces, and no reload is under way.
    is_ready: Cell<bool>,
}

struct Link {
    socket: UnixDatagram,
    manager: SocketAddr,
}

impl ServiceManager {
    /// The manager that the environment names.
    ///
    /// # Errors
    ///
    /// Where `NOTIFY_SOCKET` is not the address of a socket, or no socket can be made.
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

    /// Says that the daemon enforces, with a status line. Also the end of a reload.
    pub fn ready(&self, status: impl FnOnce() -> String) {
        self.is_ready.set(true);
        self.beat(status);
    }

    /// Says that the loop goes round, with a status line.
    pub fn beat(&self, status: impl FnOnce() -> String) {
        let ready = if self.is_ready.get() { "READY=1\n" } else { "" };
        self.send(|| format!("{ready}STATUS={}\nWATCHDOG=1", status()));
    }

    /// Says that a reload has begun. systemd wants the time of it (`systemd.service(5)`,
    /// `Type=notify-reload`).
    pub fn reloading(&self) {
        self.is_ready.set(false);
        self.send(|| format!("RELOADING=1\nMONOTONIC_USEC={}", awake_ns() / 1_000));
    }

    /// Says that the daemon ends.
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

/// When the service manager is to be told next.
pub struct Beat(Option<Interval>);

impl Beat {
    /// As the environment asks for it: within the watchdog's period, where there is one.
    pub fn from_env() -> Self {
        let is_told = env::var_os("NOTIFY_SOCKET").is_some();
        let watchdog = watchdog_period(
            env::var("WATCHDOG_USEC").ok().as_deref(),
            env::var("WATCHDOG_PID").ok().as_deref(),
        );
        Self(is_told.then(|| every(watchdog)))
    }

    /// Waits for it; without end where no service manager is told.
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

/// The watchdog's period, where it is meant for this process (`sd_watchdog_enabled(3)`).
fn watchdog_period(usec: Option<&str>, pid: Option<&str>) -> Option<Duration> {
    let is_own = pid.is_none_or(|pid| pid.parse() == Ok(std::process::id()));
    let usec = usec?.parse().ok().filter(|usec| *usec > 0 && is_own)?;
    Some(Duration::from_micros(usec))
}

/// The numbers of a status line.
pub struct Standing {
    /// What the daemon does to an expired session.
    pub mode: Mode,
    /// Rules in force.
    pub rules: usize,
    /// Sessions that are tracked.
    pub sessions: usize,
    /// Sessions that this daemon has reset.
    pub resets: u64,
    /// Whether the configuration that was read last is not in force.
    pub is_refused: bool,
    /// What is not as it should be, if anything.
    pub trouble: Option<String>,
}

impl Standing {
    /// The line, as `systemctl status` shows it.
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
        if let Some(trouble) = &self.trouble {
            // A line feed would begin another field of the message.
            line += &format!("; degraded: {}", trouble.replace('\n', " "));
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
        // More than net.unix.max_dgram_qlen.
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
            trouble: None,
        };
        let line = "enforcing 2 rule(s), 120 session(s), 7 reset";
        assert_eq!(standing.line(), line);
        standing.is_refused = true;
        standing.trouble = Some("the disk\nis full".to_owned());
        let more = "; the configuration file is refused, what was in force before stays; \
                    degraded: the disk is full";
        assert_eq!(standing.line(), format!("{line}{more}"));
    }
}
