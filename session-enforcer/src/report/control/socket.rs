//! Creates the control socket with its path and permissions.

use std::{
    fs::{self, DirBuilder},
    io,
    os::unix::{
        fs::{DirBuilderExt as _, PermissionsExt as _, chown},
        net::UnixListener,
    },
    path::{Path, PathBuf},
};

use nix::unistd::Group;
use thiserror::Error;

use crate::{
    config::{Control, ControlSocket},
    host::trust::{self, Untrusted},
    report::http::{bind_unix, check_place, directory_of},
};

/// Permissions for root and the daemon's user.
const MODE: u32 = 0o600;

/// Permissions with a group.
const GROUP_MODE: u32 = 0o660;

/// Permissions of the default socket's directory, if the daemon creates it. Every user may see the socket.
const DIRECTORY_MODE: u32 = 0o755;

/// The reasons why the control socket could not be created.
#[derive(Debug, Error)]
pub enum ControlError {
    /// The socket could not be created.
    #[error(
        "control.socket: {path}: {source}; choose another path, stop the daemon that has it, or \"\" for none"
    )]
    Bind {
        /// The path.
        path: PathBuf,
        /// The error.
        source: io::Error,
    },
    /// Another user could replace the socket.
    #[error("control.socket: {0}")]
    Untrusted(#[source] Untrusted),
    /// The group does not exist.
    #[error(
        "control.group: there is no group \"{group}\" on this host; create it, or \"\" for none"
    )]
    NoGroup {
        /// The group.
        group: String,
    },
    /// The group could not be looked up, or the socket could not be given to it.
    #[error(
        "control.group: \"{group}\": {source}; a daemon that is not root can only give its socket to a group that \
         its user is a member of (SupplementaryGroups= in its unit)"
    )]
    Group {
        /// The group.
        group: String,
        /// The error.
        source: io::Error,
    },
}

impl ControlError {
    /// Whether the configuration is the cause.
    pub fn is_configuration(&self) -> bool {
        matches!(self, Self::Untrusted(_) | Self::NoGroup { .. })
    }
}

/// Creates the socket, and returns it with the ID of the group whose members may connect. `None` without a
/// configured socket.
///
/// # Errors
///
/// Fails if the socket cannot be created, if other users could replace it, or if the group does not exist or
/// cannot be given the socket.
pub fn bind(control: &Control) -> Result<Option<(UnixListener, Option<u32>)>, ControlError> {
    let Some(path) = control.socket.path() else {
        return Ok(None);
    };
    let gid = control.group.as_deref().map(gid_of).transpose()?;
    let refused = |source| ControlError::Bind {
        path: path.to_owned(),
        source,
    };
    if control.socket == ControlSocket::Default {
        make_directory(directory_of(path)).map_err(refused)?;
    }
    trust::check(directory_of(path)).map_err(ControlError::Untrusted)?;
    // Create the socket without group permissions; they are added after the change of its group.
    let listener = bind_unix(path, MODE).map_err(refused)?;
    if let (Some(gid), Some(group)) = (gid, &control.group) {
        let given = chown(path, None, Some(gid))
            .and_then(|()| fs::set_permissions(path, fs::Permissions::from_mode(GROUP_MODE)));
        given.map_err(|source| ControlError::Group {
            group: group.clone(),
            source,
        })?;
    }
    Ok(Some((listener, gid)))
}

/// Checks whether [`bind`] would fail because of the directory or the group. The default socket may fail to
/// bind.
///
/// # Errors
///
/// Fails as [`bind`] does.
pub fn check(control: &Control) -> Result<(), ControlError> {
    if let Some(group) = &control.group {
        gid_of(group)?;
    }
    let ControlSocket::At(path) = &control.socket else {
        return Ok(());
    };
    trust::check(directory_of(path)).map_err(ControlError::Untrusted)?;
    check_place(path).map_err(|source| ControlError::Bind {
        path: path.clone(),
        source,
    })
}

fn make_directory(directory: &Path) -> io::Result<()> {
    match DirBuilder::new().mode(DIRECTORY_MODE).create(directory) {
        // The process's umask may have removed permissions.
        Ok(()) => fs::set_permissions(directory, fs::Permissions::from_mode(DIRECTORY_MODE)),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(error),
    }
}

fn gid_of(group: &str) -> Result<u32, ControlError> {
    let found = Group::from_name(group).map_err(|error| ControlError::Group {
        group: group.to_owned(),
        source: error.into(),
    })?;
    let found = found.map(|found| found.gid.as_raw());
    found.ok_or_else(|| ControlError::NoGroup {
        group: group.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(path: PathBuf, group: Option<&str>) -> Control {
        Control {
            socket: ControlSocket::At(path),
            group: group.map(str::to_owned),
        }
    }

    #[test]
    fn the_socket_is_its_user_s_and_where_there_is_a_group_the_group_s() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("control.sock");
        let mode = || fs::metadata(&path).unwrap().permissions().mode() & 0o777;
        let control = at(path.clone(), None);
        check(&control).unwrap();
        drop(bind(&control).unwrap().unwrap());
        assert_eq!(mode(), MODE);
        // A socket of a daemon that has ended is replaced.
        let own = Group::from_gid(nix::unistd::getegid()).unwrap().unwrap();
        let (listener, gid) = bind(&at(path.clone(), Some(&own.name))).unwrap().unwrap();
        assert_eq!((mode(), gid), (GROUP_MODE, Some(own.gid.as_raw())));
        let error = bind(&control).unwrap_err().to_string();
        assert!(error.contains("Address already in use"), "{error}");
        drop(listener);
    }

    #[test]
    fn an_unusable_control_socket_is_reported_with_its_key() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("control.sock");
        let no_group = at(path.clone(), Some("no-such-group"));
        for error in [check(&no_group).unwrap_err(), bind(&no_group).unwrap_err()] {
            assert!(error.to_string().starts_with("control.group: "), "{error}");
            assert!(error.is_configuration());
        }
        let nowhere = at(directory.path().join("none/control.sock"), None);
        for error in [check(&nowhere).unwrap_err(), bind(&nowhere).unwrap_err()] {
            assert!(error.to_string().starts_with("control.socket: "), "{error}");
        }
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o777)).unwrap();
        let open = at(path, None);
        for error in [check(&open).unwrap_err(), bind(&open).unwrap_err()] {
            assert!(matches!(error, ControlError::Untrusted(_)), "{error}");
        }
        let nowhere = Control {
            socket: ControlSocket::Nowhere,
            group: None,
        };
        assert!(bind(&nowhere).unwrap().is_none());
    }
}
