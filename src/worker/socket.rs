//! The listening socket: where it comes from, and accepting from it without ever blocking.
//!
//! A socket that was passed in is shared with whoever passed it, and stays blocking: see
//! [`Acceptor`].

use std::{
    env, io,
    net::{Ipv4Addr, SocketAddr, TcpStream},
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
    process,
};

use socket2::{Domain, Protocol, SockRef, Socket, Type};

use super::{WorkerError, system};
use crate::sockets::{Acceptor, accept_nonblocking};

/// `SD_LISTEN_FDS_START`, sd_listen_fds(3).
const LISTEN_FDS_START: RawFd = 3;

/// A listening TCP or unix socket, and what accepting from it without blocking takes.
#[derive(Debug)]
pub(super) struct Listener {
    socket: Socket,
    port: Option<u16>,
    /// Where the socket is blocking.
    acceptor: Option<Acceptor>,
}

impl Listener {
    /// The first that applies: `listen`, the inherited socket, `PORT` on 127.0.0.1.
    ///
    /// Must be called on the thread that will accept: that is the one the alarm interrupts.
    pub(super) fn from_environment(listen: Option<SocketAddr>) -> Result<Self, WorkerError> {
        if let Some(address) = listen {
            return Self::bind(address);
        }
        if let Some(listener) = Self::inherited()? {
            return Ok(listener);
        }
        let port = env::var_os("PORT").ok_or(WorkerError::NoSocket)?;
        match port.to_str().map(str::parse) {
            Some(Ok(port @ 1..)) => Self::bind((Ipv4Addr::LOCALHOST, port).into()),
            _ => Err(WorkerError::Port(port.to_string_lossy().into_owned())),
        }
    }

    /// The port it is bound to; `None` on unix.
    pub(super) fn port(&self) -> Option<u16> {
        self.port
    }

    /// Takes the next connection out of the accept queue. The connection is close-on-exec, sends
    /// without delay, and is nonblocking if asked. It may be a unix one: only what all streams have
    /// in common is done with it.
    ///
    /// # Errors
    ///
    /// `WouldBlock` when the queue is empty; any other error is one that only time can cure
    /// (descriptors or memory run out), so the caller backs off. Errors of a single connection are
    /// skipped, as accept(2) says.
    pub(super) fn accept(&mut self, nonblocking: bool) -> io::Result<TcpStream> {
        let flags = libc_flags(nonblocking);
        match &mut self.acceptor {
            Some(acceptor) => acceptor.accept(&self.socket, flags),
            None => accept_nonblocking(&self.socket, flags),
        }
        .map(TcpStream::from)
    }

    fn bind(address: SocketAddr) -> Result<Self, WorkerError> {
        let bind = || {
            let kind = Type::STREAM.nonblocking();
            let socket = Socket::new(Domain::for_address(address), kind, Some(Protocol::TCP))?;
            // A restarted worker gets its port back while old connections are in TIME_WAIT.
            socket.set_reuse_address(true)?;
            socket.bind(&address.into())?;
            // The kernel lowers it to net.core.somaxconn.
            socket.listen(i32::from(u16::MAX))?;
            Ok(socket)
        };
        let socket = bind().map_err(|source| WorkerError::Bind { address, source })?;
        Self::new(socket)
    }

    /// Descriptor 3, if `LISTEN_PID` and `LISTEN_FDS` say that it was passed to this process.
    fn inherited() -> Result<Option<Self>, WorkerError> {
        let number = |name| env::var(name).ok()?.parse::<u32>().ok();
        if number("LISTEN_PID") != Some(process::id()) || number("LISTEN_FDS").unwrap_or(0) == 0 {
            return Ok(None);
        }
        // SAFETY: by the protocol descriptor 3 is open and this process's own; were it not, the
        // first call on it fails and it is not touched again.
        let fd = unsafe { BorrowedFd::borrow_raw(LISTEN_FDS_START) };
        let socket = SockRef::from(&fd);
        if !matches!((socket.is_listener(), socket.r#type()), (Ok(true), Ok(Type::STREAM))) {
            return Err(WorkerError::Inherited);
        }
        // SAFETY: it is an open socket as just seen, passed to this process for it to own; `run`,
        // the only way here, is called once.
        let socket = Socket::from(unsafe { OwnedFd::from_raw_fd(LISTEN_FDS_START) });
        Self::new(socket).map(Some)
    }

    fn new(socket: Socket) -> Result<Self, WorkerError> {
        let set_up = || {
            socket.set_cloexec(true)?;
            let address = socket.local_addr()?;
            if !address.is_unix() {
                // Linux copies it to each accepted connection, which saves a call for each.
                socket.set_tcp_nodelay(true)?;
            }
            Ok((address, socket.nonblocking()?))
        };
        let (address, nonblocking) = set_up().map_err(system("set up the listening socket"))?;
        let port = address.as_socket().map(|address| address.port());
        if port.is_none() && !address.is_unix() {
            return Err(WorkerError::Inherited);
        }
        let acceptor = if nonblocking {
            None
        } else {
            Some(Acceptor::new().map_err(system("create a timer"))?)
        };
        Ok(Self { socket, port, acceptor })
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl AsRawFd for Listener {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

fn libc_flags(nonblocking: bool) -> i32 {
    use nix::sys::socket::SockFlag;
    let flags = if nonblocking { SockFlag::SOCK_NONBLOCK } else { SockFlag::empty() };
    (flags | SockFlag::SOCK_CLOEXEC).bits()
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    fn blocking() -> (Listener, SocketAddr) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        (Listener::new(OwnedFd::from(listener).into()).unwrap(), address)
    }

    #[test]
    fn accept_on_a_blocking_socket_takes_what_is_there_and_never_waits() {
        let (mut listener, address) = blocking();
        let _clients = [(); 3].map(|()| TcpStream::connect(address).unwrap());
        for _ in 0..3 {
            let accepted = listener.accept(true).unwrap();
            assert!(accepted.nodelay().unwrap() && SockRef::from(&accepted).nonblocking().unwrap());
        }
        assert_eq!(listener.accept(true).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        assert!(!listener.socket.nonblocking().unwrap());
    }
}
