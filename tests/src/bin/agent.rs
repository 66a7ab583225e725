//! Moves itself to a cgroup and a network namespace, and there makes sockets for a test (`serve`,
//! over standard input) or becomes another program (`exec`).

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
use session_enforcer_tests::{enter, serve};

const USAGE: &str = "usage: session-enforcer-test-agent serve|exec [--cgroup DIR] \
                     [--netns NAME|PATH] [--uid NUMBER] [-- COMMAND...]";

fn main() -> Result<()> {
    let mut args = env::args_os().skip(1);
    let what = args.next().context(USAGE)?;
    let (mut cgroup, mut netns, mut uid) = (None, None, None);
    while let Some(arg) = args.next() {
        match arg.to_str() {
            Some("--cgroup") => cgroup = Some(PathBuf::from(args.next().context(USAGE)?)),
            Some("--netns") => netns = Some(netns_path(&args.next().context(USAGE)?)),
            Some("--uid") => {
                let text = args.next().context(USAGE)?;
                uid = Some(text.to_str().context(USAGE)?.parse().context(USAGE)?);
            }
            Some("--") => break,
            _ => bail!(USAGE),
        }
    }
    enter(cgroup.as_deref(), netns.as_deref(), uid)?;
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

/// A name is one of iproute2's.
fn netns_path(name: &OsString) -> PathBuf {
    Path::new("/run/netns").join(name)
}

/// Standard input, which the test has made one end of a pair of sockets.
fn control() -> Result<UnixStream> {
    let stdin: OwnedFd = io::stdin().as_fd().try_clone_to_owned()?;
    Ok(stdin.into())
}
