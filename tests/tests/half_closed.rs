//! Sessions that one end has closed for writing are sessions still.

use std::{io::Write as _, net::Shutdown, thread, time::Duration};

use anyhow::Result;
use nix::errno::Errno;
use session_enforcer_tests::{Lab, Pair, ends_of, idle_rule, unhurried};

const AGENT: &str = env!("CARGO_BIN_EXE_session-enforcer-test-agent");

fn limit() -> Duration {
    unhurried(Duration::from_secs(2))
}

fn rule() -> String {
    idle_rule(limit())
}

#[test]
fn a_session_that_the_client_half_closed_is_reset_when_idle() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen(([127, 0, 0, 1], 0))?;
    let daemon = lab.daemon(&rule())?;
    let pair = Pair::open(&lab.outside, &listener)?;
    let last = pair.round_trip()?;
    // The FIN is no activity.
    last.wait(limit() / 4);
    pair.client.shutdown(Shutdown::Write)?;
    let [client, server] = pair.ends()?;
    client.assert_reset(Errno::ECONNRESET, &last, limit());
    server.assert_reset(Errno::ECONNABORTED, &last, limit());
    daemon
        .wait_for_termination_of(&pair)?
        .assert_reset("idle_timeout", &last, limit());
    Ok(())
}

#[test]
fn a_session_that_the_server_half_closed_is_reset_when_idle() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen(([127, 0, 0, 1], 0))?;
    let daemon = lab.daemon(&rule())?;
    let pair = Pair::open(&lab.outside, &listener)?;
    let last = pair.round_trip()?;
    last.wait(limit() / 4);
    pair.server.shutdown(Shutdown::Write)?;
    let [client, server] = pair.ends()?;
    // What a reset is called where the peer had already closed its direction.
    client.assert_reset(Errno::EPIPE, &last, limit());
    server.assert_reset(Errno::ECONNABORTED, &last, limit());
    daemon
        .wait_for_termination_of(&pair)?
        .assert_reset("idle_timeout", &last, limit());
    Ok(())
}

#[test]
fn a_half_closed_session_lives_while_the_other_direction_is_busy() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen(([127, 0, 0, 1], 0))?;
    let daemon = lab.daemon(&rule())?;
    let pair = Pair::open(&lab.outside, &listener)?;
    pair.client.shutdown(Shutdown::Write)?;
    let mut last = pair.opened;
    while pair.opened.elapsed() < 2 * limit() {
        last = pair.to_client(b"x")?;
        thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(daemon.terminations()?.len(), 0);
    pair.ends()?[1].assert_reset(Errno::ECONNABORTED, &last, limit());
    daemon
        .wait_for_termination_of(&pair)?
        .assert_reset("idle_timeout", &last, limit());
    Ok(())
}

#[test]
fn a_session_that_only_the_client_closed_is_reset_when_idle() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen(([127, 0, 0, 1], 0))?;
    let daemon = lab.daemon(&rule())?;
    let pair = Pair::open(&lab.outside, &listener)?;
    let last = pair.round_trip()?;
    let Pair { client, server, .. } = pair;
    drop(client);
    let end = ends_of(&[&server])?[0];
    end.assert_reset(Errno::ECONNABORTED, &last, limit());
    daemon
        .wait_for_termination()?
        .assert_reset("idle_timeout", &last, limit());
    Ok(())
}

#[test]
fn the_bytes_of_a_half_closed_session_are_those_of_its_payload() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen(([127, 0, 0, 1], 0))?;
    let daemon = lab.daemon(&rule())?;
    let pair = Pair::open(&lab.outside, &listener)?;
    pair.to_server(b"hello")?;
    pair.client.shutdown(Shutdown::Write)?;
    pair.to_client(b"bye")?;
    assert_eq!(daemon.wait_for_termination_of(&pair)?.bytes(), [5, 3]);
    Ok(())
}

#[test]
fn the_fin_of_a_client_that_does_not_read_is_no_byte() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen(([127, 0, 0, 1], 0))?;
    let daemon = lab.daemon(&rule())?;
    let pair = Pair::open(&lab.outside, &listener)?;
    pair.server.set_nonblocking(true)?;
    while (&pair.server).write(&[0; 1 << 16]).is_ok() {}
    // The server's FIN waits behind what the client has no room for, so the client's comes first.
    pair.server.shutdown(Shutdown::Write)?;
    pair.server.set_nonblocking(false)?;
    pair.to_server(b"hello")?;
    pair.client.shutdown(Shutdown::Write)?;
    assert_eq!(daemon.wait_for_termination_of(&pair)?.bytes()[0], 5);
    Ok(())
}
