//! Idle-connection problems that users of other projects reported, reproduced.
//! `session-enforcer/docs/design/reports.md` lists them.

use std::{thread, time::Duration};

use anyhow::Result;
use session_enforcer_tests::{
    Daemon, Lab, Moment, patience,
    services::{OpenSsh, Program, Redis, Scripted, WebServer},
    unhurried,
};

const AGENT: &str = env!("CARGO_BIN_EXE_session-enforcer-test-agent");
const DIRECTORY: &str = include_str!("../../clients/directory.py");
const FTP: &str = include_str!("../../clients/ftp.py");
const GRPC: &str = include_str!("../../clients/rpc.py");
const SUBSCRIBER: &str = include_str!("../../clients/subscriber.py");

/// Longer than a login takes on a busy machine.
fn limit() -> Duration {
    unhurried(Duration::from_secs(5))
}

fn long() -> Duration {
    2 * limit() + Duration::from_secs(1)
}

fn daemon(lab: &Lab, port: u16, more: &str) -> Result<Daemon> {
    let limit = limit().as_secs();
    lab.daemon(&format!(
        "[[rule]]\nname = \"service\"\ndirection = \"inbound\"\nlocal_ports = [{port}]\n\
         idle_timeout = \"{limit}s\"\n{more}\n"
    ))
}

/// openssh/openssh-portable#129, ComplianceAsCode/content#6170, turnkeylinux/common#126: users take
/// sshd's `ClientAliveInterval` for an idle timeout. It is none, because the client answers each
/// probe. The answers also keep a login alive here.
#[test]
fn client_alive_probes_of_sshd_keep_an_idle_login_alive() -> Result<()> {
    let asks = &["ClientAliveInterval=1", "ClientAliveCountMax=2"];
    let openssh = OpenSsh::start_with(AGENT, asks)?;
    let mut without = daemon(&openssh.lab, OpenSsh::PORT, "activity = \"received\"")?;
    let (opened, mut login) = Moment::of(|| openssh.login("the idle ssh", &[]))?;
    opened.wait(long());
    login.round_trip()?;
    assert_eq!(without.terminations()?.len(), 0);
    without.stop()?;

    let limit = limit().as_secs();
    let lifetime = format!("activity = \"received\"\nmax_lifetime = \"{}s\"", 2 * limit);
    let daemon = daemon(&openssh.lab, OpenSsh::PORT, &lifetime)?;
    let (opened, mut login) = Moment::of(|| openssh.login("the idle ssh", &[]))?;
    let record = daemon.wait_for_terminations(1)?;
    // The first login is adopted, with its true age.
    assert!(
        record
            .iter()
            .all(|record| record.text("event.reason") == "max_lifetime")
    );
    opened.wait(2 * self::limit());
    assert_eq!(login.client.finish(patience())?.code(), Some(255));
    Ok(())
}

/// grpc/grpc#11043, grpc/grpc-java#12112, grpc/grpc-java#7851: the first call after an idle time
/// fails with UNAVAILABLE if a middlebox has dropped the connection silently. After a reset, a call
/// fails only if it is made at that moment.
#[test]
fn a_grpc_channel_reconnects_after_one_failure_at_most() -> Result<()> {
    let server = Scripted::start(AGENT, GRPC, &[])?;
    // With this minimum, the keepalives of gRPC do not count.
    let daemon = daemon(&server.lab, 50051, "min_payload = 18")?;
    let (mut client, _) = server.client("a channel", &[])?;
    client.say("0")?;
    client.wait_for("answered\n")?;
    daemon.wait_for_terminations(1)?;
    client.say("0")?;
    client.wait_for_lines(3)?;
    // The channel may not have seen the reset yet.
    let failed = client.output().contains("UNAVAILABLE");
    client.say("0")?;
    client.wait_for_lines(4)?;
    let answered = client.output().matches("answered").count();
    assert_eq!(answered, 3 - usize::from(failed), "{}", client.output());
    Ok(())
}

