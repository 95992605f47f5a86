//! A worker's listening unix socket (`socket = "unix"`), and the endpoint of a worker.
//!
//! The socket has a path for an instant only. lbd binds it in a folder that no other user may
//! enter, opens the file, and removes both. What is left is a descriptor of the file (`O_PATH`,
//! open(2)), and connecting to `/proc/self/fd/N` reaches the socket behind it. So only lbd can
//! connect to a worker, nothing has to be cleaned up however lbd ends, and no path is too long. An
//! abstract name, in contrast, would let any process in the network namespace connect.
//!
//! Every worker has a socket of its own, so connections and probes reach the worker they are meant
//! for without any steering.

use std::{
    fmt,
    fs::{self, File, OpenOptions, Permissions},
    io,
    net::{Shutdown, SocketAddr},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::{OpenOptionsExt, PermissionsExt},
    },
    path::Path,
    sync::{Arc, Weak},
};

use nix::{errno::Errno, libc};
use socket2::{Domain, SockAddr, Socket, Type};

use super::{Acceptor, BACKLOG, accept_all};

/// Where a worker is reached. It leads to that worker or to none, however long it is kept.
#[derive(Debug, Clone)]
pub struct Endpoint {
    address: SockAddr,
    /// The file that a `/proc/self/fd` path in `address` leads through. It exists as long as its
    /// [`UnnamedUnixListener`]. Counters and older pools outlive the listener, and must not keep
    /// the descriptor open.
    file: Option<Weak<OwnedFd>>,
}

impl From<SocketAddr> for Endpoint {
    fn from(address: SocketAddr) -> Self {
        Self { address: address.into(), file: None }
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.inet() {
            Some(address) => address.fmt(f),
            None => f.write_str("its unix socket"),
        }
    }
}

impl Endpoint {
    /// Connects `socket` to it. The connect of a non-blocking socket may still be in progress on
    /// return, as connect(2) says.
    ///
    /// # Errors
    /// As connect(2); `ECONNREFUSED` if the worker's socket is gone.
    pub fn connect(&self, socket: &Socket) -> io::Result<()> {
        // Keeps the descriptor open until connect(2) has resolved the path: its number must not be
        // reused before.
        let file = self.file.as_ref().map(|file| file.upgrade().ok_or(Errno::ECONNREFUSED));
        let _file = file.transpose()?;
        socket.connect(&self.address)
    }

    /// The address, for comparisons only. To connect, use [`Self::connect`].
    #[must_use]
    pub fn address(&self) -> &SockAddr {
        &self.address
    }

    /// The address and port; `None` on unix.
    #[must_use]
    pub fn inet(&self) -> Option<SocketAddr> {
        self.address.as_socket()
    }

    /// Creates a non-blocking socket to connect with.
    ///
    /// # Errors
    /// If no descriptor is left.
    pub fn unconnected(&self) -> io::Result<Socket> {
        Socket::new(self.address.domain(), Type::STREAM.nonblocking(), None)
    }

    /// As [`Self::unconnected`], for a probe: [`UnnamedUnixListener::drain_queue`] can tell its
    /// connection from clients'.
    ///
    /// # Errors
    /// If no descriptor is left.
    pub fn way_of_a_probe(&self) -> io::Result<Socket> {
        let socket = self.unconnected()?;
        if self.address.is_unix() {
            // For an address without a path the kernel chooses an abstract name (unix(7),
            // autobind). No process can connect there, since the socket does not listen.
            socket.bind(&SockAddr::unix("")?)?;
        }
        Ok(socket)
    }
}

/// A listening unix socket without a path.
#[derive(Debug)]
pub struct UnnamedUnixListener {
    socket: Socket,
    endpoint: Endpoint,
    /// The file that the endpoint leads through.
    _file: Arc<OwnedFd>,
}

