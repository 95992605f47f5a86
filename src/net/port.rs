//! One port, and the listening sockets of the workers that use it one after the other.

use std::{
    collections::VecDeque,
    io,
    net::{Shutdown, SocketAddr},
};

use socket2::Socket;

use super::{Acceptor, BACKLOG, Sharing, accept_all, bound, steer::Steering, unconnected};
use crate::config::{ProxyProtocol, WORKERS_ON_A_PORT};

/// How many source ports of probes are remembered, so that probes are not taken for clients'
/// connections.
const PROBES: usize = 32;

/// A port, and the listening sockets on it.
#[derive(Debug)]
pub struct Port<Owner> {
    address: SocketAddr,
    /// In the order of the kernel's `SO_REUSEPORT` group.
    members: Vec<Member<Owner>>,
    selected: usize,
    /// The source ports of the latest probes.
    probes: VecDeque<u16>,
}

#[derive(Debug)]
struct Member<Owner> {
    /// `None` if no process but lbd has the socket.
    owner: Option<Owner>,
    /// The worker that had the socket last has failed. It may have done anything to the socket, so
    /// no other worker gets it.
    spoilt: bool,
    proxy_protocol: Option<ProxyProtocol>,
    socket: Socket,
}

impl<Owner> Member<Owner> {
    /// Whether the socket can be given to another worker. Every worker that had it could change it,
    /// and the change outlives the worker: it could stop it from listening (shutdown(2), or
    /// connect(2) to `AF_UNSPEC`), or attach a filter and lock it (socket(7), `SO_LOCK_FILTER`).
    /// Here whatever can be repaired is repaired.
    fn is_sound(&self) -> bool {
        let mend = || {
            if !self.socket.is_listener()? {
                return Err(io::ErrorKind::NotConnected.into());
            }
            match self.socket.detach_filter() {
                // There was no filter.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                detached => detached?,
            }
            self.socket.set_nonblocking(false)?;
            self.socket.listen(BACKLOG)
        };
        !self.spoilt && mend().is_ok()
    }
}

/// A connection that was taken out of a worker's accept queue.
#[derive(Debug)]
pub struct DrainedConnection {
    /// The drained connection.
    pub socket: Socket,
    /// The PROXY header that lbd has sent on it, or is about to send.
    pub proxy_protocol: Option<ProxyProtocol>,
}

impl<Owner: Copy + PartialEq> Port<Owner> {
    /// Binds `wanted` (port 0: a free port) and listens, for `owner`. The owner is selected, and
    /// expects this PROXY header.
    ///
    /// # Errors
    /// `AddrInUse` if any other socket is on that port already.
    pub fn open(
        wanted: SocketAddr,
        owner: Owner,
        proxy_protocol: Option<ProxyProtocol>,
    ) -> io::Result<Self> {
        let socket = bound(wanted, Sharing::NotYet)?;
        // Only after the bind: a bind with SO_REUSEPORT would share the port with any program of
        // the same user.
        socket.set_reuse_port(true)?;
        socket.listen(BACKLOG)?;
        let address = socket.local_addr()?.as_socket().unwrap_or(wanted);
        let members = vec![Member { owner: Some(owner), spoilt: false, proxy_protocol, socket }];
        let port = Self { address, members, selected: 0, probes: VecDeque::new() };
        port.steer(None)?;
        Ok(port)
    }

    /// The address of the port.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The socket of `owner`.
    #[must_use]
    pub fn socket(&self, owner: Owner) -> Option<&Socket> {
        self.position(owner).map(|index| &self.members[index].socket)
    }

    /// Gives `owner` a socket. If there is a socket that no process has, that is sound and that a
    /// worker with the same PROXY header had, `owner` takes it over with its accept queue.
    /// Otherwise it gets a new socket, beside that of the worker that it is to replace. Connections
    /// in a socket that is not taken over are returned by
    /// [`collect_leftovers`](Self::collect_leftovers).
    ///
    /// # Errors
    /// If the system refuses it, or two workers are on the port already.
    pub fn join(&mut self, owner: Owner, proxy_protocol: Option<ProxyProtocol>) -> io::Result<()> {
        let fits = |member: &&mut Member<Owner>| {
            member.owner.is_none() && member.proxy_protocol == proxy_protocol && member.is_sound()
        };
        if let Some(orphan) = self.members.iter_mut().find(fits) {
            orphan.owner = Some(owner);
            return Ok(());
        }
        // With at most two sockets, whichever leaves, the program's answer is right for the other
        // one before and after.
        if self.members.len() == WORKERS_ON_A_PORT {
            return Err(io::Error::other("two workers are on this port already"));
        }
        let socket = bound(self.address, Sharing::Now)?;
        socket.listen(BACKLOG)?;
        self.members.push(Member { owner: Some(owner), spoilt: false, proxy_protocol, socket });
        Ok(())
    }

