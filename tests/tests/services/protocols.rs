//! What the limits mean for common protocols. `docs/protocols.md` has these results.

use std::{thread, time::Duration};

use anyhow::Result;
use session_enforcer_tests::{
    Daemon, Lab, Moment,
    services::{Program, Scripted, WebServer},
    unhurried,
};

const AGENT: &str = env!("CARGO_BIN_EXE_session-enforcer-test-agent");
const AMQP: &str = include_str!("../../clients/broker.py");
const FTP: &str = include_str!("../../clients/ftp.py");
const GRPC: &str = include_str!("../../clients/rpc.py");
const LDAP: &str = include_str!("../../clients/directory.py");
const SMTP: &str = include_str!("../../clients/smtp.py");
const VNC: &str = include_str!("../../clients/screen.py");
const WEBSOCKET: &str = include_str!("../../clients/websocket.py");

/// Longer than a client takes to make a request on a busy machine.
fn limit() -> Duration {
    unhurried(Duration::from_secs(4))
}

/// A daemon with one rule for connections accepted on a port: an idle timeout and the lines of
/// `more`.
fn daemon(lab: &Lab, port: u16, more: &str) -> Result<Daemon> {
    let limit = limit().as_secs();
    lab.daemon(&format!(
        "[[rule]]\nname = \"service\"\ndirection = \"inbound\"\nlocal_ports = [{port}]\n\
         idle_timeout = \"{limit}s\"\n{more}\n"
    ))
}

/// A line that allows slow answers.
const SLOW: &str = "response_timeout = \"1h\"";

fn long() -> Duration {
    2 * limit() + Duration::from_secs(1)
}

fn assert_idle(daemon: &Daemon, port: u16, since: &Moment) -> Result<()> {
    daemon
        .wait_for_termination_from(port)?
        .assert_due("idle_timeout", since, limit());
    Ok(())
}

/// Has a client do something and waits for its output.
fn done(client: &mut Program, what: &str, says: &str) -> Result<Moment> {
    let (moment, ()) = Moment::of(|| {
        client.say(what)?;
        client.wait_for(says)
    })?;
    Ok(moment)
}

fn slow_page() -> String {
    format!("/app/{}/2000", long().as_secs())
}

#[test]
fn a_slow_http_response_lives_unless_it_is_pipelined_behind_a_quick_one() -> Result<()> {
    let web = WebServer::start(AGENT, limit())?;
    let [port, _] = WebServer::PORTS;
    let daemon = daemon(&web.lab, port, SLOW)?;
    let slow = slow_page();
    let (mut client, own) = web.client("one that waits", "http1", port)?;
    let (mut pipelined, pipelined_own) = web.client("one that pipelines", "http1", port)?;
    client.say(&format!("get {slow}"))?;
    let (asked, ()) = Moment::of(|| {
        pipelined.say("get /app/0.5/100")?;
        pipelined.say(&format!("get {slow}"))?;
        pipelined.wait_for("all of /app/0.5/100")
    })?;
    daemon
        .wait_for_termination_from(pipelined_own)?
        .assert_reset("idle_timeout", &asked, limit());
    assert!(!pipelined.output().contains(&format!("all of {slow}")));
    let (answered, ()) = Moment::of(|| client.wait_for(&format!("all of {slow}")))?;
    assert_idle(&daemon, own, &answered)
}

#[test]
fn a_slow_http_2_call_needs_a_minimum_and_no_quick_calls_beside_it() -> Result<()> {
    let web = WebServer::start(AGENT, limit())?;
    let port = WebServer::HTTP2;
    let daemon = daemon(&web.lab, port, &format!("{SLOW}\nmin_answer = 1024"))?;
    let slow = slow_page();
    let (mut alone, own) = web.client("a slow call", "http2", port)?;
    // Requests at once: the server's SETTINGS frame comes after the request, and must not count as
    // its answer.
    alone.say(&format!("get {slow}"))?;
    let (mut beside, beside_own) = web.client("calls beside each other", "http2", port)?;
    beside.say(&format!("get {slow}"))?;
    let quick = done(&mut beside, "get /app/0.5/3000", "all of /app/0.5/3000")?;
    daemon
        .wait_for_termination_from(beside_own)?
        .assert_reset("idle_timeout", &quick, limit());
    assert!(!beside.output().contains(&format!("all of {slow}")));
    let (answered, ()) = Moment::of(|| alone.wait_for(&format!("all of {slow}")))?;
    assert_idle(&daemon, own, &answered)
}

