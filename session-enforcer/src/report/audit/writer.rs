//! The thread that writes the audit. Only this part of the daemon may wait for a disk or a reader.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::{
        fd::AsFd as _,
        unix::fs::{FileExt as _, OpenOptionsExt as _},
    },
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
        mpsc::{Receiver, Sender, channel},
    },
    thread,
    time::Duration,
};

use nix::{
    fcntl::{AT_FDCWD, AtFlags, FcntlArg, OFlag, fcntl},
    unistd::{AccessFlags, faccessat},
};
use thiserror::Error;
use tokio::sync::Notify;

use super::{
    Pending,
    journald::{self, Journald},
    sink::Sink,
};
use crate::{
    config::AuditTarget,
    host::trust::{self, Untrusted},
};

/// The maximum number of bytes in the thread's queue (about 50,000 records). Records beyond it are lost and
/// counted. The limit is not in batches: a batch may be a single record, and a short stall of the disk must
/// not lose the few hundred records of that time.
const MAX_WAITING_BYTES: usize = 32 << 20;

/// At the end, the daemon waits this long for the thread.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);

/// The number of bytes that are read from the end of the file. It covers more records than the reset journal
/// has slots.
const MAX_TAIL: u64 = 16 << 20;

/// The file is readable by its group, as system logs are.
const MODE: u32 = 0o640;

/// The reasons why the audit could not be opened.
#[derive(Debug, Error)]
pub enum AuditError {
    /// The file could not be opened.
    #[error("audit.path: {path}: {source}; name a file that can be appended to, or -")]
    Open {
        /// The file.
        path: PathBuf,
        /// The error.
        source: io::Error,
    },
    /// The directory of the file does not exist.
    #[error(
        "audit.path: {path}: there is no directory {directory}; make it (mkdir -p {directory}), or name \
         another file"
    )]
    NoDirectory {
        /// The file.
        path: PathBuf,
        /// The directory.
        directory: PathBuf,
    },
    /// journald does not accept entries.
    #[error(
        "audit.path: journald: {socket}: {source}; start systemd-journald (a container needs the \
         host's socket), or name a file, or -",
        socket = journald::SOCKET
    )]
    NoJournald {
        /// The error.
        source: io::Error,
    },
    /// `audit.sync` is set together with the journal.
    #[error(
        "audit.sync: true beside audit.path = \"journald\", which itself decides when records are on \
         the disk (SyncIntervalSec= in journald.conf); set it to false, or name a file"
    )]
    SyncedJournal,
    /// Another user could change the records.
    #[error("audit.path: {0}")]
    Untrusted(#[source] Untrusted),
    /// The thread could not be started.
    #[error("starting the thread that writes the audit: {0}")]
    Thread(io::Error),
}

impl AuditError {
    fn of(path: &Path, source: io::Error) -> Self {
        let path = path.to_owned();
        match path.parent() {
            Some(parent) if !parent.exists() && source.kind() == io::ErrorKind::NotFound => {
                let directory = parent.to_owned();
                Self::NoDirectory { path, directory }
            }
            _ => Self::Open { path, source },
        }
    }
}

/// Checks whether records could be written to the target. Does not create a missing file.
///
/// # Errors
///
/// Fails if [`Audit::open`](super::Audit::open) would fail.
pub fn check(target: &AuditTarget) -> Result<(), AuditError> {
    match target {
        AuditTarget::Stdout => Ok(()),
        AuditTarget::Journald => check_journald(),
        AuditTarget::File(path) => check_file(path),
    }
}

fn check_journald() -> Result<(), AuditError> {
    journald::check().map_err(|source| AuditError::NoJournald { source })
}

fn check_file(path: &Path) -> Result<(), AuditError> {
    trust::check(path).map_err(AuditError::Untrusted)?;
    let refused = |source| AuditError::of(path, source);
    let checked = match fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let directory = path.parent().unwrap_or(path);
            let access = AtFlags::AT_EACCESS;
            faccessat(AT_FDCWD, directory, AccessFlags::W_OK, access).map_err(Into::into)
        }
        // Only opening a FIFO shows whether a process reads it.
        found => found.and_then(|_| open(path)).map(drop),
    };
    checked.map_err(refused)
}

enum Task {
    Write(Pending),
    Reopen,
}

impl Task {
    fn len(&self) -> usize {
        match self {
            Self::Write(pending) => pending.bytes.len(),
            Self::Reopen => 0,
        }
    }
}

/// The engine's side of the thread.
#[derive(Debug)]
pub(super) struct Writer {
    tasks: Option<Sender<Task>>,
    done: Receiver<()>,
    lost: Arc<AtomicU64>,
    /// Whether the thread could not write the last records.
    failing: Arc<AtomicBool>,
    waiting_bytes: Arc<AtomicUsize>,
    written: Arc<Notify>,
    /// Whether the last records were lost. The first loss was logged.
    overflowing: bool,
}

