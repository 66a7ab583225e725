//! Checks whether another user could write to or replace a file that the daemon relies on, or that others
//! rely on: the configuration, the audit file, the pins.
//!
//! A path is trusted if each directory on it and the file belong to root or to the user of this process, and
//! nobody else may write to them. Root also trusts the service's user, which has root's capabilities. A
//! directory that others may write to is accepted if it is sticky, as /tmp is: there, only the owner of an
//! entry or of the directory can replace the entry. A group with write permission counts as somebody else,
//! even root's group: its members are not root. An access control list that lets others write shows in the
//! group bits (acl(5), the mask).

use std::{
    collections::VecDeque,
    ffi::OsString,
    fs::{self, Metadata},
    io,
    os::unix::fs::{FileTypeExt as _, MetadataExt as _},
    path::{self, Component, Path, PathBuf},
};

use nix::unistd::geteuid;
use thiserror::Error;

use crate::host::users::{Names, uid_of};

/// The user of the packaged service.
const SERVICE_USER: &str = "session-enforcer";

/// The maximum number of symbolic links on one path, as in the kernel (`MAXSYMLINKS` of `linux/namei.h`).
const MAX_LINKS: usize = 40;

const GROUP_MAY_WRITE: u32 = 0o020;
const ALL_MAY_WRITE: u32 = 0o002;
const STICKY: u32 = 0o1000;

/// The reasons why a path is not trusted.
#[derive(Debug, Error)]
pub enum Untrusted {
    /// A part of the path belongs to another user.
    #[error(
        "{path}: {part} belongs to {owner}, who could change what the daemon relies on; chown {root} \
         {part}, or choose a path that only root may write to",
        root = owner_words(*.wanted)
    )]
    Owner {
        /// The whole path.
        path: String,
        /// The directory, link or file.
        part: String,
        /// The owner's name, or UID if it has no name.
        owner: String,
        /// The expected owner: the user of this process.
        wanted: u32,
    },
    /// Another user may write to a part of the path.
    #[error(
        "{path}: {part} may be written to by {writer} (mode {mode:04o}), who could change what the daemon \
         relies on; chmod {bits} {part}, or choose a path that only root may write to"
    )]
    Mode {
        /// The whole path.
        path: String,
        /// The directory or file.
        part: String,
        /// Who may write to it.
        writer: String,
        /// Its permission bits.
        mode: u32,
        /// The argument for chmod(1).
        bits: &'static str,
    },
    /// The permissions of a part of the path could not be read.
    #[error("{path}: who may write to {part} cannot be found out: {source}")]
    Unknown {
        /// The whole path.
        path: String,
        /// The directory, link or file.
        part: String,
        /// The error.
        source: io::Error,
    },
}

fn owner_words(uid: u32) -> String {
    Names::read()
        .name(uid)
        .map_or_else(|| uid.to_string(), str::to_owned)
}

/// Refuses a path that another user could change. A missing file is accepted; a caller that creates the file
/// checks again afterwards.
///
/// A descriptor that this process inherited (`/dev/stdin`, `/proc/self/fd/3`) is trusted, because whoever
/// started the daemon chose it. Character devices at the end of a path, such as `/dev/null`, are trusted too:
/// they store nothing.
///
/// # Errors
///
/// Fails if the path is not trusted. The error names the part of the path and a remedy.
pub fn check(path: &Path) -> Result<(), Untrusted> {
    walk(path, geteuid().as_raw())
}

/// The UID of the packaged service's user if this process runs as root; otherwise empty.
pub fn trusted_by_root() -> Vec<u32> {
    let service = match geteuid().is_root() {
        true => uid_of(SERVICE_USER).unwrap_or_default(),
        false => None,
    };
    service.into_iter().collect()
}

