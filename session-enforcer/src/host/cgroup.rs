//! Finds the cgroup-v2 mount, cgroups by path, pattern or ID, and the cgroups below a directory.

use std::{
    collections::HashSet,
    ffi::{OsStr, OsString},
    fs::{self, File},
    io,
    os::{
        fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd},
        unix::fs::{DirEntryExt as _, MetadataExt as _},
    },
    path::{Path, PathBuf},
};

use nix::{
    fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, openat, openat2},
    sys::{
        stat::{Mode, fstatat},
        statfs,
    },
};
use session_enforcer_common::{Ancestors, MAX_CGROUP_LEVELS, MAX_MATCH_ENTRIES};
use thiserror::Error;

use crate::config::{fits, is_pattern};

/// The maximum number of cgroups of one level that match a pattern. The match table has no room for more.
const MAX_FITTING: usize = MAX_MATCH_ENTRIES as usize;

/// The maximum length of a cgroup's path, as JSON writes it. Users choose the names of their cgroups, and the path is in
/// each record of their sessions.
const MAX_PATH: usize = 1024;

/// The end of a path that was cut. The path of a cgroup has no empty name.
const CUT: &str = "//...";

/// The file with the processes of a cgroup.
const PROCESSES: &str = "cgroup.procs";

/// The number of levels that are passed at a time on the way up from a deep cgroup.
const LEAP: usize = 64;

/// Errors about a cgroup.
#[derive(Debug, Error)]
pub enum CgroupError {
    /// No cgroup-v2 file system is mounted.
    #[error("no cgroup2 file system is mounted; mount one: mount -t cgroup2 none /sys/fs/cgroup")]
    NotMounted,
    /// A file could not be read.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The error.
        source: io::Error,
    },
    /// The opened cgroup was removed.
    #[error(
        "cgroup {0} was removed; the programs are not attached to a new cgroup of that name; restart the daemon"
    )]
    Gone(PathBuf),
    /// The directory is not in a cgroup-v2 file system.
    #[error("{0} is not a cgroup-v2 directory; name one, or leave daemon.cgroup out")]
    NotCgroup2(PathBuf),
}

fn io_error(path: &Path) -> impl FnOnce(io::Error) -> CgroupError + '_ {
    move |source| CgroupError::Io {
        path: path.to_owned(),
        source,
    }
}

/// Returns the first cgroup-v2 mount. On a hybrid system that is not `/sys/fs/cgroup`.
///
/// # Errors
///
/// Fails if cgroup v2 is not mounted.
pub fn mount_point() -> Result<PathBuf, CgroupError> {
    let mounts = mountinfo().map_err(io_error(Path::new(MOUNTINFO)))?;
    parse_mount_point(&mounts).ok_or(CgroupError::NotMounted)
}

/// The mounts that this process sees.
const MOUNTINFO: &str = "/proc/self/mountinfo";

/// Reads the mount table. Users can mount (FUSE) under any name, so invalid UTF-8 in one line must not make
/// the whole table unreadable.
pub(crate) fn mountinfo() -> io::Result<String> {
    Ok(String::from_utf8_lossy(&fs::read(MOUNTINFO)?).into_owned())
}

/// The format is that of `/proc/pid/mountinfo` in proc(5).
fn parse_mount_point(mountinfo: &str) -> Option<PathBuf> {
    mountinfo.lines().find_map(|line| {
        let (before, after) = line.split_once(" - ")?;
        let mount_point = before.split(' ').nth(4)?;
        (after.split(' ').next()? == "cgroup2").then(|| unescape(mount_point).into())
    })
}

/// mountinfo writes space, tab, newline and backslash as three octal digits.
pub(crate) fn unescape(field: &str) -> String {
    [
        ("\\040", " "),
        ("\\011", "\t"),
        ("\\012", "\n"),
        ("\\134", "\\"),
    ]
    .iter()
    .fold(field.to_owned(), |text, (code, plain)| {
        text.replace(code, plain)
    })
}

/// An open cgroup-v2 directory.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
    file: File,
    /// Whether this is the root cgroup, which contains every socket, also those of removed cgroups.
    is_root: bool,
}

