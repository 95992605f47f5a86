//! The listening socket: where it comes from, and accepting from it without ever blocking.
//!
//! An inherited socket is shared with the process that passed it, and stays blocking: see
//! [`Acceptor`].

use std::{
    env, io,
    net::{Ipv4Addr, SocketAddr, TcpStream},
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
    process,
};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use socket2::{Domain, Protocol, SockRef, Socket, Type};

use super::{WorkerError, system};
use crate::net::{Acceptor, accept_nonblocking};

/// `SD_LISTEN_FDS_START`, sd_listen_fds(3).
const LISTEN_FDS_START: RawFd = 3;

/// Listening TCP or unix sockets, and what is needed to accept from them without blocking.
#[derive(Debug)]
pub(super) struct Listener {
    /// Never empty.
    sockets: Vec<Listening>,
    /// The index of the socket to check first.
    turn: usize,
    /// Readable when one of several sockets is.
    any: Option<Epoll>,
    port: Option<u16>,
    /// Present if a socket is blocking.
    acceptor: Option<Acceptor>,
}

#[derive(Debug)]
struct Listening {
    socket: Socket,
    nonblocking: bool,
}

impl Listener {
    /// Uses the first that applies: `listen`, the inherited sockets, `PORT` on 127.0.0.1.
    ///
    /// Must be called on the thread that will accept, because that thread gets the alarm signal.
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

    /// The port of the first socket; `None` for a unix socket.
    pub(super) fn port(&self) -> Option<u16> {
        self.port
    }

    /// Takes the next connection from an accept queue. The connection is close-on-exec and sends
    /// without delay; it is nonblocking if requested. It may be a unix connection, so only
    /// operations that all streams have in common are used on it.
    ///
    /// # Errors
    ///
    /// `WouldBlock` if all queues are empty. Any other error is one that only time can cure (no
    /// descriptors or memory left), so the caller backs off. Errors of a single connection are
    /// skipped, as accept(2) recommends.
    pub(super) fn accept(&mut self, nonblocking: bool) -> io::Result<TcpStream> {
        let flags = libc_flags(nonblocking);
        for _ in 0..self.sockets.len() {
            let Listening { socket, nonblocking } = &self.sockets[self.turn];
            self.turn = (self.turn + 1) % self.sockets.len();
            let accepted = match &mut self.acceptor {
                Some(acceptor) if !nonblocking => acceptor.accept(socket, flags),
                _ => accept_nonblocking(socket, flags),
            };
            match accepted {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                accepted => return accepted.map(TcpStream::from),
            }
        }
        Err(io::ErrorKind::WouldBlock.into())
    }

    fn bind(address: SocketAddr) -> Result<Self, WorkerError> {
        let bind = || {
            let kind = Type::STREAM.nonblocking();
            let socket = Socket::new(Domain::for_address(address), kind, Some(Protocol::TCP))?;
            // So that a restarted worker can bind its port while old connections are in TIME_WAIT.
            socket.set_reuse_address(true)?;
            socket.bind(&address.into())?;
            // The kernel caps it at net.core.somaxconn.
            socket.listen(i32::from(u16::MAX))?;
            Ok(socket)
        };
        let socket = bind().map_err(|source| WorkerError::Bind { address, source })?;
        Self::new(vec![socket])
    }

    /// The descriptors from 3 on that `LISTEN_PID` and `LISTEN_FDS` say were passed to this process.
    fn inherited() -> Result<Option<Self>, WorkerError> {
        let number = |name| env::var(name).ok()?.parse::<u32>().ok();
        let count = number("LISTEN_FDS").and_then(|count| RawFd::try_from(count).ok()).unwrap_or(0);
        if number("LISTEN_PID") != Some(process::id()) || count == 0 {
            return Ok(None);
        }
        let end = LISTEN_FDS_START.saturating_add(count);
        let sockets = (LISTEN_FDS_START..end).map(passed).collect::<Result<_, _>>()?;
        Self::new(sockets).map(Some)
    }

