//! Modifies a running kernel from outside, or resets the machine, through QEMU's debugger protocol.
//!
//! Debian builds every kernel with `CONFIG_INET_DIAG_DESTROY`. Without that option, the only difference is
//! that `tcp_diag`'s handler has no `destroy` function. Clearing its pointer emulates such a kernel. The
//! kernel itself cannot do that, because the handler is in read-only memory.

use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

/// The request of the machine: the addresses of the handler and of the function, in hexadecimal.
pub(super) const ASKED: &str = "clear-destroy";
/// The answer: an error, or nothing.
pub(super) const ANSWERED: &str = "clear-destroy.done";

/// An upper bound of the size of `struct inet_diag_handler` in bytes.
const HANDLER: usize = 96;

/// Performs the request of the machine once.
pub(super) fn serve(shared: &Path, socket: &Path) {
    let (asked, answered) = (shared.join(ASKED), shared.join(ANSWERED));
    if answered.exists() || !asked.exists() {
        return;
    }
    let result = fs::read_to_string(&asked)
        .context("cannot read the request")
        .and_then(|text| clear(socket, &text));
    let said = result
        .err()
        .map_or_else(String::new, |error| format!("{error:#}"));
    // If the answer cannot be written, the machine reports a timeout.
    let _ = fs::write(answered, said);
}

fn clear(socket: &Path, asked: &str) -> Result<()> {
    let mut words = asked
        .split_whitespace()
        .map(|word| u64::from_str_radix(word, 16));
    let (Some(Ok(handler)), Some(Ok(destroy))) = (words.next(), words.next()) else {
        bail!("the request does not contain two addresses: {asked:?}");
    };
    // The connection stops the machine until it is told to continue.
    let mut debugger = Debugger::connect(socket)?;
    let cleared = debugger.clear_pointer(handler, destroy);
    debugger.ask("D", "OK")?;
    cleared
}

/// Resets the machine like its reset button.
pub(super) fn reset(socket: &Path) -> Result<()> {
    let mut debugger = Debugger::connect(socket)?;
    debugger.ask(&monitor("system_reset"), "OK")?;
    debugger.ask("D", "OK")
}

/// A connection with GDB's remote serial protocol.
struct Debugger(UnixStream);

impl Debugger {
    fn connect(socket: &Path) -> Result<Self> {
        let stream = UnixStream::connect(socket)
            .with_context(|| format!("connecting to {}", socket.display()))?;
        stream.set_read_timeout(Some(Duration::from_secs(30)))?;
        Ok(Self(stream))
    }

    /// Clears the handler's pointer to the function.
    fn clear_pointer(&mut self, handler: u64, function: u64) -> Result<()> {
        let bytes = self.read(handler, HANDLER)?;
        let mut words = (handler..).step_by(8).zip(bytes.chunks(8));
        let found = words.find(|(_, word)| *word == function.to_le_bytes());
        let (address, _) = found.context("the handler does not point to the function")?;
        self.ask(&format!("M{address:x},8:0000000000000000"), "OK")
    }

    fn read(&mut self, address: u64, size: usize) -> Result<Vec<u8>> {
        let answer = self.exchange(&format!("m{address:x},{size:x}"))?;
        let digits = answer.as_bytes().chunks(2);
        let bytes: Option<Vec<u8>> = digits
            .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok())
            .collect();
        bytes
            .filter(|bytes| bytes.len() == size)
            .with_context(|| format!("reading {address:#x}: {answer}"))
    }

    fn ask(&mut self, what: &str, expected: &str) -> Result<()> {
        let answer = self.exchange(what)?;
        if answer != expected {
            bail!("{what}: {answer}");
        }
        Ok(())
    }

    /// Sends a packet and returns the content of the answer.
    fn exchange(&mut self, what: &str) -> Result<String> {
        self.0.write_all(packet(what).as_bytes())?;
        loop {
            let answer = self.receive()?;
            // The first packet reports that the machine has stopped. Nobody requested it.
            if !answer.starts_with('T') {
                return Ok(answer);
            }
        }
    }

    fn receive(&mut self) -> Result<String> {
        let mut answer = String::new();
        let mut byte = [0];
        let mut begun = false;
        loop {
            self.0.read_exact(&mut byte).context("no answer")?;
            match byte[0] {
                b'$' => begun = true,
                b'#' if begun => break,
                other if begun => answer.push(char::from(other)),
                // The acknowledgement of the sent packet.
                _ => {}
            }
        }
        self.0.read_exact(&mut [0; 2])?;
        self.0.write_all(b"+")?;
        Ok(answer)
    }
}

/// The packet that makes QEMU's monitor run a command.
fn monitor(command: &str) -> String {
    let digits = command.bytes().map(|byte| format!("{byte:02x}"));
    format!("qRcmd,{}", digits.collect::<String>())
}

fn packet(what: &str) -> String {
    let sum = what.bytes().fold(0u8, u8::wrapping_add);
    format!("${what}#{sum:02x}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_packet_ends_with_the_sum_of_its_bytes() {
        assert_eq!(packet("OK"), "$OK#9a");
        assert_eq!(packet("D"), "$D#44");
    }

    #[test]
    fn a_command_for_the_monitor_is_in_hexadecimal() {
        assert_eq!(monitor("q\n"), "qRcmd,710a");
    }
}