impl UnnamedUnixListener {
    /// Creates one, by way of a temporary folder in `folder` that is removed before the return.
    /// Like every socket that is passed to a worker, it is blocking.
    ///
    /// # Errors
    /// If the folder can't be written to, its path is too long for a unix socket, or no descriptor
    /// is left.
    pub fn open(folder: &Path) -> io::Result<Self> {
        let private = Permissions::from_mode(0o700);
        let passage =
            tempfile::Builder::new().prefix(".lbd-").permissions(private).tempdir_in(folder)?;
        let path = passage.path().join("s");
        let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
        socket.bind(&SockAddr::unix(&path)?)?;
        // Independent of the umask: connecting requires the permission to write.
        fs::set_permissions(&path, Permissions::from_mode(0o600))?;
        let file: File = OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(&path)?;
        // Removed before the socket listens: from here on no other process can find it.
        passage.close()?;
        let address = SockAddr::unix(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
        socket.listen(BACKLOG)?;
        let file = Arc::new(file.into());
        let endpoint = Endpoint { address, file: Some(Arc::downgrade(&file)) };
        Ok(Self { socket, endpoint, _file: file })
    }

    /// The listening socket.
    #[must_use]
    pub fn socket(&self) -> &Socket {
        &self.socket
    }

    /// The endpoint that reaches the socket.
    #[must_use]
    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// Refuses new connections. Queued connections can still be accepted.
    ///
    /// # Errors
    /// None are known.
    pub fn refuse(&self) -> io::Result<()> {
        self.socket.shutdown(Shutdown::Read)
    }

    /// Drains the accept queue, and drops lbd's own probes. If the worker still runs, it may go on
    /// accepting.
    pub fn drain_queue(&self, acceptor: &mut Acceptor) -> Vec<Socket> {
        let mut waiting = accept_all(&self.socket, acceptor);
        waiting.retain(|connection| connection.peer_addr().is_ok_and(|peer| peer.is_unnamed()));
        waiting
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    #[test]
    fn what_is_kept_of_it_keeps_no_descriptor() {
        let folder = tempfile::tempdir().unwrap();
        let unnamed = UnnamedUnixListener::open(folder.path()).unwrap();
        let endpoint = unnamed.endpoint().clone();
        let file = endpoint.file.clone().unwrap();
        drop(unnamed);
        assert!(file.upgrade().is_none());
        assert_eq!(connected(&endpoint).unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
    }

    fn connected(endpoint: &Endpoint) -> io::Result<Socket> {
        let socket = endpoint.unconnected()?;
        endpoint.connect(&socket)?;
        Ok(socket)
    }

    #[test]
    fn it_leads_to_the_socket_and_leaves_nothing_behind() {
        let folder = tempfile::tempdir().unwrap();
        let one = UnnamedUnixListener::open(folder.path()).unwrap();
        let other = UnnamedUnixListener::open(folder.path()).unwrap();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
        assert!(!one.socket().nonblocking().unwrap());
        for (unnamed, said) in [(&one, b"1"), (&other, b"2")] {
            connected(unnamed.endpoint()).unwrap().write_all(said).unwrap();
        }
        for (unnamed, said) in [(&one, "1"), (&other, "2")] {
            let mut heard = String::new();
            unnamed.socket().accept().unwrap().0.read_to_string(&mut heard).unwrap();
            assert_eq!(heard, said);
        }
        // The mode is that of a file, if there were one: who has no descriptor has no way in.
        let name = one.socket().local_addr().unwrap();
        let error = Socket::new(Domain::UNIX, Type::STREAM, None).unwrap().connect(&name);
        assert_eq!(error.unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn an_endpoint_never_leads_to_another_socket() {
        let folder = tempfile::tempdir().unwrap();
        let first = UnnamedUnixListener::open(folder.path()).unwrap();
        let endpoint = first.endpoint().clone();
        drop(first);
        let later = UnnamedUnixListener::open(folder.path()).unwrap();
        let error = connected(&endpoint).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
        connected(later.endpoint()).unwrap();
    }

    #[test]
    fn what_waits_is_rescued_and_probes_are_not() {
        let folder = tempfile::tempdir().unwrap();
        let unnamed = UnnamedUnixListener::open(folder.path()).unwrap();
        let clients = [(); 3].map(|()| connected(unnamed.endpoint()).unwrap());
        let probe = unnamed.endpoint().way_of_a_probe().unwrap();
        unnamed.endpoint().connect(&probe).unwrap();
        let mut acceptor = Acceptor::new().unwrap();
        assert_eq!(unnamed.drain_queue(&mut acceptor).len(), 3);
        probe.set_nonblocking(false).unwrap();
        assert_eq!((&probe).read(&mut [0]).unwrap(), 0, "it is closed");
        assert!(unnamed.drain_queue(&mut acceptor).is_empty());
        drop(clients);

        let _late = connected(unnamed.endpoint()).unwrap();
        unnamed.refuse().unwrap();
        let error = connected(unnamed.endpoint()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
        assert_eq!(unnamed.drain_queue(&mut acceptor).len(), 1);
        assert!(unnamed.drain_queue(&mut acceptor).is_empty());
    }

    #[test]
    fn a_folder_that_will_not_do_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let missing = UnnamedUnixListener::open(&folder.path().join("no")).unwrap_err();
        assert_eq!(missing.kind(), io::ErrorKind::NotFound);
        let long = folder.path().join("x".repeat(100));
        fs::create_dir(&long).unwrap();
        assert!(UnnamedUnixListener::open(&long).is_err());
        assert_eq!(fs::read_dir(&long).unwrap().count(), 0);
    }
}
