//! The workers' listening sockets, where lbd makes them, in three forms: on a port of the worker's
//! own ([`Port`], `socket = "inherit"`), as described below; unix sockets without a path
//! ([`UnnamedUnixListener`], `socket = "unix"`); and on the public address ([`direct`]).
//!
//! Each worker incarnation has a listening socket of its own. If two shared one, lbd could not tell
//! which of them accepted a connection, and one could answer a probe that was meant for the other.
//! The sockets of a slot share its port by `SO_REUSEPORT`, and a BPF program decides which socket
//! gets a new connection: the selected one, or for a probe, recognised by its source port, the one
//! it is meant for.
//!
//! lbd keeps a copy of each socket until its worker has gone completely. So the accept queue
//! outlives the worker: a successor takes it over with the socket, or lbd drains it and hands the
//! connections to other workers.
//!
//! Queued connections begin with the PROXY header that the socket's worker expects
//! ([`ProxyProtocol`](crate::config::ProxyProtocol)), so only a worker that expects the same header
//! takes the socket over.
//!
//! O_NONBLOCK belongs to the open file description, which worker and lbd share. So the sockets are
//! created blocking, as systemd passes them, and stay blocking.

mod accept;
pub mod diag;
pub mod direct;
mod holder;
mod listen;
mod options;
pub mod pathname;
mod peer;
mod port;
pub mod proxy_protocol;
pub(crate) mod rotation;
mod steer;
mod unix;

pub(crate) use accept::AcceptFailure;
pub use accept::{Acceptor, MayAccept, accept_nonblocking};
pub use holder::Holder;
pub use listen::{BindError, Listener, Shared};
pub(crate) use listen::{is_ephemeral, keepalive};
pub(crate) use peer::{Peer, Reach};
pub use port::{DrainedConnection, Port};
pub use unix::{Endpoint, UnnamedUnixListener};

use std::{
    io,
    net::{IpAddr, SocketAddr},
};

use nix::{libc, sys::socket::getsockopt};
use socket2::{Domain, SockFilter, Socket, Type};

/// The requested length of a listening socket's accept queue. The kernel caps it to
/// `net.core.somaxconn`.
pub(crate) const BACKLOG: i32 = 4096;

/// Whether `SO_REUSEPORT` is set before the bind.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Sharing {
    NotYet,
    Now,
}

fn bound(address: SocketAddr, sharing: Sharing) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    if matches!(address.ip(), IpAddr::V6(_)) {
        socket.set_only_v6(true)?;
    }
    // Connections of an earlier worker may still be in TIME_WAIT.
    socket.set_reuse_address(true)?;
    if sharing == Sharing::Now {
        socket.set_reuse_port(true)?;
    }
    socket.bind(&address.into())?;
    Ok(socket)
}

/// Creates a non-blocking socket to connect to `address`.
///
/// # Errors
/// If no descriptor is left.
pub fn unconnected(address: SocketAddr) -> io::Result<Socket> {
    Socket::new(Domain::for_address(address), Type::STREAM.nonblocking(), None)
}

/// Checks that `address` is free at this moment, and returns it; for port 0, returns a free port.
/// If another program had the address, it would be mistaken for the worker that is to bind it.
///
/// # Errors
/// `AddrInUse` if it is in use.
pub fn free(address: SocketAddr) -> io::Result<SocketAddr> {
    let socket = bound(address, Sharing::NotYet)?;
    // A socket that is bound with SO_REUSEADDR and does not listen conflicts only with listening
    // sockets. That conflict shows here at the latest.
    socket.listen(1)?;
    Ok(socket.local_addr()?.as_socket().unwrap_or(address))
}

/// Makes `socket`, which listens on TCP, ignore new clients. Clients whose connect has been
/// answered can still be accepted. New SYNs are dropped, so those clients retry a second later, and
/// find either a successor or a closed port.
///
/// A classic BPF filter on a TCP socket sees the segment from its TCP header on, for IPv4 and IPv6
/// alike (`tcp_filter` in net/ipv4/tcp_ipv4.c); byte 13 holds the flags (RFC 9293, section 3.1).
///
/// # Errors
/// If the system has no memory for the filter.
pub fn refuse_new(socket: &Socket) -> io::Result<()> {
    const SYN: u32 = 0x02;
    const ACK: u32 = 0x10;
    let op = |code: u32, jt, jf, k| SockFilter::new(code as u16, jt, jf, k);
    socket.attach_filter(&[
        op(libc::BPF_LD | libc::BPF_B | libc::BPF_ABS, 0, 0, 13),
        op(libc::BPF_ALU | libc::BPF_AND | libc::BPF_K, 0, 0, SYN | ACK),
        op(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, SYN),
        op(libc::BPF_RET | libc::BPF_K, 0, 0, 0),
        op(libc::BPF_RET | libc::BPF_K, 0, 0, u32::MAX),
    ])
}

/// The number of connections in the accept queue of `socket`, which listens on TCP.
///
/// # Errors
/// If it is not such a socket.
fn queue_length(socket: &Socket) -> io::Result<u32> {
    // For a listening socket, this field is the current length of the accept queue (`tcp_get_info`
    // in net/ipv4/tcp.c).
    Ok(getsockopt(socket, options::TcpInfo)?.tcpi_unacked)
}

/// Accepts everything in the accept queue, until it is empty or the acceptor [is
/// short](Acceptor::is_short) of room.
fn accept_all(socket: &Socket, acceptor: &mut Acceptor) -> Vec<Socket> {
    std::iter::from_fn(|| acceptor.accept(socket, libc::SOCK_CLOEXEC).ok()).collect()
}