impl Cgroup {
    /// Opens a cgroup-v2 directory.
    ///
    /// # Errors
    ///
    /// Fails if the directory does not exist or is not in a cgroup-v2 file system.
    pub fn open(path: &Path) -> Result<Self, CgroupError> {
        let file = File::open(path).map_err(io_error(path))?;
        let kind = statfs::fstatfs(&file).map_err(|e| io_error(path)(e.into()))?;
        let is_directory = file.metadata().map_err(io_error(path))?.is_dir();
        if kind.filesystem_type() != statfs::CGROUP2_SUPER_MAGIC || !is_directory {
            return Err(CgroupError::NotCgroup2(path.to_owned()));
        }
        Ok(Self {
            path: path.to_owned(),
            file,
            // Every cgroup but the root has this file. The check is made once, while the path certainly leads
            // to the open directory: for a removed cgroup the file is missing too.
            is_root: !path.join("cgroup.events").exists(),
        })
    }

    /// The open directory, for attaching programs.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// The path of the directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The ID of the opened cgroup.
    pub fn id(&self) -> Option<u64> {
        let opened = self.file.metadata().ok()?;
        Some(opened.ino())
    }

    /// Whether the cgroup was removed, so that its path no longer leads to it.
    pub fn is_gone(&self) -> bool {
        let opened = self.file.metadata().map(|opened| opened.ino());
        let there = fs::metadata(&self.path).map(|there| there.ino());
        !self.is_root && (opened.is_err() || there.ok() != opened.ok())
    }

    /// Fails if the cgroup was removed. An attachment to it does not cover a new cgroup of the same name.
    ///
    /// # Errors
    ///
    /// [`CgroupError::Gone`] if it was removed.
    pub fn check_there(&self) -> Result<(), CgroupError> {
        if self.is_gone() {
            return Err(CgroupError::Gone(self.path.clone()));
        }
        Ok(())
    }

    /// Whether an attachment to this cgroup covers every socket of the host.
    pub fn is_root(&self) -> bool {
        self.is_root
    }
}

impl Scope {
    /// Lists the cgroups that an attachment to this directory covers.
    ///
    /// # Errors
    ///
    /// Fails if the directory cannot be read.
    pub fn below(directory: &Path) -> Result<Self, CgroupError> {
        Self::list(directory).map_err(io_error(directory))
    }

    fn list(directory: &Path) -> io::Result<Self> {
        let root = File::open(directory)?;
        let mut ids = HashSet::from([root.metadata()?.ino()]);
        walk(&root, |id, _, _| {
            ids.insert(id);
            false
        })?;
        Ok(Self::Only(ids))
    }
}

/// Calls `take` for every cgroup below a directory until it returns true. Its arguments are the cgroup ID
/// (the inode number of the directory), the parent and the name. The walk opens each directory relative to
/// the previous one and holds only one open at a time, because users can nest cgroups deeper than a path can
/// express. A cgroup that is removed during the walk is skipped.
fn walk(root: &File, mut take: impl FnMut(u64, &File, &OsStr) -> bool) -> io::Result<()> {
    let mut here = root.try_clone()?;
    let mut waiting = vec![below(&here)?];
    while let Some(siblings) = waiting.last_mut() {
        let Some((name, id)) = siblings.pop() else {
            waiting.pop();
            if !waiting.is_empty() {
                here = open_directory(&here, OsStr::new(".."))?;
            }
            continue;
        };
        if take(id, &here, &name) {
            return Ok(());
        }
        let entered = open_directory(&here, &name);
        if let Ok((children, next)) = entered.and_then(|next| Ok((below(&next)?, next))) {
            here = next;
            waiting.push(children);
        }
    }
    Ok(())
}

fn open_directory(at: &File, name: &OsStr) -> io::Result<File> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    Ok(openat(at, name, flags, Mode::empty())?.into())
}

/// Opens the ancestor this many levels above a cgroup. Fails if that is above the root.
fn open_above(cgroup: &File, levels: usize) -> io::Result<File> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let how = OpenHow::new()
        .flags(flags)
        .resolve(ResolveFlag::RESOLVE_NO_XDEV);
    Ok(openat2(cgroup, &*"../".repeat(levels), how)?.into())
}

/// Cuts a path behind one of its names if JSON takes more than [`MAX_PATH`] bytes for it.
fn bounded(path: &str, is_whole: bool) -> String {
    let mut length = 0;
    let names = path.split('/').skip(1).take_while(|name| {
        // The quotation marks do not count, the slash does.
        length += serde_json::to_string(name).map_or(0, |text| text.len() - 1);
        length <= MAX_PATH
    });
    let kept: String = names.flat_map(|name| ["/", name]).collect();
    if is_whole && kept.len() == path.len() {
        kept
    } else {
        kept + CUT
    }
}