/// cannatag/ldap3#418, benningm/mtpolicyd#27, authelia/authelia#58: an LDAP connection that the
/// application keeps fails for ever after the server's idle timeout.
#[test]
fn an_ldap3_connection_fails_for_ever_and_a_restartable_one_does_not() -> Result<()> {
    let server = Scripted::start(AGENT, DIRECTORY, &["0"])?;
    let daemon = daemon(&server.lab, 389, "")?;
    let mut said = Vec::new();
    for strategy in ["SYNC", "RESTARTABLE"] {
        let (mut client, _) = server.client(strategy, &[strategy])?;
        let before = daemon.terminations()?.len();
        daemon.wait_for_terminations(before + 1)?;
        for lines in 2..=3 {
            client.say("search")?;
            client.wait_for_lines(lines)?;
        }
        let output = client.output();
        said.push(
            output
                .lines()
                .skip(1)
                .map(str::to_owned)
                .collect::<Vec<_>>(),
        );
    }
    assert!(
        said[0].iter().all(|line| line.starts_with("error: ")),
        "{said:?}"
    );
    assert_eq!(said[1], ["found", "found"]);
    Ok(())
}

/// LuckPerms/LuckPerms#4303, redis/node-redis#197, celery/kombu#2590: an idle subscriber is
/// disconnected and misses messages until it notices. A subscriber that pings lives.
#[test]
fn a_redis_subscriber_misses_messages_unless_it_pings() -> Result<()> {
    let redis = Redis::start(AGENT)?;
    let daemon = daemon(&redis.lab, Redis::PORT, "")?;
    let start = |name: &str, interval: &str| -> Result<Program> {
        let address = Redis::ADDRESS.to_string();
        let mut client = redis.python(name, SUBSCRIBER, &[&address, interval])?;
        client.wait_for("subscribed")?;
        Ok(client)
    };
    let mut pings = start("the subscriber that pings", "1")?;
    let mut silent = start("the silent subscriber", "0")?;
    silent.wait_for("ConnectionError")?;
    redis.ask(&["PUBLISH", "news", "missed"])?;
    pings.wait_for("missed")?;
    silent.wait_for("subscribed again")?;
    redis.ask(&["PUBLISH", "news", "heard"])?;
    silent.wait_for("heard")?;
    pings.wait_for("heard")?;
    assert!(!silent.output().contains("missed"));
    assert_eq!(daemon.terminations()?.len(), 1);
    Ok(())
}

/// patrickjuchli/basic-ftp#16, mscdex/node-ftp#151, lavv17/lftp#423, QuorumDMS/ftp-srv#387: the
/// control connection of FTP is idle during a transfer. Some clients send NOOP meanwhile.
#[test]
fn an_ftp_client_that_sends_noop_during_a_transfer_needs_no_setting() -> Result<()> {
    let seconds = long().as_secs().to_string();
    let server = Scripted::start(AGENT, FTP, &[&seconds])?;
    let daemon = daemon(&server.lab, 21, "")?;
    let (mut client, _) = server.client("a download", &["noop"])?;
    client.wait_for("226 ")?;
    assert_eq!(daemon.terminations()?.len(), 0);
    Ok(())
}

/// openresty/lua-resty-core#65, haproxy/haproxy#1423, jetty/jetty.project#2306: a proxy reuses a
/// backend connection that the backend's idle timeout has closed, and its client gets a 502. A
/// reset tells the proxy before the next request.
#[test]
fn nginx_does_not_use_a_connection_to_its_backend_that_was_reset() -> Result<()> {
    let web = WebServer::start_with_backend_in_cgroup(AGENT, limit())?;
    let daemon = daemon(&web.lab, WebServer::BACKEND, "")?;
    let [port, _] = WebServer::PORTS;
    let (mut client, _) = web.client("a client", "http1", port)?;
    for uses in 1..=3 {
        client.say("post /app/0/10")?;
        client.wait_for_lines(uses + 1)?;
        daemon.wait_for_terminations(uses)?;
        thread::sleep(Duration::from_millis(200));
    }
    assert_eq!(client.output().matches("all of /app/0/10 200").count(), 3);
    Ok(())
}
