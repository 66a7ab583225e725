//! What is printed, and how it looks: colours and the running clock on a terminal only.

use std::env;
use std::io::{self, IsTerminal as _, Write as _};
use std::time::Instant;

use anyhow::{Context as _, Result};

/// Begins a line anew: what the clock has written goes.
const CLEAR: &str = "\r\x1b[2K";

/// How an event's first word stands out.
#[derive(Clone, Copy)]
pub(super) enum Kind {
    Ready,
    Reset,
    Record,
    Silent,
    Lives,
}

impl Kind {
    const fn word(self) -> &'static str {
        match self {
            Self::Ready => "READY",
            Self::Reset => "RESET",
            Self::Record => "RECORD",
            Self::Silent => "SILENT",
            Self::Lives => "LIVES",
        }
    }

    /// The number of an ANSI colour.
    const fn colour(self) -> &'static str {
        match self {
            Self::Ready | Self::Silent => "36",
            Self::Reset => "1;31",
            Self::Record => "33",
            Self::Lives => "32",
        }
    }
}

/// Standard output.
pub(super) struct Screen {
    live: bool,
    colour: bool,
    zero: Instant,
}

impl Screen {
    pub(super) fn new() -> Self {
        let live = io::stdout().is_terminal() && env::var_os("TERM").is_none_or(|t| t != "dumb");
        let plain = env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        Self {
            live,
            colour: live && !plain,
            zero: Instant::now(),
        }
    }

    /// From now on the clock counts anew.
    pub(super) fn start_clock(&mut self) {
        self.zero = Instant::now();
    }

    pub(super) fn line(&self, text: &str) -> Result<()> {
        let clear = if self.live { CLEAR } else { "" };
        print(&format!("{clear}{text}\n"))
    }

    /// A heading, with an empty line above.
    pub(super) fn heading(&self, text: &str) -> Result<()> {
        self.line(&format!("\n{}", self.paint("1", text)))
    }

    /// Lines that are set off.
    pub(super) fn quote(&self, text: &str) -> Result<()> {
        text.lines()
            .try_for_each(|line| self.line(format!("    {line}").trim_end()))
    }

    /// What happened to whom at `at`; the first line beside the time, the others below it.
    pub(super) fn event(&self, at: Instant, kind: Kind, who: &str, lines: &[String]) -> Result<()> {
        let time = at.saturating_duration_since(self.zero).as_secs_f64();
        let word = self.paint(kind.colour(), &format!("{:<6}", kind.word()));
        let mut left = format!("t={time:>6.3} s  {word}  {who:<8}");
        for line in lines {
            self.line(&format!("{left}  {line}"))?;
            left = " ".repeat(18);
        }
        Ok(())
    }

    /// The running clock, in the last line; only where such a line can be written again.
    pub(super) fn clock(&self, text: &str) -> Result<()> {
        if !self.live {
            return Ok(());
        }
        let time = self.zero.elapsed().as_secs_f64();
        let line = self.paint("2", &format!("t={time:>4.1} s  {text}"));
        // A narrow terminal cuts the line off and does not wrap it: CLEAR is for one line.
        print(&format!("{CLEAR}\x1b[?7l{line}\x1b[?7h"))
    }

    /// Leaves the last line to whoever prints next.
    pub(super) fn stop_clock(&self) {
        if self.live {
            // Where that fails, nobody looks any more.
            let _ = print(CLEAR);
        }
    }

    fn paint(&self, colour: &str, text: &str) -> String {
        if !self.colour {
            return text.to_owned();
        }
        format!("\x1b[{colour}m{text}\x1b[0m")
    }
}

/// Not `println!`, which panics where the reader has gone.
fn print(text: &str) -> Result<()> {
    let mut out = io::stdout().lock();
    let written = out.write_all(text.as_bytes()).and_then(|()| out.flush());
    written.context("writing to standard output")
}
