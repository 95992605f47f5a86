//! The workers' own listening sockets, where lbd makes them: on a port ([`Port`], `socket =
//! "inherit"`), as follows, without one ([`UnnamedUnixListener`], `socket = "unix"`), or on the public address
//! ([`direct`]).
//!
//! Each worker incarnation has a listening socket of its own: two that accept from one socket can't
//! be told apart, and a probe of the one may be answered by the other. The sockets of a slot share
//! its port by `SO_REUSEPORT`, and a program says which of them a new connection goes to: the one
//! that is selected, or, for a probe, by its source port, the one it is meant for.
//!
//! lbd keeps a copy of each socket until nothing of its worker is left. So what queues in it
//! outlives the worker: a successor takes it over with the socket, or lbd accepts it and hands it to
//! another worker.
//!
//! What queues in a socket begins with the header that its worker expects
//! ([`ProxyProtocol`](crate::config::ProxyProtocol)), so that only a worker that expects the same one takes it over.
//!
//! O_NONBLOCK belongs to the open file description, which worker and lbd share: the sockets are made
//! blocking, as systemd passes them, and stay so.

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

/// How many clients may wait in the accept queue of a listening socket: asked for, the kernel caps it to
/// `net.core.somaxconn`.
pub(crate) const BACKLOG: i32 = 4096;

/// Whether a socket may share its port from the bind on.
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

/// A non-blocking socket to connect to `address` with.
///
/// # Errors
/// Where there is no descriptor left for it.
pub fn unconnected(address: SocketAddr) -> io::Result<Socket> {
    Socket::new(Domain::for_address(address), Type::STREAM.nonblocking(), None)
}

/// Whether `address` is free at this moment, and with port 0 one that is. Whoever had it would pass
/// for the worker that is to bind it.
///
/// # Errors
/// `AddrInUse` where somebody has it.
pub fn free(address: SocketAddr) -> io::Result<SocketAddr> {
    let socket = bound(address, Sharing::NotYet)?;
    // A socket that is bound with SO_REUSEADDR and does not listen conflicts with nobody but a
    // listener, which shows here at the latest.
    socket.listen(1)?;
    Ok(socket.local_addr()?.as_socket().unwrap_or(address))
}

/// Has `socket`, which listens on TCP, answer no new client, while those whose connect has been
/// answered stay to be accepted: their SYNs are dropped, so that they come again a second later, and
/// find either somebody else or a closed port.
///
/// Classic BPF on a TCP socket sees the segment from its TCP header on, for IPv4 and IPv6 alike
/// (`tcp_filter` in net/ipv4/tcp_ipv4.c); byte 13 holds the flags (RFC 9293, section 3.1).
///
/// # Errors
/// Where the system has no memory for it.
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

/// How many connections wait in the accept queue of `socket`, which listens on TCP.
///
/// # Errors
/// Where it is no such socket.
fn queue_length(socket: &Socket) -> io::Result<u32> {
    // Of a listening socket that is its backlog now (`tcp_get_info` in net/ipv4/tcp.c).
    Ok(getsockopt(socket, options::TcpInfo)?.tcpi_unacked)
}

/// Everything that waits in the accept queue, until it is empty or the acceptor [is
/// short](Acceptor::is_short) of room.
fn accept_all(socket: &Socket, acceptor: &mut Acceptor) -> Vec<Socket> {
    std::iter::from_fn(|| acceptor.accept(socket, libc::SOCK_CLOEXEC).ok()).collect()
}
