//! The Debian package and the tarball, installed in a machine with systemd. `cargo xtask dist
//! --test` runs these tests.

use std::{thread, time::Duration};

use anyhow::{Context as _, Result, ensure};
use session_enforcer_tests::{Finished, Machine, eventually, patience};

/// Installs the package, or reinstalls the same version.
const INSTALL: &str = "dpkg -i /root/session-enforcer.deb";

const CONFIG: &str = "/etc/session-enforcer/config.toml";
const UNIT: &str = "session-enforcer.service";

/// An OpenSSH login in which nobody types.
const LOGIN: &str = "ssh -o BatchMode=yes -o StrictHostKeyChecking=accept-new root@127.0.0.1 \
                     'echo in; exec sleep 600'";

/// A machine with the installed package, a running service and working logins.
struct Host(Machine);

impl Host {
    fn new() -> Result<Self> {
        let host = Self(with_package()?);
        host.0.ask(INSTALL)?;
        host.0.ask(&format!("systemctl enable --now {UNIT}"))?;
        host.0.ask(
            "mkdir -p /root/.ssh && ssh-keygen -q -t ed25519 -N '' -f /root/.ssh/id_ed25519 && \
             cp /root/.ssh/id_ed25519.pub /root/.ssh/authorized_keys",
        )?;
        Ok(host)
    }

    /// A host with one rule that resets idle logins.
    fn enforcing(idle_seconds: u32) -> Result<Self> {
        let host = Self::new()?;
        host.configure(&rule(idle_seconds))?;
        host.0.ask(&format!("systemctl reload {UNIT}"))?;
        Ok(host)
    }

    fn configure(&self, text: &str) -> Result<()> {
        self.0.write(CONFIG, text)
    }

    fn property(&self, name: &str) -> Result<String> {
        self.0
            .ask(&format!("systemctl show --property={name} --value {UNIT}"))
    }

    /// Waits until a property of the service has this value.
    fn wait_for(&self, name: &str, value: &str) -> Result<()> {
        let what = format!("{name} is {value}");
        eventually(&what, patience(), || {
            Ok((self.property(name)? == value).then_some(()))
        })
    }

    /// The value of a metric without labels.
    fn metric(&self, name: &str) -> Result<f64> {
        let text = self
            .0
            .ask("curl --silent --fail http://127.0.0.1:9847/metrics")?;
        let line = text
            .lines()
            .find(|line| line.split(' ').next() == Some(name));
        let value = line.and_then(|line| line.split(' ').nth(1));
        Ok(value
            .with_context(|| format!("no {name} in {text}"))?
            .parse()?)
    }

    /// The line of the journal that matches, once it appears.
    fn journal(&self, pattern: &str) -> Result<String> {
        let what = format!("the journal has {pattern}");
        let line = format!("journalctl --unit={UNIT} --output=cat | grep '{pattern}'");
        eventually(&what, patience(), || {
            let found = self.0.run(&line)?;
            Ok((found.code == 0).then(|| found.stdout.trim_end().to_owned()))
        })
    }

    fn assert_login_is_reset(&self) -> Result<()> {
        assert_reset(&self.0.run(LOGIN)?)
    }
}

/// A machine with the package file, not installed.
fn with_package() -> Result<Machine> {
    let machine = Machine::boot()?;
    machine.put("SESSION_ENFORCER_DEB", "/root/session-enforcer.deb")?;
    Ok(machine)
}

fn rule(idle_seconds: u32) -> String {
    format!(
        "[[rule]]\nname = \"ssh\"\ndirection = \"inbound\"\nlocal_ports = [22]\n\
         idle_timeout = \"{idle_seconds}s\"\n"
    )
}

/// The client's message for a reset depends on its release.
fn assert_reset(login: &Finished) -> Result<()> {
    let words = ["Connection reset by peer", "Broken pipe"];
    let is_told = words.iter().any(|word| login.stderr.contains(word));
    ensure!(
        (login.code, login.stdout.as_str()) == (255, "in\n") && is_told,
        "the login was not reset: {login:?}"
    );
    Ok(())
}

#[test]
fn two_commands_start_the_enforcement_and_the_journal_has_the_record() -> Result<()> {
    let machine = with_package()?;
    machine.ask(INSTALL)?;
    let idle = machine.run(&format!("systemctl is-active {UNIT}"))?;
    assert_eq!(
        idle.stdout.trim(),
        "inactive",
        "the installation has started the service"
    );
    drop(machine);

    let host = Host::new()?;
    assert_eq!(host.property("ActiveState")?, "active");
    host.0
        .ask("curl --silent --fail http://127.0.0.1:9847/readyz")?;
    let status = host.property("StatusText")?;
    assert!(status.starts_with("observing 1 rule(s), "), "{status}");
    let user = host
        .0
        .ask("ps -o user:32= -p $(systemctl show -P MainPID session-enforcer)")?;
    assert_eq!(user, "session-enforcer");
    host.0
        .ask(&format!("systemd-analyze security --threshold=35 {UNIT}"))?;

    host.configure(&rule(2))?;
    host.0.ask(&format!("systemctl reload {UNIT}"))?;
    host.assert_login_is_reset()?;
    let record = host.journal("session-terminated")?;
    let record: serde_json::Value = serde_json::from_str(&record)?;
    assert_eq!(record["event"]["reason"], "idle_timeout");
    assert_eq!(record["rule"]["name"], "ssh");
    Ok(())
}

