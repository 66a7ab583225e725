//! Keeps a copy of the last valid configuration, so that a start with an invalid file still enforces.

use std::{
    fs::{self, File},
    path::Path,
    thread,
};

use anyhow::{Context as _, Result};

use crate::{
    cli::RunArgs,
    config::Config,
    exit::{self, ExitStatus},
};

/// Copies the file, which has come into force, to the path of the arguments. Uses a thread, because a disk
/// may be slow.
pub fn keep(args: &RunArgs) {
    let (Some(path), Some(copy)) = (args.config_path(), args.last_good.clone()) else {
        return;
    };
    let args = args.clone();
    let copying = thread::Builder::new().name("last-good".to_owned());
    let started =
        copying.spawn(move || copy_valid(&args, &path, &copy).unwrap_or_else(|error| warn(&error)));
    if let Err(error) = started {
        warn(&error.into());
    }
}

fn warn(error: &anyhow::Error) {
    tracing::error!(
        "cannot keep a copy of the configuration in force, for a start with an invalid file: {}",
        exit::causes(error)
    );
}

/// Returns the last valid configuration if the start failed because of an invalid one.
pub fn stand_in(args: &RunArgs, error: &anyhow::Error) -> Option<Config> {
    let copy = args.last_good.as_deref()?;
    if ExitStatus::of(error) != ExitStatus::Configuration || !copy.exists() {
        return None;
    }
    let kept = match args.config_from(Some(copy)) {
        Ok(kept) => kept,
        Err(wrong) => {
            tracing::error!(
                "the copy of the last valid configuration cannot be used: {}",
                exit::causes(&wrong)
            );
            return None;
        }
    };
    let error = exit::causes(error);
    tracing::error!(
        "starting with {}, the copy of the last valid configuration, because of: {error}",
        copy.display()
    );
    Some(Config {
        stands_in_for: Some(error),
        ..kept
    })
}

/// Replaces the previous copy if the file is still valid when it is read again.
fn copy_valid(args: &RunArgs, path: &Path, copy: &Path) -> Result<()> {
    let new = copy.with_extension("new");
    let write = || -> Result<()> {
        fs::copy(path, &new)?;
        args.config_from(Some(&new))?;
        File::open(&new)?.sync_all()?;
        Ok(fs::rename(&new, copy)?)
    };
    write().with_context(|| format!("writing {}", copy.display()))
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::cli::{Cli, Command};

    const VALID: &str = "[[rule]]\nname = 'a'\nidle_timeout = '1s'\n";

    struct Host {
        directory: tempfile::TempDir,
        args: RunArgs,
    }

    impl Host {
        fn new() -> Self {
            let directory = tempfile::tempdir().unwrap();
            let at = |name: &str| directory.path().join(name).into_os_string();
            let words = ["session-enforcer", "run", "--config"].map(Into::into);
            let more = [at("config.toml"), "--last-good".into(), at("good.toml")];
            let cli = Cli::from_args(words.into_iter().chain(more)).unwrap();
            let Command::Run(args) = cli.command else {
                unreachable!("it says run")
            };
            Self { directory, args }
        }

        fn path(&self, name: &str) -> PathBuf {
            self.directory.path().join(name)
        }

        fn write(&self, text: &str) {
            fs::write(self.path("config.toml"), text).unwrap();
        }
    }

    impl Host {
        fn read(&self) -> Result<Config> {
            self.args.to_config()
        }

        fn keep(&self) -> Result<()> {
            let copy = self.args.last_good.as_deref().unwrap();
            copy_valid(&self.args, &self.args.config_path().unwrap(), copy)
        }
    }

    #[test]
    fn the_last_valid_configuration_stands_in_for_a_wrong_file() {
        let host = Host::new();
        host.write(VALID);
        host.keep().unwrap();
        host.write("x");
        let error = host.read().unwrap_err();
        let kept = stand_in(&host.args, &error).unwrap();
        assert_eq!(kept.stands_in_for, Some(exit::causes(&error)));
        assert_eq!(kept.rules[0].name, "a");
        // Another configuration does not help against other failures.
        assert!(stand_in(&host.args, &anyhow::anyhow!("no memory")).is_none());
    }

    #[test]
    fn a_copy_is_of_a_valid_file_or_none() {
        let host = Host::new();
        host.write(VALID);
        host.keep().unwrap();
        let other = VALID.replace("'a'", "'b'");
        host.write(&other);
        host.keep().unwrap();
        host.write("x");
        assert!(host.keep().is_err());
        assert_eq!(fs::read_to_string(host.path("good.toml")).unwrap(), other);
    }

    #[test]
    fn without_a_valid_copy_nothing_stands_in() {
        let host = Host::new();
        host.write("x");
        let error = host.read().unwrap_err();
        assert!(stand_in(&host.args, &error).is_none());
        fs::write(host.path("good.toml"), "y").unwrap();
        assert!(stand_in(&host.args, &error).is_none());
    }
}
