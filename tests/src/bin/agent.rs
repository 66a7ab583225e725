//! Moves itself to a cgroup and a network namespace. There it creates sockets for a test (`serve`, over
//! standard input) or replaces itself with another program (`exec`).

use std::{
    env,
    ffi::OsString,
    io,
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::{net::UnixStream, process::CommandExt as _},
    },
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};
use session_enforcer_tests::{Place, enter, serve};

const USAGE: &str = "usage: session-enforcer-test-agent serve|exec [--cgroup DIR] \
                     [--netns NAME|PATH] [--uid NUMBER] [--rights-of NUMBER] [--own-user-namespace] \
                     [-- COMMAND...]";

fn main() -> Result<()> {
    let mut args = env::args_os().skip(1);
    let what = args.next().context(USAGE)?;
    let mut place = Place::here();
    while let Some(arg) = args.next() {
        let mut value = || args.next().context(USAGE);
        place = match arg.to_str() {
            Some("--cgroup") => place.in_directory(Path::new(&value()?)),
            Some("--netns") => place.in_netns_at(netns_path(&value()?)),
            Some("--uid") => place.as_user(number(&value()?)?),
            Some("--rights-of") => place.with_rights_of(number(&value()?)?),
            Some("--own-user-namespace") => place.in_own_user_namespace(),
            Some("--") => break,
            _ => bail!(USAGE),
        }
    }
    enter(&place)?;
    match what.to_str() {
        Some("serve") => serve(&control()?),
        Some("exec") => {
            let program = args.next().context(USAGE)?;
            let error = Command::new(&program).args(args).exec();
            Err(error).with_context(|| format!("starting {}", program.display()))
        }
        _ => bail!(USAGE),
    }
}

fn number(text: &OsString) -> Result<u32> {
    text.to_str().context(USAGE)?.parse().context(USAGE)
}

/// The file of a namespace that iproute2 created under this name.
fn netns_path(name: &OsString) -> PathBuf {
    Path::new("/run/netns").join(name)
}

/// Standard input, which is one end of the test's socket pair.
fn control() -> Result<UnixStream> {
    let stdin: OwnedFd = io::stdin().as_fd().try_clone_to_owned()?;
    Ok(stdin.into())
}
