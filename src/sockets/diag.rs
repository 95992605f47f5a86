//! What the kernel knows of connections that lbd does not have: sock_diag(7), over netlink.

use std::{
    collections::HashSet,
    io,
    net::{IpAddr, SocketAddr},
    os::fd::{AsRawFd, OwnedFd},
    time::Duration,
};

use netlink_packet_core::{
    NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_sock_diag::{
    SockDiagMessage,
    constants::{AF_INET, AF_INET6, IPPROTO_TCP, TCP_LISTEN},
    inet::{ExtensionFlags, InetRequest, InetResponse, SocketId, StateFlags},
};
use nix::sys::{
    socket::{
        AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, setsockopt, socket,
        sockopt::ReceiveTimeout,
    },
    time::{TimeVal, TimeValLike},
};

/// Larger than what the kernel puts in one datagram (`NLMSG_GOODSIZE`, and 32 KiB for a dump).
const DATAGRAM: usize = 64 * 1024;

/// The kernel answers within the call that asks. If ever it doesn't, nothing shall hang.
const PATIENCE: Duration = Duration::from_secs(1);

/// Asks the kernel about sockets.
#[derive(Debug)]
pub struct Diag {
    socket: OwnedFd,
    buffer: Box<[u8]>,
}

impl Diag {
    /// # Errors
    /// Where netlink is forbidden, or the kernel has no sock_diag.
    pub fn open() -> io::Result<Self> {
        let protocol = SockProtocol::NetlinkSockDiag;
        let socket =
            socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol)?;
        let patience = TimeVal::milliseconds(PATIENCE.as_millis() as i64);
        setsockopt(&socket, ReceiveTimeout, &patience)?;
        Ok(Self { socket, buffer: vec![0; DATAGRAM].into() })
    }

    /// The inodes of the connections that were accepted at `address` or any other with its port and
    /// family, and that some process still has.
    ///
    /// # Errors
    /// Where the kernel does not tell.
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
        self.ask(id, states, NLM_F_DUMP, |found| {
            // One that waits to be accepted, or was closed by its process, has none.
            inodes.extend(Some(found.header.inode).filter(|inode| *inode != 0));
        })?;
        Ok(inodes)
    }

    /// Whether somebody has accepted the connection from `client` to `server`. False also where
    /// there is none (any more).
    ///
    /// # Errors
    /// Where the kernel does not tell.
    pub fn is_accepted(&mut self, server: SocketAddr, client: SocketAddr) -> io::Result<bool> {
        self.inode(server, client).map(|inode| inode.is_some())
    }

    /// The inode of the socket at `local` that is connected to `remote`; `None` where there is none,
    /// or no process has it (yet, or any more).
    ///
    /// # Errors
    /// Where the kernel does not tell.
    pub fn inode(&mut self, local: SocketAddr, remote: SocketAddr) -> io::Result<Option<u32>> {
        let id = SocketId {
            source_port: local.port(),
            destination_port: remote.port(),
            source_address: local.ip(),
            destination_address: remote.ip(),
            interface_id: 0,
            // INET_DIAG_NOCOOKIE: whichever it is.
            cookie: [0xff; 8],
        };
        let mut inode = None;
        let answer = |found: InetResponse| {
            // Where there is no such connection, the kernel finds who listens.
            let is_it = found.header.inode != 0 && found.header.state != TCP_LISTEN;
            inode = is_it.then_some(found.header.inode);
        };
        match self.ask(id, StateFlags::all(), 0, answer) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            asked => asked.map(|()| inode),
        }
    }

    fn ask(
        &mut self,
        id: SocketId,
        states: StateFlags,
        flags: u16,
        mut answer: impl FnMut(InetResponse),
    ) -> io::Result<()> {
        let family = if id.source_address.is_ipv4() { AF_INET } else { AF_INET6 };
        let extensions = ExtensionFlags::empty();
        let request =
            InetRequest { family, protocol: IPPROTO_TCP, extensions, states, socket_id: id };
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | flags;
        let mut message = NetlinkMessage::new(header, SockDiagMessage::InetRequest(request).into());
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        send(self.socket.as_raw_fd(), &bytes, MsgFlags::empty())?;
        loop {
            let length = recv(self.socket.as_raw_fd(), &mut self.buffer, MsgFlags::empty())?;
            let mut rest = &self.buffer[..length];
            while !rest.is_empty() {
                let message = NetlinkMessage::<SockDiagMessage>::deserialize(rest)
                    .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
                // Each is padded to a multiple of four (netlink(7), NLMSG_ALIGN).
                let taken = (message.header.length as usize).next_multiple_of(4);
                rest = rest.get(taken.max(4)..).unwrap_or_default();
                match message.payload {
                    NetlinkPayload::InnerMessage(SockDiagMessage::InetResponse(found)) => {
                        answer(*found);
                        if flags & NLM_F_DUMP == 0 {
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

/// The inodes of all sockets that this process has (proc_pid_fd(5)).
///
/// # Errors
/// Where `/proc` can't be read.
pub fn own_sockets() -> io::Result<HashSet<u32>> {
    let mut inodes = HashSet::new();
    for entry in std::fs::read_dir("/proc/self/fd")? {
        // One that was closed meanwhile is none of them.
        let Ok(target) = std::fs::read_link(entry?.path()) else { continue };
        let inode: Option<u32> = target
            .to_str()
            .and_then(|target| target.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok());
        inodes.extend(inode);
    }
    Ok(inodes)
}

fn any(family: IpAddr) -> SocketId {
    if family.is_ipv4() { SocketId::new_v4() } else { SocketId::new_v6() }
}

#[cfg(test)]
mod tests {
    use std::{
        net::{TcpListener, TcpStream},
        os::{fd::AsFd, unix::fs::MetadataExt},
    };

    use super::*;

    fn inode(socket: &impl AsFd) -> u32 {
        let copy = std::fs::File::from(socket.as_fd().try_clone_to_owned().unwrap());
        u32::try_from(copy.metadata().unwrap().ino()).unwrap()
    }

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
            let (accepted, peer) = listener.accept().unwrap();
            assert_eq!(diag.accepted(address).unwrap(), HashSet::from([inode(&accepted)]));
            for client in &clients {
                assert_eq!(diag.is_accepted(address, of(client)).unwrap(), of(client) == peer);
            }
            // Of each end it is known whose it is.
            let theirs = diag.inode(of(&clients[0]), address).unwrap();
            assert_eq!(theirs, Some(inode(&clients[0])));
            assert!(own_sockets().unwrap().contains(&inode(&clients[0])));
            drop(accepted);
            assert!(diag.accepted(address).unwrap().is_empty());
            assert!(!diag.is_accepted(address, peer).unwrap());
            assert!(!diag.is_accepted(address, "192.0.2.1:9".parse().unwrap()).unwrap_or(false));
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
            held.iter().map(|(_, (accepted, _))| inode(accepted)).collect();
        assert_eq!(Diag::open().unwrap().accepted(address).unwrap(), expected);
    }
}
