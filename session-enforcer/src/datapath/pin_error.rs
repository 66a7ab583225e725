//! Errors of the pin directory.

use std::{
    io,
    path::{Path, PathBuf},
};

use nix::errno::Errno;
use thiserror::Error;

use crate::{exit::ExitStatus, host::trust::Untrusted};

/// An error of the pin directory.
#[derive(Debug, Error)]
pub enum PinError {
    /// The directory is on another file system, and not at the place where the daemon may mount bpffs.
    #[error(
        "{0} is not on bpffs; name a directory below /sys/fs/bpf, mount bpffs there (mount -t bpf \
         bpf DIR), or set daemon.pin_dir to \"\", and sessions are adopted anew at each start"
    )]
    NotOnBpffs(PathBuf),
    /// bpffs does not accept the name.
    #[error("{0} cannot be made: bpffs takes no names with dots; choose another daemon.pin_dir")]
    Dot(PathBuf),
    /// Other users could have placed objects in it that the daemon would trust.
    #[error(
        "{0} must be a directory of this user that nobody else may write to (mode 0700); remove it \
         or choose another daemon.pin_dir"
    )]
    NotOwn(PathBuf),
    /// Other users could replace it.
    #[error(transparent)]
    Untrusted(#[from] Untrusted),
    /// The kernel has no bpffs.
    #[error("this kernel has no /sys/fs/bpf; set daemon.pin_dir to \"\" to do without pins")]
    Unsupported,
    /// The kernel refused the mount.
    #[error(
        "bpffs is not mounted at /sys/fs/bpf, and mounting it: {0}; mount it (mount -t bpf bpf \
         /sys/fs/bpf), or set daemon.pin_dir to \"\" to do without pins"
    )]
    Mount(Errno),
    /// Another process holds the lock.
    #[error("{path} is held by {}: one daemon at a time; stop it, or choose another daemon.pin_dir", holder(*.pid))]
    Held {
        /// The directory.
        path: PathBuf,
        /// The process that holds it, if known.
        pid: Option<u32>,
    },
    /// An operation on a file failed.
    #[error("{doing} {path}: {source}")]
    Io {
        /// The operation.
        doing: &'static str,
        /// The file.
        path: PathBuf,
        /// The error of the kernel.
        source: io::Error,
    },
}

fn holder(pid: Option<u32>) -> String {
    pid.map_or_else(
        || "a process that is not seen from here".to_owned(),
        |pid| format!("process {pid}"),
    )
}

impl PinError {
    pub(super) fn io(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io {
            doing,
            path,
            source,
        }
    }

    /// The exit status for the error.
    pub fn status(&self) -> ExitStatus {
        match self {
            Self::NotOnBpffs(_) | Self::Dot(_) | Self::NotOwn(_) | Self::Untrusted(_) => {
                ExitStatus::Configuration
            }
            Self::Mount(Errno::EPERM | Errno::EACCES) => ExitStatus::NoPermission,
            Self::Unsupported | Self::Mount(_) => ExitStatus::Unavailable,
            Self::Held { .. } => ExitStatus::Other,
            Self::Io { source, .. } if source.kind() == io::ErrorKind::PermissionDenied => {
                ExitStatus::NoPermission
            }
            Self::Io { .. } => ExitStatus::Other,
        }
    }
}
