//! The cookbook's recipes for Redis, Kubernetes, inbound connections and the web, as shipped but
//! with shorter limits.

use std::{net::Shutdown, thread, time::Duration};

use anyhow::{Context as _, Result};
use session_enforcer_tests::{
    Agent, Daemon, Lab, Listener, Moment, Netns, Pair, Place, Recipe, Veth, dial,
    services::{Program, Redis, WebServer, redis_at},
    unhurried,
};

const AGENT: &str = env!("CARGO_BIN_EXE_session-enforcer-test-agent");

/// The factor by which limits are shortened so that `minutes` last `time`.
fn shorter(minutes: u32, time: Duration) -> Result<u32> {
    Ok(minutes * 60 / u32::try_from(unhurried(time).as_secs())?)
}

fn opened(daemon: &Daemon, rule: &str) -> Result<f64> {
    let labels = [("rule", rule)];
    daemon.metric("session_enforcer_sessions_opened_total", &labels)
}

/// The local port of a `redis-cli`, from `CLIENT INFO`.
fn port_of(client: &mut Program) -> Result<u16> {
    client.say("CLIENT INFO")?;
    client.wait_for(" laddr=")?;
    let output = client.output();
    let port = output.split("addr=").nth(1);
    let port = port.and_then(|after| after.split([':', ' ']).nth(1));
    Ok(port.context(output.clone())?.parse()?)
}

#[test]
fn in_the_redis_recipe_blocking_commands_may_wait_and_exempt_subscribers_live() -> Result<()> {
    let redis = Redis::start(AGENT)?;
    let (mut pubsub, _directory) = redis.second(6380)?;
    let recipe = Recipe::new("redis-pubsub", [shorter(10, Duration::from_secs(4))?, 1])?
        .with("10.0.8.0/24", &format!("{}/32", Redis::FAR))?;
    let daemon = redis.lab.daemon(recipe.text())?;
    let [idle, hour] = [10, 60].map(|minutes| recipe.minutes(minutes));
    let exempt = |name, args: &[&str]| -> Result<Program> {
        let mut client = redis.far_client(name, args)?;
        client.wait_for("subscribe\nnews\n1\n")?;
        Ok(client)
    };
    let mut subscriber = exempt("the exempt subscriber", &["SUBSCRIBE", "news"])?;
    let port = ["-p", "6380", "SUBSCRIBE", "news"];
    let mut other = exempt("the subscriber of the other instance", &port)?;
    let near = |name: &str, command: &str, says: &str| {
        let mut client = redis.near_client(name)?;
        let port = port_of(&mut client)?;
        let (last, ()) = Moment::of(|| {
            client.say(command)?;
            if !says.is_empty() {
                return client.wait_for(says);
            }
            redis.wait_for_blocked(1)
        })?;
        anyhow::Ok((client, port, last))
    };
    let (mut endless, endless_port, endless_since) =
        near("the BLPOP without an end", "BLPOP a 0", "")?;
    let (mut silent, silent_port, silent_since) =
        near("the subscriber of nothing", "SUBSCRIBE quiet", "quiet\n1\n")?;
    let (_idle, idle_port, idle_since) = near("the idle client", "ECHO here", "here")?;
    let (mut told, told_port, _) =
        near("the subscriber that is told", "SUBSCRIBE loud", "loud\n1\n")?;
    let mut blocking = redis.near_client("the BLPOP")?;
    let blocking_port = port_of(&mut blocking)?;
    let (blocked, ()) = Moment::of(|| blocking.say("BLPOP b 0"))?;
    while blocked.elapsed() < 2 * idle + Duration::from_secs(1) {
        redis.ask(&["PUBLISH", "loud", "message"])?;
        thread::sleep(Duration::from_millis(500));
    }
    assert!(told.is_running()? && told.output().matches("message").count() > 4);
    redis.ask(&["LPUSH", "b", "element"])?;
    blocking.wait_for("element")?;
    daemon.wait_for_termination_from(silent_port)?.assert_reset(
        "idle_timeout",
        &silent_since,
        idle,
    );
    daemon
        .wait_for_termination_from(idle_port)?
        .assert_reset("idle_timeout", &idle_since, idle);
    for port in [told_port, blocking_port] {
        let record = daemon.wait_for_termination_from(port)?;
        assert_eq!(record.text("event.reason"), "idle_timeout");
        let counted = record.time("session_enforcer.counted_from");
        assert!(counted > blocked.earliest.wall + 2 * idle, "{record:?}");
    }
    let record = daemon.wait_for_termination_from(endless_port)?;
    record.assert_reset("response_timeout", &endless_since, hour);
    assert_eq!(record.text("rule.name"), "clients");
    silent.wait_for("Error")?;
    endless.wait_for("Error")?;
    for rule in ["subscribers", "pubsub"] {
        assert_eq!(opened(&daemon, rule)?, 0.0, "{rule}");
    }
    redis.ask(&["PUBLISH", "news", "after all"])?;
    subscriber.wait_for("after all")?;
    assert!(pubsub.is_running()? && other.is_running()?);
    Ok(())
}

