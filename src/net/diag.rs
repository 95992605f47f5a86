//! Asks the kernel about sockets and connections that lbd itself does not hold: sock_diag(7), over
//! netlink.

use std::{
    cell::RefCell,
    collections::{HashMap, HashSet},
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::{AsFd, AsRawFd, OwnedFd},
    rc::Rc,
    time::{Duration, Instant},
};

use netlink_packet_core::{
    NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_sock_diag::{
    SockDiagMessage,
    constants::{
        AF_INET, AF_INET6, IPPROTO_TCP, TCP_CLOSE, TCP_CLOSE_WAIT, TCP_CLOSING, TCP_ESTABLISHED,
        TCP_FIN_WAIT1, TCP_FIN_WAIT2, TCP_LAST_ACK, TCP_SYN_RECV, TCP_SYN_SENT, TCP_TIME_WAIT,
    },
    inet::{ExtensionFlags, InetRequest, InetResponseHeader, SocketId, StateFlags},
    unix::{ShowFlags, StateFlags as UnixStateFlags, UnixRequest, UnixResponse, nlas::Nla},
};
use nix::{
    errno::Errno,
    sys::{
        socket::{
            AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, setsockopt,
            socket, sockopt::ReceiveTimeout,
        },
        stat::fstat,
        time::{TimeVal, TimeValLike},
    },
};

/// The receive buffer, larger than what the kernel puts in one datagram (`NLMSG_GOODSIZE`, and 32
/// KiB for a dump).
const DATAGRAM: usize = 64 * 1024;

/// The receive timeout. The kernel answers within the call that asks; if it ever does not, lbd must
/// not hang.
const PATIENCE: Duration = Duration::from_secs(1);

/// Asks the kernel about sockets.
#[derive(Debug)]
pub struct Diag {
    socket: OwnedFd,
    buffer: Box<[u8]>,
    /// The sequence number of the latest request, so that a late answer to an earlier request is
    /// not mistaken for its answer.
    sequence: u32,
}

/// How old the answer to [`SharedDiag::lately_listening`] may be.
const LATELY: Duration = Duration::from_millis(50);

/// One [`Diag`] that is shared on one thread. It is opened when it is first needed.
#[derive(Debug, Clone, Default)]
pub struct SharedDiag(Rc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    diag: RefCell<Option<Diag>>,
    /// Who listened on each port, and when that was looked up.
    listening: RefCell<Option<(Instant, ByPort)>>,
}

/// The sockets that listen, by port.
type ByPort = HashMap<u16, Vec<ListeningSocket>>;

impl SharedDiag {
    /// Asks `question`, and returns the answer.
    ///
    /// # Errors
    /// As [`Diag::open`], and as `question`.
    pub fn ask<T>(&self, question: impl FnOnce(&mut Diag) -> io::Result<T>) -> io::Result<T> {
        let mut shared = self.0.diag.borrow_mut();
        let diag = match &mut *shared {
            Some(diag) => diag,
            none => none.insert(Diag::open()?),
        };
        let answer = question(diag);
        if answer.is_err() {
            // The rest of this answer, which may still arrive, would be mixed with the next one.
            *shared = None;
        }
        answer
    }

    /// As [`Diag::listeners`], but as it was up to 50 ms ago.
    ///
    /// The kernel goes through all sockets that listen, whatever port is asked for: where hundreds of
    /// workers are probed, one look serves all of them.
    ///
    /// # Errors
    /// As [`ask`](Self::ask).
    pub fn lately_listening(&self, port: u16) -> io::Result<Vec<ListeningSocket>> {
        let mut listening = self.0.listening.borrow_mut();
        let now = Instant::now();
        let known = match &mut *listening {
            Some((at, known)) if now.duration_since(*at) < LATELY => known,
            old => {
                let mut known = ByPort::new();
                for socket in self.ask(Diag::all_listeners)? {
                    known.entry(socket.address.port()).or_default().push(socket);
                }
                &mut old.insert((now, known)).1
            }
        };
        Ok(known.get(&port).cloned().unwrap_or_default())
    }

    /// Makes the next question fail with a temporary error.
    #[cfg(test)]
    pub(crate) fn fail_once(&self) {
        let socket = std::os::unix::net::UnixDatagram::unbound().unwrap().into();
        *self.0.diag.borrow_mut() = Some(Diag { socket, buffer: Box::default(), sequence: 0 });
    }
}

/// Whether `error` means that this kernel never answers: it has no sock_diag, or denies it to lbd.
/// Any other error is temporary and proves nothing: lbd lacks a descriptor or memory, or no answer
/// came in time.
#[must_use]
pub fn never_tells(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error().map(Errno::from_raw),
        Some(
            Errno::EPROTONOSUPPORT
                | Errno::EAFNOSUPPORT
                | Errno::EPERM
                | Errno::EACCES
                | Errno::ENOENT
        )
    )
}