/// Lists the child directories with their inode numbers.
fn below(directory: &File) -> io::Result<Vec<(OsString, u64)>> {
    let entries = fs::read_dir(format!("/proc/self/fd/{}", directory.as_raw_fd()))?.flatten();
    let directories = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    Ok(directories
        .map(|entry| (entry.file_name(), entry.ino()))
        .collect())
}

/// The whole cgroup hierarchy; finds cgroups by path and by ID.
#[derive(Debug)]
pub struct Tree {
    mount: PathBuf,
    root: File,
}

/// A cgroup's place in the hierarchy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Located {
    /// The path from the root. If JSON takes more than [`MAX_PATH`] bytes for it, it is cut and ends in [`CUT`].
    pub path: String,
    /// The IDs of the cgroup and of its ancestors, without the root (the root itself has only its own ID).
    pub ancestors: Ancestors,
}

/// A `struct file_handle` for a cgroup (`linux/fcntl.h`, `linux/exportfs.h`). `id` is the cgroup ID.
#[repr(C)]
struct CgroupHandle {
    bytes: u32,
    kind: i32,
    id: u64,
}

/// `FILEID_KERNFS`.
const HANDLE_OF_KERNFS: i32 = 0xfe;

impl Tree {
    /// Opens the cgroup-v2 mount.
    ///
    /// # Errors
    ///
    /// Fails if cgroup v2 is not mounted.
    pub fn open() -> Result<Self, CgroupError> {
        Self::at(mount_point()?)
    }

    fn at(mount: PathBuf) -> Result<Self, CgroupError> {
        let root = File::open(&mount).map_err(io_error(&mount))?;
        Ok(Self { mount, root })
    }

    /// The directory of the cgroup with this path from the root.
    pub fn directory(&self, path: &str) -> PathBuf {
        self.mount.join(path.trim_start_matches('/'))
    }

    /// The ID of the cgroup that currently has this path from the root.
    pub fn id(&self, path: &str) -> Option<u64> {
        let metadata = fs::metadata(self.directory(path)).ok()?;
        metadata.is_dir().then(|| metadata.ino())
    }

    /// Returns the cgroups that match a path or a pattern, with their IDs, and the directories whose parents
    /// must be watched for further matches. At most [`MAX_FITTING`] of one level.
    pub fn fitting(&self, pattern: &str) -> (Vec<(String, u64)>, Vec<PathBuf>) {
        if !is_pattern(pattern) {
            let found = self.id(pattern).map(|id| (pattern.to_owned(), id));
            return (found.into_iter().collect(), vec![self.directory(pattern)]);
        }
        let mut found = vec![(String::new(), 0)];
        let mut awaited = Vec::new();
        for name in pattern.split('/').skip(1) {
            let place = |(above, _): &(String, u64)| self.directory(&format!("{above}/{name}"));
            awaited.extend(found.iter().map(place));
            let below = found.iter().flat_map(|(above, _)| self.named(above, name));
            found = below.take(MAX_FITTING).collect();
        }
        (found, awaited)
    }

    /// Returns the child cgroups whose names match. A removed cgroup has none. A name that is not UTF-8
    /// matches nothing.
    fn named(&self, above: &str, name: &str) -> Vec<(String, u64)> {
        if !is_pattern(name) {
            let path = format!("{above}/{name}");
            return self.id(&path).map(|id| (path, id)).into_iter().collect();
        }
        let entries = fs::read_dir(self.directory(above)).into_iter().flatten();
        let directories = entries.flatten().filter(|entry| {
            let kind = entry.file_type();
            kind.is_ok_and(|kind| kind.is_dir())
        });
        let names = directories
            .filter_map(|entry| Some((entry.file_name().into_string().ok()?, entry.ino())));
        names
            .filter(|(found, _)| fits(found, name))
            .map(|(found, id)| (format!("{above}/{found}"), id))
            .collect()
    }

    /// Finds the place of the cgroup with this ID.
    ///
    /// # Errors
    ///
    /// Fails if the cgroup no longer exists.
    pub fn locate(&self, id: u64) -> io::Result<Located> {
        let root = self.root.metadata()?.ino();
        let mut here = self.open_cgroup(id)?;
        let mut path = self.path(&here).map(|path| bounded(&path, true));
        // A removed cgroup has no files, and the kernel appends " (deleted)" to its path.
        fstatat(&here, PROCESSES, AtFlags::empty())?;
        // Users can nest cgroups thousands deep. Rules name the levels next to the root only.
        while open_above(&here, LEAP + MAX_CGROUP_LEVELS).is_ok() {
            here = open_above(&here, LEAP)?;
        }
        let mut ids = Vec::new();
        loop {
            // The kernel does not tell a path longer than `PATH_MAX`.
            path = path.or_else(|| self.path(&here).map(|path| bounded(&path, false)));
            let found = here.metadata()?.ino();
            if found == root {
                break;
            }
            ids.push(found);
            here = open_above(&here, 1)?;
        }
        if ids.is_empty() {
            ids.push(root);
        }
        ids.reverse();
        Ok(Located {
            path: path.ok_or(io::ErrorKind::NotFound)?,
            ancestors: Ancestors::of(&ids),
        })
    }

