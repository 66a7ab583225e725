//! Where records are written to.

use std::{
    fs::File,
    io::{self, Write},
};

/// A target of records.
pub(super) trait Sink: Write + Send {
    /// Waits until everything is on the disk.
    fn sync(&self) -> io::Result<()>;
}

impl Sink for File {
    fn sync(&self) -> io::Result<()> {
        match self.sync_data() {
            // A pipe or a terminal does not support it (fsync(2)).
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => Ok(()),
            synced => synced,
        }
    }
}
