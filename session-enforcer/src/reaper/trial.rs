//! Tests whether this host can reset connections, on a loopback connection that is made for the test.

use std::{
    io::{ErrorKind, Read as _},
    net::{Ipv4Addr, TcpListener, TcpStream},
    os::fd::AsRawFd as _,
    time::Duration,
};

use super::{
    diag::{DiagSocket, SocketId},
    disconnect::{self, Answer},
    protocol::{Holder, Probed},
};

/// Lets the kernel destroy a loopback connection of this process and checks that it is gone. Without `SOCK_DESTROY` the
/// connection is reset with the method for such kernels.
pub fn try_reset() -> Probed {
    Trial::new()
        .and_then(Trial::destroy)
        .unwrap_or_else(|error| Probed::Failed(format!("{error:#}")))
}

/// A connection of this process.
pub(crate) struct Trial {
    client: TcpStream,
    target: SocketId,
    diag: DiagSocket,
    /// Its backlog has the other end.
    _listener: TcpListener,
}

impl Trial {
    /// Makes the connection.
    pub(crate) fn new() -> anyhow::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let client = TcpStream::connect(listener.local_addr()?)?;
        Ok(Self {
            target: disconnect::socket_id(&client)?,
            client,
            diag: DiagSocket::open()?,
            _listener: listener,
        })
    }

    fn destroy(mut self) -> anyhow::Result<Probed> {
        let code = self.diag.destroy(&self.target)?.code;
        if code == libc::EOPNOTSUPP {
            let tried = self.disconnect().map_err(|error| format!("{error:#}"));
            return Ok(Probed::NotSupported(tried));
        }
        if code == 0 {
            self.client.set_read_timeout(Some(Duration::from_secs(1)))?;
            match self.client.read(&mut [0]) {
                Err(error) if error.kind() == ErrorKind::ConnectionAborted => {}
                other => {
                    let error =
                        format!("the kernel claims success and the socket lives: {other:?}");
                    return Ok(Probed::NotDestroyed(error));
                }
            }
        }
        Ok(Probed::Destroyed(code))
    }

    /// Resets the connection with the method for kernels without `SOCK_DESTROY`.
    pub(crate) fn disconnect(mut self) -> anyhow::Result<()> {
        let pid = std::process::id();
        let holder = Holder {
            pid,
            thread: pid,
            fd: self.client.as_raw_fd(),
            comm: [0; 16],
        };
        let answer = disconnect::reset_tcp(&mut self.diag, &self.target, Some(&holder))?;
        anyhow::ensure!(answer == Answer::Reset, "the connection is not found");
        Ok(())
    }
}
