//! Listeners: the sockets that clients connect to.
//!
//! All data threads accept from one open file description. With one `SO_REUSEPORT` socket per
//! thread instead, closing one of them would reset the connections in its accept queue.

mod error;
mod passed;

use std::{
    io,
    net::SocketAddr,
    os::fd::{AsFd, BorrowedFd},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use nix::{
    libc,
    poll::{PollFd, PollFlags, PollTimeout, poll},
};
use socket2::{Domain, Socket, TcpKeepalive, Type};

use super::{
    Peer,
    diag::{Diag, inode_of},
    pathname::{Rights, SocketFile, listen_at},
};
use crate::config::{Listen, UnixAccess};
pub use error::BindError;
pub(crate) use error::is_ephemeral;
pub use passed::Shared;

/// A bound and listening socket.
///
/// Dropping it closes the socket, and removes its path if it is a unix socket whose file is still
/// its own.
#[derive(Debug)]
pub struct Listener {
    /// The file of a unix socket that lbd has bound. It is removed before the socket is closed, so
    /// that no client finds a path without a listening socket.
    file: Option<SocketFile>,
    socket: Socket,
    listen: Listen,
    /// Set if another process has the socket too: then nothing is done to it that the other would
    /// notice.
    shared: Option<Arc<Shared>>,
    /// Whether the last attempt to accept failed.
    failing: AtomicBool,
}

impl Listener {
    /// Binds and listens; never blocks.
    ///
    /// An IPv6 address accepts IPv6 clients only. A unix socket's file that a dead process left
    /// behind is replaced. `access` says who may connect to a unix socket; it has no meaning for an
    /// IP address.
    ///
    /// # Errors
    ///
    /// If the address is taken, not this machine's, or not allowed.
    pub fn bind(listen: &Listen, access: &UnixAccess) -> Result<Self, BindError> {
        match listen {
            Listen::Tcp(address) => bind_tcp(*address).and_then(|s| Self::adopt(s, listen)),
            Listen::Unix(path) => {
                listen_at(path, access, super::BACKLOG).and_then(|(socket, file)| {
                    let mut listener = Self::over(socket, listen, None)?;
                    listener.file = Some(file);
                    Ok(listener)
                })
            }
        }
        .map_err(|cause| BindError::new(listen, cause))
    }

    /// As [`Self::bind`], for an address that overlaps those of other listeners of this process.
    ///
    /// `SO_REUSEPORT` lets sockets of one user share a port if all have it at the time of the bind
    /// (socket(7)). It is not needed afterwards, and as long as it is set any program of that user
    /// could join. So it is set for the bind only.
    pub(crate) fn bind_beside(address: SocketAddr, others: &[&Self]) -> Result<Self, BindError> {
        let listen = &Listen::Tcp(address);
        let share = |yes| others.iter().try_for_each(|other| other.socket.set_reuse_port(yes));
        let bound = share(true)
            .and_then(|()| tcp_socket(address))
            .and_then(|socket| {
                socket.set_reuse_port(true)?;
                socket.bind(&address.into())?;
                Ok(socket)
            })
            // listen(2) checks for conflicts once more.
            .and_then(|socket| Self::adopt(socket, listen))
            .and_then(|listener| listener.socket.set_reuse_port(false).map(|()| listener));
        let unshared = share(false);
        bound
            .and_then(|listener| unshared.map(|()| listener))
            .map_err(|cause| BindError::new(listen, cause))
    }

    /// Takes over a bound TCP socket, and listens.
    fn adopt(socket: Socket, listen: &Listen) -> io::Result<Self> {
        socket.listen(super::BACKLOG)?;
        Self::over(socket, listen, None)
    }

    /// Makes a listener of a listening socket.
    pub(crate) fn over(
        socket: Socket,
        listen: &Listen,
        shared: Option<Arc<Shared>>,
    ) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        if let Listen::Tcp(_) = listen {
            // Accepted sockets inherit it (tcp(7)), which saves a call per connection.
            socket.set_tcp_nodelay(true)?;
        }
        let (listen, failing) = (listen.clone(), AtomicBool::new(false));
        Ok(Self { file: None, socket, listen, shared, failing })
    }

    /// Takes over a socket that listens at `listen` already.
    ///
    /// # Errors
    ///
    /// If it is of an unexpected kind.
    pub fn again(socket: Socket, listen: &Listen) -> Result<Self, BindError> {
        Self::over(socket, listen, None).map_err(|cause| BindError::new(listen, cause))
    }

    /// Applies `access` to a unix socket that lbd has bound; does nothing to another. Clients that
    /// may connect both before and after are not refused meanwhile. Returns the previous rights,
    /// for [`Self::restore`].
    ///
    /// # Errors
    ///
    /// If there is no such user or group, or the file may not be given to them; nothing has changed
    /// then.
    pub fn set_access(&self, access: &UnixAccess) -> Result<Option<Rights>, BindError> {
        let set = self.file.as_ref().map(|file| file.set_access(access)).transpose();
        set.map_err(|cause| BindError::new(&self.listen, cause))
    }

    /// Undoes [`Self::set_access`].
    pub(crate) fn restore(&self, rights: Rights) {
        // The rights were in force a moment ago, so a failure is not expected. It would leave the
        // stricter of both.
        _ = self.file.as_ref().map(|file| file.set(rights));
    }

    /// Sets the TCP keepalive time of clients accepted from now on.
    ///
    /// Accepted sockets inherit it (`tcp_create_openreq_child` in the kernel's
    /// net/ipv4/tcp_minisocks.c starts the timer), which saves four calls per connection.
    pub(crate) fn keep_alive(&self, after: Duration) {
        if self.is_tcp() {
            // Fails only for values that a configuration can't have.
            _ = self.socket.set_tcp_keepalive(&keepalive(after));
        }
    }

    /// A copy of its socket, for the code that steers its connections.
    ///
    /// # Errors
    ///
    /// If no descriptor is left.
    pub fn socket(&self) -> io::Result<Socket> {
        self.socket.try_clone()
    }

    /// The configured address.
    #[must_use]
    pub fn listen(&self) -> &Listen {
        &self.listen
    }

    /// The port it is bound to, even if port 0 was configured; `None` on unix.
    #[must_use]
    pub fn port(&self) -> Option<u16> {
        Some(self.socket.local_addr().ok()?.as_socket()?.port())
    }

    /// Whether a client waits to be accepted. `is_quiet` says whether the listener was
    /// [quiesced](Self::quiesce).
    pub(crate) fn has_clients(&self, is_quiet: bool) -> bool {
        let mut fds = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
        let is_readable = poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0);
        // poll(2) reports a unix socket that is shut down as readable even if no client waits
        // (`unix_poll` in the kernel's net/unix/af_unix.c).
        is_readable && (self.is_tcp() || !is_quiet || self.has_pending().unwrap_or(true))
    }

    /// Whether a client is in the queue of a unix socket, according to the kernel.
    fn has_pending(&self) -> io::Result<bool> {
        Ok(!Diag::open()?.unix_pending(inode_of(&self.socket)?)?.is_empty())
    }

    /// Accepts the next client; one call makes its socket non-blocking and close-on-exec.
    pub(crate) fn accept(&self) -> io::Result<(Socket, Peer)> {
        let (socket, address) = self.socket.accept4(libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC)?;
        Ok((socket, address.as_socket().map_or(Peer::Unix, Peer::Inet)))
    }

    /// Lets no new client in. Clients whose connect has been answered can still be accepted.
    ///
    /// On TCP, new SYNs are dropped: a client retries a second later, and then finds either a
    /// successor or a closed port, but is never reset after its connect succeeded. On unix,
    /// connects are refused from now on.
    ///
    /// Does nothing to a shared socket: new clients are for the process that has it next.
    pub(crate) fn quiesce(&self) -> io::Result<()> {
        if self.is_shared() {
            return Ok(());
        }
        match self.listen {
            Listen::Tcp(_) => super::refuse_new(&self.socket),
            Listen::Unix(_) => {
                if let Some(file) = &self.file {
                    file.remove();
                }
                self.socket.shutdown(std::net::Shutdown::Read)
            }
        }
    }

    pub(crate) fn is_tcp(&self) -> bool {
        matches!(self.listen, Listen::Tcp(_))
    }

    /// Whether another process has the socket too, and keeps it when this is dropped.
    #[must_use]
    pub fn is_shared(&self) -> bool {
        self.shared.is_some()
    }

    /// Records that accepting failed. Returns whether the attempt before had not.
    pub(crate) fn fails(&self) -> bool {
        !self.failing.swap(true, Relaxed)
    }

    /// Records that accepting succeeded. Returns whether the attempt before had failed.
    pub(crate) fn recovers(&self) -> bool {
        self.failing.load(Relaxed) && self.failing.swap(false, Relaxed)
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// TCP keepalive that probes after so much silence, and then a few times more (tcp(7),
/// `TCP_KEEPIDLE`).
pub(crate) fn keepalive(after: Duration) -> TcpKeepalive {
    const INTERVAL: Duration = Duration::from_secs(15);
    const PROBES: u32 = 4;
    TcpKeepalive::new().with_time(after).with_interval(INTERVAL).with_retries(PROBES)
}

fn bind_tcp(address: SocketAddr) -> io::Result<Socket> {
    let socket = tcp_socket(address)?;
    socket.bind(&address.into())?;
    Ok(socket)
}

fn tcp_socket(address: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM.nonblocking(), None)?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    // Otherwise connections of a former run in TIME_WAIT would block the address.
    socket.set_reuse_address(true)?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        net::TcpStream,
        os::unix::fs::PermissionsExt,
        os::unix::net::{UnixListener, UnixStream},
    };

    use super::*;

    fn tcp(address: &str) -> Listen {
        Listen::Tcp(address.parse().unwrap())
    }

    #[test]
    fn accepted_sockets_have_nodelay_without_asking() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let listener = Listener::bind(&tcp(address), &UnixAccess::default()).unwrap();
            let bound = listener.socket.local_addr().unwrap().as_socket().unwrap();
            let client = TcpStream::connect(bound).unwrap();
            let (socket, peer) = listener.accept().unwrap();
            assert!(socket.tcp_nodelay().unwrap());
            assert_eq!(peer, Peer::Inet(client.local_addr().unwrap()));
            let flags = nix::fcntl::fcntl(&socket, nix::fcntl::FcntlArg::F_GETFL).unwrap();
            assert_ne!(flags & libc::O_NONBLOCK, 0);
        }
    }

    #[test]
    fn accepted_sockets_are_kept_alive_without_asking() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let listener = Listener::bind(&tcp(address), &UnixAccess::default()).unwrap();
            let bound = listener.socket.local_addr().unwrap().as_socket().unwrap();
            for seconds in [60, 7] {
                listener.keep_alive(Duration::from_secs(seconds));
                let _client = TcpStream::connect(bound).unwrap();
                let (socket, _) = listener.accept().unwrap();
                assert!(socket.keepalive().unwrap());
                assert_eq!(socket.tcp_keepalive_time().unwrap().as_secs(), seconds);
                assert_eq!(socket.tcp_keepalive_interval().unwrap().as_secs(), 15);
                assert_eq!(socket.tcp_keepalive_retries().unwrap(), 4);
            }
        }
    }

    #[test]
    fn a_quiet_listener_keeps_its_queue_and_lets_nobody_in() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let listener = Listener::bind(&tcp(address), &UnixAccess::default()).unwrap();
            let bound = listener.socket.local_addr().unwrap().as_socket().unwrap();
            let queued = TcpStream::connect(bound).unwrap();
            listener.quiesce().unwrap();
            let late = TcpStream::connect_timeout(&bound, Duration::from_millis(200));
            assert_eq!(late.unwrap_err().kind(), io::ErrorKind::TimedOut);
            let (_socket, peer) = listener.accept().unwrap();
            assert_eq!(peer, Peer::Inet(queued.local_addr().unwrap()));
            assert_eq!(listener.accept().unwrap_err().kind(), io::ErrorKind::WouldBlock);
        }
    }

    #[test]
    fn a_stale_unix_socket_is_replaced_and_a_live_one_is_taken() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lbd.sock");
        let listen = Listen::Unix(path.clone());
        let other = UnixListener::bind(&path).unwrap();
        let text = Listener::bind(&listen, &UnixAccess::default()).unwrap_err().to_string();
        assert!(text.contains("; `ss -lxp src "), "{text}");
        drop(other);
        let listener = Listener::bind(&listen, &UnixAccess::default()).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o666);
        let _client = UnixStream::connect(&path).unwrap();
        assert_eq!(listener.accept().unwrap().1, Peer::Unix);
        drop(listener);
        assert!(!path.exists());
    }

    #[test]
    fn a_file_that_is_no_socket_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("precious");
        fs::write(&path, "data").unwrap();
        let text = Listener::bind(&Listen::Unix(path.clone()), &UnixAccess::default())
            .unwrap_err()
            .to_string();
        assert!(text.ends_with("; the file there is no socket: remove it or choose another path"));
        assert_eq!(fs::read(&path).unwrap(), b"data");
    }

    #[test]
    fn a_successors_path_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lbd.sock");
        let listener = Listener::bind(&Listen::Unix(path.clone()), &UnixAccess::default()).unwrap();
        fs::rename(&path, dir.path().join("old")).unwrap();
        let _successor = UnixListener::bind(&path).unwrap();
        drop(listener);
        assert!(path.exists());
    }
}
