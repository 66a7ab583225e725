//! Prints the show. Colours and the running clock appear only on a terminal.

use std::env;
use std::io::{self, IsTerminal as _, Write as _};
use std::time::Instant;

use anyhow::{Context as _, Result};

/// Returns to the start of the line and clears it, which removes the clock.
const CLEAR: &str = "\r\x1b[2K";

/// The kind of an event, which determines its first word and colour.
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

    /// Restarts the clock from zero.
    pub(super) fn start_clock(&mut self) {
        self.zero = Instant::now();
    }

    pub(super) fn line(&self, text: &str) -> Result<()> {
        let clear = if self.live { CLEAR } else { "" };
        print(&format!("{clear}{text}\n"))
    }

    /// Prints a heading after an empty line.
    pub(super) fn heading(&self, text: &str) -> Result<()> {
        self.line(&format!("\n{}", self.paint("1", text)))
    }

    /// Prints indented lines.
    pub(super) fn quote(&self, text: &str) -> Result<()> {
        text.lines()
            .try_for_each(|line| self.line(format!("    {line}").trim_end()))
    }

    /// Prints an event at `at`: the first line beside the time, the others below it.
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

    /// Prints the running clock on the last line, if the output is a terminal.
    pub(super) fn clock(&self, text: &str) -> Result<()> {
        if !self.live {
            return Ok(());
        }
        let time = self.zero.elapsed().as_secs_f64();
        let line = self.paint("2", &format!("t={time:>4.1} s  {text}"));
        // Disable wrapping, so that a narrow terminal cuts the line: CLEAR clears only one line.
        print(&format!("{CLEAR}\x1b[?7l{line}\x1b[?7h"))
    }

    /// Clears the clock before other output.
    pub(super) fn stop_clock(&self) {
        if self.live {
            // The error does not matter, because nobody sees the output.
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

/// Replaces `println!`, which panics if the reader has closed the output.
fn print(text: &str) -> Result<()> {
    let mut out = io::stdout().lock();
    let written = out.write_all(text.as_bytes()).and_then(|()| out.flush());
    written.context("writing to standard output")
}