    /// Reads `cgroup.procs` of the cgroup with this ID.
    ///
    /// # Errors
    ///
    /// Fails if the cgroup no longer exists.
    pub fn processes(&self, id: u64) -> io::Result<String> {
        let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
        let cgroup = self.open_cgroup(id)?;
        let file = openat(&cgroup, PROCESSES, flags, Mode::empty())?;
        io::read_to_string(File::from(file))
    }

    fn open_cgroup(&self, id: u64) -> io::Result<File> {
        let opened = self.open_by_handle(id);
        // Without `CAP_DAC_READ_SEARCH` the process may not open by handle; then search the whole tree.
        match &opened {
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => self.search(id),
            _ => opened,
        }
    }

    fn open_by_handle(&self, id: u64) -> io::Result<File> {
        let handle = CgroupHandle {
            bytes: size_of::<u64>() as u32,
            kind: HANDLE_OF_KERNFS,
            id,
        };
        // SAFETY: the handle has as many bytes as its header says, and the descriptor is open.
        let fd = unsafe {
            libc::syscall(
                libc::SYS_open_by_handle_at,
                self.root.as_raw_fd(),
                &raw const handle,
                libc::O_PATH | libc::O_CLOEXEC,
            )
        };
        let fd = nix::errno::Errno::result(fd)?;
        // SAFETY: the system call has just opened the descriptor for this process.
        Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) }.into())
    }

    fn search(&self, wanted: u64) -> io::Result<File> {
        if self.root.metadata()?.ino() == wanted {
            return self.root.try_clone();
        }
        let mut found = Err(io::ErrorKind::NotFound.into());
        walk(&self.root, |id, parent, name| {
            if id == wanted {
                found = open_directory(parent, name);
            }
            id == wanted
        })?;
        found
    }

    /// The path from the root of an open cgroup. `None` if it is longer than `PATH_MAX`.
    fn path(&self, cgroup: &File) -> Option<String> {
        let path = fs::read_link(format!("/proc/self/fd/{}", cgroup.as_raw_fd())).ok()?;
        let below = path.strip_prefix(&self.mount).ok()?;
        Some(format!("/{}", below.to_string_lossy()))
    }
}

/// The cgroups that an attachment covers.
#[derive(Debug, PartialEq, Eq)]
pub enum Scope {
    /// Every cgroup.
    All,
    /// The cgroups with these IDs.
    Only(HashSet<u64>),
}