/// A listening TCP socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ListeningSocket {
    /// The address that it is bound to.
    pub address: SocketAddr,
    /// The inode, by which `/proc/PID/fd` names it: `socket:[INODE]`.
    pub inode: u32,
    /// The user who made it.
    pub uid: u32,
}

/// One end of a TCP connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Connection {
    /// The state of the connection.
    pub state: TcpState,
    /// The inode, by which `/proc/PID/fd` names it. 0 if no process has the socket: it waits to be
    /// accepted, or was closed.
    pub inode: u32,
    /// The user who accepted it (or made it, if this end is the one that connected). Meaningless if
    /// `inode` is 0.
    pub uid: u32,
}

impl Connection {
    /// Whether a process has this end: it was accepted, and has not been closed yet.
    #[must_use]
    pub fn is_accepted(&self) -> bool {
        self.inode != 0
    }
}

/// One end of a connection, with its address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct End {
    pub(super) address: SocketAddr,
    pub(super) connection: Connection,
    /// The time left on the timer that runs; in [`TcpState::TimeWait`], the time until the kernel
    /// forgets the connection.
    pub(super) expires: Duration,
}

/// The states of a TCP connection (RFC 9293, section 3.3.2), as the kernel numbers them
/// (include/net/tcp_states.h). `LISTEN` is not among them: no connection is in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TcpState {
    /// The handshake is complete, whether or not the connection was accepted.
    Established,
    /// The SYN has not been answered.
    SynSent,
    /// The handshake is not complete at the accepting end: its accept queue is full, or with
    /// `TCP_DEFER_ACCEPT` it waits for the first byte.
    SynReceived,
    /// This end has sent its FIN.
    FinWait1,
    /// This end has sent its FIN, which was acknowledged.
    FinWait2,
    /// Both ends have closed; the kernel remembers the connection for a minute.
    TimeWait,
    /// The connection no longer exists.
    Closed,
    /// The other end has sent its FIN.
    CloseWait,
    /// Both ends have sent their FINs, the other end first.
    LastAck,
    /// Both ends have sent their FINs, at the same time.
    Closing,
}

impl TcpState {
    fn of(number: u8) -> Option<Self> {
        Some(match number {
            TCP_ESTABLISHED => Self::Established,
            TCP_SYN_SENT => Self::SynSent,
            TCP_SYN_RECV => Self::SynReceived,
            TCP_FIN_WAIT1 => Self::FinWait1,
            TCP_FIN_WAIT2 => Self::FinWait2,
            TCP_TIME_WAIT => Self::TimeWait,
            TCP_CLOSE => Self::Closed,
            TCP_CLOSE_WAIT => Self::CloseWait,
            TCP_LAST_ACK => Self::LastAck,
            TCP_CLOSING => Self::Closing,
            _ => return None,
        })
    }
}