    /// The owner that new connections go to; `None` if no process has the selected socket.
    #[must_use]
    pub fn selected(&self) -> Option<Owner> {
        self.members[self.selected].owner
    }

    /// New connections go to `owner` from now on.
    ///
    /// # Errors
    /// If the system refuses the program; then new connections go where they went before.
    pub fn select(&mut self, owner: Owner) -> io::Result<()> {
        let Some(index) = self.position(owner).filter(|index| *index != self.selected) else {
            return Ok(());
        };
        let before = std::mem::replace(&mut self.selected, index);
        self.steer(None).inspect_err(|_| self.selected = before)
    }

    /// Creates a socket for a probe, not yet connected. Its connection reaches `owner` even if
    /// another worker is selected. It is valid until the next call of this method or of
    /// [`Self::select`].
    ///
    /// # Errors
    /// If no descriptor or no port is left.
    pub fn way_to(&mut self, owner: Owner) -> io::Result<Socket> {
        let socket = unconnected(self.address)?;
        socket.bind(&SocketAddr::new(self.address.ip(), 0).into())?;
        let source = socket.local_addr()?.as_socket().map_or(0, |local| local.port());
        self.probes.truncate(PROBES - 1);
        self.probes.push_front(source);
        // If the worker is alone on the port, every answer of the program leads to it. If not, the
        // program is attached again each time: the workers have access to the group too, and could
        // have detached or replaced it.
        if let Some(index) = self.position(owner).filter(|_| self.members.len() > 1) {
            self.steer(Some((source, index as u32)))?;
        }
        Ok(socket)
    }

    /// Says that no process but lbd has the socket of `owner` any more. If the owner has `failed`
    /// without ever being healthy, its socket is not given to another worker.
    pub fn abandon(&mut self, owner: Owner, failed: bool) {
        if let Some(index) = self.position(owner) {
            self.members[index].owner = None;
            self.members[index].spoilt = failed;
        }
    }

    /// Whether a worker is on the port.
    #[must_use]
    pub fn is_owned(&self) -> bool {
        self.members.iter().any(|member| member.owner.is_some())
    }

    /// Whether there is a socket that no worker has.
    #[must_use]
    pub fn has_leftovers(&self) -> bool {
        self.members.iter().any(|member| member.owner.is_none())
    }

    /// Drains the accept queue of `owner`, which may go on accepting meanwhile; with `None`, those
    /// of sockets that no worker has.
    pub fn drain_queue(
        &self,
        owner: Option<Owner>,
        acceptor: &mut Acceptor,
    ) -> Vec<DrainedConnection> {
        let chosen = self.members.iter().filter(|member| member.owner == owner);
        chosen.flat_map(|member| self.clients(member, acceptor)).collect()
    }

    /// Closes the sockets that no worker has, if there is a worker on the port, or if there are two
    /// such sockets that expect different PROXY headers, so that no worker could take over both.
    /// Returns the connections that were still queued in them.
    pub fn collect_leftovers(&mut self, acceptor: &mut Acceptor) -> Vec<DrainedConnection> {
        let first = self.members[0].proxy_protocol;
        let is_mixed = self.members.iter().any(|member| member.proxy_protocol != first);
        let mut drained = Vec::new();
        while (self.is_owned() || is_mixed && self.members.len() > 1)
            && let Some(index) = self.members.iter().position(|member| member.owner.is_none())
        {
            if self.selected == index {
                self.selected = usize::from(index == 0);
                if self.steer(None).is_err() {
                    break; // nothing is lost: it is tried again with the next change
                }
            }
            drained.extend(self.clients(&self.members[index], acceptor));
            if acceptor.is_short() {
                break; // somebody may wait there still
            }
            // The kernel also moves the last one to the freed index. The program's answer stays
            // right meanwhile: it is 0, or out of range, and then the kernel chooses the only
            // socket left.
            let left = self.members.swap_remove(index);
            // A close is not enough: a child that was just forked has a copy of the socket until
            // its execve, and until then the socket would stay in the kernel's group.
            let _ = left.socket.shutdown(Shutdown::Read);
            self.selected = 0;
            let _ = self.steer(None);
        }
        drained
    }

