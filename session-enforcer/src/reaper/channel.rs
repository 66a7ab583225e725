//! The socket pair between the engine and a reaper. Each message arrives whole and may carry a descriptor.

use std::{
    io::{self, IoSlice, IoSliceMut},
    os::fd::{AsFd, AsRawFd as _, FromRawFd as _, OwnedFd, RawFd},
};

use nix::{
    errno::Errno,
    sys::socket::{
        AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg,
        sendmsg, setsockopt, socketpair, sockopt,
    },
};

use super::protocol::MAX_MESSAGE;

/// Returns both ends of a channel: the engine's end, which is non-blocking, and the reaper's end.
///
/// # Errors
///
/// Fails if the process has no free descriptor.
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let (kind, flags) = (SockType::SeqPacket, SockFlag::SOCK_CLOEXEC);
    let (engine, reaper) = socketpair(AddressFamily::Unix, kind, None, flags)?;
    for end in [&engine, &reaper] {
        // The buffer fits one message plus the kernel's overhead, independent of the system's default size.
        setsockopt(end, sockopt::SndBuf, &(2 * MAX_MESSAGE))?;
    }
    let nonblocking = nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK);
    nix::fcntl::fcntl(&engine, nonblocking)?;
    Ok((engine, reaper))
}

/// Sends a message and, if given, a descriptor.
///
/// # Errors
///
/// EPIPE if the other side has ended. EAGAIN if a non-blocking channel has no room.
pub fn send(channel: &impl AsFd, bytes: &[u8], fd: Option<&OwnedFd>) -> io::Result<()> {
    let fds: Vec<RawFd> = fd.iter().map(|fd| fd.as_raw_fd()).collect();
    let rights = [ControlMessage::ScmRights(&fds)];
    let control = if fds.is_empty() { &[] } else { &rights[..] };
    let raw = channel.as_fd().as_raw_fd();
    loop {
        let sent = sendmsg::<()>(
            raw,
            &[IoSlice::new(bytes)],
            control,
            MsgFlags::MSG_NOSIGNAL,
            None,
        );
        match sent {
            Ok(_) => return Ok(()),
            Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Receives one message into the buffer. Returns its length (0 if the other side has ended) and the
/// descriptor that came with it.
///
/// # Errors
///
/// EAGAIN if a non-blocking channel has no message. EMSGSIZE if the message does not fit into the buffer.
pub fn receive(channel: &impl AsFd, buffer: &mut [u8]) -> io::Result<(usize, Option<OwnedFd>)> {
    let mut space = nix::cmsg_space!(RawFd);
    let raw = channel.as_fd().as_raw_fd();
    loop {
        let mut parts = [IoSliceMut::new(buffer)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        match recvmsg::<()>(raw, &mut parts, Some(&mut space), flags) {
            Ok(message) => {
                let fd = descriptor(message.cmsgs()?);
                if message.flags.contains(MsgFlags::MSG_TRUNC) {
                    return Err(Errno::EMSGSIZE.into());
                }
                return Ok((message.bytes, fd));
            }
            Err(Errno::EINTR) => {}
            // The other process ended with unread messages in its queue.
            Err(Errno::ECONNRESET) => return Ok((0, None)),
            Err(error) => return Err(error.into()),
        }
    }
}

fn descriptor(messages: impl Iterator<Item = ControlMessageOwned>) -> Option<OwnedFd> {
    let mut fds = messages
        .filter_map(|message| match message {
            ControlMessageOwned::ScmRights(fds) => Some(fds),
            _ => None,
        })
        .flatten()
        // SAFETY: the kernel has just opened these descriptors for this process.
        .map(|fd| unsafe { OwnedFd::from_raw_fd(fd) });
    let first = fds.next();
    fds.for_each(drop);
    first
}

#[cfg(test)]
mod tests {
    use std::{fs::File, io::ErrorKind, os::unix::fs::MetadataExt as _};

    use super::*;

    #[test]
    fn messages_come_whole_with_their_descriptor_and_an_end_is_an_end() {
        let (engine, reaper) = pair().unwrap();
        let mut buffer = vec![0; MAX_MESSAGE];
        let none = receive(&engine, &mut buffer).unwrap_err();
        assert_eq!(none.kind(), ErrorKind::WouldBlock);
        let file = File::open("/dev/null").unwrap();
        let number = file.metadata().unwrap().ino();
        send(&reaper, &vec![7; MAX_MESSAGE], None).unwrap();
        assert!(matches!(
            receive(&engine, &mut buffer),
            Ok((MAX_MESSAGE, None))
        ));
        send(&engine, b"x", Some(&file.into())).unwrap();
        let (length, fd) = receive(&reaper, &mut buffer).unwrap();
        assert_eq!(&buffer[..length], b"x");
        assert_eq!(File::from(fd.unwrap()).metadata().unwrap().ino(), number);
        drop(reaper);
        assert!(matches!(receive(&engine, &mut buffer), Ok((0, None))));
        let sent = send(&engine, b"x", None).unwrap_err();
        assert_eq!(sent.raw_os_error(), Some(libc::EPIPE));
    }
}
