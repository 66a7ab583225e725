//! The metrics server, beside the enforcement.

use std::{
    io::Write as _,
    net::{Ipv4Addr, TcpStream},
    time::Duration,
};

use anyhow::Result;
use nix::errno::Errno;
use session_enforcer_tests::{Lab, Pair};

const AGENT: &str = env!("CARGO_BIN_EXE_session-enforcer-test-agent");
const LIMIT: Duration = Duration::from_secs(1);
const RULE: &str = "[[rule]]\nname = \"idle\"\nidle_timeout = \"1s\"\n";

#[test]
fn health_and_metrics_are_served_and_nothing_else() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let daemon = lab.daemon(RULE)?;
    for path in ["/healthz", "/readyz", "/metrics"] {
        assert_eq!(daemon.get(path)?.0, 200, "{path}");
    }
    assert_eq!(daemon.get("/nothing")?.0, 404);
    let info = daemon.metric("session_enforcer_build_info", &[])?;
    assert_eq!(info, 1.0);
    Ok(())
}

#[test]
fn clients_that_stand_still_stop_neither_the_enforcement_nor_other_clients() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen((Ipv4Addr::LOCALHOST, 0))?;
    let daemon = lab.daemon(RULE)?;
    let mut still = Vec::new();
    for _ in 0..50 {
        let mut stream = TcpStream::connect(daemon.metrics_address())?;
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost")?;
        still.push(stream);
    }
    let pair = Pair::open(&lab.outside, &listener)?;
    pair.ends()?[0].assert_reset(Errno::ECONNRESET, &pair.opened, LIMIT);
    daemon.wait_for_metric("session_enforcer_terminations_total", &[], 1.0)
}
