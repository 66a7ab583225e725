//! Tests whether this host can reset connections, on a loopback connection that is made for the test.

use std::{
    io::{ErrorKind, Read as _},
    net::{Ipv4Addr, TcpListener, TcpStream},
    time::Duration,
};

use super::{
    diag::DiagSocket,
    disconnect::{self, Answer, Holders},
    protocol::Probed,
};

/// Lets the kernel destroy a loopback connection of this process and checks that it is gone.
pub fn try_reset() -> Probed {
    match try_destroy() {
        Ok(libc::EOPNOTSUPP) => {
            Probed::NotSupported(try_disconnect().map_err(|error| format!("{error:#}")))
        }
        Ok(code) => Probed::Destroyed(code),
        Err(error) => Probed::Failed(format!("{error:#}")),
    }
}

/// Resets a connection of this process with the method for kernels without `SOCK_DESTROY`.
pub(crate) fn try_disconnect() -> anyhow::Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let client = TcpStream::connect(listener.local_addr()?)?;
    let target = disconnect::socket_id(&client)?;
    let (mut diag, mut holders) = (DiagSocket::open()?, Holders::default());
    let answer = disconnect::reset_tcp(&mut diag, &target, None, &mut holders)?;
    anyhow::ensure!(answer == Answer::Reset, "the connection is not found");
    Ok(())
}

/// Destroys a connection of this process and returns the kernel's answer.
fn try_destroy() -> anyhow::Result<i32> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let mut client = TcpStream::connect(listener.local_addr()?)?;
    let target = disconnect::socket_id(&client)?;
    let code = DiagSocket::open()?.destroy(&target)?.code;
    if code == 0 {
        client.set_read_timeout(Some(Duration::from_secs(1)))?;
        match client.read(&mut [0]) {
            Err(error) if error.kind() == ErrorKind::ConnectionAborted => {}
            other => anyhow::bail!("the kernel claims success and the socket lives: {other:?}"),
        }
    }
    Ok(code)
}