impl Diag {
    /// # Errors
    /// If netlink is forbidden, or the kernel has no sock_diag.
    pub fn open() -> io::Result<Self> {
        let protocol = SockProtocol::NetlinkSockDiag;
        let socket =
            socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol)?;
        let patience = TimeVal::milliseconds(PATIENCE.as_millis() as i64);
        setsockopt(&socket, ReceiveTimeout, &patience)?;
        Ok(Self { socket, buffer: vec![0; DATAGRAM].into(), sequence: 0 })
    }

    /// The inodes of the connections that were accepted at the port and address family of
    /// `address`, whatever their IP address, and that some process still has.
    ///
    /// # Errors
    /// If the kernel does not answer.
    pub fn accepted(&mut self, address: SocketAddr) -> io::Result<HashSet<u32>> {
        let mut id = any(address.ip());
        id.source_port = address.port();
        let states = StateFlags::ESTABLISHED
            | StateFlags::FIN_WAIT1
            | StateFlags::FIN_WAIT2
            | StateFlags::CLOSE_WAIT
            | StateFlags::CLOSING
            | StateFlags::LAST_ACK;
        let mut inodes = HashSet::new();
        self.ask_inet(id, states, Extent::All, |found| {
            // A connection that waits to be accepted, or was closed by its process, has none.
            inodes.extend(Some(found.header.inode).filter(|inode| *inode != 0));
        })?;
        Ok(inodes)
    }

    /// The end at `server` of exactly this connection from `client`; `None` if there is no such
    /// connection, or no longer.
    ///
    /// # Errors
    /// If the kernel does not answer.
    pub fn accepted_state(
        &mut self,
        server: SocketAddr,
        client: SocketAddr,
    ) -> io::Result<Option<Connection>> {
        let id = SocketId {
            source_port: server.port(),
            destination_port: client.port(),
            source_address: server.ip(),
            destination_address: client.ip(),
            interface_id: 0,
            cookie: NO_COOKIE,
        };
        let mut connection = None;
        let answer = |found: &Found| {
            let InetResponseHeader { state, inode, uid, .. } = found.header;
            // If there is no such connection, the kernel returns the listening socket, whose state
            // (`LISTEN`) is none of a connection.
            connection = TcpState::of(state).map(|state| Connection { state, inode, uid });
        };
        none_if_not_found(self.ask_inet(id, StateFlags::all(), Extent::Exact, answer))?;
        Ok(connection)
    }

    /// Whether the connection from `client` to `server` was accepted, and is still open there. Also
    /// false if there is no such connection, or no longer.
    ///
    /// # Errors
    /// If the kernel does not answer.
    pub fn is_accepted(&mut self, server: SocketAddr, client: SocketAddr) -> io::Result<bool> {
        let connection = self.accepted_state(server, client)?;
        Ok(connection.is_some_and(|connection| connection.is_accepted()))
    }

    /// The inode of the socket at `local` that is connected to `remote`; `None` if there is none,
    /// or no process has it (yet, or any longer).
    ///
    /// # Errors
    /// If the kernel does not answer.
    pub fn inode(&mut self, local: SocketAddr, remote: SocketAddr) -> io::Result<Option<u32>> {
        let connection = self.accepted_state(local, remote)?;
        Ok(connection.map(|connection| connection.inode).filter(|inode| *inode != 0))
    }

    /// All sockets in this network namespace that listen on this TCP port, at any address, in both
    /// families.
    ///
    /// # Errors
    /// If the kernel does not answer.
    pub fn listeners(&mut self, port: u16) -> io::Result<Vec<ListeningSocket>> {
        let mut listeners = Vec::new();
        for family in [IpAddr::V4(Ipv4Addr::UNSPECIFIED), Ipv6Addr::UNSPECIFIED.into()] {
            let mut id = any(family);
            id.source_port = port;
            self.ask_inet(id, StateFlags::LISTEN, Extent::All, |found| {
                let InetResponseHeader { socket_id: id, inode, uid, .. } = &found.header;
                let address = SocketAddr::new(id.source_address, id.source_port);
                listeners.push(ListeningSocket { address, inode: *inode, uid: *uid });
            })?;
        }
        Ok(listeners)
    }

    /// The inode of the socket that gets connections to `address`, even if it is bound to the
    /// wildcard address; `None` if there is none in this network namespace. If several sockets
    /// share the address (`SO_REUSEPORT`), it is one of them, and always the same one while they
    /// do. The time it takes does not depend on the number of listening sockets.
    ///
    /// # Errors
    /// If the kernel does not answer.
    pub fn listener(&mut self, address: SocketAddr) -> io::Result<Option<u32>> {
        let id = SocketId {
            source_port: address.port(),
            // No connection has source port 0, and without a connection the kernel looks up the
            // listening socket.
            destination_port: 0,
            source_address: address.ip(),
            destination_address: address.ip(),
            interface_id: 0,
            cookie: NO_COOKIE,
        };
        let mut inode = None;
        let answer = |found: &Found| inode = Some(found.header.inode);
        none_if_not_found(self.ask_inet(id, StateFlags::LISTEN, Extent::Exact, answer))?;
        Ok(inode)
    }

    /// The local ends of all connections on this port, in both families.
    pub(super) fn ends_at(&mut self, port: u16) -> io::Result<Vec<End>> {
        let mut ends = Vec::new();
        for family in [IpAddr::V4(Ipv4Addr::UNSPECIFIED), Ipv6Addr::UNSPECIFIED.into()] {
            let mut id = any(family);
            id.source_port = port;
            self.ask_inet(id, StateFlags::all(), Extent::All, |found| {
                let InetResponseHeader { state, inode, uid, socket_id: id, .. } = &found.header;
                let address = SocketAddr::new(id.source_address, id.source_port);
                let state = TcpState::of(*state);
                ends.extend(state.map(|state| End {
                    address,
                    connection: Connection { state, inode: *inode, uid: *uid },
                    expires: Duration::from_millis(found.expires.into()),
                }));
            })?;
        }
        Ok(ends)
    }

    /// As [`Self::listeners`], for all ports.
    ///
    /// # Errors
    /// If the kernel does not answer.
    pub fn all_listeners(&mut self) -> io::Result<Vec<ListeningSocket>> {
        self.listeners(0) // no filter: nobody listens on port 0
    }

    /// The inodes of the client sockets that have connected to the unix socket with inode
    /// `listener` and wait to be accepted. Also empty if there is no such socket, or no longer.
    ///
    /// # Errors
    /// If the kernel does not answer, or there are too many for an answer.
    pub fn unix_pending(&mut self, listener: u32) -> io::Result<HashSet<u32>> {
        let mut pending = HashSet::new();
        let asked = self.ask_unix(listener, ShowFlags::ICONS, |found| {
            for nla in &found.nlas {
                if let Nla::PendingConnections(inodes) = nla {
                    // The inode is 0 if the client has closed its end.
                    pending.extend(inodes.iter().filter(|inode| **inode != 0));
                }
            }
        });
        none_if_not_found(asked)?;
        Ok(pending)
    }

    /// Whether the unix connection whose client socket has inode `client` was accepted, and has not
    /// been closed by the server. The time it takes does not depend on the length of the queue.
    ///
    /// # Errors
    /// If the kernel does not answer.
    pub fn is_unix_accepted(&mut self, client: u32) -> io::Result<bool> {
        let mut accepted = false;
        let asked = self.ask_unix(client, ShowFlags::PEER, |found| {
            // The server's end has no inode until a process has accepted it.
            accepted = found.nlas.iter().any(|nla| matches!(nla, Nla::Peer(inode) if *inode != 0));
        });
        none_if_not_found(asked)?;
        Ok(accepted)
    }

    fn ask_unix(
        &mut self,
        inode: u32,
        show_flags: ShowFlags,
        mut answer: impl FnMut(&UnixResponse),
    ) -> io::Result<()> {
        let state_flags = UnixStateFlags::all();
        let request = UnixRequest { state_flags, inode, show_flags, cookie: NO_COOKIE };
        let request = SockDiagMessage::UnixRequest(request);
        self.ask(request, Extent::Exact, |message, _| {
            if let SockDiagMessage::UnixResponse(found) = message {
                answer(&found);
            }
        })
    }

    fn ask_inet(
        &mut self,
        socket_id: SocketId,
        states: StateFlags,
        extent: Extent,
        mut answer: impl FnMut(&Found),
    ) -> io::Result<()> {
        let family = if socket_id.source_address.is_ipv4() { AF_INET } else { AF_INET6 };
        let extensions = ExtensionFlags::empty();
        let request = InetRequest { family, protocol: IPPROTO_TCP, extensions, states, socket_id };
        self.ask(SockDiagMessage::InetRequest(request), extent, |message, bytes| {
            if let SockDiagMessage::InetResponse(found) = message {
                // The crate drops this field in TIME_WAIT: `idiag_expires` of struct inet_diag_msg
                // (linux/inet_diag.h), behind the family and the socket's id.
                let expires = bytes.get(NETLINK_HEADER + 52..).and_then(<[u8]>::first_chunk);
                let expires = expires.map_or(0, |expires| u32::from_ne_bytes(*expires));
                answer(&Found { header: found.header, expires });
            }
        })
    }

    fn ask(
        &mut self,
        request: SockDiagMessage,
        extent: Extent,
        mut answer: impl FnMut(SockDiagMessage, &[u8]),
    ) -> io::Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut header = NetlinkHeader::default();
        header.sequence_number = self.sequence;
        header.flags = NLM_F_REQUEST
            | match extent {
                Extent::Exact => 0,
                Extent::All => NLM_F_DUMP,
            };
        let mut message = NetlinkMessage::new(header, request.into());
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        retried(|| send(self.socket.as_raw_fd(), &bytes, MsgFlags::empty()))?;
        loop {
            let fd = self.socket.as_raw_fd();
            let length = retried(|| recv(fd, &mut self.buffer, MsgFlags::empty()))?;
            let mut rest = &self.buffer[..length];
            while !rest.is_empty() {
                let message = NetlinkMessage::<SockDiagMessage>::deserialize(rest)
                    .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
                // Each message is padded to a multiple of four bytes (netlink(7), NLMSG_ALIGN).
                let taken = (message.header.length as usize).next_multiple_of(4);
                let bytes = rest;
                rest = rest.get(taken.max(4)..).unwrap_or_default();
                if message.header.sequence_number != self.sequence {
                    continue;
                }
                match message.payload {
                    NetlinkPayload::InnerMessage(found) => {
                        answer(found, bytes);
                        if extent == Extent::Exact {
                            return Ok(());
                        }
                    }
                    NetlinkPayload::Done(_) => return Ok(()),
                    NetlinkPayload::Error(error) => return Err(error.to_io()),
                    _ => {}
                }
            }
        }
    }
}

