//! Runs programs on a pseudo-terminal.

use std::{
    fs::File,
    io::{ErrorKind, Read as _},
    os::fd::AsFd as _,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    pty::{Winsize, openpty},
};

use crate::process::die_with_parent;

/// Runs a program to its end with its output on a terminal of this width. Returns the output.
///
/// # Errors
///
/// Fails if the program cannot be started, fails, or has not ended after `bound`.
pub fn run_on_terminal(mut command: Command, columns: u16, bound: Duration) -> Result<String> {
    let size = Winsize {
        ws_row: 24,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    let terminal = openpty(Some(&size), None)?;
    command
        .stdin(Stdio::null())
        .stdout(Stdio::from(terminal.slave.try_clone()?))
        .stderr(Stdio::from(terminal.slave));
    let mut child = die_with_parent(&mut command).spawn()?;
    // From now on only the child holds the terminal's other side.
    drop(command);
    let mut master = File::from(terminal.master);
    let mut output = Vec::new();
    let until = Instant::now() + bound;
    let ended = loop {
        let left = until.saturating_duration_since(Instant::now());
        let mut fds = [PollFd::new(master.as_fd(), PollFlags::POLLIN)];
        let timeout = PollTimeout::try_from(left.as_millis())?;
        if poll(&mut fds, timeout)? == 0 {
            break false;
        }
        let mut bytes = [0; 4096];
        match master.read(&mut bytes) {
            Ok(0) => break true,
            Ok(read) => output.extend_from_slice(&bytes[..read]),
            // No process has the other side open any longer (pty(7)).
            Err(error) if error.raw_os_error() == Some(Errno::EIO as i32) => break true,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error.into()),
        }
    };
    if !ended {
        child.kill()?;
    }
    let status = child.wait()?;
    let text = String::from_utf8_lossy(&output).replace("\r\n", "\n");
    ensure!(ended && status.success(), "{status} after {text}");
    Ok(text)
}