#[test]
fn journalctl_finds_a_record_by_its_fields_and_explains_it() -> Result<()> {
    let host = Host::new()?;
    host.configure(&format!("[audit]\npath = \"journald\"\n{}", rule(2)))?;
    host.0.ask(&format!("systemctl restart {UNIT}"))?;
    host.assert_login_is_reset()?;
    let ask = format!("journalctl --unit={UNIT} SESSION_ENFORCER_RULE=ssh");
    let entry = eventually("an entry of the rule", patience(), || {
        let found = host.0.ask(&format!("{ask} --output=json"))?;
        Ok((!found.is_empty()).then_some(found))
    })?;
    let entry: serde_json::Value = serde_json::from_str(&entry)?;
    for (name, value) in [
        ("_SYSTEMD_UNIT", UNIT),
        ("SESSION_ENFORCER_EVENT_REASON", "idle_timeout"),
        ("SESSION_ENFORCER_RESULT", "reset"),
        ("SESSION_ENFORCER_DESTINATION_PORT", "22"),
    ] {
        assert_eq!(entry[name], value, "{name} in {entry:#}");
    }
    let explained = host.0.ask(&format!("{ask} --catalog"))?;
    let words = [
        "A connection reached its limit and was ended",
        "to 127.0.0.1 port 22 reached a limit",
        "\"ssh\": idle_timeout.",
    ];
    for words in words {
        ensure!(explained.contains(words), "{words:?} in {explained}");
    }
    Ok(())
}

#[test]
fn an_invalid_file_fails_the_reload_and_a_restart_uses_the_last_valid_one() -> Result<()> {
    let host = Host::enforcing(2)?;
    let before = host.property("MainPID")?;
    host.configure("[[rule]]\nname = \"ssh\"\nidle_timeout = \"never\"\n")?;
    let reload = host.0.run(&format!("systemctl reload {UNIT}"))?;
    assert_ne!(reload.code, 0);
    assert_eq!(host.property("ActiveState")?, "active");
    assert_eq!(host.property("MainPID")?, before);
    host.journal("config.toml:3:.*idle_timeout")?;
    host.assert_login_is_reset()?;

    let loaded = "session_enforcer_config_last_reload_successful";
    let unknown_user = format!("{}users = [\"no such user\"]\n", rule(2));
    for wrong in ["[[rule]]\n", &unknown_user] {
        host.configure(wrong)?;
        host.0.ask(&format!("systemctl restart {UNIT}"))?;
        assert_ne!(host.property("MainPID")?, before);
        assert_eq!(host.metric(loaded)?, 0.0);
        let status = host.property("StatusText")?;
        assert!(
            status.contains("the configuration file is refused"),
            "{status}"
        );
        host.assert_login_is_reset()?;
    }

    host.configure(&rule(2))?;
    host.0.ask(&format!("systemctl reload {UNIT}"))?;
    eventually("the reload of the file", patience(), || {
        Ok((host.metric(loaded)? == 1.0).then_some(()))
    })
}

#[test]
fn a_daemon_that_is_killed_or_stalls_is_restarted() -> Result<()> {
    let host = Host::enforcing(2)?;
    host.0
        .ask("kill -KILL $(systemctl show -P MainPID session-enforcer)")?;
    host.wait_for("NRestarts", "1")?;
    host.wait_for("ActiveState", "active")?;
    host.assert_login_is_reset()?;

    // The unit itself has 30 s.
    let folder = format!("/run/systemd/system/{UNIT}.d");
    host.0.ask(&format!("mkdir -p {folder}"))?;
    host.0.write(
        &format!("{folder}/watchdog.conf"),
        "[Service]\nWatchdogSec=3s\n",
    )?;
    host.0.ask(&format!(
        "systemctl daemon-reload && systemctl restart {UNIT}"
    ))?;
    // Three watchdog periods: a running daemon is not killed.
    thread::sleep(Duration::from_secs(9));
    assert_eq!(host.property("NRestarts")?, "0");
    host.0
        .ask("kill -STOP $(systemctl show -P MainPID session-enforcer)")?;
    host.wait_for("NRestarts", "1")?;
    host.wait_for("ActiveState", "active")?;
    host.journal("Watchdog timeout")?;
    host.assert_login_is_reset()
}