/// Opens a connection from `client` to this address.
fn pair(client: &Agent, listener: &Listener, to: (std::net::IpAddr, u16)) -> Result<Pair> {
    Pair::dial(client.tcp(to.into())?, listener, to.into())
}

#[test]
fn in_the_kubernetes_recipe_pods_have_limits_and_the_node_has_none() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let (pods, node) = (lab.cgroup.child()?, lab.cgroup.child()?);
    let (pod, other) = (Netns::new()?, Netns::new()?);
    Veth::between(&pod, &other)?;
    let in_cluster = "10.77.0.3".parse()?;
    other.ip(&format!("addr add {in_cluster}/24 dev {}", Veth::INTERFACE))?;
    let quoted = |name: &str| format!("\"{name}\"");
    let lifetime = unhurried(Duration::from_secs(12));
    let lifetimes = u32::try_from(24 * 3_600 / lifetime.as_secs())?;
    let shorter = shorter(30, Duration::from_secs(4))?;
    let recipe = Recipe::new("kubernetes-node", [shorter, lifetimes])?
        .with(&quoted("/kubepods.slice"), &quoted(&pods.name()?))?
        .with(&quoted("/system.slice"), &quoted(&node.name()?))?
        .with("10.244.0.0/16", &format!("{in_cluster}/32"))?;
    let place = |cgroup| Place::here().in_cgroup(cgroup).in_netns(&pod);
    let (left, right) = (Veth::LEFT, Veth::RIGHT);
    let (_redis, _directory) = redis_at(&lab, &place(&pods), left, 6379)?;
    let local = "127.0.0.1".parse()?;
    let (_of_node, _its_directory) = redis_at(&lab, &place(&node), local, 6379)?;
    let daemon = lab.daemon(recipe.text())?;

    // Connections to the databases.
    let outside = lab.outside_in(&other)?;
    let ask = |agent: &Agent, address| -> Result<(std::net::TcpStream, Moment)> {
        use std::io::{Read as _, Write as _};
        let to = std::net::SocketAddr::new(address, 6379);
        let mut stream = dial(agent.tcp(to)?, to)?;
        let (last, ()) = Moment::of(|| {
            stream.write_all(b"PING\r\n")?;
            stream.read_exact(&mut [0; 7])?;
            Ok(())
        })?;
        Ok((stream, last))
    };
    let (idle, last) = ask(&outside, left)?;
    let (of_node, _) = ask(&lab.outside_in(&pod)?, local)?;
    // Connections from a pod to the outside, to another pod, and to the API server.
    let from_pod = lab.at(&place(&pods))?;
    let listener = outside.listen((right, 8000))?;
    let quiet = pair(&from_pod, &listener, (right, 8000))?;
    let asked = quiet.round_trip()?;
    let busy = pair(&from_pod, &listener, (right, 8000))?;
    let inner_listener = outside.listen((in_cluster, 8000))?;
    let inner = pair(&from_pod, &inner_listener, (in_cluster, 8000))?;
    let api_listener = outside.listen((right, 6443))?;
    let api = pair(&from_pod, &api_listener, (right, 6443))?;

    busy.keep_busy_until_end()?;
    let record = daemon.wait_for_termination_from(idle.local_addr()?.port())?;
    record.assert_reset("idle_timeout", &last, recipe.minutes(30));
    assert_eq!(record.text("rule.name"), "pod-databases");
    let record = daemon.wait_for_termination_of(&quiet)?;
    record.assert_reset("idle_timeout", &asked, recipe.minutes(60));
    assert_eq!(record.text("rule.name"), "pod-egress");
    let record = daemon.wait_for_termination_of(&busy)?;
    assert_eq!(record.text("event.reason"), "max_lifetime");
    let limit = record.number("session_enforcer.limit_seconds");
    assert!(limit >= lifetime.as_secs_f64() * 0.9 && limit <= lifetime.as_secs_f64());

    for pair in [&inner, &api] {
        pair.round_trip()?;
    }
    drop(of_node);
    for rule in ["node-services", "cluster-internal", "control-plane-out"] {
        assert_eq!(opened(&daemon, rule)?, 0.0, "{rule}");
    }
    assert_eq!(daemon.terminations()?.len(), 3);
    Ok(())
}