/// Follows the path as the kernel does (`path_resolution(7)`).
fn walk(path: &Path, own: u32) -> Result<(), Untrusted> {
    let unknown = |part: &Path, source| Untrusted::Unknown {
        path: path.display().to_string(),
        part: part.display().to_string(),
        source,
    };
    let whole = path::absolute(path).map_err(|error| unknown(path, error))?;
    let mut waiting = names(&whole);
    let mut at = PathBuf::from("/");
    let mut links = 0;
    let root = fs::symlink_metadata(&at).map_err(|error| unknown(&at, error))?;
    judge(path, &at, &root, own)?;
    let mut is_shared = is_shared(&root);
    while let Some(name) = waiting.pop_front() {
        if name == ".." {
            at.pop();
            // The directory was checked on the way down; only its sticky state must be read again.
            is_shared = fs::symlink_metadata(&at).is_ok_and(|above| self::is_shared(&above));
            continue;
        }
        if is_own_descriptors(&at) {
            return Ok(());
        }
        let entry = at.join(&name);
        let found = match fs::symlink_metadata(&entry) {
            Err(error) if is_missing(&error) => return Ok(()),
            found => found.map_err(|error| unknown(&entry, error))?,
        };
        if !found.is_symlink() {
            judge(path, &entry, &found, own)?;
            is_shared = self::is_shared(&found);
            at = entry;
            continue;
        }
        // The owner of a link can replace it only in a sticky directory that others may write to.
        if is_shared {
            judge_owner(path, &entry, &found, own)?;
        }
        links += 1;
        if links > MAX_LINKS {
            return Err(unknown(&entry, io::Error::from_raw_os_error(libc::ELOOP)));
        }
        let target = fs::read_link(&entry).map_err(|error| unknown(&entry, error))?;
        if target.is_absolute() {
            at = PathBuf::from("/");
            is_shared = self::is_shared(&root);
        }
        let mut further = names(&target);
        further.append(&mut waiting);
        waiting = further;
    }
    Ok(())
}

/// Splits the path into names, from the left.
fn names(path: &Path) -> VecDeque<OsString> {
    let name = |part: Component<'_>| match part {
        Component::Normal(_) | Component::ParentDir => Some(part.as_os_str().to_owned()),
        Component::RootDir | Component::CurDir | Component::Prefix(_) => None,
    };
    path.components().filter_map(name).collect()
}

fn is_missing(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
    )
}

/// Whether this is the directory of this process's open files (proc(5)).
fn is_own_descriptors(directory: &Path) -> bool {
    let own = ["/proc/self/fd", "/proc/thread-self/fd"];
    directory.starts_with("/proc")
        && own
            .iter()
            .any(|own| fs::canonicalize(own).is_ok_and(|own| own == directory))
}

/// Whether others may create entries in the directory but not replace those of other users.
fn is_shared(found: &Metadata) -> bool {
    found.is_dir()
        && found.mode() & STICKY != 0
        && found.mode() & (GROUP_MAY_WRITE | ALL_MAY_WRITE) != 0
}

/// Refuses a file or directory that belongs to others or that others may write to.
fn judge(path: &Path, part: &Path, found: &Metadata, own: u32) -> Result<(), Untrusted> {
    if found.file_type().is_char_device() {
        return Ok(());
    }
    judge_owner(path, part, found, own)?;
    if is_shared(found) {
        return Ok(());
    }
    let mode = found.mode() & 0o7777;
    let (writer, bits) = if mode & ALL_MAY_WRITE != 0 {
        ("everybody".to_owned(), "go-w")
    } else if mode & GROUP_MAY_WRITE != 0 {
        (group_words(found.gid()), "g-w")
    } else {
        return Ok(());
    };
    Err(Untrusted::Mode {
        path: path.display().to_string(),
        part: part.display().to_string(),
        writer,
        mode,
        bits,
    })
}

fn judge_owner(path: &Path, part: &Path, found: &Metadata, own: u32) -> Result<(), Untrusted> {
    let uid = found.uid();
    if [0, own].contains(&uid) || trusted_by_root().contains(&uid) {
        return Ok(());
    }
    Err(Untrusted::Owner {
        path: path.display().to_string(),
        part: part.display().to_string(),
        owner: owner_words(uid),
        wanted: own,
    })
}