/// The inodes of all sockets of this process (proc_pid_fd(5)).
///
/// # Errors
/// If `/proc` can't be read.
pub fn own_sockets() -> io::Result<HashSet<u32>> {
    let mut inodes = HashSet::new();
    for entry in std::fs::read_dir("/proc/self/fd")? {
        // The descriptor was closed meanwhile.
        let Ok(target) = std::fs::read_link(entry?.path()) else { continue };
        let inode: Option<u32> = target
            .to_str()
            .and_then(|target| target.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok());
        inodes.extend(inode);
    }
    Ok(inodes)
}

/// The inode of a socket, by which sock_diag and `/proc/PID/fd` identify it.
///
/// # Errors
/// If `socket` is not a socket.
pub fn inode_of(socket: &impl AsFd) -> io::Result<u32> {
    let inode = fstat(socket.as_fd())?.st_ino;
    // Inode numbers of sockets have 32 bits (`get_next_ino` in fs/inode.c).
    u32::try_from(inode).map_err(|_| io::ErrorKind::InvalidInput.into())
}

/// INET_DIAG_NOCOOKIE: matches any cookie.
const NO_COOKIE: [u8; 8] = [0xff; 8];

/// The length of struct nlmsghdr (netlink(7)).
const NETLINK_HEADER: usize = 16;