/// A server with a peer that the recipe exempts and another client.
struct Inbound {
    recipe: Recipe,
    daemon: Daemon,
    server: Agent,
    /// A client with the server's own address.
    client: Agent,
    peer: Agent,
    _lab: Lab,
    _hosts: [Netns; 2],
}

fn everything_inbound(lifetimes: u32) -> Result<Inbound> {
    let lab = Lab::new(AGENT)?;
    let hosts = [Netns::new()?, Netns::new()?];
    let [near, far] = &hosts;
    Veth::between(near, far)?;
    let shorter = shorter(60, Duration::from_secs(12))?;
    let recipe = Recipe::new("everything-inbound", [shorter, lifetimes])?;
    let recipe = recipe.with("10.0.0.0/28", &format!("{}/32", Veth::RIGHT))?;
    Ok(Inbound {
        daemon: lab.daemon(recipe.text())?,
        recipe,
        server: lab.inside_in(near)?,
        client: lab.outside_in(near)?,
        peer: lab.outside_in(far)?,
        _lab: lab,
        _hosts: hosts,
    })
}

#[test]
fn in_the_everything_inbound_recipe_all_but_the_exempt_have_four_limits() -> Result<()> {
    // Less than a busy connection is waited for.
    let lifetime = unhurried(Duration::from_secs(16));
    let inbound = everything_inbound(u32::try_from(7 * 24 * 3_600 / lifetime.as_secs())?)?;
    let Inbound { recipe, daemon, .. } = &inbound;
    let address = Veth::LEFT;
    let open = |client: &Agent, address: std::net::IpAddr, port| {
        let listener = inbound.server.listen((address, port))?;
        pair(client, &listener, (address, listener.port()))
    };
    let exempt = [
        open(&inbound.client, "127.0.0.1".parse()?, 0)?,
        open(&inbound.peer, address, 0)?,
        open(&inbound.client, address, 2049)?,
    ];
    let idle = open(&inbound.client, address, 0)?;
    let half_closed = open(&inbound.client, address, 0)?;
    let busy = open(&inbound.client, address, 0)?;
    let last = idle.round_trip()?;
    half_closed.round_trip()?;
    let (closed, ()) = Moment::of(|| Ok(half_closed.client.shutdown(Shutdown::Write)?))?;
    busy.keep_busy_until_end()?;

    let record = |pair| daemon.wait_for_termination_of(pair);
    record(&half_closed)?.assert_reset("half_closed_timeout", &closed, recipe.minutes(5));
    record(&idle)?.assert_reset("idle_timeout", &last, recipe.minutes(60));
    let record = record(&busy)?;
    assert_eq!(record.text("event.reason"), "max_lifetime");
    // The jitter: 5.6 to 7 days in the recipe.
    let limit = record.number("session_enforcer.limit_seconds");
    assert!(limit >= lifetime.as_secs_f64() * 0.8 && limit <= lifetime.as_secs_f64());
    for pair in &exempt {
        pair.round_trip()?;
    }
    assert_eq!(daemon.terminations()?.len(), 3);
    Ok(())
}

