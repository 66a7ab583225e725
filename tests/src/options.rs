//! Socket options through setsockopt(2) and getsockopt(2).

use std::{
    io, mem,
    os::fd::{AsFd, AsRawFd as _},
    time::Duration,
};

use anyhow::{Result, bail};
use libc::c_int;
use nix::errno::Errno;

/// Sets a numeric option.
///
/// # Errors
///
/// Fails if the kernel refuses.
pub fn set_option(socket: &impl AsFd, level: c_int, name: c_int, value: c_int) -> Result<()> {
    set_bytes_option(socket, level, name, &value.to_ne_bytes())
}

/// Sets an option whose value is a structure or a text.
///
/// # Errors
///
/// Fails if the kernel refuses.
pub fn set_bytes_option(socket: &impl AsFd, level: c_int, name: c_int, value: &[u8]) -> Result<()> {
    let fd = socket.as_fd().as_raw_fd();
    // SAFETY: the kernel reads at most `value.len()` bytes at `value`.
    let status = unsafe {
        libc::setsockopt(
            fd,
            level,
            name,
            value.as_ptr().cast(),
            value.len() as libc::socklen_t,
        )
    };
    if status != 0 {
        bail!(
            "setting option {name} of level {level}: {}",
            io::Error::last_os_error()
        );
    }
    Ok(())
}

/// Reads a numeric option.
///
/// # Errors
///
/// Fails if the kernel refuses.
pub fn option(socket: &impl AsFd, level: c_int, name: c_int) -> Result<c_int> {
    let mut value = 0;
    read_option(socket, level, name, &mut value)?;
    Ok(value)
}

/// Reads an option into a value that consists of integers.
fn read_option<T>(socket: &impl AsFd, level: c_int, name: c_int, value: &mut T) -> Result<()> {
    let mut length = size_of::<T>() as libc::socklen_t;
    let (fd, value) = (socket.as_fd().as_raw_fd(), std::ptr::from_mut(value));
    // SAFETY: the kernel writes at most `length` bytes, and the value has that size.
    let status = unsafe { libc::getsockopt(fd, level, name, value.cast(), &raw mut length) };
    if status != 0 {
        bail!(
            "reading option {name} of level {level}: {}",
            io::Error::last_os_error()
        );
    }
    Ok(())
}

/// Reads the socket's cookie.
///
/// # Errors
///
/// Fails if the kernel refuses.
pub fn cookie(socket: &impl AsFd) -> Result<u64> {
    let mut value = 0;
    read_option(socket, libc::SOL_SOCKET, libc::SO_COOKIE, &mut value)?;
    Ok(value)
}

/// Takes the pending error of a socket, if there is one.
///
/// # Errors
///
/// Fails if the kernel refuses.
pub fn last_error(socket: &impl AsFd) -> Result<Option<Errno>> {
    let code = option(socket, libc::SOL_SOCKET, libc::SO_ERROR)?;
    Ok((code != 0).then(|| Errno::from_raw(code)))
}

/// Enables keepalive probes, the first after `interval` without traffic.
///
/// # Errors
///
/// Fails if the kernel refuses.
pub fn keep_alive(socket: &impl AsFd, interval: Duration) -> Result<()> {
    let seconds = c_int::try_from(interval.as_secs())?;
    set_option(socket, libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1)?;
    set_option(socket, libc::IPPROTO_TCP, libc::TCP_KEEPIDLE, seconds)?;
    set_option(socket, libc::IPPROTO_TCP, libc::TCP_KEEPINTVL, seconds)
}

/// Makes close(2) reset the connection, which leaves nothing behind, not even the tuple.
///
/// # Errors
///
/// Fails if the kernel refuses.
pub fn reset_on_close(socket: &impl AsFd) -> Result<()> {
    // The fields of `struct linger`: enabled, no time.
    let linger = [1 as c_int, 0].map(c_int::to_ne_bytes).concat();
    set_bytes_option(socket, libc::SOL_SOCKET, libc::SO_LINGER, &linger)
}

/// Binds a socket to one interface.
///
/// # Errors
///
/// Fails if the interface does not exist in the socket's namespace.
pub fn bind_to_device(socket: &impl AsFd, interface: &str) -> Result<()> {
    set_bytes_option(
        socket,
        libc::SOL_SOCKET,
        libc::SO_BINDTODEVICE,
        interface.as_bytes(),
    )
}

/// Reads the kernel's data about a connection.
///
/// # Errors
///
/// Fails if the kernel refuses.
pub fn tcp_info(socket: &impl AsFd) -> Result<libc::tcp_info> {
    // SAFETY: the structure consists of integers, for which zeroes are valid.
    let mut info: libc::tcp_info = unsafe { mem::zeroed() };
    read_option(socket, libc::IPPROTO_TCP, libc::TCP_INFO, &mut info)?;
    Ok(info)
}