fn group_words(gid: u32) -> String {
    match Names::read_groups().name(gid) {
        Some(name) => format!("the group {name}"),
        None => format!("the group {gid}"),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use super::*;

    /// A UID that no user of a test machine has.
    const STRANGER: u32 = 61_234;

    fn own() -> u32 {
        geteuid().as_raw()
    }

    fn set_mode(path: &Path, mode: u32) {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    /// Creates a file below two directories that only this user may write to.
    fn place() -> (tempfile::TempDir, PathBuf) {
        let top = tempfile::tempdir().unwrap();
        fs::create_dir(top.path().join("below")).unwrap();
        let file = top.path().join("below/file");
        fs::write(&file, "").unwrap();
        for (path, mode) in [(top.path().join("below"), 0o755), (file.clone(), 0o644)] {
            set_mode(&path, mode);
        }
        (top, file)
    }

    #[test]
    fn a_file_that_only_root_and_this_user_can_change_is_trusted_below_a_sticky_directory_too() {
        let (top, file) = place();
        check(&file).unwrap();
        check(top.path()).unwrap();
        check(&top.path().join("below/../below/./file")).unwrap();
        check(Path::new("/etc/passwd")).unwrap();
    }

    #[test]
    fn a_file_that_others_can_change_is_refused_with_their_name_and_a_remedy() {
        let (top, file) = place();
        let below = top.path().join("below");
        for (part, mode, bits) in [
            (&file, 0o664, "chmod g-w"),
            (&file, 0o602, "chmod go-w"),
            (&below, 0o770, "chmod g-w"),
            (&below, 0o777, "chmod go-w"),
        ] {
            let before = fs::metadata(part).unwrap().mode();
            set_mode(part, mode);
            let refused = check(&file).unwrap_err().to_string();
            set_mode(part, before);
            assert!(
                refused.starts_with(&file.display().to_string()),
                "{refused}"
            );
            let words = format!("{} may be written to by ", part.display());
            assert!(refused.contains(&words), "{refused}");
            assert!(refused.contains(&format!("(mode {mode:04o})")), "{refused}");
            assert!(
                refused.contains(&format!("{bits} {}", part.display())),
                "{refused}"
            );
        }
        check(&file).unwrap();
    }

    #[test]
    fn a_file_of_another_user_is_refused() {
        let (top, file) = place();
        // The walk of another user trusts only root's and that user's own files.
        if own() != 0 {
            assert!(matches!(
                walk(&file, STRANGER),
                Err(Untrusted::Owner { .. })
            ));
            return;
        }
        walk(&file, STRANGER).unwrap();
        for part in [&file, &top.path().join("below")] {
            std::os::unix::fs::chown(part, Some(STRANGER), None).unwrap();
            walk(&file, STRANGER).unwrap();
            let refused = check(&file).unwrap_err().to_string();
            std::os::unix::fs::chown(part, Some(0), None).unwrap();
            let words = format!("{} belongs to {STRANGER}, who", part.display());
            assert!(refused.contains(&words), "{refused}");
            assert!(
                refused.contains(&format!("chown root {}", part.display())),
                "{refused}"
            );
        }
    }

    #[test]
    fn the_way_of_a_link_is_judged_and_not_only_its_end() {
        let (top, file) = place();
        let open = top.path().join("open");
        fs::create_dir(&open).unwrap();
        symlink(&file, open.join("absolute")).unwrap();
        symlink("../below", open.join("relative")).unwrap();
        let ways = [open.join("absolute"), open.join("relative/file")];
        for (mode, trusted) in [(0o755, true), (0o777, false), (0o1777, true)] {
            set_mode(&open, mode);
            for way in &ways {
                assert_eq!(check(way).is_ok(), trusted, "{mode:o} {}", way.display());
            }
        }
        set_mode(&file, 0o666);
        for way in &ways {
            let refused = check(way).unwrap_err().to_string();
            let words = format!("{} may be written to", file.display());
            assert!(refused.contains(&words), "{refused}");
        }
    }

    #[test]
    fn a_link_of_somebody_else_in_a_sticky_directory_is_refused() {
        if own() != 0 {
            return;
        }
        let (top, file) = place();
        let link = top.path().join("link");
        symlink(&file, &link).unwrap();
        std::os::unix::fs::lchown(&link, Some(STRANGER), None).unwrap();
        check(&link).unwrap();
        set_mode(top.path(), 0o1777);
        assert!(matches!(check(&link), Err(Untrusted::Owner { .. })));
        check(&file).unwrap();
    }

    #[test]
    fn a_missing_file_is_accepted_if_its_directory_is_trusted() {
        let (top, _) = place();
        let missing = top.path().join("below/none/none");
        check(&missing).unwrap();
        check(&top.path().join("below/file/none")).unwrap();
        set_mode(&top.path().join("below"), 0o777);
        check(&missing).unwrap_err();
    }

    #[test]
    fn a_circle_of_links_ends() {
        let (top, _) = place();
        symlink("b", top.path().join("a")).unwrap();
        symlink("a", top.path().join("b")).unwrap();
        let refused = check(&top.path().join("a"));
        assert!(matches!(refused, Err(Untrusted::Unknown { .. })));
    }

    #[test]
    fn inherited_descriptors_and_devices_are_trusted() {
        for path in [
            "/dev/stdin",
            "/dev/fd/0",
            "/proc/self/fd/0",
            "/proc/thread-self/fd/0",
            "/dev/null",
        ] {
            check(Path::new(path)).unwrap();
        }
    }
}