#[test]
fn in_the_everything_inbound_recipe_an_answer_may_take_four_hours() -> Result<()> {
    let inbound = everything_inbound(1)?;
    let listener = inbound.server.listen((Veth::LEFT, 0))?;
    let owed = pair(&inbound.client, &listener, (Veth::LEFT, listener.port()))?;
    let asked = owed.to_server(b"request")?;
    asked.wait(inbound.recipe.minutes(4 * 60 - 5));
    let record = inbound.daemon.wait_for_termination_of(&owed)?;
    record.assert_reset("response_timeout", &asked, inbound.recipe.minutes(4 * 60));
    Ok(())
}

#[test]
fn in_the_fedramp_recipe_for_the_web_only_payload_from_users_counts() -> Result<()> {
    let fifteen_minutes = Duration::from_secs(6);
    let web = WebServer::start(AGENT, 3 * unhurried(fifteen_minutes))?;
    let recipe = Recipe::new("fedramp", [shorter(15, fifteen_minutes)?, 1])?;
    let daemon = web.lab.daemon(recipe.text())?;
    let [users, console] = WebServer::PORTS;
    let ask = |name: &str, port, path: &str, says: &str| {
        let (mut client, own) = web.client(name, "http1", port)?;
        let (last, ()) = Moment::of(|| {
            client.say(&format!("get {path}"))?;
            client.wait_for(says)
        })?;
        anyhow::Ok((client, own, last))
    };
    let (mut download, download_port, download_last) =
        ask("a download", users, WebServer::FILE, "some of")?;
    let (_events, events_port, events_last) = ask("events", users, "/app/events", "some of")?;
    let (_console, console_port, console_last) = ask("a console", console, "/app/0/10", "all of")?;
    let (mut user, _, opened) = ask("a user", users, "/app/0/10", "all of")?;
    let (mut slow, slow_port) = web.client("a slow page", "http1", users)?;
    let (slow_last, ()) = Moment::of(|| slow.say("get /app/60/10"))?;
    for uses in 1.. {
        if opened.elapsed() > 2 * recipe.minutes(15) {
            break;
        }
        thread::sleep(Duration::from_millis(500));
        user.say("get /app/0/10")?;
        user.wait_for_lines(uses + 2)?;
    }
    assert!(!user.output().contains("Error"));
    for (rule, port, last, minutes) in [
        ("privileged-ports", console_port, &console_last, 10),
        ("users-web", download_port, &download_last, 15),
        ("users-web", events_port, &events_last, 15),
        ("users-web", slow_port, &slow_last, 15),
    ] {
        let record = daemon.wait_for_termination_from(port)?;
        record.assert_reset("idle_timeout", last, recipe.minutes(minutes));
        assert_eq!(record.text("rule.name"), rule);
    }
    download.wait_for("ConnectionResetError")?;
    assert!(!download.output().contains("all of"));
    // `docs/clients.md` quotes this line of the log.
    let abort = "recv() failed (103: Software caused connection abort) while keepalive";
    assert!(web.log().contains(abort), "{}", web.log());
    assert_eq!(daemon.terminations()?.len(), 4);
    Ok(())
}