impl Writer {
    pub(super) fn open(target: &AuditTarget, is_synced: bool) -> Result<Self, AuditError> {
        let output = match target {
            AuditTarget::Stdout => {
                let file = unbuffered_stdout().map_err(|source| AuditError::Open {
                    path: PathBuf::from("-"),
                    source,
                })?;
                Output::new(file, None)
            }
            AuditTarget::Journald if is_synced => return Err(AuditError::SyncedJournal),
            AuditTarget::Journald => {
                check_journald()?;
                Output::new(Journald, None)
            }
            AuditTarget::File(path) => Output::open(path)?,
        };
        Self::start(Output {
            is_synced,
            ..output
        })
    }

    pub(super) fn start(mut output: Output) -> Result<Self, AuditError> {
        let (tasks, queue) = channel();
        let (finished, done) = channel();
        let lost = Arc::clone(&output.lost);
        let failing = Arc::clone(&output.failing);
        let waiting_bytes = Arc::new(AtomicUsize::new(0));
        let waiting = Arc::clone(&waiting_bytes);
        let written = Arc::new(Notify::new());
        let told = output.is_synced.then(|| Arc::clone(&written));
        let work = move || {
            for task in queue {
                output.perform(&task);
                waiting.fetch_sub(task.len(), Ordering::Relaxed);
                told.iter().for_each(|written| written.notify_one());
            }
            // The daemon may have stopped waiting.
            let _ = finished.send(());
        };
        thread::Builder::new()
            .name("audit".to_owned())
            .spawn(work)
            .map_err(AuditError::Thread)?;
        Ok(Self {
            tasks: Some(tasks),
            done,
            lost,
            failing,
            waiting_bytes,
            written,
            overflowing: false,
        })
    }

    /// Queues records for the thread. If the queue is full, counts them as lost.
    pub(super) fn write(&mut self, pending: Pending) {
        let (bytes, records) = (pending.bytes.len(), pending.records);
        let is_full = self.waiting_bytes.load(Ordering::Relaxed) + bytes > MAX_WAITING_BYTES;
        if is_full || !self.send(Task::Write(pending)) {
            self.lost.fetch_add(records, Ordering::Relaxed);
            if !std::mem::replace(&mut self.overflowing, true) {
                tracing::error!("audit records are lost: the reader of the audit does not keep up");
            }
        } else if std::mem::take(&mut self.overflowing) {
            tracing::info!("audit records are written again");
        }
    }

    pub(super) fn reopen(&self) {
        if !self.send(Task::Reopen) {
            tracing::error!("the audit file is not opened again: its writer has ended");
        }
    }

    fn send(&self, task: Task) -> bool {
        // Add before sending, because the thread subtracts the same number.
        let bytes = task.len();
        self.waiting_bytes.fetch_add(bytes, Ordering::Relaxed);
        let sent = self.tasks.as_ref().map(|tasks| tasks.send(task));
        let is_sent = matches!(sent, Some(Ok(())));
        if !is_sent {
            self.waiting_bytes.fetch_sub(bytes, Ordering::Relaxed);
        }
        is_sent
    }

    /// Ends the thread after it has written everything.
    pub(super) fn close(&mut self) {
        self.tasks = None;
        if self.done.recv_timeout(CLOSE_TIMEOUT).is_err() {
            tracing::error!(
                "some audit records were not written before the stop: their reader does not keep up"
            );
        }
    }

    /// Whether the thread's queue is empty.
    pub(super) fn is_idle(&self) -> bool {
        self.waiting_bytes.load(Ordering::Relaxed) == 0
    }

    pub(super) fn written(&self) -> Arc<Notify> {
        Arc::clone(&self.written)
    }

    pub(super) fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }

    pub(super) fn is_failing(&self) -> bool {
        self.overflowing || self.failing.load(Ordering::Relaxed)
    }
}

/// Opens a file for appending. Opening a FIFO without a reader would block the daemon's start, so it is
/// refused.
fn open(path: &Path) -> io::Result<File> {
    let opened = OpenOptions::new()
        .create(true)
        .append(true)
        .mode(MODE)
        .custom_flags(libc::O_NONBLOCK)
        .open(path);
    let file = opened.map_err(|error| match error.raw_os_error() {
        Some(libc::ENXIO) => io::Error::other("nobody reads this FIFO or socket"),
        _ => error,
    })?;
    let flags = OFlag::from_bits_retain(fcntl(&file, FcntlArg::F_GETFL)?);
    fcntl(&file, FcntlArg::F_SETFL(flags - OFlag::O_NONBLOCK))?;
    Ok(file)
}

/// Reads the last [`MAX_TAIL`] bytes of a file. If the file is longer, the result starts with a whole line.
pub(super) fn tail(path: &Path) -> io::Result<Vec<u8>> {
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)?;
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Ok(Vec::new());
    }
    let from = metadata.len().saturating_sub(MAX_TAIL);
    let mut bytes = vec![0; usize::try_from(metadata.len() - from).unwrap_or(0)];
    file.read_exact_at(&mut bytes, from)?;
    Ok(bytes)
}

