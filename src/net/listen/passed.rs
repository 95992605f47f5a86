//! A listening socket that another process has too, and has made: the service manager's.

use std::{io, sync::Arc};

use socket2::Socket;

use super::{BindError, Listener};
use crate::config::Listen;

/// A socket that lbd was given, and whoever gave it keeps.
///
/// It is left as it came: clients in its queue, its path, its backlog. Only O_NONBLOCK, which belongs
/// to the open file description and so to everybody (open(2)), is set while a [`Listener`] needs it;
/// it is as it was when this is dropped.
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
    /// `AddrNotAvailable` where it has neither an IP address nor a path.
    pub fn new(socket: Socket, name: String) -> io::Result<Self> {
        let address = Self::address_of(&socket).ok_or(io::ErrorKind::AddrNotAvailable)?;
        let was_blocking = !socket.nonblocking()?;
        Ok(Self { socket, name, address, was_blocking })
    }

    /// Where `socket` is bound, if that is what a configuration can name.
    #[must_use]
    pub fn address_of(socket: &Socket) -> Option<Listen> {
        let address = socket.local_addr().ok()?;
        let tcp = address.as_socket().map(Listen::Tcp);
        tcp.or_else(|| Some(Listen::Unix(address.as_pathname()?.to_owned())))
    }

    /// What it was passed as (`FileDescriptorName=`).
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where it is bound.
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
            // Who passed it may do without; most set it anew for whom they pass it to next.
            _ = self.socket.set_nonblocking(false);
        }
    }
}

impl Listener {
    /// A listener for `listen` on a socket that is bound there, or stands for it.
    ///
    /// # Errors
    /// Where there is no descriptor left, or the socket is of an unexpected kind.
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