impl Scope {
    /// Whether a socket of the cgroup is in scope. If the socket's cgroup is unknown, only `All` contains it.
    pub fn contains(&self, cgroup_id: Option<u64>) -> bool {
        match (self, cgroup_id) {
            (Self::All, _) => true,
            (Self::Only(ids), Some(id)) => ids.contains(&id),
            (Self::Only(_), None) => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use nix::sys::stat::mkdirat;

    use super::*;

    #[test]
    fn the_mount_is_found_in_a_hybrid_hierarchy() {
        let mountinfo = "\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime shared:9 - cgroup cgroup rw,cpu
41 31 0:38 / /sys/fs/cgroup/uni\\040fied rw,relatime shared:9 master:1 - cgroup2 cgroup2 rw
";
        assert_eq!(
            parse_mount_point(mountinfo),
            Some("/sys/fs/cgroup/uni fied".into())
        );
        assert_eq!(
            parse_mount_point("31 23 0:28 / / rw - ext4 /dev/sda rw\n"),
            None
        );
    }

    #[test]
    fn a_directory_elsewhere_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let error = Cgroup::open(dir.path()).unwrap_err();
        assert!(
            error.to_string().contains("is not a cgroup-v2 directory"),
            "{error}"
        );
        assert!(Cgroup::open(&dir.path().join("none")).is_err());
    }

    #[test]
    fn cgroups_that_match_a_pattern_are_found_with_the_directories_to_watch() {
        let mount = tempfile::tempdir().unwrap();
        for path in ["s/a-1/x", "s/a-1/y", "s/a-2", "s/b/x", "t/a-3/x"] {
            fs::create_dir_all(mount.path().join(path)).unwrap();
        }
        fs::write(mount.path().join("s/a-file"), "").unwrap();
        let tree = Tree::at(mount.path().to_owned()).unwrap();
        let fitting = |pattern: &str| {
            let (found, awaited) = tree.fitting(pattern);
            let mut paths: Vec<String> = found.into_iter().map(|(path, _)| path).collect();
            paths.sort();
            let awaited = awaited.into_iter().map(|path| {
                let below = path.strip_prefix(mount.path()).unwrap();
                below.to_str().unwrap().to_owned()
            });
            let mut awaited: Vec<_> = awaited.collect();
            awaited.sort();
            (paths.join(" "), awaited.join(" "))
        };
        let found = |paths: &str, awaited: &str| (paths.to_owned(), awaited.to_owned());
        assert_eq!(fitting("/s/a-*"), found("/s/a-1 /s/a-2", "s s/a-*"));
        assert_eq!(
            fitting("/s/*/x"),
            found("/s/a-1/x /s/b/x", "s s/* s/a-1/x s/a-2/x s/b/x")
        );
        assert_eq!(
            fitting("/*/a-3/*"),
            found("/t/a-3/x", "* s/a-3 t/a-3 t/a-3/*")
        );
        assert_eq!(fitting("/none/*"), found("", "none"));
        assert_eq!(fitting("/s/a-1/x"), found("/s/a-1/x", "s/a-1/x"));
        assert_eq!(fitting("/none/x"), found("", "none/x"));
        let id = |path: &str| tree.id(path).unwrap();
        let (found, _) = tree.fitting("/s/*/x");
        assert!(found.iter().all(|(path, found)| *found == id(path)));
    }

    #[test]
    fn the_ancestors_of_a_removed_cgroup_are_not_known() {
        let tree = Tree::open().unwrap();
        let root = fs::metadata(&tree.mount).unwrap().ino();
        let located = Located {
            path: "/".to_owned(),
            ancestors: Ancestors::of(&[root]),
        };
        assert_eq!(tree.locate(root).unwrap(), located);
        assert!(tree.locate(u64::MAX).is_err());
    }

    #[test]
    fn a_long_path_is_cut_behind_a_name_and_marked() {
        let usual = "/system.slice/docker-x.scope";
        assert_eq!(bounded(usual, true), usual);
        assert_eq!(bounded(usual, false), format!("{usual}//..."));
        assert_eq!(bounded("/", true), "/");
        let full = format!("/{}", "n".repeat(MAX_PATH - 1));
        assert_eq!(bounded(&full, true), full);
        assert_eq!(bounded(&format!("{full}n"), true), "//...");
        assert_eq!(bounded(&format!("{full}/n"), true), format!("{full}//..."));
        // JSON writes these with more bytes.
        for name in ["\u{1}", "\"", "\\", "\n"] {
            let cut = bounded(&format!("{usual}/{}/b", name.repeat(MAX_PATH - 1)), true);
            assert_eq!(cut, format!("{usual}//..."));
        }
    }

    #[test]
    fn a_cgroup_that_is_deeper_than_a_path_can_express_is_found_by_a_search() {
        let mount = tempfile::tempdir().unwrap();
        let tree = Tree::at(mount.path().to_owned()).unwrap();
        let mut here = tree.root.try_clone().unwrap();
        let name = "n".repeat(250);
        for _ in 0..20 {
            mkdirat(&here, &*name, Mode::S_IRWXU).unwrap();
            here = open_directory(&here, OsStr::new(&name)).unwrap();
        }
        let id = here.metadata().unwrap().ino();
        let found = tree.search(id).unwrap();
        assert_eq!(found.metadata().unwrap().ino(), id);
        assert_eq!(tree.path(&found), None);
        let Scope::Only(ids) = Scope::below(mount.path()).unwrap() else {
            panic!("a directory has a list");
        };
        assert!(ids.len() == 21 && ids.contains(&id));
        assert!(tree.search(u64::MAX).is_err());
    }

    #[test]
    fn a_socket_of_unknown_cgroup_is_only_in_the_scope_of_all() {
        let only = Scope::Only(HashSet::from([5]));
        assert!(only.contains(Some(5)) && !only.contains(Some(6)) && !only.contains(None));
        assert!(Scope::All.contains(None));
    }
}