/// Whether a connection lives longer than the limit if the client pings every half second.
fn lives_by_pings(more: &str) -> Result<bool> {
    let web = WebServer::start(AGENT, limit())?;
    let port = WebServer::HTTP2;
    let daemon = daemon(&web.lab, port, more)?;
    let (mut client, own) = web.client("one that pings", "http2", port)?;
    let asked = done(&mut client, "get /app/0/3000", "all of")?;
    while asked.elapsed() < long() && daemon.terminations()?.is_empty() {
        client.say("ping")?;
        thread::sleep(Duration::from_millis(500));
    }
    if daemon.terminations()?.is_empty() {
        return Ok(true);
    }
    assert!(client.output().contains("pong"));
    assert_idle(&daemon, own, &asked)?;
    Ok(false)
}

#[test]
fn http_2_pings_keep_a_connection_alive_unless_they_are_below_the_minimum() -> Result<()> {
    assert!(lives_by_pings("")?);
    assert!(!lives_by_pings("min_payload = 18")?);
    Ok(())
}

#[test]
fn a_slow_grpc_call_lives_and_keepalives_keep_an_unused_channel_alive() -> Result<()> {
    let server = Scripted::start(AGENT, GRPC, &[])?;
    let daemon = daemon(&server.lab, 50051, &format!("{SLOW}\nmin_answer = 1024"))?;
    let (mut slow, _) = server.client("a slow call", &[])?;
    let (_unused, _) = server.client("an unused channel", &[])?;
    slow.say(&long().as_secs().to_string())?;
    slow.wait_for("answered")?;
    assert_eq!(daemon.terminations()?.len(), 0);
    Ok(())
}

#[test]
fn an_unused_grpc_channel_is_reset_if_its_keepalives_are_below_the_minimum() -> Result<()> {
    let server = Scripted::start(AGENT, GRPC, &[])?;
    let daemon = daemon(&server.lab, 50051, "min_payload = 18")?;
    let (mut client, own) = server.client("an unused channel", &[])?;
    let called = done(&mut client, "0", "answered")?;
    assert_idle(&daemon, own, &called)?;
    // The channel reconnects by itself.
    client.say("0")?;
    client.wait_for_lines(3)?;
    Ok(())
}

#[test]
fn pings_keep_a_websocket_alive_unless_they_are_below_the_minimum() -> Result<()> {
    let server = Scripted::start(AGENT, WEBSOCKET, &[])?;
    let mut daemon = daemon(&server.lab, 8000, "")?;
    let (mut client, _) = server.client("one that pings", &[])?;
    let said = done(&mut client, "a message", "a message")?;
    said.wait(long());
    done(&mut client, "another message", "another message")?;
    assert_eq!(daemon.terminations()?.len(), 0);
    daemon.stop()?;

    let daemon = self::daemon(&server.lab, 8000, "min_payload = 32")?;
    let (mut client, own) = server.client("one that pings in vain", &[])?;
    let long = "a message of more than thirty-two bytes";
    let said = done(&mut client, long, long)?;
    assert_idle(&daemon, own, &said)?;
    client.wait_for("closed")
}

#[test]
fn an_ftp_control_connection_lives_through_a_transfer_only_with_a_minimum() -> Result<()> {
    let seconds = long().as_secs().to_string();
    let server = Scripted::start(AGENT, FTP, &[&seconds])?;
    let mut first = daemon(&server.lab, 21, SLOW)?;
    let (mut client, own) = server.client("a download", &[])?;
    client.wait_for("ConnectionResetError")?;
    assert_eq!(
        first.wait_for_termination_from(own)?.text("event.reason"),
        "idle_timeout"
    );
    first.stop()?;

    // Longer than the transfer.
    let response = 2 * long();
    let more = format!(
        "response_timeout = \"{}s\"\nmin_answer = 1024",
        response.as_secs()
    );
    let daemon = daemon(&server.lab, 21, &more)?;
    let (asked, (mut client, own)) = Moment::of(|| server.client("a download", &[]))?;
    client.wait_for("226 ")?;
    // The replies 150 and 226 together are smaller than `min_answer`, so the request still waits
    // for its answer.
    let record = daemon.wait_for_termination_from(own)?;
    assert_eq!(record.text("event.reason"), "response_timeout");
    assert!(record.time("session_enforcer.deadline") >= asked.earliest.wall + response);
    Ok(())
}

