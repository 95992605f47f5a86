//! A listening socket that another process, the service manager, has created and passed to lbd.

use std::{io, sync::Arc};

use socket2::Socket;

use super::{BindError, Listener};
use crate::config::Listen;

/// A listening socket that was passed to lbd, and that the passing process keeps.
///
/// lbd leaves it as it was: the clients in its queue, its path, its backlog. Only O_NONBLOCK, which
/// belongs to the open file description and so affects every process (open(2)), is set while a
/// [`Listener`] needs it. It is restored when this is dropped.
#[derive(Debug)]
pub struct Shared {
    socket: Socket,
    name: String,
    address: Listen,
    was_blocking: bool,
}

impl Shared {
    /// Takes over a listening stream socket that was passed under `name`.
    ///
    /// # Errors
    /// `AddrNotAvailable` if it has neither an IP address nor a path.
    pub fn new(socket: Socket, name: String) -> io::Result<Self> {
        let address = Self::address_of(&socket).ok_or(io::ErrorKind::AddrNotAvailable)?;
        let was_blocking = !socket.nonblocking()?;
        Ok(Self { socket, name, address, was_blocking })
    }

    /// The address of `socket`, if a configuration can name such an address.
    #[must_use]
    pub fn address_of(socket: &Socket) -> Option<Listen> {
        let address = socket.local_addr().ok()?;
        let tcp = address.as_socket().map(Listen::Tcp);
        tcp.or_else(|| Some(Listen::Unix(address.as_pathname()?.to_owned())))
    }

    /// The name under which it was passed (`FileDescriptorName=`).
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The address that it is bound to.
    #[must_use]
    pub fn address(&self) -> &Listen {
        &self.address
    }

    /// Whether it is an IPv6 socket that takes IPv4 clients too (ipv6(7), `IPV6_V6ONLY`).
    #[must_use]
    pub fn is_dual_stack(&self) -> bool {
        self.socket.only_v6().is_ok_and(|only| !only)
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        if self.was_blocking {
            // A failure is harmless: most service managers set the flag anew for the process that
            // they pass the socket to next.
            _ = self.socket.set_nonblocking(false);
        }
    }
}

impl Listener {
    /// Creates a listener for `listen` on a socket that is bound there, or is configured to stand
    /// for it.
    ///
    /// # Errors
    /// If no descriptor is left, or the socket is of an unexpected kind.
    pub fn share(shared: &Arc<Shared>, listen: &Listen) -> Result<Self, BindError> {
        let socket = shared.socket.try_clone();
        socket
            .and_then(|socket| Self::over(socket, listen, Some(Arc::clone(shared))))
            .map_err(|cause| BindError::new(listen, cause))
    }
}

#[cfg(test)]
mod tests {
    use std::{
        net::{TcpListener, TcpStream},
        os::fd::OwnedFd,
    };

    use super::*;

    #[test]
    fn a_shared_socket_is_left_as_it_came() {
        let theirs = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = theirs.local_addr().unwrap();
        let copy = Socket::from(OwnedFd::from(theirs.try_clone().unwrap()));
        let shared = Arc::new(Shared::new(copy, "lbd.socket".to_owned()).unwrap());
        assert_eq!(*shared.address(), Listen::Tcp(address));
        let listener = Listener::share(&shared, shared.address()).unwrap();
        assert!(socket2::SockRef::from(&theirs).nonblocking().unwrap());

        // One that waits stays, and another one comes in: no filter, and the queue is not emptied.
        let _first = TcpStream::connect(address).unwrap();
        listener.quiesce().unwrap();
        let _second = TcpStream::connect(address).unwrap();
        drop((listener, shared));
        assert!(!socket2::SockRef::from(&theirs).nonblocking().unwrap());
        for _ in 0..2 {
            theirs.accept().unwrap();
        }
    }
}
