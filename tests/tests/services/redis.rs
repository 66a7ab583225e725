//! Redis: a subscriber of an exempt rule may be idle for any time, while other idle clients are
//! reset.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::Result;
use session_enforcer_tests::{Daemon, Moment, services::Redis, unhurried};

const AGENT: &str = env!("CARGO_BIN_EXE_session-enforcer-test-agent");

/// Longer than an answer of the server and a scrape take.
fn limit() -> Duration {
    unhurried(Duration::from_secs(3))
}

fn daemon(redis: &Redis) -> Result<Daemon> {
    redis.lab.daemon(&format!(
        "[[rule]]\nname = \"subscribers\"\nlocal_ports = [{port}]\nremote = [\"{far}/32\"]\n\
         action = \"exempt\"\n\
         [[rule]]\nname = \"redis\"\nlocal_ports = [{port}]\nidle_timeout = \"{limit}s\"\n",
        port = Redis::PORT,
        far = Redis::FAR,
        limit = limit().as_secs(),
    ))
}

/// Asserts that the exempt rule never has a session.
fn assert_exempt(daemon: &Daemon, duration: Duration) -> Result<()> {
    let start = Instant::now();
    loop {
        for name in ["sessions", "sessions_opened_total", "sessions_closed_total"] {
            let name = format!("session_enforcer_{name}");
            assert_eq!(
                daemon.metric(&name, &[("rule", "subscribers")])?,
                0.0,
                "{name}"
            );
        }
        if start.elapsed() >= duration {
            return Ok(());
        }
        thread::sleep(Duration::from_millis(100));
    }
}

#[test]
fn an_exempt_subscriber_gets_its_message_after_an_idle_client_was_reset() -> Result<()> {
    let redis = Redis::start(AGENT)?;
    let daemon = daemon(&redis)?;
    let mut subscriber = redis.far_client("the subscriber", &["SUBSCRIBE", "news"])?;
    subscriber.wait_for("subscribe\nnews\n1\n")?;
    let mut idle = redis.near_client("the idle client")?;
    let (last, ()) = Moment::of(|| {
        idle.say("ECHO here")?;
        idle.wait_for("here")
    })?;
    assert_eq!(daemon.metric("session_enforcer_sessions", &[])?, 1.0);
    assert_exempt(&daemon, 3 * limit())?;

    let record = daemon.wait_for_termination()?;
    record.assert_reset("idle_timeout", &last, limit());
    assert_eq!(record.text("rule.name"), "redis");
    assert_eq!(record.text("source.ip"), Redis::ADDRESS.to_string());
    assert_eq!(record.ports()[1], Redis::PORT);
    idle.say("ECHO again")?;
    idle.wait_for("Error: ")?;
    // The client reconnects, and the subscriber still receives messages.
    idle.say("PUBLISH news hello")?;
    subscriber.wait_for("message\nnews\nhello\n")?;
    assert!(subscriber.is_running()? && !subscriber.output().contains("Error"));
    assert_eq!(
        daemon.metric(
            "session_enforcer_sessions_opened_total",
            &[("rule", "redis")]
        )?,
        2.0
    );
    assert_exempt(&daemon, Duration::ZERO)?;
    for record in daemon.terminations()? {
        assert_ne!(record.text("source.ip"), Redis::FAR.to_string());
    }
    Ok(())
}
