//! The cookbook's recipes for SSH, as shipped but with shorter limits.

use std::{fs, thread, time::Duration};

use anyhow::Result;
use session_enforcer_tests::{
    Daemon, Moment, Recipe, eventually, patience,
    services::{Login, OpenSsh, Program},
    unhurried,
};

const AGENT: &str = env!("CARGO_BIN_EXE_session-enforcer-test-agent");
const TYPING: Duration = Duration::from_millis(500);

/// What 15 minutes of the recipes last here: longer than a login takes on a busy machine.
fn fifteen_minutes() -> Duration {
    unhurried(Duration::from_secs(6))
}

/// The factor by which limits are shortened.
fn shorter() -> Result<u32> {
    Ok((15 * 60 / fifteen_minutes().as_secs()).try_into()?)
}

fn bastion(lifetimes: u32) -> Result<Recipe> {
    let recipe = Recipe::new("ssh-bastion", [shorter()?, lifetimes])?;
    recipe.with("10.20.0.10", OpenSsh::BEHIND)
}

/// Starts a command with constant output in a login. Nothing is typed afterwards.
fn login_with_output(mut login: Login) -> Result<(Moment, Login)> {
    let (typed, ()) = Moment::of(|| {
        let client = &mut login.client;
        client.say("i=0; while sleep 0.2; do i=$((i+1)); echo line-$i:; done")?;
        client.wait_for("line-1:\r\n")
    })?;
    Ok((typed, login))
}

/// Types until `duration` has passed since `since`.
fn type_for(login: &mut Login, since: &Moment, duration: Duration) -> Result<()> {
    while since.elapsed() < duration {
        login.round_trip()?;
        thread::sleep(TYPING);
    }
    Ok(())
}

fn assert_has_ended(login: &mut Login) -> Result<()> {
    assert_eq!(login.client.finish(patience())?.code(), Some(255));
    Ok(())
}

#[test]
fn in_the_bastion_recipe_typing_counts_and_output_does_not() -> Result<()> {
    let openssh = OpenSsh::start(AGENT)?;
    let recipe = bastion(200)?;
    let daemon = openssh.lab.daemon(recipe.text())?;
    let (typed, mut idle) = login_with_output(openssh.login("the ssh with a screen", &[])?)?;
    let from_deployment = format!("BindAddress={}", OpenSsh::BEHIND);
    let mut automation = openssh.login("the deployment host", &[&from_deployment])?;
    // The cookbook warns that keepalives and large output count as received payload.
    let keepalives = &["ServerAliveInterval=1"];
    let (opened, mut kept) = Moment::of(|| openssh.login("the ssh with keepalives", keepalives))?;
    let mut flooded = openssh.login("the ssh with much output", &[])?;
    flooded.client = flooded.client.quiet();
    let flood = "while sleep 0.2; do head -c 50000 /dev/zero; done";
    flooded.client.say(flood)?;
    let mut typing = openssh.login("the ssh that types", &[])?;
    type_for(&mut typing, &opened, 2 * recipe.minutes(15) + TYPING)?;

    let record = daemon.wait_for_termination()?;
    record.assert_reset("idle_timeout", &typed, recipe.minutes(15));
    assert_eq!(record.text("rule.name"), "logins");
    assert_eq!(record.ports()[0], idle.port);
    assert!(flooded.client.is_running()?);
    assert_has_ended(&mut idle)?;
    for login in [&mut automation, &mut kept, &mut typing] {
        login.round_trip()?;
    }
    assert_eq!(daemon.terminations()?.len(), 1);
    Ok(())
}

#[test]
fn in_the_bastion_recipe_no_login_outlives_the_lifetime() -> Result<()> {
    let openssh = OpenSsh::start(AGENT)?;
    // Longer than the 15 minutes after which the deployment host would be idle under the rule for
    // people.
    let recipe = bastion(12 * 60 * 60 / unhurried(Duration::from_secs(7)).as_secs() as u32)?;
    let daemon = openssh.lab.daemon(recipe.text())?;
    let from_deployment = format!("BindAddress={}", OpenSsh::BEHIND);
    let (begun, mut automation) =
        Moment::of(|| openssh.login("the deployment host", &[&from_deployment]))?;
    let (opened, mut typing) = Moment::of(|| openssh.login("the ssh that types", &[]))?;
    eventually("the end of the login that types", patience(), || {
        let ended = typing.round_trip().is_err();
        thread::sleep(TYPING);
        Ok(ended.then_some(()))
    })?;
    assert_has_ended(&mut typing)?;
    assert_has_ended(&mut automation)?;
    let records = daemon.wait_for_terminations(2)?;
    records[0].assert_reset("max_lifetime", &opened, recipe.lifetime(12));
    assert_eq!(records[0].text("rule.name"), "logins");
    records[1].assert_reset("max_lifetime", &begun, recipe.lifetime(24));
    assert_eq!(records[1].text("rule.name"), "automation");
    Ok(())
}

#[test]
fn in_the_bastion_recipe_onward_connections_are_limited_by_what_is_sent_through_them() -> Result<()>
{
    let openssh = OpenSsh::start(AGENT)?;
    let _behind = openssh.start_behind()?;
    let recipe = bastion(200)?;
    let daemon = openssh.lab.daemon(recipe.text())?;
    // Keepalives keep the connection to the bastion alive, so that only the onward connection
    // reaches its limit.
    let first = &["ServerAliveInterval=1"];
    let login = openssh.login_behind("the ssh with a screen", first)?;
    let (typed, mut idle) = login_with_output(login)?;
    let (opened, mut typing) = Moment::of(|| openssh.login_behind("the ssh that types", &[]))?;
    type_for(&mut typing, &opened, 2 * recipe.minutes(15) + TYPING)?;

    let record = daemon.wait_for_termination()?;
    record.assert_reset("idle_timeout", &typed, recipe.minutes(15));
    assert_eq!(record.text("rule.name"), "onward");
    assert_eq!(record.text("network.direction"), "outbound");
    assert_eq!(record.text("destination.ip"), OpenSsh::BEHIND);
    assert_has_ended(&mut idle)?;
    typing.round_trip()
}

