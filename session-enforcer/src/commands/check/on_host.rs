//! Predicts what `run` would refuse on this host of a valid configuration, without creating anything.

use std::{error::Error, path::Path};

use nix::unistd::geteuid;

use crate::{
    commands::run as daemon,
    config::{Config, User},
    datapath::PinDir,
    engine::owner_resolver as owners,
    host::{privilege, trust},
    reaper::worker,
    report::{audit, control, http},
};

/// Returns each refusal as one line, as `run` would report it for this user. A user other than root cannot
/// check everything; such checks are omitted.
pub(super) fn refusals(file: &Path, config: &Config) -> Vec<String> {
    let mut refused = Vec::new();
    let mut note = |result: Result<(), Box<dyn Error>>| {
        let is_kept_from_us =
            |error: &(dyn Error + 'static)| !geteuid().is_root() && daemon::is_permission(error);
        let error = result.err().filter(|error| !is_kept_from_us(&**error));
        refused.extend(error.map(|error| error.to_string()));
    };
    note(trust::check(file).map_err(Into::into));
    for rule in &config.rules {
        for user in &rule.users {
            if let (User::Name(name), Some(at)) = (user, &rule.users_at) {
                let uid = owners::uid_of(Some(&worker::find_user(name)), name, at);
                note(uid.map(drop).map_err(Into::into));
            }
        }
    }
    note(daemon::open_cgroup(config).map(drop).map_err(Into::into));
    // As `run` opens it.
    let audit = privilege::unprivileged(|| audit::check(&config.audit));
    note(audit.map_or_else(
        |error| Err(error.into()),
        |checked| checked.map_err(Into::into),
    ));
    if let Some(path) = &config.pin_dir {
        let refused = PinDir::check(path);
        note(refused.map_err(|error| format!("daemon.pin_dir: {error}").into()));
    }
    if let Some(listen) = &config.metrics_listen {
        note(http::check(listen).map_err(Into::into));
    }
    note(control::check(&config.control).map_err(Into::into));
    refused
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt as _};

    use super::*;

    /// The refusals for a file with this text in a directory with this mode.
    fn refused(text: &str, mode: u32) -> Vec<String> {
        let directory = tempfile::tempdir().unwrap();
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(mode)).unwrap();
        let file = directory.path().join("x.toml");
        let text = format!("{text}[[rule]]\nname = 'a'\nidle_timeout = '1m'\n");
        fs::write(&file, &text).unwrap();
        refusals(&file, &Config::parse("x.toml", &text).unwrap())
    }

    #[test]
    fn a_valid_configuration_is_not_refused_on_this_host() {
        let text = "[daemon]\npin_dir = ''\n[audit]\npath = '/dev/null'\n";
        assert_eq!(refused(text, 0o755), Vec::<String>::new());
    }

    #[test]
    fn each_thing_that_this_host_lacks_is_said() {
        let text = "[daemon]\ncgroup = '/none'\npin_dir = '/tmp/none'\n[metrics]\n\
                    listen = '192.0.2.1:9847'\n[audit]\npath = '/none/audit.json'\n\
                    [[rule]]\nname = 'b'\nusers = ['root', 'no-such', 12345]\nmax_lifetime = '1h'\n";
        let refused = refused(text, 0o777);
        let starts = [
            "x.toml",
            "x.toml:10:9: rule \"b\": users: there is no user \"no-such\" on this host; ",
            "daemon.cgroup: /none: ",
            "audit.path: /none/audit.json: there is no directory /none; make it (mkdir -p /none)",
            "daemon.pin_dir: /tmp/none is not on bpffs; ",
            "metrics.listen: 192.0.2.1:9847: ",
        ];
        assert_eq!(refused.len(), starts.len(), "{refused:#?}");
        for (line, start) in refused.iter().zip(starts).skip(1) {
            assert!(line.starts_with(start), "{line}");
        }
        assert!(refused[0].contains("x.toml: ") && refused[0].contains("by everybody"));
    }

    #[test]
    fn an_audit_that_is_a_fifo_is_refused_while_nobody_reads_it() {
        let directory = tempfile::tempdir().unwrap();
        let fifo = directory.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let path = fifo.display();
        let text = format!("[daemon]\npin_dir = ''\n[audit]\npath = '{path}'\n");
        let nobody = format!("audit.path: {path}: nobody reads this FIFO or socket");
        let found = refused(&text, 0o755);
        assert!(
            found.len() == 1 && found[0].starts_with(&nobody),
            "{found:?}"
        );
        // Opened for both, since a reader alone would wait for a writer.
        let reader = fs::File::options().read(true).write(true).open(&fifo);
        assert_eq!(refused(&text, 0o755), Vec::<String>::new());
        drop(reader);
    }

    #[test]
    fn an_audit_that_is_a_directory_is_refused() {
        let refused = refused("[daemon]\npin_dir = ''\n[audit]\npath = '/'\n", 0o755);
        assert!(
            refused[0].starts_with("audit.path: /: Is a directory"),
            "{refused:?}"
        );
        assert_eq!(refused.len(), 1, "{refused:?}");
    }
}