#[test]
fn an_upgrade_takes_the_sessions_over() -> Result<()> {
    const LIMIT: u32 = 8;
    let host = Host::enforcing(LIMIT)?;
    let login = thread::scope(|scope| {
        let login = scope.spawn(|| host.0.run(LOGIN));
        let upgraded = (|| -> Result<()> {
            eventually("the session of the login", patience(), || {
                let sessions = host.metric("session_enforcer_sessions{rule=\"ssh\"}")?;
                Ok((sessions == 1.0).then_some(()))
            })?;
            let before = host.property("MainPID")?;
            host.0.ask(INSTALL)?;
            assert_ne!(host.property("MainPID")?, before);
            assert_eq!(
                host.metric("session_enforcer_sessions_taken_over_total")?,
                1.0
            );
            Ok(())
        })();
        let login = login.join().expect("the thread of the login panicked");
        upgraded.and(login)
    })?;
    assert_reset(&login)?;
    let record = host.journal("session-terminated")?;
    let record: serde_json::Value = serde_json::from_str(&record)?;
    // The clock began before the upgrade: after a restart of the clock, the idle time in the record
    // would be shorter.
    let idle = record["session_enforcer"]["idle_seconds"].as_f64();
    assert!(
        idle.is_some_and(|idle| idle >= f64::from(LIMIT)),
        "{record}"
    );
    Ok(())
}

#[test]
fn logrotate_moves_the_audit_file_and_the_daemon_opens_a_new_one() -> Result<()> {
    const FILE: &str = "/var/log/session-enforcer/audit.jsonl";
    let host = Host::new()?;
    host.configure(&format!("[audit]\npath = \"{FILE}\"\n{}", rule(2)))?;
    // Run as root, while the files belong to the service's user.
    host.0.ask("session-enforcer check")?;
    host.0.ask(&format!("systemctl restart {UNIT}"))?;
    host.assert_login_is_reset()?;
    let lines = || {
        let count = format!("grep -c session-terminated {FILE} {FILE}.1");
        Ok::<_, anyhow::Error>(host.0.run(&count)?.stdout)
    };
    host.0
        .ask("logrotate --force /etc/logrotate.d/session-enforcer")?;
    host.assert_login_is_reset()?;
    eventually("a record in each file", patience(), || {
        Ok((lines()? == format!("{FILE}:1\n{FILE}.1:1\n")).then_some(()))
    })?;
    let owner = host.0.ask(&format!("stat --format='%U %a' {FILE}"))?;
    assert_eq!(owner, "session-enforcer 640");
    Ok(())
}

#[test]
fn a_purge_leaves_nothing() -> Result<()> {
    let list = "find / -xdev -not -path '/proc/*' -not -path '/root/*' -not -path '/var/log/journal/*' \
                -not -path '/var/lib/dpkg/*' -not -path '/var/log/dpkg.log' -not -path '/tmp/*' \
                -not -path '/var/tmp/*' -not -path '/etc/*-' | sort; find /sys/fs/bpf -mindepth 1 | sort; \
                getent passwd; getent group";
    let machine = Machine::boot()?;
    let before = machine.ask(list)?;
    drop(machine);
    let host = Host::enforcing(2)?;
    host.assert_login_is_reset()?;
    // The purge must also remove the programs of a killed daemon.
    host.0.ask(&format!(
        "systemctl kill --signal=KILL {UNIT}; dpkg --purge session-enforcer"
    ))?;
    let after = host.0.ask(list)?;
    let new: Vec<&str> = after
        .lines()
        .filter(|line| !before.lines().any(|l| l == *line))
        .collect();
    assert!(new.is_empty(), "{new:#?}");
    Ok(())
}

#[test]
fn the_tarball_installs_and_uninstalls_a_service() -> Result<()> {
    let machine = Machine::boot()?;
    machine.put("SESSION_ENFORCER_TARBALL", "/root/session-enforcer.tar.gz")?;
    machine.ask("tar -C /root -xf /root/session-enforcer.tar.gz")?;
    machine.ask("/root/session-enforcer-*/install.sh")?;
    let host = Host(machine);
    host.0.ask(&format!("systemctl enable --now {UNIT}"))?;
    assert_eq!(host.property("ActiveState")?, "active");
    host.0
        .ask("curl --silent --fail http://127.0.0.1:9847/readyz")?;
    // Installs again, as an upgrade does.
    let before = host.property("MainPID")?;
    host.0.ask("/root/session-enforcer-*/install.sh")?;
    assert_ne!(host.property("MainPID")?, before);
    host.0
        .ask("/root/session-enforcer-*/install.sh --uninstall")?;
    let left = host.0.ask(
        "find / -xdev -name '*session-enforcer*' -not -path '/proc/*' -not -path '/root/*' \
         -not -path '/var/log/journal/*' | sort; find /sys/fs/bpf -mindepth 1 -name '*enforcer*'",
    )?;
    let kept = [
        "/etc/session-enforcer",
        "/var/lib/session-enforcer",
        "/var/log/session-enforcer",
    ];
    assert_eq!(left.lines().collect::<Vec<_>>(), kept);
    Ok(())
}
