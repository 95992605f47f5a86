//! How a backend is connected to.

use std::io;

use nix::errno::Errno;
use socket2::{Domain, Socket};

use crate::{
    config::Routing,
    net::keepalive,
    proxy::balance::{Backend, Lease},
};

/// Begins to connect, and returns whether the connect has completed; if not, an edge tells the
/// result.
///
/// On loopback the handshake has completed when connect() returns, although it returns EINPROGRESS:
/// the answer came while connect() held the socket's lock. A second call fetches the result. It
/// saves a turn of the loop, and saves the worker a wakeup for a connection without its first
/// bytes.
///
/// If the client's bytes are about to follow, they are sent with the handshake's last segment,
/// which is held back for them (tcp(7), `TCP_QUICKACK`). So the worker is woken once, for a
/// connection that already has a request in it. If no bytes followed after all, the kernel would
/// send the segment 200 ms later.
///
/// A remote worker gets TCP keepalive. On loopback the kernel reports a closed peer at once.
pub(super) fn connect(
    backend: &mut Lease,
    bytes_follow: bool,
    routing: &Routing,
) -> Result<(Socket, bool), Errno> {
    let domain = backend.domain();
    let (socket, pin) = backend.socket().map_err(errno)?;
    backend.pin = pin;
    if domain != Domain::UNIX {
        socket.set_tcp_nodelay(true).map_err(errno)?;
        if bytes_follow && backend.is_local() {
            socket.set_tcp_quickack(false).map_err(errno)?;
        }
        if !backend.is_local() {
            socket.set_tcp_keepalive(&keepalive(routing.keepalive)).map_err(errno)?;
        }
    }
    for _ in 0..2 {
        match backend.endpoint().connect(&socket).map_err(errno) {
            Ok(()) => return Ok((socket, true)),
            Err(Errno::EINPROGRESS) if backend.is_local() => {}
            Err(Errno::EINPROGRESS | Errno::EALREADY) => break,
            Err(error) => return Err(error),
        }
    }
    Ok((socket, false))
}

pub(super) fn errno(error: io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or(0))
}

/// Whether the kernel chose as source port the very port that was to be reached, and so connected
/// the socket to itself (RFC 9293, section 3.5, simultaneous open). Then no one listens there.
pub(super) fn is_self_connected(socket: &Socket, backend: &Backend) -> bool {
    let at = backend.endpoint().address();
    backend.is_ephemeral() && socket.local_addr().is_ok_and(|local| local == *at)
}