/// Server: sends a byte every 0.3 s.
const SENDS: &str = "
import socket, sys, time
listener = socket.create_server(('127.0.0.1', int(sys.argv[1])))
print('ready', flush=True)
stream = listener.accept()[0]
while True:
    stream.sendall(b'x')
    time.sleep(0.3)
";

/// Client: reads, and replies if its second argument is `answers`.
const CLIENT: &str = "
import socket, sys, time
stream = socket.create_connection(('127.0.0.1', int(sys.argv[1])))
print('connected', flush=True)
while stream.recv(100):
    if sys.argv[2] == 'answers':
        stream.sendall(b'y')
print('ended', flush=True)
";

/// A forwarding through which a server sends, with a client that replies or only reads.
fn forwarding(openssh: &OpenSsh, ports: [u16; 2], how: &str) -> Result<[Program; 3]> {
    let [port, to] = ports.map(|port| port.to_string());
    let mut server = openssh.python("the server", SENDS, &[&to])?;
    server.wait_for("ready")?;
    let tunnel = openssh.forward("the ssh with a forwarding", ports)?;
    let mut client = openssh.python("the client", CLIENT, &[&port, how])?;
    client.wait_for("connected")?;
    Ok([server, tunnel, client])
}

#[test]
fn with_activity_received_a_forwarding_lives_while_its_client_sends() -> Result<()> {
    let openssh = OpenSsh::start(AGENT)?;
    let recipe = bastion(200)?;
    let daemon = openssh.lab.daemon(recipe.text())?;
    let (opened, [_first, mut pushed_to, mut silent]) =
        Moment::of(|| forwarding(&openssh, [4001, 4002], "is silent"))?;
    let [_second, mut used, mut answering] = forwarding(&openssh, [4003, 4004], "answers")?;
    let record = daemon.wait_for_termination()?;
    assert_eq!(record.text("event.reason"), "idle_timeout");
    assert_eq!(record.text("rule.name"), "logins");
    silent.wait_for("ended")?;
    assert_eq!(pushed_to.finish(patience())?.code(), Some(255));
    opened.wait(3 * recipe.minutes(15));
    assert!(used.is_running()? && answering.is_running()?);
    assert_eq!(daemon.terminations()?.len(), 1);
    Ok(())
}

#[test]
fn with_activity_received_an_sftp_download_lives_as_its_client_requests_each_block() -> Result<()> {
    const BYTES_PER_SECOND: u32 = 50_000;
    let openssh = OpenSsh::start(AGENT)?;
    let recipe = bastion(200)?;
    let daemon = openssh.lab.daemon(recipe.text())?;
    // The download takes three limits.
    let length = 3 * recipe.minutes(15).as_secs() * u64::from(BYTES_PER_SECOND);
    let (there, here) = (openssh.home().join("big"), openssh.home().join("here"));
    fs::write(&there, vec![b'x'; length.try_into()?])?;
    let mut download = openssh.sftp("the sftp", BYTES_PER_SECOND)?;
    download.say(&format!("get {} {}", there.display(), here.display()))?;
    eventually("the whole file", 2 * patience(), || {
        assert!(download.is_running()?);
        let got = fs::metadata(&here).map_or(0, |file| file.len());
        Ok((got == length).then_some(()))
    })?;
    assert_eq!(daemon.terminations()?.len(), 0);
    // After the download the session is idle.
    let record = daemon.wait_for_termination()?;
    assert_eq!(record.text("event.reason"), "idle_timeout");
    assert!(record.bytes()[1] > length);
    Ok(())
}

/// Asserts that a login with output, to which nobody types, is reset after `minutes` under the
/// recipe.
fn assert_holds(openssh: &OpenSsh, [name, rule]: [&str; 2], minutes: u32) -> Result<()> {
    let recipe = Recipe::new(name, [minutes * shorter()? / 15, 200])?;
    let daemon: Daemon = openssh.lab.daemon(recipe.text())?;
    let (typed, mut idle) = login_with_output(openssh.login("the ssh with a screen", &[])?)?;
    let record = daemon.wait_for_termination()?;
    record.assert_reset("idle_timeout", &typed, recipe.minutes(minutes));
    assert_eq!(record.text("rule.name"), rule);
    assert_has_ended(&mut idle)
}

#[test]
fn the_compliance_recipes_reset_a_login_in_which_nobody_types() -> Result<()> {
    let openssh = OpenSsh::start(AGENT)?;
    assert_holds(&openssh, ["pci-dss", "ssh"], 15)?;
    assert_holds(&openssh, ["fedramp", "privileged-ports"], 10)?;
    assert_holds(&openssh, ["nist-800-63b", "aal3"], 15)
}

#[test]
fn the_first_configuration_resets_a_login_in_which_nobody_types() -> Result<()> {
    let openssh = OpenSsh::start(AGENT)?;
    let recipe = Recipe::new("config", [shorter()?, 1])?;
    let daemon = openssh.lab.daemon(recipe.text())?;
    let (typed, mut idle) = login_with_output(openssh.login("the idle ssh", &[])?)?;
    let record = daemon.wait_for_termination()?;
    record.assert_reset("idle_timeout", &typed, recipe.minutes(15));
    assert_eq!(record.text("rule.name"), "ssh");
    assert_has_ended(&mut idle)
}