#[test]
fn a_mail_server_that_scans_a_message_owes_an_answer() -> Result<()> {
    let seconds = long().as_secs().to_string();
    let server = Scripted::start(AGENT, SMTP, &[&seconds])?;
    let mut first = daemon(&server.lab, 25, "")?;
    let (mut client, own) = server.client("a mail", &[])?;
    client.wait_for("SMTPServerDisconnected")?;
    assert_eq!(
        first.wait_for_termination_from(own)?.text("event.reason"),
        "idle_timeout"
    );
    first.stop()?;

    let daemon = daemon(&server.lab, 25, SLOW)?;
    let (mut client, own) = server.client("a mail", &[])?;
    let (taken, ()) = Moment::of(|| client.wait_for("taken"))?;
    assert_idle(&daemon, own, &taken)
}

#[test]
fn ldap_has_answers_except_for_abandon_and_synchronisation_is_silent() -> Result<()> {
    let seconds = long().as_secs().to_string();
    let server = Scripted::start(AGENT, LDAP, &[&seconds])?;
    let response = 2 * long();
    let more = format!("response_timeout = \"{}s\"", response.as_secs());
    let daemon = daemon(&server.lab, 389, &more)?;
    let (mut slow, slow_port) = server.client("a slow search", &[])?;
    slow.say("slow")?;
    let (mut abandons, abandons_port) = server.client("one that abandons", &[])?;
    let (mut idle, idle_port) = server.client("one that is idle", &[])?;
    let abandoned = done(&mut abandons, "abandon", "abandoned")?;
    let last = done(&mut idle, "search", "found")?;
    // The daemon also resets the client's separate connection for synchronisation, and the client
    // prints how it ended.
    idle.say("synchronise")?;
    let (answered, ()) = Moment::of(|| slow.wait_for("found"))?;
    assert_idle(&daemon, idle_port, &last)?;
    assert_idle(&daemon, slow_port, &answered)?;
    idle.wait_for_lines(3)?;
    let record = daemon.wait_for_termination_from(abandons_port)?;
    record.assert_due("response_timeout", &abandoned, response);
    assert_eq!(daemon.terminations()?.len(), 4);
    Ok(())
}

/// A viewer under `activity = "received"`, of a screen that changes or not.
fn viewer(changes: &str) -> Result<(Scripted, Daemon, Program, u16)> {
    let server = Scripted::start(AGENT, VNC, &[changes])?;
    let daemon = daemon(&server.lab, 5900, "activity = \"received\"")?;
    let (client, port) = server.client("the viewer", &[])?;
    Ok((server, daemon, client, port))
}

#[test]
fn a_vnc_viewer_of_a_changing_screen_is_active_and_of_a_still_screen_idle() -> Result<()> {
    let (opened, (_server, daemon, mut client, _)) = Moment::of(|| viewer("changes"))?;
    opened.wait(2 * long());
    assert!(client.is_running()?);
    assert_eq!(daemon.terminations()?.len(), 0);
    let (_server, daemon, _viewer, port) = viewer("does not")?;
    let record = daemon.wait_for_termination_from(port)?;
    assert_eq!(record.text("event.reason"), "idle_timeout");
    Ok(())
}

#[test]
fn heartbeats_keep_amqp_alive_unless_they_are_below_the_minimum() -> Result<()> {
    let server = Scripted::start(AGENT, AMQP, &[])?;
    let mut daemon = daemon(&server.lab, 5672, "")?;
    let (mut client, _) = server.client("one with heartbeats", &[])?;
    let said = done(&mut client, "publish", "published")?;
    said.wait(2 * long());
    assert_eq!(daemon.terminations()?.len(), 0);
    done(&mut client, "publish", "published\npublished")?;
    daemon.stop()?;

    let daemon = self::daemon(&server.lab, 5672, "min_payload = 9")?;
    let (mut client, port) = server.client("one with heartbeats", &[])?;
    let said = done(&mut client, "publish", "published")?;
    assert_idle(&daemon, port, &said)?;
    client.wait_for("error: ")
}

#[test]
fn publishing_over_amqp_counts_as_a_request_that_is_never_answered() -> Result<()> {
    let server = Scripted::start(AGENT, AMQP, &[])?;
    let response = 2 * limit();
    let more = format!(
        "response_timeout = \"{}s\"\nmin_payload = 9",
        response.as_secs()
    );
    let daemon = daemon(&server.lab, 5672, &more)?;
    let (mut client, port) = server.client("a publisher", &[])?;
    let said = done(&mut client, "publish", "published")?;
    daemon
        .wait_for_termination_from(port)?
        .assert_due("response_timeout", &said, response);
    Ok(())
}