/// The answer about one TCP socket.
struct Found {
    header: InetResponseHeader,
    /// The time left on the timer that runs, in milliseconds.
    expires: u32,
}

/// The scope of a request.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Extent {
    /// One socket.
    Exact,
    /// All sockets that match.
    All,
}

fn none_if_not_found(asked: io::Result<()>) -> io::Result<()> {
    match asked {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        asked => asked,
    }
}

/// Repeats a call that a signal has interrupted.
fn retried<T>(mut call: impl FnMut() -> nix::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(Errno::EINTR) => {}
            result => return Ok(result?),
        }
    }
}

fn any(family: IpAddr) -> SocketId {
    if family.is_ipv4() { SocketId::new_v4() } else { SocketId::new_v6() }
}

#[cfg(test)]
mod tests {
    use std::{
        io::Write,
        net::{Shutdown, TcpListener, TcpStream},
        os::unix::net::{UnixListener, UnixStream},
        time::Instant,
    };

    use nix::unistd::getuid;
    use socket2::{Domain, SockAddr, Socket, Type};

    use super::*;
    use crate::net::options::TcpDeferAccept;

    #[test]
    fn a_connection_is_seen_from_accept_to_close() {
        let mut diag = Diag::open().unwrap();
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let listener = TcpListener::bind(address).unwrap();
            let address = listener.local_addr().unwrap();
            assert!(diag.accepted(address).unwrap().is_empty());
            let clients = [(); 2].map(|()| TcpStream::connect(address).unwrap());
            let of = |client: &TcpStream| client.local_addr().unwrap();
            assert!(diag.accepted(address).unwrap().is_empty(), "they wait");
            assert!(!diag.is_accepted(address, of(&clients[0])).unwrap());
            let waiting = diag.accepted_state(address, of(&clients[0])).unwrap().unwrap();
            assert_eq!((waiting.state, waiting.inode), (TcpState::Established, 0));
            let (accepted, peer) = listener.accept().unwrap();
            let inode = inode_of(&accepted).unwrap();
            assert_eq!(diag.accepted(address).unwrap(), HashSet::from([inode]));
            for client in &clients {
                assert_eq!(diag.is_accepted(address, of(client)).unwrap(), of(client) == peer);
            }
            let expected =
                Connection { state: TcpState::Established, inode, uid: getuid().as_raw() };
            assert_eq!(diag.accepted_state(address, peer).unwrap(), Some(expected));
            // Of each end it is known whose it is.
            let theirs = diag.inode(of(&clients[0]), address).unwrap();
            assert_eq!(theirs, Some(inode_of(&clients[0]).unwrap()));
            assert!(own_sockets().unwrap().contains(&inode_of(&clients[0]).unwrap()));
            drop(accepted);
            assert!(diag.accepted(address).unwrap().is_empty());
            assert!(!diag.is_accepted(address, peer).unwrap());
            // It is there until the client closes it too; on its way from FIN-WAIT-1 to FIN-WAIT-2.
            let closed = diag.accepted_state(address, peer).unwrap().unwrap();
            assert_ne!(closed.state, TcpState::Established);
            assert!(!closed.is_accepted());
            let other = "192.0.2.1:9".parse().unwrap();
            assert_eq!(diag.accepted_state(address, other).ok().flatten(), None);
            assert!(!diag.is_accepted(address, other).unwrap_or(false));
        }
    }

    #[test]
    fn a_shared_one_is_made_anew_after_an_error() {
        let diag = SharedDiag::default();
        diag.fail_once();
        let error = diag.ask(Diag::all_listeners).unwrap_err();
        assert!(!never_tells(&error), "{error}");
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let inode = inode_of(&listener).unwrap();
        assert_eq!(diag.ask(|diag| diag.listener(address)).unwrap(), Some(inode));
    }

    #[test]
    fn what_lacks_at_the_moment_is_told_from_what_never_is_there() {
        let tells = |errno: Errno| !never_tells(&io::Error::from(errno));
        for errno in [Errno::EMFILE, Errno::ENFILE, Errno::ENOBUFS, Errno::ENOMEM, Errno::EAGAIN] {
            assert!(tells(errno), "{errno}");
        }
        assert!(!never_tells(&io::ErrorKind::TimedOut.into()));
        let never = [Errno::EPROTONOSUPPORT, Errno::EAFNOSUPPORT, Errno::EPERM, Errno::EACCES];
        for errno in never.into_iter().chain([Errno::ENOENT]) {
            assert!(!tells(errno), "{errno}");
        }
    }

    #[test]
    fn more_than_one_datagram_of_them() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let held: Vec<_> = (0..700)
            .map(|_| (TcpStream::connect(address).unwrap(), listener.accept().unwrap()))
            .collect();
        let expected: HashSet<u32> =
            held.iter().map(|(_, (accepted, _))| inode_of(accepted).unwrap()).collect();
        assert_eq!(Diag::open().unwrap().accepted(address).unwrap(), expected);
    }

    /// With `TCP_DEFER_ACCEPT` a connection is no connection before its first byte, or its end.
    #[test]
    fn a_deferred_connection_is_seen_as_one_that_is_not_there_yet() {
        let mut diag = Diag::open().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        setsockopt(&listener, TcpDeferAccept, &30).unwrap();
        for ends in [false, true] {
            let mut client = TcpStream::connect(address).unwrap();
            let peer = client.local_addr().unwrap();
            let state = diag.accepted_state(address, peer).unwrap().unwrap();
            assert_eq!((state.state, state.inode), (TcpState::SynReceived, 0));
            if ends {
                client.shutdown(Shutdown::Write).unwrap();
            } else {
                client.write_all(b"x").unwrap();
            }
            let start = Instant::now();
            let (_accepted, from) = listener.accept().unwrap();
            assert_eq!(from, peer);
            assert!(start.elapsed() < Duration::from_secs(1));
            assert!(diag.is_accepted(address, peer).unwrap());
        }
    }

    #[test]
    fn who_listens_on_a_port() {
        let mut diag = Diag::open().unwrap();
        let v4 = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = v4.local_addr().unwrap().port();
        let v6 = Socket::new(Domain::IPV6, Type::STREAM, None).unwrap();
        v6.set_only_v6(true).unwrap();
        let address = SocketAddr::from((Ipv6Addr::LOCALHOST, port));
        v6.bind(&address.into()).unwrap();
        let of = |socket: &dyn AsFd, address| ListeningSocket {
            address,
            inode: inode_of(&socket.as_fd()).unwrap(),
            uid: getuid().as_raw(),
        };
        let first = of(&v4, v4.local_addr().unwrap());
        assert_eq!(diag.listeners(port).unwrap(), [first], "the other one does not listen yet");
        v6.listen(1).unwrap();
        // Connections at the port are not listeners.
        let _client = TcpStream::connect(v4.local_addr().unwrap()).unwrap();
        let _accepted = v4.accept().unwrap();
        assert_eq!(diag.listeners(port).unwrap(), [first, of(&v6, address)]);
        for listener in [first, of(&v6, address)] {
            assert_eq!(diag.listener(listener.address).unwrap(), Some(listener.inode));
        }
        let elsewhere = SocketAddr::from(([127, 0, 0, 2], port));
        assert_eq!(diag.listener(elsewhere).unwrap(), None);
        let all = diag.all_listeners().unwrap();
        assert!(all.contains(&first) && all.contains(&of(&v6, address)), "{all:?}");
        drop((v4, v6));
        assert_eq!(diag.listeners(port).unwrap(), []);
        let all = Socket::new(Domain::IPV6, Type::STREAM, None).unwrap();
        all.set_only_v6(false).unwrap();
        all.set_reuse_address(true).unwrap();
        all.bind(&SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)).into()).unwrap();
        all.listen(1).unwrap();
        // Those of IPv4 reach it under both of their names.
        for ip in ["127.0.0.1", "::1", "::ffff:127.0.0.1"] {
            let inode = diag.listener(SocketAddr::new(ip.parse().unwrap(), port)).unwrap();
            assert_eq!(inode, Some(inode_of(&all).unwrap()), "{ip}");
        }
    }

    #[test]
    fn a_unix_connection_is_seen_from_connect_to_accept() {
        let mut diag = Diag::open().unwrap();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let inode = inode_of(&listener).unwrap();
        assert!(diag.unix_pending(inode).unwrap().is_empty());
        let clients = [(); 2].map(|()| UnixStream::connect(&path).unwrap());
        let of = [0, 1].map(|index| inode_of(&clients[index]).unwrap());
        assert_eq!(diag.unix_pending(inode).unwrap(), HashSet::from(of));
        assert!(!diag.is_unix_accepted(of[0]).unwrap());
        let (accepted, _) = listener.accept().unwrap(); // in their order
        assert_eq!(diag.unix_pending(inode).unwrap(), HashSet::from([of[1]]));
        assert!(diag.is_unix_accepted(of[0]).unwrap());
        assert!(!diag.is_unix_accepted(of[1]).unwrap());
        drop(accepted);
        assert!(!diag.is_unix_accepted(of[0]).unwrap(), "it was closed");
        drop(clients);
        assert!(diag.unix_pending(inode).unwrap().is_empty(), "nobody waits any more");
        drop(listener);
        assert!(diag.unix_pending(inode).unwrap().is_empty());
        assert!(!diag.is_unix_accepted(of[1]).unwrap());
    }

    #[test]
    fn a_long_queue_of_a_unix_socket_is_told_whole() {
        let mut diag = Diag::open().unwrap();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let listener = Socket::new(Domain::UNIX, Type::STREAM, None).unwrap();
        listener.bind(&SockAddr::unix(&path).unwrap()).unwrap();
        listener.listen(super::super::BACKLOG).unwrap();
        let clients: Vec<_> = (0..800).map(|_| UnixStream::connect(&path).unwrap()).collect();
        let expected: HashSet<u32> =
            clients.iter().map(|client| inode_of(client).unwrap()).collect();
        assert_eq!(diag.unix_pending(inode_of(&listener).unwrap()).unwrap(), expected);
    }
}
