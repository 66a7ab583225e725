//! `session-enforcer top` in a real terminal (tmux).

use std::{
    fs,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use nix::errno::Errno;
use session_enforcer_tests::{
    Daemon, Lab, Moment, Pair, daemon_command, eventually, patience, run_to_end,
};
use tempfile::TempDir;

const AGENT: &str = env!("CARGO_BIN_EXE_session-enforcer-test-agent");

/// Shown in the terminal before `top` starts and again after it ends.
const MARK: &str = "the terminal as it was";

/// Limits that no session reaches during a test.
const CONFIG: &str = "[daemon]\nmax_sessions = 8192\n[[rule]]\nname = 'first'\nremote = ['127.0.0.1']\n\
                      direction = 'inbound'\nidle_timeout = '1h'\n";

/// A terminal of tmux in which `top` runs.
struct Terminal {
    directory: TempDir,
}

impl Terminal {
    /// Starts a separate tmux server with `top` in its only window. When `top` ends, the window
    /// shows its exit status.
    fn new(daemon: &Daemon, environment: &str) -> Result<Self> {
        let terminal = Self {
            directory: tempfile::tempdir()?,
        };
        let program = PathBuf::from(daemon_command()?.get_program());
        let script = format!(
            "stty -g > {before}; echo {MARK}; echo $$ > {pid}; {environment} {program} top --socket {socket}; \
             status=$?; stty -g > {after}; echo ended with $status; exec cat",
            before = terminal.file("before").display(),
            after = terminal.file("after").display(),
            pid = terminal.file("pid").display(),
            program = program.display(),
            socket = daemon.control_socket().display(),
        );
        terminal.tmux(&[
            "-f",
            "/dev/null",
            "new-session",
            "-d",
            "-x",
            "80",
            "-y",
            "24",
            &script,
        ])?;
        Ok(terminal)
    }

    fn file(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn tmux(&self, args: &[&str]) -> Result<String> {
        let mut command = Command::new("tmux");
        command.arg("-S").arg(self.file("tmux.sock")).args(args);
        command.env("TERM", "xterm-256color").env_remove("TMUX");
        let finished = run_to_end(command, patience()).context("tmux (package tmux)")?;
        ensure!(finished.code == 0, "{args:?}: {finished:?}");
        Ok(finished.stdout)
    }

    fn screen(&self) -> Result<String> {
        self.tmux(&["capture-pane", "-p"])
    }

    /// Whether the screen has a colour of the palette.
    fn has_colours(&self) -> Result<bool> {
        let shown = self.tmux(&["capture-pane", "-p", "-e"])?;
        Ok(shown.contains("\x1b[38;5;"))
    }

    /// Waits until the screen satisfies `look`.
    fn wait_for(&self, what: &str, look: impl Fn(&str) -> bool) -> Result<String> {
        let mut last = String::new();
        let found = eventually(what, patience(), || {
            last = self.screen()?;
            Ok(look(&last).then(|| last.clone()))
        });
        found.with_context(|| format!("the terminal shows:\n{last}"))
    }

    fn press(&self, keys: &[&str]) -> Result<()> {
        let mut args = vec!["send-keys"];
        args.extend(keys);
        self.tmux(&args).map(drop)
    }

    /// Waits until `top` has ended. Asserts that it restored the terminal.
    fn wait_for_end(&self) -> Result<()> {
        let screen = self.wait_for("the program's end", |screen| {
            screen.contains("ended with 0")
        })?;
        ensure!(
            screen.contains(MARK),
            "the earlier contents are gone:\n{screen}"
        );
        ensure!(!screen.contains("sorted by"), "{screen}");
        let modes = |name| fs::read_to_string(self.file(name));
        ensure!(modes("before")? == modes("after")?, "{}", modes("after")?);
        let state = self.tmux(&["display-message", "-p", "#{alternate_on} #{cursor_flag}"])?;
        ensure!(state.trim() == "0 1", "alternate screen, cursor: {state}");
        Ok(())
    }

    /// The process id of `top`.
    fn program(&self) -> Result<u32> {
        let shell = fs::read_to_string(self.file("pid"))?;
        let shell = shell.trim();
        let children = fs::read_to_string(format!("/proc/{shell}/task/{shell}/children"))?;
        let child = children
            .split_whitespace()
            .next()
            .context("the shell has no child")?;
        Ok(child.parse()?)
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // The server may have ended already.
        let _ = Command::new("tmux")
            .arg("-S")
            .arg(self.file("tmux.sock"))
            .arg("kill-server")
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
    }
}

fn open(lab: &Lab, count: usize) -> Result<Vec<Pair>> {
    let listener = lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?;
    (0..count)
        .map(|_| Pair::open(&lab.outside, &listener))
        .collect()
}

#[test]
fn top_shows_filters_sorts_and_resets_sessions_and_restores_the_terminal() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let daemon = lab.daemon(CONFIG)?;
    let pairs = open(&lab, 3)?;
    let ports: Vec<String> = pairs
        .iter()
        .map(|pair| format!(":{} ", pair.client_address.port()))
        .collect();
    let terminal = Terminal::new(&daemon, "")?;
    let all = |screen: &str| ports.iter().all(|port| screen.contains(port));
    let screen = terminal.wait_for("all sessions", all)?;
    assert!(
        screen.lines().all(|line| line.chars().count() <= 80),
        "{screen}"
    );
    assert!(
        screen.contains("3 of 8192 sessions") && screen.contains("  ready"),
        "{screen}"
    );
    assert!(terminal.has_colours()?);
    terminal.press(&["s"])?;
    terminal.wait_for("another order", |screen| screen.contains("sorted by idle"))?;
    // Type a filter, key by key.
    terminal.press(&["/"])?;
    let port = ports[1].trim();
    terminal.press(&["-l", port])?;
    let one = |screen: &str| {
        ports
            .iter()
            .filter(|port| screen.contains(&***port))
            .count()
            == 1
            && screen.contains(&ports[1])
    };
    terminal.wait_for("one session", one)?;
    terminal.press(&["Enter"])?;
    terminal.press(&["k"])?;
    terminal.wait_for("the confirmation prompt", |screen| {
        screen.contains("Reset session ")
    })?;
    let (asked, ()) = Moment::of(|| terminal.press(&["y"]))?;
    pairs[1].ends()?[0].assert_reset(Errno::ECONNRESET, &asked, Duration::ZERO);
    let record = daemon.wait_for_termination_of(&pairs[1])?;
    assert_eq!(record.text("event.reason"), "admin");
    terminal.wait_for("the answer", |screen| screen.contains(": reset"))?;
    terminal.wait_for("the last termination", |screen| {
        screen.contains("session-terminated  first  admin")
    })?;
    terminal.press(&["Escape"])?;
    let others = |screen: &str| screen.contains(&ports[0]) && screen.contains(&ports[2]);
    terminal.wait_for("the other sessions", others)?;
    // A larger terminal shows more columns, a smaller one fewer.
    terminal.tmux(&["resize-window", "-x", "160", "-y", "40"])?;
    terminal.wait_for("more columns", |screen| screen.contains("CLOCK"))?;
    terminal.tmux(&["resize-window", "-x", "60", "-y", "12"])?;
    terminal.wait_for("fewer columns", |screen| {
        !screen.contains("CLOCK") && screen.lines().count() <= 12 && screen.contains("q quit")
    })?;
    terminal.press(&["q"])?;
    terminal.wait_for_end()
}

#[test]
fn a_signal_ends_top_and_restores_the_terminal() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let daemon = lab.daemon(CONFIG)?;
    let _pairs = open(&lab, 1)?;
    for signal in [
        nix::sys::signal::Signal::SIGTERM,
        nix::sys::signal::Signal::SIGHUP,
        nix::sys::signal::Signal::SIGINT,
    ] {
        let terminal = Terminal::new(&daemon, "NO_COLOR=1")?;
        terminal.wait_for("the sessions", |screen| {
            screen.contains("1 of 8192 sessions")
        })?;
        assert!(!terminal.has_colours()?);
        let pid = nix::unistd::Pid::from_raw(i32::try_from(terminal.program()?)?);
        nix::sys::signal::kill(pid, signal)?;
        terminal.wait_for_end()?;
    }
    Ok(())
}

#[test]
fn top_reports_a_stopped_daemon_and_refuses_to_start_without_a_terminal() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let mut daemon = lab.daemon(CONFIG)?;
    let terminal = Terminal::new(&daemon, "")?;
    terminal.wait_for("the daemon", |screen| screen.contains("  ready"))?;
    daemon.stop()?;
    terminal.wait_for("the message that no daemon answers", |screen| {
        screen.contains("no daemon answers")
    })?;
    terminal.press(&["q"])?;
    terminal.wait_for_end()?;
    let mut command = daemon_command()?;
    command
        .args(["top", "--socket"])
        .arg(Path::new("/nonexistent/control.sock"));
    let refused = run_to_end(command, patience())?;
    assert_eq!(refused.code, 2, "{refused:?}");
    assert!(refused.stderr.contains("needs a terminal"), "{refused:?}");
    Ok(())
}
