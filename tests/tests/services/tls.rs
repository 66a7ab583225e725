//! TLS 1.3: session tickets of the server count as an answer unless `min_answer` is larger.

use std::time::Duration;

use anyhow::Result;
use session_enforcer_tests::{Daemon, Moment, services::TlsServer, unhurried};

const AGENT: &str = env!("CARGO_BIN_EXE_session-enforcer-test-agent");

fn limit() -> Duration {
    unhurried(Duration::from_secs(2))
}

/// A server that answers after two limits, and a daemon.
fn start(more: &str) -> Result<(TlsServer, Daemon)> {
    let server = TlsServer::start(AGENT, 2 * limit())?;
    let (port, limit) = (server.port(), limit().as_secs());
    let daemon = server.lab.daemon(&format!(
        "[[rule]]\nname = \"https\"\ndirection = \"inbound\"\nlocal_ports = [{port}]\n\
         idle_timeout = \"{limit}s\"\nresponse_timeout = \"1h\"\n{more}\n"
    ))?;
    Ok((server, daemon))
}

#[test]
fn session_tickets_count_as_the_answer_to_the_first_request() -> Result<()> {
    let (server, daemon) = start("")?;
    let mut client = server.client()?;
    client.wait_for("ConnectionResetError")?;
    assert!(!client.output().contains("answered"));
    let record = daemon.wait_for_termination()?;
    assert_eq!(record.text("event.reason"), "idle_timeout");
    Ok(())
}

#[test]
fn with_a_minimum_session_tickets_are_no_answer_and_the_slow_answer_arrives() -> Result<()> {
    let (server, daemon) = start("min_answer = 1024")?;
    let mut client = server.client()?;
    let (answered, ()) = Moment::of(|| client.wait_for("answered"))?;
    client.wait_for("ConnectionResetError")?;
    let record = daemon.wait_for_termination()?;
    record.assert_due("idle_timeout", &answered, limit());
    Ok(())
}

/// The tickets then contain the client's certificate.
#[test]
fn session_tickets_for_a_client_with_a_certificate_need_a_larger_minimum() -> Result<()> {
    let (server, daemon) = start("min_answer = 1024")?;
    let mut client = server.client_with_certificate()?;
    client.wait_for("ConnectionResetError")?;
    assert!(!client.output().contains("answered"));
    let record = daemon.wait_for_termination()?;
    assert_eq!(record.text("event.reason"), "idle_timeout");
    drop(daemon);
    drop(server);
    let (server, _daemon) = start("min_answer = 8192")?;
    server.client_with_certificate()?.wait_for("answered")
}
