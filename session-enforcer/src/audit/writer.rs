//! The thread that writes. It is the only part of the daemon that may wait for a disk or a reader.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc::{Receiver, SyncSender, TrySendError, channel, sync_channel},
    },
    thread,
    time::Duration,
};

use thiserror::Error;

use crate::config::AuditTarget;

/// Batches that may wait for the thread. The engine hands over one a pass, of a thousand records at
/// most: a reader that stands still costs some 50 MB before records are lost and counted.
const QUEUE: usize = 64;

/// How long the end of the daemon waits for the thread.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);

/// Readable by the group, as system logs are.
const MODE: u32 = 0o640;

/// Why the audit could not be opened.
#[derive(Debug, Error)]
pub enum AuditError {
    /// The file could not be opened.
    #[error("audit.path: {path}: {source}; name a file that can be appended to, or -")]
    Open {
        /// The file.
        path: PathBuf,
        /// What went wrong.
        source: io::Error,
    },
    /// The thread could not be started.
    #[error("starting the thread that writes the audit: {0}")]
    Thread(io::Error),
}

enum Task {
    Write { bytes: Vec<u8>, records: u64 },
    Reopen,
}

/// The engine's side of the thread.
#[derive(Debug)]
pub(super) struct Writer {
    tasks: Option<SyncSender<Task>>,
    done: Receiver<()>,
    lost: Arc<AtomicU64>,
}

impl Writer {
    pub(super) fn open(target: &AuditTarget) -> Result<Self, AuditError> {
        match target {
            AuditTarget::Stdout => Self::start(Output::new(io::stdout(), None)),
            AuditTarget::File(path) => {
                let file = open(path).map_err(|source| AuditError::Open {
                    path: path.clone(),
                    source,
                })?;
                Self::start(Output::new(file, Some(path.clone())))
            }
        }
    }

    pub(super) fn start(mut output: Output) -> Result<Self, AuditError> {
        let (tasks, queue) = sync_channel(QUEUE);
        let (finished, done) = channel();
        let lost = Arc::clone(&output.lost);
        let work = move || {
            for task in queue {
                output.perform(&task);
            }
            // Nobody listens where the daemon did not wait so long.
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
        })
    }

    pub(super) fn write(&self, bytes: Vec<u8>, records: u64) {
        let Some(tasks) = &self.tasks else {
            return;
        };
        match tasks.try_send(Task::Write { bytes, records }) {
            Ok(()) => {}
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => {
                self.lost.fetch_add(records, Ordering::Relaxed);
                tracing::error!(
                    "{records} audit records are lost: the audit is not written fast enough"
                );
            }
        }
    }

    pub(super) fn reopen(&self) {
        let sent = self
            .tasks
            .as_ref()
            .map(|tasks| tasks.try_send(Task::Reopen));
        if !matches!(sent, Some(Ok(()))) {
            tracing::error!("the audit file is not opened again: its writer does not keep up");
        }
    }

    /// Ends the thread when it has written everything.
    pub(super) fn close(mut self) {
        self.tasks = None;
        if self.done.recv_timeout(CLOSE_TIMEOUT).is_err() {
            tracing::error!("the audit is not written to its end: its writer does not keep up");
        }
    }

    pub(super) fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .create(true)
        .append(true)
        .mode(MODE)
        .open(path)
}

/// Where the records go, and what became of them.
pub(super) struct Output {
    sink: Box<dyn Write + Send>,
    path: Option<PathBuf>,
    lost: Arc<AtomicU64>,
    /// Whether a record was cut in the middle.
    mid_line: bool,
    /// Whether the last write failed, which was logged then.
    failing: bool,
}

impl Output {
    pub(super) fn new(sink: impl Write + Send + 'static, path: Option<PathBuf>) -> Self {
        Self {
            sink: Box::new(sink),
            path,
            lost: Arc::default(),
            mid_line: false,
            failing: false,
        }
    }

    #[cfg(test)]
    pub(super) fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }

    fn perform(&mut self, task: &Task) {
        match task {
            Task::Write { bytes, records } => self.write(bytes, *records),
            Task::Reopen => self.reopen(),
        }
    }

    /// Writes whole records.
    pub(super) fn write(&mut self, bytes: &[u8], records: u64) {
        // A record that was cut must not have the next one at its end.
        let separator: &[u8] = if self.mid_line { b"\n" } else { b"" };
        let (_, separated) = write_some(&mut self.sink, separator);
        let (written, result) = match separated {
            Ok(()) => write_some(&mut self.sink, bytes),
            Err(error) => (0, Err(error)),
        };
        if let Some(last) = bytes[..written].last() {
            self.mid_line = *last != b'\n';
        }
        let result = result.and_then(|()| self.sink.flush());
        self.note(result, &bytes[written..], records);
    }

    /// Counts what was lost, and logs when the trouble begins and ends.
    fn note(&mut self, result: io::Result<()>, unwritten: &[u8], records: u64) {
        match result {
            Ok(()) => {
                if std::mem::take(&mut self.failing) {
                    tracing::info!("the audit is written again");
                }
            }
            Err(error) => {
                let lines = unwritten.iter().filter(|byte| **byte == b'\n').count() as u64;
                let lost = lines.clamp(1, records.max(1));
                self.lost.fetch_add(lost, Ordering::Relaxed);
                if !std::mem::replace(&mut self.failing, true) {
                    tracing::error!("audit records are lost, the audit cannot be written: {error}");
                }
            }
        }
    }

    fn reopen(&mut self) {
        let Some(path) = &self.path else {
            return;
        };
        match open(path) {
            Ok(file) => {
                self.sink = Box::new(file);
                self.mid_line = false;
            }
            Err(error) => {
                tracing::error!(
                    "audit.path: {}: {error}; the file that was open goes on",
                    path.display()
                );
            }
        }
    }
}

/// Writes as much as goes; how much that was, and what stopped it.
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
