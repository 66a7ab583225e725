//! The cookbook's recipes for SSH, as they are shipped but with shorter limits: what people do under them.

use std::{fs, thread, time::Duration};

use anyhow::Result;
use session_enforcer_tests::{
    Daemon, Moment, Recipe, eventually, patience,
    services::{Login, OpenSsh, Program},
    unhurried,
};

const AGENT: &str = env!("CARGO_BIN_EXE_session-enforcer-test-agent");
const TYPING: Duration = Duration::from_millis(500);

/// 15 minutes of the recipes: longer than a log-in takes on a busy machine.
fn fifteen_minutes() -> Duration {
    unhurried(Duration::from_secs(6))
}

/// By how much limits are shorter.
fn shorter() -> Result<u32> {
    Ok((15 * 60 / fifteen_minutes().as_secs()).try_into()?)
}

fn bastion(lifetimes: u32) -> Result<Recipe> {
    let recipe = Recipe::new("ssh-bastion", [shorter()?, lifetimes])?;
    recipe.with("10.20.0.10", OpenSsh::BEHIND)
}

/// A login to which nothing is typed after this, and on which something scrolls by.
fn scrolling(mut login: Login) -> Result<(Moment, Login)> {
    let (typed, ()) = Moment::of(|| {
        let client = &mut login.client;
        client.say("i=0; while sleep 0.2; do i=$((i+1)); echo line-$i:; done")?;
        client.wait_for("line-1:\r\n")
    })?;
    Ok((typed, login))
}

/// Types until so much time has passed since.
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
fn in_the_bastion_recipe_what_people_type_counts_and_what_scrolls_by_does_not() -> Result<()> {
    let openssh = OpenSsh::start(AGENT)?;
    let recipe = bastion(200)?;
    let daemon = openssh.lab.daemon(recipe.text())?;
    let (typed, mut idle) = scrolling(openssh.login("the ssh with a screen", &[])?)?;
    let from_deployment = format!("BindAddress={}", OpenSsh::BEHIND);
    let mut automation = openssh.login("the deployment host", &[&from_deployment])?;
    // The cookbook warns of these.
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
fn in_the_bastion_recipe_nobody_outlives_the_lifetime() -> Result<()> {
    let openssh = OpenSsh::start(AGENT)?;
    // Longer than the time in which the deployment host is idle for too long, were it a person.
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
fn in_the_bastion_recipe_the_way_onward_is_limited_by_what_is_sent_there() -> Result<()> {
    let openssh = OpenSsh::start(AGENT)?;
    let _behind = openssh.start_behind()?;
    let recipe = bastion(200)?;
    let daemon = openssh.lab.daemon(recipe.text())?;
    // Its keepalives keep the way to the bastion open, so that the way onward shows its own limit.
    let first = &["ServerAliveInterval=1"];
    let login = openssh.login_behind("the ssh with a screen", first)?;
    let (typed, mut idle) = scrolling(login)?;
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

/// Sends a byte every 0.3 s to whoever has connected.
const SENDS: &str = "
import socket, sys, time
listener = socket.create_server(('127.0.0.1', int(sys.argv[1])))
print('ready', flush=True)
stream = listener.accept()[0]
while True:
    stream.sendall(b'x')
    time.sleep(0.3)
";

/// Says what it receives, and sends a byte every 0.3 s itself where it is told to.
const CLIENT: &str = "
import socket, sys, time
stream = socket.create_connection(('127.0.0.1', int(sys.argv[1])))
print('connected', flush=True)
while stream.recv(100):
    if sys.argv[2] == 'answers':
        stream.sendall(b'y')
print('ended', flush=True)
";

/// A forwarding by which something comes, and a client that answers or does not; when it had been set up.
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
fn under_received_a_forwarding_lives_while_its_client_sends() -> Result<()> {
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
fn under_received_sftp_lives_in_both_directions_as_its_client_asks_for_each_block() -> Result<()> {
    const BYTES_PER_SECOND: u32 = 50_000;
    let openssh = OpenSsh::start(AGENT)?;
    let recipe = bastion(200)?;
    let daemon = openssh.lab.daemon(recipe.text())?;
    // It takes three limits.
    let length = 3 * recipe.minutes(15).as_secs() * u64::from(BYTES_PER_SECOND);
    let (there, here) = (openssh.home().join("big"), openssh.home().join("here"));
    fs::write(&there, vec![b'x'; length.try_into()?])?;
    let mut download = openssh.sftp("the sftp", BYTES_PER_SECOND)?;
    download.say(&format!("get {} {}", there.display(), here.display()))?;
    eventually("the file is there", 2 * patience(), || {
        assert!(download.is_running()?);
        let got = fs::metadata(&here).map_or(0, |file| file.len());
        Ok((got == length).then_some(()))
    })?;
    assert_eq!(daemon.terminations()?.len(), 0);
    // And then it is idle.
    let record = daemon.wait_for_termination()?;
    assert_eq!(record.text("event.reason"), "idle_timeout");
    assert!(record.bytes()[1] > length);
    Ok(())
}

/// A login on which something scrolls by, under a recipe for a control: it ends so many minutes after what was typed last.
fn assert_holds(openssh: &OpenSsh, [name, rule]: [&str; 2], minutes: u32) -> Result<()> {
    let recipe = Recipe::new(name, [minutes * shorter()? / 15, 200])?;
    let daemon: Daemon = openssh.lab.daemon(recipe.text())?;
    let (typed, mut idle) = scrolling(openssh.login("the ssh with a screen", &[])?)?;
    let record = daemon.wait_for_termination()?;
    record.assert_reset("idle_timeout", &typed, recipe.minutes(minutes));
    assert_eq!(record.text("rule.name"), rule);
    assert_has_ended(&mut idle)
}

#[test]
fn the_recipes_for_controls_end_a_login_to_which_nobody_types() -> Result<()> {
    let openssh = OpenSsh::start(AGENT)?;
    assert_holds(&openssh, ["pci-dss", "ssh"], 15)?;
    assert_holds(&openssh, ["fedramp", "privileged-ports"], 10)?;
    assert_holds(&openssh, ["nist-800-63b", "aal3"], 15)
}

#[test]
fn the_first_configuration_ends_a_login_in_which_nothing_passes_for_30_minutes() -> Result<()> {
    let openssh = OpenSsh::start(AGENT)?;
    let recipe = Recipe::new("config", [2 * shorter()?, 1])?;
    let daemon = openssh.lab.daemon(recipe.text())?;
    let mut idle = openssh.login("the idle ssh", &[])?;
    let (typed, ()) = Moment::of(|| idle.round_trip())?;
    let record = daemon.wait_for_termination()?;
    record.assert_reset("idle_timeout", &typed, recipe.minutes(30));
    assert_eq!(record.text("rule.name"), "ssh");
    assert_has_ended(&mut idle)
}