    /// Drains a queue, and drops lbd's own probes: if another worker answered a probe, that would
    /// be taken for the answer of the worker that was meant.
    fn clients(&self, member: &Member<Owner>, acceptor: &mut Acceptor) -> Vec<DrainedConnection> {
        let mut waiting = accept_all(&member.socket, acceptor);
        waiting.retain(|connection| {
            let peer = connection.peer_addr().ok().and_then(|peer| peer.as_socket());
            peer.is_none_or(|peer| !self.probes.contains(&peer.port()))
        });
        let proxy_protocol = member.proxy_protocol;
        waiting.into_iter().map(|socket| DrainedConnection { socket, proxy_protocol }).collect()
    }

    fn position(&self, owner: Owner) -> Option<usize> {
        self.members.iter().position(|member| member.owner == Some(owner))
    }

    fn steer(&self, exception: Option<(u16, u32)>) -> io::Result<()> {
        let steering = Steering { default: self.selected as u32, exception };
        let ip = self.address.ip();
        // The program can be attached to the group through any of its sockets, unless its worker
        // has locked it (socket(7), `SO_LOCK_FILTER`) or stopped it from listening. The newest
        // socket is the least likely to be spoilt in such a way.
        let mut attached = Err(io::ErrorKind::NotFound.into());
        for member in self.members.iter().rev() {
            attached = steering.attach(&member.socket, ip);
            if attached.is_ok() {
                break;
            }
        }
        attached
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, Write},
        net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpStream},
        os::fd::AsRawFd,
    };

    use nix::sys::socket::setsockopt;

    use super::*;
    use crate::net::{free, options::LockFilter};

    const V4: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);
    const V6: SocketAddr = SocketAddr::new(IpAddr::V6(Ipv6Addr::LOCALHOST), 0);

    /// How many connections wait in the socket of each owner; they are taken out.
    fn waiting<const N: usize>(port: &Port<u8>, owners: [u8; N]) -> [usize; N] {
        owners.map(|owner| {
            let socket = port.socket(owner).unwrap();
            accept_all(socket, &mut Acceptor::new().unwrap()).len()
        })
    }

    fn connect(port: &Port<u8>, times: usize) -> Vec<TcpStream> {
        (0..times).map(|_| TcpStream::connect(port.address()).unwrap()).collect()
    }

    #[test]
    fn only_the_selected_one_is_reached_but_by_a_probe_meant_for_another() {
        for address in [V4, V6] {
            let mut port = Port::open(address, 1, None).unwrap();
            port.join(2, None).unwrap();
            let _clients = connect(&port, 50);
            assert_eq!(waiting(&port, [1, 2]), [50, 0], "{address}");
            for _ in 0..20 {
                let probe = port.way_to(2).unwrap();
                probe.set_nonblocking(false).unwrap();
                probe.connect(&port.address().into()).unwrap();
                let _clients = connect(&port, 1);
                assert_eq!(waiting(&port, [1, 2]), [1, 1], "{address}");
            }
            port.select(2).unwrap();
            let _clients = connect(&port, 50);
            assert_eq!(waiting(&port, [1, 2]), [0, 50], "{address}");
        }
    }

    #[test]
    fn whichever_of_two_leaves_the_other_gets_everything() {
        for (leaver, stayer) in [(1, 2), (2, 1)] {
            for selected in [1, 2] {
                let mut port = Port::open(V4, 1, None).unwrap();
                port.join(2, None).unwrap();
                port.select(selected).unwrap();
                port.abandon(leaver, false);
                assert_eq!(port.collect_leftovers(&mut Acceptor::new().unwrap()).len(), 0);
                let _clients = connect(&port, 50);
                assert_eq!(waiting(&port, [stayer]), [50], "{leaver} left, {selected} selected");
                port.join(3, None).unwrap();
                let _clients = connect(&port, 50);
                assert_eq!(waiting(&port, [stayer, 3]), [50, 0], "and a third joined");
                port.select(3).unwrap();
                let _clients = connect(&port, 50);
                assert_eq!(waiting(&port, [stayer, 3]), [0, 50], "and was selected");
            }
        }
    }

    #[test]
    fn one_that_leaves_gets_nothing_even_if_a_child_has_a_copy_still() {
        for (leaver, stayer) in [(1, 2), (2, 1)] {
            let mut port = Port::open(V4, 1, None).unwrap();
            port.join(2, None).unwrap();
            port.select(stayer).unwrap();
            let _copy = port.socket(leaver).unwrap().try_clone().unwrap();
            port.abandon(leaver, false);
            port.collect_leftovers(&mut Acceptor::new().unwrap());
            let _clients = connect(&port, 50);
            assert_eq!(waiting(&port, [stayer]), [50], "{leaver} left");
        }
    }

    #[test]
    fn what_waits_is_rescued_with_every_byte() {
        let mut port = Port::open(V4, 1, None).unwrap();
        let mut clients = connect(&port, 3);
        for client in &mut clients {
            client.write_all(b"hello").unwrap();
        }
        assert_eq!(port.drain_queue(None, &mut Acceptor::new().unwrap()).len(), 0);
        port.join(2, None).unwrap();
        port.select(2).unwrap();
        port.abandon(1, false);
        let drained = port.collect_leftovers(&mut Acceptor::new().unwrap());
        assert_eq!(drained.len(), 3);
        for (DrainedConnection { socket: mut drained, .. }, client) in
            drained.into_iter().zip(&mut clients)
        {
            let mut hello = [0; 5];
            drained.read_exact(&mut hello).unwrap();
            assert_eq!(&hello, b"hello");
            drained.write_all(b"world").unwrap();
            client.read_exact(&mut hello).unwrap();
            assert_eq!(&hello, b"world");
        }
    }

    #[test]
    fn a_probe_that_waits_is_not_rescued() {
        let mut port = Port::open(V4, 1, None).unwrap();
        let probes = [(); 3].map(|()| {
            let probe = port.way_to(1).unwrap();
            probe.set_nonblocking(false).unwrap();
            probe.connect(&port.address().into()).unwrap();
            probe
        });
        let _clients = connect(&port, 2);
        assert_eq!(port.drain_queue(Some(1), &mut Acceptor::new().unwrap()).len(), 2);
        let mut byte = [0];
        for mut probe in probes {
            assert_eq!(probe.read(&mut byte).unwrap(), 0, "it is closed");
        }
    }

    #[test]
    fn a_successor_takes_the_socket_over_with_what_waits_in_it() {
        let mut port = Port::open(V4, 1, None).unwrap();
        let _clients = connect(&port, 3);
        port.abandon(1, false);
        assert!(!port.is_owned());
        assert_eq!(
            port.collect_leftovers(&mut Acceptor::new().unwrap()).len(),
            0,
            "the last socket stays"
        );
        port.join(2, None).unwrap();
        assert_eq!(waiting(&port, [2]), [3]);
    }

    #[test]
    fn what_waits_is_not_for_a_successor_that_expects_another_header() {
        let (v1, v2) = (Some(ProxyProtocol::V1), Some(ProxyProtocol::V2));
        let acceptor = &mut Acceptor::new().unwrap();
        let mut port = Port::open(V4, 1, v1).unwrap();
        let _clients = connect(&port, 3);
        port.abandon(1, false);
        assert_eq!(port.selected(), None);
        port.join(2, v2).unwrap();
        let drained = port.collect_leftovers(acceptor);
        assert_eq!(drained.len(), 3);
        assert!(drained.iter().all(|drained| drained.proxy_protocol == v1));
        assert_eq!(waiting(&port, [2]), [0]);
        assert_eq!(port.selected(), Some(2));

        // Both of two die, and neither's socket is for the one that comes.
        port.join(3, v1).unwrap();
        port.abandon(2, false);
        port.abandon(3, false);
        let _clients = connect(&port, 3);
        let drained = port.collect_leftovers(acceptor).len();
        port.join(4, None).unwrap();
        assert_eq!(drained + port.collect_leftovers(acceptor).len(), 3);
        let _clients = connect(&port, 3);
        assert_eq!(waiting(&port, [4]), [3]);
    }

    #[test]
    fn a_taken_port_is_refused_whoever_has_it() {
        let port = Port::open(V4, 1, None).unwrap();
        let taken = |result: io::Result<_>| result.unwrap_err().kind() == io::ErrorKind::AddrInUse;
        assert!(taken(Port::open(port.address(), 2, None).map(drop)));
        assert!(taken(free(port.address()).map(drop)));
        let third = Port::open(V4, 1, None).unwrap();
        assert_ne!(third.address(), port.address());
    }

    #[test]
    fn the_sockets_stay_blocking() {
        let mut port = Port::open(V4, 1, None).unwrap();
        port.join(2, None).unwrap();
        port.drain_queue(Some(1), &mut Acceptor::new().unwrap());
        assert!(!port.socket(1).unwrap().nonblocking().unwrap());
        assert!(!port.socket(2).unwrap().nonblocking().unwrap());
    }

    #[test]
    fn two_are_the_most() {
        let mut port = Port::open(V4, 1, None).unwrap();
        port.join(2, None).unwrap();
        assert!(port.join(3, None).is_err());
    }

    /// Nobody is lost who waits in it, and nobody gets it.
    #[test]
    fn a_socket_that_was_spoilt_is_nobodys_again() {
        type Spoil = fn(&Socket);
        let shut: Spoil = |socket| socket.shutdown(Shutdown::Both).unwrap();
        let dissolve: Spoil = |socket| {
            let unspecified = [0_u8; 16]; // AF_UNSPEC is 0
            // SAFETY: the kernel reads 16 bytes, as many as there are.
            let result =
                unsafe { nix::libc::connect(socket.as_raw_fd(), unspecified.as_ptr().cast(), 16) };
            assert_eq!(result, 0);
        };
        let lock: Spoil = |socket| {
            let drop_all = [socket2::SockFilter::new(nix::libc::BPF_RET as u16, 0, 0, 0)];
            socket.attach_filter(&drop_all).unwrap();
            setsockopt(socket, LockFilter, &true).unwrap();
        };
        let fail: Spoil = |_| {};
        for (name, spoil, waits) in [
            ("shut", shut, 0),
            ("dissolved", dissolve, 0),
            ("locked", lock, 2),
            ("failed", fail, 2),
        ] {
            let mut port = Port::open(V4, 1, None).unwrap();
            let _clients = connect(&port, 2);
            let copy = port.socket(1).unwrap().try_clone().unwrap();
            spoil(&copy);
            port.abandon(1, std::ptr::fn_addr_eq(spoil, fail));
            port.join(2, None).unwrap();
            let inode = |socket: &Socket| crate::net::diag::inode_of(socket).unwrap();
            assert_ne!(inode(port.socket(2).unwrap()), inode(&copy));
            let drained = port.collect_leftovers(&mut Acceptor::new().unwrap());
            assert_eq!(drained.len(), waits, "{name}");
            assert_eq!(port.selected(), Some(2));
            let _clients = connect(&port, 20);
            assert_eq!(waiting(&port, [2]), [20]);
            port.abandon(2, false);
            port.join(3, None).unwrap();
            let _clients = connect(&port, 20);
            assert_eq!(waiting(&port, [3]), [20], "and it goes on as ever");
        }
    }

    #[test]
    fn a_successor_finds_the_socket_as_it_was_made() {
        let mut port = Port::open(V4, 1, None).unwrap();
        let socket = port.socket(1).unwrap();
        socket.set_nonblocking(true).unwrap();
        socket.listen(0).unwrap();
        port.abandon(1, false);
        port.join(2, None).unwrap();
        assert!(!port.socket(2).unwrap().nonblocking().unwrap());
        let _clients = connect(&port, 50);
        assert_eq!(waiting(&port, [2]), [50]);
    }

    #[test]
    fn a_program_that_was_taken_off_is_put_on_again() {
        let mut port = Port::open(V4, 1, None).unwrap();
        port.join(2, None).unwrap();
        port.select(2).unwrap();
        let other = Steering { default: 0, exception: None };
        other.attach(port.socket(1).unwrap(), port.address().ip()).unwrap();
        let _clients = connect(&port, 20);
        assert_eq!(waiting(&port, [1, 2]), [20, 0]);
        let _probe = port.way_to(2).unwrap();
        let _clients = connect(&port, 20);
        assert_eq!(waiting(&port, [1, 2]), [0, 20]);
    }
}