    fn new(sockets: Vec<Socket>) -> Result<Self, WorkerError> {
        let set_up = |socket: Socket| {
            socket.set_cloexec(true)?;
            let address = socket.local_addr()?;
            if !address.is_unix() {
                // Accepted connections inherit the option on Linux, which saves a system call for
                // each.
                socket.set_tcp_nodelay(true)?;
            }
            Ok(Listening { nonblocking: socket.nonblocking()?, socket })
        };
        let sockets: io::Result<Vec<_>> = sockets.into_iter().map(set_up).collect();
        let sockets = sockets.map_err(system("set up the listening socket"))?;
        let any = any(&sockets).map_err(system("watch the listening sockets"))?;
        let first = sockets.first().and_then(|first| first.socket.local_addr().ok());
        let first = first.ok_or(WorkerError::Inherited)?;
        let port = first.as_socket().map(|address| address.port());
        if port.is_none() && !first.is_unix() {
            return Err(WorkerError::Inherited);
        }
        let acceptor = if sockets.iter().all(|listening| listening.nonblocking) {
            None
        } else {
            Some(Acceptor::new().map_err(system("create a timer"))?)
        };
        Ok(Self { sockets, turn: 0, any, port, acceptor })
    }
}

impl AsFd for Listener {
    /// Readable when there may be a connection. An epoll instance is readable when one of its
    /// descriptors is (epoll(7)).
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.any.as_ref().map_or(self.sockets[0].socket.as_fd(), |any| any.0.as_fd())
    }
}

impl AsRawFd for Listener {
    fn as_raw_fd(&self) -> RawFd {
        self.as_fd().as_raw_fd()
    }
}

/// The listening socket that was passed with this descriptor number.
fn passed(number: RawFd) -> Result<Socket, WorkerError> {
    // SAFETY: by the protocol the descriptor is open and this process's own; were it not, the first
    // call on it fails and it is not touched again.
    let fd = unsafe { BorrowedFd::borrow_raw(number) };
    let socket = SockRef::from(&fd);
    if !matches!((socket.is_listener(), socket.r#type()), (Ok(true), Ok(Type::STREAM))) {
        return Err(WorkerError::Inherited);
    }
    // SAFETY: it is an open socket as just seen, passed to this process for it to own; `run`, the
    // only way here, is called once.
    Ok(Socket::from(unsafe { OwnedFd::from_raw_fd(number) }))
}

/// An epoll instance that is readable when one of several sockets is; `None` for a single socket.
fn any(sockets: &[Listening]) -> io::Result<Option<Epoll>> {
    if sockets.len() < 2 {
        return Ok(None);
    }
    let any = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    for Listening { socket, .. } in sockets {
        any.add(socket, EpollEvent::new(EpollFlags::EPOLLIN, 0))?;
    }
    Ok(Some(any))
}

fn libc_flags(nonblocking: bool) -> i32 {
    use nix::sys::socket::SockFlag;
    let flags = if nonblocking { SockFlag::SOCK_NONBLOCK } else { SockFlag::empty() };
    (flags | SockFlag::SOCK_CLOEXEC).bits()
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

    use super::*;

    fn blocking() -> (Listener, SocketAddr) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        (Listener::new(vec![OwnedFd::from(listener).into()]).unwrap(), address)
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
        assert!(!listener.sockets[0].socket.nonblocking().unwrap());
    }

    #[test]
    fn of_several_sockets_each_is_accepted_from() {
        let bound = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
        let addresses = bound.each_ref().map(|listener| listener.local_addr().unwrap());
        let sockets = bound.into_iter().map(|listener| OwnedFd::from(listener).into()).collect();
        let mut listener = Listener::new(sockets).unwrap();
        for address in addresses.into_iter().rev() {
            let client = TcpStream::connect(address).unwrap();
            let mut fds = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
            assert_eq!(poll(&mut fds, PollTimeout::from(10_000_u16)).unwrap(), 1);
            let accepted = listener.accept(true).unwrap();
            assert_eq!(accepted.peer_addr().unwrap(), client.local_addr().unwrap());
            assert_eq!(listener.accept(true).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        }
    }
}