/// Standard output without the standard library's buffer. With the buffer, unwritten records would count as
/// written.
fn unbuffered_stdout() -> io::Result<File> {
    Ok(io::stdout().as_fd().try_clone_to_owned()?.into())
}

/// Whether the file ends within a line, which happens if the machine or the disk failed during a write.
fn ends_mid_line(file: &File, path: &Path) -> io::Result<bool> {
    let metadata = file.metadata()?;
    if !metadata.is_file() || metadata.len() == 0 {
        return Ok(false);
    }
    let mut last = [0];
    File::open(path)?.read_exact_at(&mut last, metadata.len() - 1)?;
    Ok(last != *b"\n")
}

/// Writes the records and tracks failures.
pub(super) struct Output {
    sink: Box<dyn Sink>,
    path: Option<PathBuf>,
    lost: Arc<AtomicU64>,
    /// Whether the last written record is incomplete.
    mid_line: bool,
    /// Whether the last write failed. The first failure was logged.
    failing: Arc<AtomicBool>,
    /// Whether each write must reach the disk.
    is_synced: bool,
}

impl Output {
    fn open(path: &Path) -> Result<Self, AuditError> {
        // Check before the file is created, because others could make the daemon create one elsewhere, and
        // again afterwards, when the file itself can be checked.
        trust::check(path).map_err(AuditError::Untrusted)?;
        let file = open(path).map_err(|source| AuditError::of(path, source))?;
        trust::check(path).map_err(AuditError::Untrusted)?;
        // A file that is writable but not readable is assumed to end with a whole line.
        let mid_line = ends_mid_line(&file, path).unwrap_or(false);
        Ok(Self {
            mid_line,
            ..Self::new(file, Some(path.to_owned()))
        })
    }

    /// `sink` must not buffer: bytes that it has accepted count as written.
    pub(super) fn new(sink: impl Sink + 'static, path: Option<PathBuf>) -> Self {
        Self {
            sink: Box::new(sink),
            path,
            lost: Arc::default(),
            mid_line: false,
            failing: Arc::default(),
            is_synced: false,
        }
    }

    #[cfg(test)]
    pub(super) fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }

    fn perform(&mut self, task: &Task) {
        match task {
            Task::Write(pending) => self.write(&pending.bytes, pending.records),
            Task::Reopen => self.reopen(),
        }
    }

    /// Writes whole records.
    pub(super) fn write(&mut self, bytes: &[u8], records: u64) {
        // End an incomplete record first, so that the next record is not appended to it.
        let separator: &[u8] = if self.mid_line { b"\n" } else { b"" };
        let (_, separated) = write_some(&mut self.sink, separator);
        let (written, result) = match separated {
            Ok(()) => {
                self.mid_line = false;
                write_some(&mut self.sink, bytes)
            }
            Err(error) => (0, Err(error)),
        };
        let result = match result {
            Ok(()) if self.is_synced => self.sink.sync(),
            result => result,
        };
        if let Some(last) = bytes[..written].last() {
            self.mid_line = *last != b'\n';
        }
        self.note(result, &bytes[written..], records);
    }

    /// Counts lost records, and logs the begin and the end of a failure.
    fn note(&mut self, result: io::Result<()>, unwritten: &[u8], records: u64) {
        match result {
            Ok(()) => {
                if self.failing.swap(false, Ordering::Relaxed) {
                    tracing::info!("the audit is written again");
                }
            }
            Err(error) => {
                let lines = unwritten.iter().filter(|byte| **byte == b'\n').count() as u64;
                let lost = lines.clamp(1, records.max(1));
                self.lost.fetch_add(lost, Ordering::Relaxed);
                if !self.failing.swap(true, Ordering::Relaxed) {
                    tracing::error!("audit records are lost, the audit cannot be written: {error}");
                }
            }
        }
    }

    fn reopen(&mut self) {
        let Some(path) = &self.path else {
            return;
        };
        match Self::open(path) {
            Ok(output) => {
                self.sink = output.sink;
                // The path may still be the open file, which may end with an incomplete record.
                self.mid_line = output.mid_line;
            }
            Err(error) => {
                tracing::error!("{error}; the file that was open goes on");
            }
        }
    }
}

/// Writes as much as possible. Returns the number of written bytes and the error that stopped the write.
fn write_some(sink: &mut impl Write, mut bytes: &[u8]) -> (usize, io::Result<()>) {
    let whole = bytes.len();
    while !bytes.is_empty() {
        match sink.write(bytes) {
            Ok(0) => return (whole - bytes.len(), Err(io::ErrorKind::WriteZero.into())),
            Ok(written) => bytes = &bytes[written..],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return (whole - bytes.len(), Err(error)),
        }
    }
    (whole, Ok(()))
}
