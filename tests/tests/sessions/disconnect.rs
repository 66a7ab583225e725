//! Kernels without `SOCK_DESTROY`: a plain TCP connection is reset through a descriptor that is
//! taken from its process. The daemon uses `SOCK_DESTROY` on this kernel, so the tests call that
//! code directly.

use std::{
    io::Read as _,
    net::{Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr},
    os::fd::AsRawFd as _,
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use nix::{
    errno::Errno,
    sys::socket::{SockaddrStorage, bind},
};
use session_enforcer::reaper::{
    diag::{Detail, DiagSocket, SockDiagError, SocketId, state},
    disconnect::{Answer, DisconnectError, reset_by_cookie, reset_tcp, socket_id},
    processes::find_holders,
    protocol::{Holder, SearchScope, SocketKey},
};
use session_enforcer_tests::{
    Lab, Listener, Pair, cookie, dial, disconnect, eventually, patience, set_option,
};

const AGENT: &str = env!("CARGO_BIN_EXE_session-enforcer-test-agent");
const LOOPBACK: (Ipv4Addr, u16) = (Ipv4Addr::LOCALHOST, 0);

fn open(lab: &Lab, address: impl Into<SocketAddr>) -> Result<Pair> {
    Pair::open(&lab.outside, &lab.inside.listen(address)?)
}

/// Resets a connection as the daemon does: it searches for the holder if it is told to.
fn reset(target: &SocketId) -> Result<Answer, DisconnectError> {
    let mut diag = DiagSocket::open()?;
    match reset_tcp(&mut diag, target, None) {
        Err(DisconnectError::NeedsHolder(key)) => {
            reset_tcp(&mut diag, target, holder(key, &HOST).as_ref())
        }
        other => other,
    }
}

const HOST: SearchScope = SearchScope::Host { from: 0 };

fn holder(key: SocketKey, scope: &SearchScope) -> Option<Holder> {
    find_holders(vec![key], scope, patience()).0.remove(&key)
}

#[test]
fn both_ends_see_the_reset_and_no_other_connection_of_the_process_does() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    for address in [
        SocketAddr::from(LOOPBACK),
        SocketAddr::from((Ipv6Addr::LOCALHOST, 0)),
    ] {
        let [pair, other] = [open(&lab, address)?, open(&lab, address)?];
        let target = socket_id(&pair.server)?;
        assert_eq!(reset(&target)?, Answer::Reset);
        let [client, server] = pair.ends()?;
        assert_eq!(client.error, Some(Errno::ECONNRESET));
        assert_eq!(server.error, Some(Errno::ECONNRESET));
        other.round_trip()?;
        assert_eq!(reset(&target)?, Answer::Gone);
    }
    Ok(())
}

#[test]
fn a_thread_that_waits_for_payload_returns() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let pair = open(&lab, LOOPBACK)?;
    let target = socket_id(&pair.server)?;
    thread::scope(|scope| {
        let reader = scope.spawn(|| (&pair.server).read(&mut [0]));
        thread::sleep(Duration::from_millis(200));
        assert_eq!(reset(&target)?, Answer::Reset);
        let read = reader.join().expect("the thread that reads");
        let error = read.expect_err("an error and no payload");
        // `WouldBlock` would mean that the read timed out and that the connection still exists.
        assert_ne!(error.kind(), std::io::ErrorKind::WouldBlock);
        Ok(())
    })
}

#[test]
fn half_closed_connections_are_reset() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    // After a FIN from the peer, a reset is reported as EPIPE (`tcp_reset()`).
    for (client_closes, error) in [(true, Errno::ECONNRESET), (false, Errno::EPIPE)] {
        let pair = open(&lab, LOOPBACK)?;
        let target = socket_id(&pair.server)?;
        let closer = if client_closes {
            &pair.client
        } else {
            &pair.server
        };
        closer.shutdown(Shutdown::Write)?;
        assert_eq!(reset(&target)?, Answer::Reset);
        assert_eq!(pair.ends()?[0].error, Some(error));
    }
    Ok(())
}

#[test]
fn a_connection_with_another_cookie_is_never_reset() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let [pair, other] = [open(&lab, LOOPBACK)?, open(&lab, LOOPBACK)?];
    // The tuple of one connection with the cookie of the other.
    let mixed = SocketId {
        cookie: cookie(&other.server)?,
        ..socket_id(&pair.server)?
    };
    assert_eq!(reset(&mixed)?, Answer::Gone);
    pair.round_trip()?;
    other.round_trip()?;
    Ok(())
}

#[test]
fn a_descriptor_that_refers_to_another_socket_now_is_not_used() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let [pair, other] = [open(&lab, LOOPBACK)?, open(&lab, LOOPBACK)?];
    let target = socket_id(&pair.server)?;
    let mut diag = DiagSocket::open()?;
    let Err(DisconnectError::NeedsHolder(key)) = reset_tcp(&mut diag, &target, None) else {
        anyhow::bail!("it is reset without a holder");
    };
    let before = holder(key, &HOST).context("a holder")?;
    // After the scan, the process closes its descriptor, and another socket gets the same number.
    let kept = pair.server.try_clone()?;
    // SAFETY: both descriptors are open and stay open; the second refers to another socket
    // afterwards.
    let status = unsafe { libc::dup2(other.server.as_raw_fd(), pair.server.as_raw_fd()) };
    ensure!(status >= 0, "dup2: {}", Errno::last());
    let result = reset_tcp(&mut diag, &target, Some(&before));
    assert!(
        matches!(result, Err(DisconnectError::Another { pid }) if pid == std::process::id()),
        "{result:?}"
    );
    other.round_trip()?;
    assert_eq!(reset(&target)?, Answer::Reset);
    drop(kept);
    Ok(())
}

#[test]
fn a_connection_can_be_reset_only_once_a_process_has_accepted_it() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen(LOOPBACK)?;
    let client = dial(lab.outside.tcp(listener.address)?, listener.address)?;
    let port = client.local_addr()?.port();
    // The kernel lists the connection once the last segment of the handshake has arrived.
    let waiting = eventually("the connection that waits", patience(), || {
        let table = DiagSocket::open()?.listed(state::SESSIONS, [0, 0])?;
        let mut table = table.into_iter();
        Ok(table.find(|socket| socket.target.remote_port == port && socket.inode == 0))
    })?;
    let result = reset(&waiting.target);
    assert!(
        matches!(result, Err(DisconnectError::NotAccepted)),
        "{result:?}"
    );
    let accepted = listener.accept()?;
    assert_eq!(reset(&waiting.target)?, Answer::Reset);
    drop(accepted);
    Ok(())
}

#[test]
fn a_connection_is_found_by_its_cookie_alone_but_not_in_another_cgroup() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let [pair, other] = [open(&lab, LOOPBACK)?, open(&lab, LOOPBACK)?];
    let target = socket_id(&pair.server)?;
    let key = SocketKey::Cookie(target.cookie);
    let needed = reset_by_cookie(&target, None);
    assert!(
        matches!(needed, Err(DisconnectError::NeedsHolder(needed)) if needed == key),
        "{needed:?}"
    );
    // This process holds the descriptor, and it is in another cgroup.
    let cgroup = SearchScope::Cgroup(lab.cgroup.id()?);
    assert_eq!(holder(key, &cgroup), None);
    let holder = holder(key, &HOST).context("a holder")?;
    let reset = || reset_by_cookie(&target, Some(&holder));
    assert_eq!(reset()?, Answer::Reset);
    assert_eq!(pair.ends()?[0].error, Some(Errno::ECONNRESET));
    // The process still has the socket, which is not connected any more.
    assert_eq!(reset()?, Answer::Gone);
    other.round_trip()?;
    Ok(())
}

/// The socket keeps its cookie.
#[test]
fn a_socket_that_is_connected_again_is_not_reset_by_its_cookie() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let first = open(&lab, LOOPBACK)?;
    let before = socket_id(&first.client)?;
    let listener = lab.inside.listen(LOOPBACK)?;
    let again = Pair::dial(disconnect(first.client)?, &listener, listener.address)?;
    let now = socket_id(&again.client)?;
    assert_eq!(now.cookie, before.cookie);
    let holder = holder(SocketKey::Cookie(now.cookie), &HOST).context("a holder")?;
    let reset = |target| reset_by_cookie(target, Some(&holder));
    assert_eq!(reset(&before)?, Answer::Gone);
    again.round_trip()?;
    assert_eq!(reset(&now)?, Answer::Reset);
    Ok(())
}

/// The kernel lists 16 sockets of a hash bucket at a time, and resumes by their number.
#[test]
fn a_socket_that_a_search_may_have_missed_is_not_taken_for_closed() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let listener = lab.inside.listen(LOOPBACK)?;
    let first = dial_from([127, 0, 0, 2], 0, &lab, &listener)?;
    let target = socket_id(&first.server)?;
    let port = first.client_address.port();
    let gone = SocketId {
        cookie: target.cookie + 1_000_000,
        ..target
    };
    let mut diag = DiagSocket::open()?;
    let mut search = |target: SocketId| diag.search(&[target]);
    assert_eq!(search(gone)?, [None]);
    let others = (3..20).map(|last| dial_from([127, 0, 0, last], port, &lab, &listener));
    let others = others.collect::<Result<Vec<_>>>()?;
    assert!(search(target)?[0].is_some());
    let result = search(gone);
    assert!(matches!(result, Err(SockDiagError::Crowded)), "{result:?}");
    drop(others);
    Ok(())
}

/// A connection from this address and port.
fn dial_from(address: [u8; 4], port: u16, lab: &Lab, listener: &Listener) -> Result<Pair> {
    let from = SocketAddr::from((address, port));
    let socket = lab.outside.tcp(from)?;
    set_option(&socket, libc::SOL_SOCKET, libc::SO_REUSEADDR, 1)?;
    bind(socket.as_raw_fd(), &SockaddrStorage::from(from))?;
    Pair::dial(socket, listener, listener.address)
}

/// The kernel destroys the `TIME_WAIT` socket and answers ENOENT, so the daemon counts no reset.
#[test]
fn a_time_wait_socket_is_no_session() -> Result<()> {
    let lab = Lab::new(AGENT)?;
    let Pair { client, server, .. } = open(&lab, LOOPBACK)?;
    let target = socket_id(&client)?;
    drop(client);
    // Wait for the client's FIN.
    ensure!((&server).read(&mut [0])? == 0);
    drop(server);
    let mut diag = DiagSocket::open()?;
    eventually("the end of both", patience(), || {
        let left = diag.query(&target, Detail::Names)?;
        Ok(left
            .is_some_and(|left| left.state == state::TIME_WAIT)
            .then_some(()))
    })?;
    assert_eq!(diag.destroy(&target)?.code, libc::ENOENT);
    Ok(())
}
